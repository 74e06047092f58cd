"""The rule of the house: every import points down, and no two files import each other in a circle."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
BELOW = {  #: room: the rooms that it may import
    "models": {"models"},
    "scaling": {"scaling", "models"},
    "analysis": {"analysis"},
    "sweeps": {"sweeps", "scaling", "models", "analysis"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in BELOW
    for path in (ROOT / room).rglob("*.py")
}


@functools.cache
def imports(name: str) -> set[str]:
    """The modules of ours that a file names, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {module for module in found if module in FILES}


def test_every_import_points_down():
    """If this fails, a room has begun to depend on one above or beside it: move the shared thing down."""
    wrong = [
        f"{name} imports {module}"
        for name in FILES
        for module in imports(name)
        if module.split(".")[0] not in BELOW[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_imports_the_roof():
    wrong = [
        f"{name} imports {module}"
        for name in FILES
        for module in imports(name)
        if module.startswith("sweeps.cli") and not name.startswith("sweeps.cli")
    ]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_of_imports():
    graph = {name: imports(name) - {name} for name in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for module in graph[name]:
                visit(module, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
