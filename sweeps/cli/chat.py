"""The command to talk to trained models: chat, as a page or in the terminal."""

import random
import sys
from pathlib import Path

from models.errors import InputError, did_you_mean
from sweeps.cli.parse import command, fail, whole
from sweeps.cli.sample import SAMPLING, add_sampling, shown

PORT = 8765
COMMANDS = {
    "/temperature T": "logits are divided by it",
    "/colour": "colour tokens by their log-probability, or stop doing so",
    "/next": "what the model held likely after your last line",
    "/quit": "leave (also Ctrl-D)",
}


def cmd_chat(argv: list[str]) -> int:
    parser = command(
        "chat",
        "scaling chat runs/mine runs/finetuned",
        "Talk to a finished run's model, or to two side by side, on a page of this machine or in the terminal. Each "
        "question stands alone.",
    )
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+", help="folder of a finished run; at most two")
    parser.add_argument("--terminal", action="store_true", help="talk here; the options of `scaling sample` hold")
    parser.add_argument(
        "--template", metavar="TEXT", help="what the model continues, {prompt} in it (default: the run's)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=whole, default=PORT, help=f"0: any that is free (default: {PORT})")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="also answer to this name")
    add_sampling(parser, seed=None)
    args = parser.parse_args(argv)
    if len(args.runs) > 2:
        fail(f"{len(args.runs)} runs: at most two are shown side by side")
    if args.stop:
        fail("--stop: an answer ends with its text; scaling sample takes stops")
    if not args.terminal:
        changed = [name for name in SAMPLING if getattr(args, name) != parser.get_default(name)]
        if changed or args.template is not None:
            fail(
                f"--{(changed or ['template'])[0].replace('_', '-')}: for --terminal; the page has settings of its own"
            )
        try:
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            fail(f"{error.name} is missing; install it with: pip install starlette uvicorn, or talk with --terminal")

    from scaling.engine.runtime import set_up_jax

    set_up_jax()
    from scaling.load import check_writes, load

    models = [load(run) for run in args.runs]
    for model in models:
        check_writes(model)
    names = [run.resolve().name for run in args.runs]
    if args.terminal:
        return talk(models, names, args)
    from scaling.chat.server import serve

    def ready(url: str) -> None:
        print(f"talk to {' and '.join(map(shown, names))} at {url} (Ctrl-C ends it)", flush=True)

    serve(models, names, args.host, args.port, args.allow_host, ready)
    print("ended")
    return 0


def talk(models, names, args) -> int:
    """Lines from the standard input, answers as they are written."""
    from scaling.chat.talk import Question, template_of

    template, settings = args.template, {name: getattr(args, name) for name in SAMPLING if name not in ("stop", "seed")}
    Question("", template or template_of(models[-1]), **settings)  # what is wrong is said before anything is asked
    coloured, asked = False, None
    print(f"{' and '.join(map(shown, names))}; /help lists commands")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return 0
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return 0
            elif word == "/help":
                print("\n".join(f"{name:16s} {text}" for name, text in COMMANDS.items()))
            elif word == "/colour":
                coloured = not coloured
                print(f"colour is {'on' if coloured else 'off'}")
            elif word == "/temperature":
                changed = settings | {"temperature": float(rest)}
                Question("", template or template_of(models[-1]), **changed)
                settings = changed
            elif word == "/next":
                if asked is not None:
                    show_next(models, names, asked)
            elif word.startswith("/"):
                known = [name.split()[0] for name in COMMANDS]
                print(f"error: unknown command {shown(word)!r}{did_you_mean(word, known)}; /help lists them")
            else:
                seed = random.randrange(2**32) if args.seed is None else args.seed
                asked = Question(line, template or template_of(models[-1]), seed=seed, **settings)
                answer(models, names, asked, coloured)
        except (InputError, ValueError) as error:
            print(f"error: {shown(str(error))}", file=sys.stderr)


def answer(models, names, question, coloured: bool) -> None:
    from scaling.chat.talk import End, prompt_of, write

    for name, model in zip(names, models, strict=True):
        if len(models) > 1:
            print(f"{shown(name)}:")
        for piece in write(model, prompt_of(model, question), question):
            if isinstance(piece, End):
                continue
            text = shown(piece.text)
            if coloured:
                text = f"\x1b[48;5;{shade(piece.logprob / len(piece.ids))}m{text}\x1b[0m"
            print(text, end="", flush=True)
        print()


def shade(logprob: float) -> int:
    """A colour of 256: green where the model was sure, red from 8 nats on."""
    return (22, 28, 64, 100, 136, 130, 124, 88, 52)[min(8, int(-logprob))]


def show_next(models, names, question) -> None:
    from scaling.chat.talk import likely, prompt_of

    for name, model in zip(names, models, strict=True):
        if len(models) > 1:
            print(f"{shown(name)}:")
        for token in likely(model, prompt_of(model, question))[:10]:
            print(f"{100 * token['p']:6.1f} %  {shown(token['name'])}")
