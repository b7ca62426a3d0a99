"""The files around the package agree with it: CI, hooks, templates, citation, documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymerge

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


class _Loader(yaml.SafeLoader):
    """A safe loader that reads a tag such as ``!!python/object/apply`` as its plain value."""


_Loader.add_multi_constructor(
    "tag:yaml.org,2002:python/", lambda loader, suffix, node: loader.construct_mapping(node)
)


def _yaml(path: str | Path) -> Any:
    return yaml.load((ROOT / path).read_text(encoding="utf-8"), Loader=_Loader)


def _targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    return set(phony.split())


def _recipe(target: str) -> list[str]:
    (block,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip() for line in block.splitlines()]


# --- make --------------------------------------------------------------------------------------


def test_every_phony_target_has_a_recipe() -> None:
    assert {"demo", "test", "check", "docs"} <= _targets()
    for target in _targets():
        assert _recipe(target), target


def test_the_makefile_installs_extras_that_exist() -> None:
    extras = re.findall(r"--editable \"\.\[(\w+)\]\"", MAKEFILE)
    assert sorted(extras) == ["dev", "docs"]
    assert set(extras) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/try_it.md",
        ".ci/run",
        ".github/workflows/ci.yml",
        ".github/PULL_REQUEST_TEMPLATE.md",
    ],
)
def test_make_commands_in_the_project_files_name_targets_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"^(?:- run: )?make (\w+)|`make (\w+)`", text.replace("      ", ""), re.M)
    assert {first or second for first, second in named} <= _targets()


def test_ci_checks_tests_and_builds_the_documentation() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert {"make check", "make docs", "make test"} <= set(lines)


def test_the_built_site_is_ignored_by_git() -> None:
    site = _yaml("mkdocs.yml")["site_dir"]
    command = ["git", "check-ignore", "--quiet", f"{site}/index.html"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


# --- the workflow ------------------------------------------------------------------------------


def _steps(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_check_and_tests_on_two_python_versions() -> None:
    job = _yaml(".github/workflows/ci.yml")["jobs"]["test"]
    versions = job["strategy"]["matrix"]["python"]
    assert versions == ["3.10", "3.12"]  # strings: 3.10 as a number would be 3.1
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert _steps(job) == ["make check", "make test"]
    assert job["runs-on"].startswith("ubuntu")


def test_the_workflow_builds_the_documentation() -> None:
    assert _steps(_yaml(".github/workflows/ci.yml")["jobs"]["docs"]) == ["make docs"]


# --- hooks -------------------------------------------------------------------------------------


def test_the_local_hooks_are_what_make_check_runs() -> None:
    repos = _yaml(".pre-commit-config.yaml")["repos"]
    (local,) = (repo for repo in repos if repo["repo"] == "local")
    hooks = [hook["entry"].removeprefix(".venv/bin/") for hook in local["hooks"]]
    check = [line.removeprefix("$(BIN)/") for line in _recipe("check")]
    assert hooks == [re.sub(r" --check| \.$", "", line).removesuffix(" .") for line in check]


def test_the_common_hooks_check_yaml_and_ends_of_files() -> None:
    hooks = {
        hook["id"] for repo in _yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    }
    assert {"check-yaml", "end-of-file-fixer", "ruff", "ruff-format", "mypy"} <= hooks


def test_text_files_end_with_one_newline() -> None:
    for path in _tracked("*.md", "*.yml", "*.yaml", "*.toml", "*.cff", "*.py"):
        text = path.read_text(encoding="utf-8")
        assert not text or (text.endswith("\n") and not text.endswith("\n\n")), path


def _tracked(*patterns: str) -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", *patterns]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).exists()]


# --- citation and templates --------------------------------------------------------------------


def test_the_citation_agrees_with_pyproject() -> None:
    citation = _yaml("CITATION.cff")
    assert (citation["title"], citation["version"]) == (PROJECT["name"], PROJECT["version"])
    assert citation["version"] == raymerge.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert citation["authors"] == [{"name": "The raymerge authors"}]
    assert citation.keys() >= {"cff-version", "message", "type"}


def test_there_is_a_template_for_bugs_features_and_checkpoints() -> None:
    assert [path.stem for path in TEMPLATES] == ["bug", "checkpoint", "feature"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_issue_template_is_a_valid_form(path: Path) -> None:
    form = _yaml(path)
    assert form.keys() == {"name", "description", "labels", "body"}
    questions = [part for part in form["body"] if part["type"] != "markdown"]
    assert questions
    assert len({part["id"] for part in questions}) == len(questions)
    for part in questions:
        assert part["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]
        assert ("options" in part["attributes"]) == (part["type"] in {"dropdown", "checkboxes"})


# --- the documentation site --------------------------------------------------------------------


def _pages(entries: list[Any]) -> list[str]:
    values = [value for entry in entries for value in entry.values()]
    return [
        page for value in values for page in (_pages(value) if isinstance(value, list) else [value])
    ]


def test_every_page_of_the_repository_is_in_the_navigation() -> None:
    pages = _pages(_yaml("mkdocs.yml")["nav"])
    folders = ("", "benchmarks/", "benchmarks/peers/", "cluster/", "configs/", "docs/")
    files = [f"{folder}{path.name}" for folder in folders for path in (ROOT / folder).glob("*.md")]
    assert sorted(pages) == sorted(files)


def test_the_site_fetches_nothing_from_elsewhere() -> None:
    site = _yaml("mkdocs.yml")
    assert site["theme"]["font"] is False
    assert "analytics" not in site.get("extra", {})
    assert all((ROOT / "docs" / path).is_file() for path in site["extra_css"])
    assert all((ROOT / "docs" / path).is_file() for path in site["extra"]["polyfills"])


def test_the_api_page_documents_every_public_name() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: raymerge\.(\w+)$", page, re.MULTILINE)
    assert sorted([*names, "__version__"]) == sorted(raymerge.__all__)


def test_the_table_of_example_configs_has_every_config() -> None:
    page = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([\w/]+\.yaml)\)", page)
    files = [p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.yaml")]
    assert sorted(links) == sorted(files)


# --- docs/architecture.md ----------------------------------------------------------------------

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PACKAGE = Path(raymerge.__file__).parent


def _tree() -> dict[str, str]:
    """Return the phrase of each folder of the page's tree, in the page's order."""
    (block,) = re.findall(r"^```\nraymerge/\n(.*?)^```", ARCHITECTURE, re.DOTALL | re.MULTILINE)
    parents: dict[int, str] = {0: ""}
    tree = {}
    for line in block.splitlines():
        indent, name, phrase = re.fullmatch(r"( +)(\w+)/ +(.+)", line).groups()  # type: ignore[union-attr]
        parents[len(indent)] = path = f"{parents[len(indent) - 2]}{name}/"
        tree[path] = phrase
    return tree


def test_the_tree_of_the_architecture_page_has_every_folder() -> None:
    folders = {
        f"{path.parent.relative_to(PACKAGE).as_posix()}/" for path in PACKAGE.rglob("__init__.py")
    }
    assert _tree().keys() == folders - {"./"}


def test_files_named_on_the_architecture_page_exist() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", ARCHITECTURE)
    assert len(named) >= 8
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_the_picture_names_the_rooms_in_the_order_of_the_tree() -> None:
    picture = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'<text class="b"[^>]*>(\w+)/</text>', picture)
    rooms = [path.strip("/") for path in _tree() if path.count("/") == 1]
    assert drawn == rooms[::-1]  # the picture stands with the last room at the top
