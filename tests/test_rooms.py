"""The ten rooms of the package and the order of their imports, read from the source.

A room imports from the rooms before it. Imports inside functions and for type checkers count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import raymerge

PACKAGE = Path(raymerge.__file__).parent
ROOMS = (
    "files", "config", "data", "merging", "report", "models", "engine", "distributed", "runs",
    "apps",
)  # fmt: skip
AT_THE_ROOT = {"__init__", "__main__", "cli", "errors"}


class Import(NamedTuple):
    """One import of one module; ``module`` and ``target`` are dotted names."""

    file: Path
    line: int
    module: str
    target: str
    is_lazy: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def room_of(module: str) -> str:
    """Return the name after ``raymerge``: a room or a module at the root; "" for the package."""
    return [*module.split("."), ""][1]


def imports_of(package: Path) -> list[Import]:
    """Return every import in every file below a package's folder."""
    modules = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    assert modules
    return [each for module, path in modules.items() for each in _read(module, path, modules)]


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(module: str, path: Path, modules: Iterable[str]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for target in _targets(node, modules):
            yield Import(path, node.lineno, module, target, is_lazy=node not in tree.body)


def _targets(node: ast.AST, modules: Iterable[str]) -> set[str]:
    """Return the modules that a statement imports; a submodule counts, not its package."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.module is not None, f"line {node.lineno}: a relative import"
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        return {name if name in modules else node.module for name in names}
    return set()


# --- the rules: each returns the imports that break it --------------------------------------------


def against_the_order(imports: Iterable[Import]) -> list[str]:
    """A room imports itself, the rooms before it and ``errors``, never ``cli`` or the package."""
    return [
        str(each)
        for each in imports
        if each.target.split(".")[0] == "raymerge"
        and room_of(each.module) in ROOMS
        and room_of(each.target) not in _allowed(room_of(each.module))
    ]


def _allowed(room: str) -> set[str]:
    if room == "merging":
        return {"merging", "config", "errors"}
    return {*ROOMS[: ROOMS.index(room) + 1], "errors"}


def circle(imports: Iterable[Import]) -> list[str]:
    """Return the imports of one circle of files, or nothing where there is none."""
    own = [each for each in imports if each.target.split(".")[0] == "raymerge"]
    graph: dict[str, set[str]] = {}
    for each in own:
        graph.setdefault(each.module, set()).add(each.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        targets_first: list[str] = error.args[1]
        steps = set(zip(targets_first[1:], targets_first[:-1], strict=True))
        return [str(each) for each in own if (each.module, each.target) in steps]
    return []


def users_of(library: str, imports: Iterable[Import]) -> list[Import]:
    return [each for each in imports if each.target.split(".")[0] == library]


def loaders_of(library: str, imports: Iterable[Import]) -> set[str]:
    """Return the modules whose import loads a library, through any number of others."""
    at_the_top = [each for each in imports if not each.is_lazy]
    modules = {each.module for each in users_of(library, at_the_top)}
    while found := {each.module for each in at_the_top if each.target in modules} - modules:
        modules |= found
    return modules


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(PACKAGE)


def test_the_rooms_are_the_folders_of_the_package() -> None:
    assert {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))} == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


def test_a_room_imports_only_from_the_rooms_before_it(imports: list[Import]) -> None:
    assert against_the_order(imports) == []


def test_the_errors_import_nothing_of_the_package(imports: list[Import]) -> None:
    own = [str(each) for each in users_of("raymerge", imports) if each.module == "raymerge.errors"]
    assert own == []


def test_no_files_import_each_other_in_a_circle(imports: list[Import]) -> None:
    assert circle(imports) == []


def test_only_distributed_imports_ray(imports: list[Import]) -> None:
    users = users_of("ray", imports)
    assert users
    assert [str(each) for each in users if room_of(each.module) != "distributed"] == []


def test_ray_is_loaded_only_where_workers_are_started(imports: list[Import]) -> None:
    """Outside ``distributed``, what loads Ray is imported inside the functions that need it."""
    loads_ray = loaders_of("ray", imports)
    assert "raymerge.distributed.cluster" in loads_ray
    early = [
        str(each)
        for each in imports
        if each.target in loads_ray and not each.is_lazy and room_of(each.module) != "distributed"
    ]
    assert early == []


@pytest.mark.parametrize("library", ["torch", "ray"])
def test_the_report_imports_neither_torch_nor_ray(imports: list[Import], library: str) -> None:
    users = users_of(library, imports)
    assert [str(each) for each in users if room_of(each.module) == "report"] == []


# --- the rules are able to fail -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("files/a.py", "from raymerge.config import schema"),
        ("files/a.py", "import raymerge.cli"),
        ("config/a.py", "def f():\n    from raymerge import __version__"),
        ("merging/a.py", "from raymerge.files import urls"),
        ("engine/worker/a.py", "from raymerge.runs import merge"),
    ],
)
def test_an_import_against_the_order_is_printed(tmp_path: Path, file: str, line: str) -> None:
    path = _write(tmp_path, file, line)
    number = line.count("\n") + 1
    (printed,) = against_the_order(imports_of(tmp_path / "raymerge"))
    assert printed.startswith(f"{path}:{number} imports raymerge")


def test_a_circle_is_printed(tmp_path: Path) -> None:
    _write(tmp_path, "files/a.py", "import os\nfrom raymerge.files import b")
    _write(tmp_path, "files/b.py", "def f():\n    from raymerge.files.c import x")
    _write(tmp_path, "files/c.py", "from raymerge.files.a import y")
    _write(tmp_path, "files/d.py", "from raymerge.files.a import y")
    printed = circle(imports_of(tmp_path / "raymerge"))
    assert [each.rpartition("/")[2] for each in printed] == [
        "a.py:2 imports raymerge.files.b",
        "b.py:2 imports raymerge.files.c",
        "c.py:1 imports raymerge.files.a",
    ]


def test_what_loads_a_library_is_followed_through_the_tops_of_modules(tmp_path: Path) -> None:
    _write(tmp_path, "distributed/a.py", "import ray")
    _write(tmp_path, "distributed/b.py", "from raymerge.distributed.a import x")
    _write(tmp_path, "runs/c.py", "from raymerge.distributed import b")
    _write(tmp_path, "runs/d.py", "def f():\n    from raymerge.distributed import b")
    assert loaders_of("ray", imports_of(tmp_path / "raymerge")) == {
        "raymerge.distributed.a", "raymerge.distributed.b", "raymerge.runs.c",
    }  # fmt: skip


def test_an_import_for_type_checkers_counts(tmp_path: Path) -> None:
    _write(tmp_path, "report/a.py", "if TYPE_CHECKING:\n    import ray.actor\nfrom torch import nn")
    imports = imports_of(tmp_path / "raymerge")
    assert [each.is_lazy for each in users_of("ray", imports)] == [True]
    assert [each.is_lazy for each in users_of("torch", imports)] == [False]


def _write(folder: Path, file: str, text: str) -> Path:
    path = folder / "raymerge" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
