"""What every command's parser shares: one line for a mistake, numbers as people write them."""

import argparse
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from analysis.text import printable
from models.errors import did_you_mean
from scaling.exit_codes import BAD_INPUT


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest name, and exit code 2."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split()[0]
            known = [o for a in self._actions for o in a.option_strings if o.startswith("--")]
            message = f"unknown option {wrong}{did_you_mean(wrong.split('=')[0], known)}; see {self.prog} --help"
        fail(message)


def fail(message: str) -> None:
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    raise SystemExit(BAD_INPUT)


def command(name: str, example: str, description: str) -> Parser:
    return Parser(
        prog=f"scaling {name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def whole(text: str) -> int:
    """A whole number, also written as 2e6."""
    value = number(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def yes_or_no(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def reader(kind: Any) -> Callable[[str], Any]:
    """What reads a value of an annotation: "none" where it may be None, a tuple with commas between its parts."""
    inner = typing.get_args(kind)
    if types.NoneType in inner:
        (other,) = (option for option in inner if option is not types.NoneType)
        return lambda text: None if text == "none" else reader(other)(text)
    if typing.get_origin(kind) is tuple:
        return lambda text: tuple(reader(inner[0])(part) for part in text.split(",") if part)
    return {bool: yes_or_no, int: whole, float: number}.get(kind, str)


def metavar(kind: Any) -> str:
    inner = [option for option in typing.get_args(kind) if option not in (types.NoneType, Ellipsis)]
    return f"{metavar(inner[0])},..." if typing.get_origin(kind) is tuple else (inner[0] if inner else kind).__name__


def as_text(value: Any) -> str:
    """A value as `reader` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value))
    return "none" if value is None else str(value)


def positive(name: str, value: float) -> None:
    if not 0 < value <= 1e40:
        fail(f"{name} {value:g}: expected a number above 0, and below 1e40")


def add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint-seconds", type=number, default=120.0, help="least time between two checkpoints")
    parser.add_argument("--eval-every", type=whole, default=0, help="tokens between validations; 0: only at the end")
    parser.add_argument("--track", default="", help="tensorboard, wandb, or both with a comma")
