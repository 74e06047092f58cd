"""The walk over dataclasses, on parts that RunConfig does not have yet: nested added ones, tuples, None, unions."""

import argparse
from dataclasses import dataclass, field

import pytest

from models.config import ADDED
from models.errors import InputError
from scaling.fields import from_plain, leaves, parts, replaced, to_plain, value_at
from sweeps.cli.parse import as_text, metavar, reader


@dataclass(frozen=True)
class Deep:
    rank: int = 4
    alpha: float = field(default=1.0, metadata=ADDED)


@dataclass(frozen=True)
class Part:
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    deep: Deep = field(default_factory=Deep, metadata=ADDED)


@dataclass(frozen=True)
class Whole:
    width: int = 8
    scale: float = 1.0
    on: bool = False
    limit: int | None = None
    part: Part = field(default_factory=Part, metadata=ADDED)
    parent: Deep | None = field(default=None, metadata=ADDED)


OLD = {"width": 8, "scale": 1.0, "on": False, "limit": None}  # as written before `part` and `parent` were added
WHOLES = {
    "old": (Whole(), OLD),
    "part": (Whole(part=Part(names=("a", "b"))), OLD | {"part": {"names": ["a", "b"], "pair": [1, 2.0]}}),
    "deep": (
        Whole(part=Part(deep=Deep(rank=8))),
        OLD | {"part": {"names": [], "pair": [1, 2.0], "deep": {"rank": 8}}},
    ),
    "deepest": (
        Whole(part=Part(deep=Deep(alpha=0.5))),
        OLD | {"part": {"names": [], "pair": [1, 2.0], "deep": {"rank": 4, "alpha": 0.5}}},
    ),
    "none": (Whole(limit=3, parent=Deep()), OLD | {"limit": 3, "parent": {"rank": 4}}),
}


@pytest.mark.parametrize("name", WHOLES)
def test_what_is_added_is_absent_while_it_is_the_default(name):
    """If this fails, a part that is added gives every earlier run another id, or its config.json is not read."""
    whole, plain = WHOLES[name]
    assert to_plain(whole) == plain
    assert from_plain(Whole, plain) == whole


def test_a_field_within_an_added_part_may_be_added_later():
    """A config.json from when `part` was there and `deep` was not."""
    assert from_plain(Whole, OLD | {"part": {"names": [], "pair": [1, 2]}}) == Whole()
    with pytest.raises(InputError, match="part lacks pair"):
        from_plain(Whole, OLD | {"part": {"names": []}})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("width", "8", "width = '8': expected a whole number"),
        ("width", True, "width = True: expected a whole number"),
        ("width", 8.5, "width = 8.5: expected a whole number"),
        ("scale", float("nan"), "scale = nan: expected a finite number"),
        ("scale", 10**400, "expected a finite number"),
        ("on", 1, "on = 1: expected true or false"),
        ("limit", "many", "limit = 'many': expected a whole number or null"),
        ("part", [], r"part = \[\]: expected an object"),
        ("part", {"names": "ab", "pair": [1, 2]}, "part.names = 'ab': expected a list"),
        ("part", {"names": [1], "pair": [1, 2]}, r"part.names\[0\] = 1: expected a string"),
        ("part", {"names": [], "pair": [1, 2, 3]}, "part.pair = .*: expected a list"),
        ("part", {"names": [], "pair": [1, 2], "deep": {"rnak": 1}}, "part.deep has no field 'rnak', did you mean"),
        ("widht", 3, "the run has no field 'widht', did you mean 'width'"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(path, value, message):
    with pytest.raises(InputError, match=message):
        from_plain(Whole, OLD | {path: value})


def test_whole_floats_are_ints_and_ints_are_floats():
    whole = from_plain(Whole, OLD | {"width": 16.0, "scale": 2, "limit": 3.0})
    assert [type(v) for v in (whole.width, whole.scale, whole.limit)] == [int, float, int]


def test_paths_reach_every_depth():
    assert list(leaves(Whole)) == [
        "width", "scale", "on", "limit", "part.names", "part.pair", "part.deep.rank", "part.deep.alpha", "parent.rank",
        "parent.alpha",
    ]  # fmt: skip
    assert list(parts(Whole)) == ["part", "part.deep", "parent"]
    assert value_at(Whole(part=Part(deep=Deep(rank=9))), "part.deep.rank") == 9
    assert value_at(Whole(), "parent.rank") is None


def test_fields_are_replaced_all_at_once_at_every_depth():
    changes = {"width": 1, "part.names": ("x",), "part.deep.rank": 2, "part.deep.alpha": 3.0, "parent.rank": 5}
    expected = Whole(width=1, part=Part(names=("x",), deep=Deep(2, 3.0)), parent=Deep(5))
    assert replaced(Whole(), changes) == expected
    assert replaced(expected, {"part": Part(), "part.deep.rank": 7, "parent": None}) == Whole(
        1, part=Part(deep=Deep(7))
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [("width", 3), ("scale", 0.5), ("limit", None), ("limit", 7), ("part.names", ("a", "b")), ("part.names", ())],
)
def test_an_option_takes_what_help_shows(path, value):
    parser, kind = argparse.ArgumentParser(), leaves(Whole)[path]
    parser.add_argument("--x", type=reader(kind), metavar=metavar(kind), help=f"(default: {as_text(value)})")
    assert parser.parse_args(["--x", as_text(value)]).x == value
    assert metavar(kind) in parser.format_help()


@pytest.mark.parametrize("value", [1e300, 10**400, -(10**30)])
def test_a_whole_number_has_a_bound(value):
    """What is computed from one later would overflow there."""
    with pytest.raises(InputError, match="expected a whole number"):
        from_plain(int, value, "steps")
    assert from_plain(int, 1e12, "steps") == 10**12
