"""No line of the package runs code from files or passes secrets on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import raymerge

PACKAGE = Path(raymerge.__file__).parent

NEVER = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.load", "_pickle.loads",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "tempfile.mktemp", "shutil.unpack_archive", "torch.jit.load",
    "torch.hub.load", "torch.package.PackageImporter",
}  # fmt: skip
"""Neither called nor named: a name can be called elsewhere."""
UNPACKING = {"extract", "extractall"}
"""Methods of archives; a regular expression's or a string's would have another name."""


def violations(source: str) -> list[str]:
    """``line: what`` for each thing that the rules forbid."""
    tree = ast.parse(source)
    imported = _imported(tree)
    found = [(node.lineno, what) for node in ast.walk(tree) for what in _wrong(node, imported)]
    return [f"{line}: {what}" for line, what in sorted(found)]


def _imported(tree: ast.AST) -> dict[str, str]:
    """Local name → what it is, dotted."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or top] = top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.AST, imported: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, imported)}.{node.attr}"
    return ""


def _wrong(node: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Name | ast.Attribute) and _dotted(node, imported) in NEVER:
        yield _dotted(node, imported)
    if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "marshal", "shelve", "dill"}:
        yield f"from {node.module} import"
    if isinstance(node, ast.Call):
        yield from _wrong_call(node, imported)
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield from _wrong_value(str(key.value), value, imported)


def _wrong_call(node: ast.Call, imported: dict[str, str]) -> Iterator[str]:
    name, given = _dotted(node.func, imported), {k.arg: k.value for k in node.keywords}
    if name == "torch.load":  # even with weights_only, a small file can take all memory
        yield "torch.load"
    if name == "PIL.Image.open" and "formats" not in given:
        yield "Image.open of any format"
    if isinstance(node.func, ast.Attribute) and node.func.attr in UNPACKING:
        yield f".{node.func.attr}()"
    for key, value in given.items():
        yield from _wrong_value(str(key), value, imported)


def _wrong_value(key: str, value: ast.AST, imported: dict[str, str]) -> Iterator[str]:
    """Check a named argument or an entry of a mapping."""
    if key in ("shell", "allow_pickle", "trust_remote_code") and not _is_constant(value, False):
        yield f"{key} that may be true"
    if key == "env_vars":
        yield "env_vars, which all users of a cluster can read"
    if key == "runtime_env":
        names = {_dotted(part, imported) for part in ast.walk(value)}
        if names & {"os.environ", "os.getenv", "os.environ.get"}:
            yield "the environment in runtime_env"


def _is_constant(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE))
)
def test_the_package_keeps_the_rules(file: Path) -> None:
    assert violations(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle\npickle.loads(b'')", "pickle.loads"),
        ("import pickle as p\nclass U(p.Unpickler): pass", "pickle.Unpickler"),
        ("from pickle import load", "from pickle import"),
        ("import marshal\nread = marshal.load", "marshal.load"),
        ("import shelve\nshelve.open('x')", "shelve.open"),
        ("from dill import loads as l", "from dill import"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("from torch import load\nload('x', weights_only=safe)", "torch.load"),
        ("import yaml\nyaml.load('x', Loader=yaml.Loader)", "yaml.load"),
        ("import yaml as y\ny.unsafe_load('x')", "yaml.unsafe_load"),
        ("eval('1')", "eval"),
        ("def f():\n    exec('1')", "exec"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell that may be true"),
        ("import subprocess\nsubprocess.run('x', **{'shell': flag})", "shell that may be true"),
        ("from os import system\nsystem('x')", "os.system"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle that may be true"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
        ("import tarfile\ntarfile.open('x').extractall('y')", ".extractall()"),
        ("import zipfile\nwith zipfile.ZipFile('x') as z:\n    z.extract('y')", ".extract()"),
        ("from PIL import Image\nImage.open('x')", "Image.open of any format"),
        ("f(trust_remote_code=True)", "trust_remote_code that may be true"),
        ("import os\nf(runtime_env={'env_vars': dict(os.environ)})", "the environment in runtime"),
        ("import os\nd = {'runtime_env': {'x': os.getenv('TOKEN')}}", "the environment in runtime"),
        ("f(runtime_env={'env_vars': {'A': a}})", "env_vars"),
    ],
)
def test_what_breaks_them_is_seen(source: str, what: str) -> None:
    assert any(what in each for each in violations(source)), violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.save({}, 'x')",
        "import yaml\nyaml.safe_load('x')",
        "model.eval()",
        "import pickle\npickle.NONE",
        "import re\nre.compile('x')",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import os\nsubprocess.run(['x'], env={**os.environ})",
        "f(runtime_env={'working_dir': folder})",
    ],
)
def test_what_keeps_them_is_let_through(source: str) -> None:
    assert violations(source) == []
