"""The house: six files and three rooms, imports that go down only, and one installed module."""

import ast
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIX = ("bfpo", "model", "data", "train", "eval", "synthetic")
ROOMS = ("support", "tasks", "toy")
# A file imports what stands in lines above its own, or in its own room.
ORDER = [
    ["bfpo", "support"],
    ["model"],
    ["data"],
    ["tasks", "toy"],
    ["eval"],
    ["train", "tasks.redteam"],
    ["toy.experiments"],
    ["synthetic"],
]


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the program."""
    found = {name: ROOT / f"{name}.py" for name in SIX}
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            found[room if path.stem == "__init__" else f"{room}.{path.stem}"] = path
    return found


def level(name: str) -> int:
    """The line of ORDER in which a module stands, itself or with its room."""
    for title in (name, name.partition(".")[0]):
        for number, line in enumerate(ORDER):
            if title in line:
                return number
    raise AssertionError(f"{name} has no place in the order")


def imported(path: Path) -> set[str]:
    """The program's modules that a file imports, wherever in it: TYPE_CHECKING hides nothing."""
    every = modules()
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name in every and name not in ROOMS}


def test_the_top_level_holds_six_files() -> None:
    """Claim: the six files that are the paper are the only Python at the top. Oracle: the disk."""
    assert {path.stem for path in ROOT.glob("*.py")} == set(SIX)


def test_imports_go_down_only() -> None:
    """Claim: a file imports from lines above its own in ORDER, or from its own room, without a
    circle; the rooms tasks and toy do not know each other, and train.py knows no evaluation.

    Oracle: every import statement of the program.
    """
    graph = {name: imported(path) for name, path in modules().items()}
    wrong = []
    for name, targets in graph.items():
        for target in targets:
            own_room = "." in name and name.partition(".")[0] == target.partition(".")[0]
            if level(target) > level(name) or (level(target) == level(name) and not own_room):
                wrong.append(f"{name} -> {target}")
    assert not wrong
    assert not any(target == "eval" or target.startswith("tasks") for target in graph["train"])
    left = dict(graph)
    while left:  # leaves are taken away until nothing is left, unless some stand in a circle
        leaves = [name for name, targets in left.items() if not targets & left.keys()]
        assert leaves, f"a circle among {sorted(left)}"
        for name in leaves:
            del left[name]


def loaded(*statements: str) -> list[set[str]]:
    """The program's modules that a fresh process has after each statement."""
    code = "import sys; " + "; ".join(f"{each}; print(*sys.modules)" for each in statements)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [set(line.split()) & modules().keys() for line in done.stdout.splitlines()]


def test_commands_load_little() -> None:
    """Claim: Figure 4 needs no transformer and no judge, and training no evaluation and no toy.

    Oracle: sys.modules of a fresh process.
    """
    small = {"synthetic", "bfpo", "support", "support.plots", "support.storage", "support.sources"}
    figure, both = loaded("import synthetic", "import train")
    assert figure == small | {"support.distributed"}
    rooms = {name.partition(".")[0] for name in both}
    assert rooms == {"synthetic", "train", "data", "model", "bfpo", "support"}


@pytest.mark.slow  # ten seconds: pip
def test_installing_gives_one_module(tmp_path: Path) -> None:
    """Claim: `pip install -e .` installs bfpo, and no module of a common name such as data or eval.

    Oracle: imports in an environment of its own, outside the checkout. It borrows pip, torch and
    setuptools from this environment, so that nothing is downloaded.
    """
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for file in ("pyproject.toml", *(f"{name}.py" for name in SIX)):
        (checkout / file).write_bytes((ROOT / file).read_bytes())
    for room in ROOMS:
        (checkout / room).mkdir()
        (checkout / room / "__init__.py").touch()
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, *install, checkout], check=True, env=clean, cwd=tmp_path)
    code = f"""
import importlib.util
import bfpo
assert bfpo.__file__.startswith({str(checkout)!r}), bfpo.__file__
print(*(name for name in {[*SIX, *ROOMS]} if importlib.util.find_spec(name)))
"""
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["bfpo"], done.stderr
