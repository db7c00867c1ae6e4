"""Layering of the package: subpackages import only lower ones, and there are no import cycles."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tracknet.scripts import cli

PACKAGE = Path(__file__).parent.parent / "tracknet"
# Subpackages ("rooms") from top to bottom, as in docs/architecture.md.
ROOMS = (
    "scripts",
    "api",
    "benchmark",
    "runs",
    "planning",
    "config",
    "training",
    "reporting",
    "tracking",
    "memory",
    "quantization",
    "models",
    "data",
)
LOOSE = ("registry", "progress", "files", "errors")


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, including imports inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tracknet":
            members = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            # `from tracknet.room import module` depends on the module, not on the `__init__.py` of the room.
            found |= members or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "tracknet"}
    return found


def room_of(module: str) -> str:
    """Return the subpackage of a module, empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_no_room_imports_one_above_it():
    order = (*ROOMS, *LOOSE)
    upward = [
        f"{module} -> {other}"
        for module, path in MODULES.items()
        for other in imports_of(path)
        if room_of(module) and room_of(other) and order.index(room_of(other)) < order.index(room_of(module))
    ]
    assert not upward


def test_modules_are_no_circle():
    # `tracknet/__init__.py` is for users. Modules import it only for the version.
    graph = {module: imports_of(path) - {"tracknet"} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_few_modules_lie_loose_and_all_rooms_are_known():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert loose == set(LOOSE) and len(loose) <= 4
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_and_the_package_load_no_torch(verb):
    code = (
        "import sys, tracknet\n"
        "from tracknet.scripts import cli\n"
        "try: cli.main([sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'omegaconf'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
