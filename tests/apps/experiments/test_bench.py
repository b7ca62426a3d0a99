"""The base of all experiments: configs from changes, the printed findings, the command's errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import Commands, cache_tokenizer, refused
from experiment_worlds import ARITHMETIC, STEPS, bench, write
from world import World

from raymerge.apps.experiments import methods
from raymerge.apps.experiments.findings import Findings, Table, text
from raymerge.apps.experiments.methods import METHODS, known_methods, select
from raymerge.apps.experiments.published_numbers import MEANS, published
from raymerge.apps.zoo import WORLDS
from raymerge.config.experiments import EMBEDDED, Methods, load_experiment
from raymerge.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "experiments"


def test_a_preset_replaces_the_optimizer_of_the_base(world: World, tmp_path: Path) -> None:
    given = bench(world, tmp_path)
    assert given.config({"preset": "fast"}, "a").optimizer.steps == 50
    assert given.config({"method": "ties"}, "a").optimizer == given.base.optimizer
    assert given.config(STEPS, "a/b").optimizer.steps == 2
    assert given.config(STEPS, "a/b").output == str(tmp_path / "runs" / "a" / "b")


@pytest.mark.parametrize("name", ["", "../up", "a/../b", "/root", "a b"])
def test_the_name_of_a_row_must_be_a_folder_name(world: World, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not a valid name of a row and folder"):
        bench(world, tmp_path).config(ARITHMETIC, name)


def test_every_method_has_a_config_and_every_published_row_a_method(
    world: World, tmp_path: Path
) -> None:
    given = bench(world, tmp_path)
    for name, changes in METHODS.items():
        assert given.config(changes, name).model_names == given.base.model_names
    assert set(MEANS) <= {*METHODS, "joint"}
    assert select("ties", "average") == {name: METHODS[name] for name in ("ties", "average")}


def test_a_joint_model_beside_the_pretrained_one_is_a_row(world: World, tmp_path: Path) -> None:
    base = world.parse()
    assert list(known_methods(base)) == list(METHODS)
    (tmp_path / "joint.safetensors").touch()
    model = base.model.model_copy(update={"arch": f"local-dir:{tmp_path / 'pretrained'}"})
    rows = list(known_methods(base.model_copy(update={"model": model})))
    assert rows[:3] == ["zero_shot", "individual", "joint"]
    assert [name for name in rows if name != "joint"] == list(METHODS)


def test_the_table_of_methods_names_its_sources(world: World, tmp_path: Path) -> None:
    given = bench(world, tmp_path, {"ties": {"method": "ties"}, "mine": ARITHMETIC})
    (table,) = methods.run(given, Methods(name="methods")).tables
    assert list(table.columns[-4:]) == ["B/32", "B/16", "L/14", "published in"]
    assert list(table.rows["ties"][-4:]) == [0.724, 0.770, 0.860, "AdaMerging paper"]
    assert list(table.rows["mine"][-4:]) == [None, None, None, "–"]
    assert "TALL-masks" in published("tsv").source


def test_findings_are_printed_in_aligned_columns() -> None:
    rows = {"a": [0.7312, "x", None], "longer": [1.0, "yy", 0.05]}
    table = Table("Title", ["mean", "what", "–"], rows, "A caption.")
    assert text(Findings("All", [table], notes=["One.", "Two."])).splitlines() == [
        "All",
        "",
        "Title",
        "         mean  what    –",
        "a        73.1     x    –",
        "longer  100.0    yy  5.0",
        "A caption.",
        "",
        "- One.",
        "- Two.",
    ]


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def raymerge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    cache_tokenizer(monkeypatch)
    return Commands(capsys)


def test_the_command_writes_the_findings_and_prints_them(
    world: World, tmp_path: Path, raymerge: Commands
) -> None:
    experiment = {"name": "generalisation", "unseen": [["shape"]]}
    config = write(tmp_path, world, experiment, methods={"task_arithmetic": ARITHMETIC})
    ran = raymerge.ok("experiment", config)
    record = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert record["experiment"] == "generalisation"
    assert record["tables"][0]["title"] == "Unseen: shape"
    assert "Unseen: shape" in ran.out
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000

    refused(raymerge("experiment", config), "is in use;", "--overwrite to replace it")
    raymerge.ok("experiment", config, "--overwrite")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experiment": {"name": "generalisation", "unseen": [["shap"]]}}, "'shap' is not in"),
        ({"experiment": {"name": "generalisation", "unseen": []}}, "experiment.unseen"),
        ({"experiment": {"name": "generalization"}}, "generalisation"),
        ({"experiment": {"name": "robustness", "severity": 6}}, "severity"),
        ({"experiment": {"name": "robustness", "corruptions": ["fog"]}}, "known: motion_blur"),
        ({"methods": {"mine": {"method": {"name": "tise"}}}}, "methods: mine: method.name"),
        ({"methods": {"mine": {"metod": "ties"}}}, "methods: mine: metod"),
        ({"methods": {"../mine": {"method": "ties"}}}, "'../mine' is not a valid name"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ],
)
def test_wrong_input_is_one_line(
    world: World, tmp_path: Path, raymerge: Commands, changes: dict[str, object], says: str
) -> None:
    experiment = {"name": "generalisation", "unseen": [["shape"]]}
    config = write(tmp_path, world, **{"experiment": experiment, **changes})  # type: ignore[arg-type]
    refused(raymerge("experiment", config), says)
    assert not (tmp_path / "out").exists()


def test_an_output_of_another_writer_is_refused(
    world: World, tmp_path: Path, raymerge: Commands
) -> None:
    config = write(tmp_path, world, {"name": "methods"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for flags in ((), ("--overwrite",)):
        ran = raymerge("experiment", config, *flags)
        refused(ran, "is in use and was not written by `raymerge experiment`")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_are_valid_and_their_bases_are_there(path: Path) -> None:
    config = load_experiment(path)
    assert config.base in EMBEDDED or Path(config.base).is_file()


def test_a_config_may_name_every_embedded_world() -> None:
    assert tuple(WORLDS) == EMBEDDED
