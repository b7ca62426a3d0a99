"""The config is exactly what raymerge understands; anything else is one line naming the key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from raymerge.config import METHOD_NAMES, Config, dump_config, load_config, parse_config
from raymerge.config.loading import apply_override, read_yaml
from raymerge.config.schema import CardConfig, TaskConfig
from raymerge.errors import ConfigError

BASE: dict[str, Any] = {
    "model": {"arch": "ViT-B-32-quickgelu", "pretrained": "openai"},
    "tasks": [
        {"name": "mnist", "checkpoint": "ckpts/mnist.pt", "classnames": ["0", "1"], "adapt": "d/a"},
        {"name": "dtd", "checkpoint": "/abs/dtd.pt", "classnames": ["x", "y", "z"], "test": "t"},
    ],
}


def _data(**sections: Any) -> dict[str, Any]:
    return {**copy.deepcopy(BASE), **sections}


def _task(**keys: Any) -> dict[str, Any]:
    return {**copy.deepcopy(BASE["tasks"][0]), **keys}


def _method(name: str) -> dict[str, Any]:
    """The least that a config says of a method."""
    return {"name": name, **({"checkpoint": "/abs/joint.pt"} if name == "joint" else {})}


def _parse(data: dict[str, Any], root: Path = Path("/root")) -> Config:
    return parse_config(data, root=root)


def _refusal(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        _parse(data)
    message = str(raised.value)
    assert "\n" not in message
    assert raised.value.exit_code == 2
    return message


def _write(folder: Path, data: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


# --- defaults of the contract ------------------------------------------------------------------


def test_the_defaults_are_the_contracts():
    config = _parse(_data())
    method = config.method.model_dump()
    assert {k: method[k] for k in ("name", "granularity", "task_vectors", "objective")} == {
        "name": "adamerging",
        "granularity": "tensor",
        "task_vectors": "raw",
        "objective": "entropy",
    }
    assert config.method.effective_init == 0.3
    assert method["clamp"] == "projected"
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.steps) == (1e-3, (0.9, 0.999), 500)
    assert (optimizer.batch_size, optimizer.images_per_step) == (16, 16)
    assert (config.precision, config.seed, config.cluster.workers) == ("float32", 0, "auto")
    assert config.tasks[0].templates == ("a photo of a {}.",)
    assert config.task_names == ("mnist", "dtd")


def test_a_config_is_frozen():
    config = _parse(_data())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5


# --- unknown keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "key", "meant"),
    [
        (_data(optimiser={}), "optimiser", "optimizer"),
        (_data(presets="official"), "presets", "preset"),
        (_data(model={**BASE["model"], "pretained": "x"}), "model.pretained", "pretrained"),
        (_data(tasks=[_task(adpat="x")]), "tasks[0].adpat", "adapt"),
        (_data(tasks=[_task(), _task(class_names=[])]), "tasks[1].class_names", "classnames"),
        (_data(method={"name": "adamerging", "granularty": 1}), "method.granularty", "granularity"),
        (_data(method={"name": "ties", "densty": 0.2}), "method.densty", "density"),
        (_data(method={"name": "task_arithmetic", "scale": 1}), "method.scale", "scaling"),
        (_data(optimizer={"batchsize": 4}), "optimizer.batchsize", "batch_size"),
        (_data(cluster={"worker": 4}), "cluster.worker", "workers"),
        (_data(cluster={"step_timeout": 4}), "cluster.step_timeout", "step_timeout_s"),
        (_data(state={"every_step": 4}), "state.every_step", "every_steps"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_with_what_was_meant(data, key, meant):
    assert _refusal(data) == f"config: {key}: unknown key; did you mean {meant}?"


@pytest.mark.parametrize(
    ("data", "known"),
    [
        (_data(method={"name": "average", "qqq": 1}), "known here: name"),
        (_data(state={"qqq": 1}), "known here: every_steps, keep"),
    ],
)
def test_an_unknown_key_like_no_other_lists_the_known_ones(data, known):
    message = _refusal(data)
    assert "qqq: unknown key" in message
    assert known in message


def test_a_key_of_another_method_is_unknown():
    assert "method.density: unknown key" in _refusal(
        _data(method={"name": "task_arithmetic", "density": 0.2})
    )


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_only_frank_wolfe_learns_for_a_task_that_no_model_was_trained_for(name: str) -> None:
    unmerged = {"name": "svhn", "classnames": ["0", "1"], "adapt": "d/s"}
    data = _data(method=_method(name), tasks=[_task(), unmerged])
    if name in ("fw_hard", "fw_soft"):
        config = _parse(data)
        assert (config.model_names, config.task_names) == (("mnist",), ("mnist", "svhn"))
        return
    assert _refusal(data).endswith(
        "tasks[1]: task 'svhn' has images to adapt on but no checkpoint; name its checkpoint or "
        "remove adapt"
    )


# --- broken rules ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"tasks": BASE["tasks"]}, "model: missing"),
        ({"model": BASE["model"]}, "tasks: missing"),
        (_data(tasks=[]), "tasks: the list is empty"),
        (_data(model={"pretrained": "openai"}), "model.arch: missing"),
        (_data(model={"arch": "ViT-B-32"}), "needs model.pretrained"),
        (_data(model="ViT-B-32"), "needs model.pretrained"),
        (_data(model="openai/clip-vit-base-patch32"), "write hf-hub:openai/clip-vit-base-patch32"),
        (_data(model="./models/base"), "for a folder write local-dir:./models/base"),
        (_data(model="base.pt"), "write model: {arch: ViT-B-32, pretrained: base.pt}"),
        (_data(model={"arch": "local-dir:m", "pretrained": "x.pt"}), "remove model.pretrained"),
        (_data(model=3), "model: "),
        (_data(tasks="mnist"), "tasks: "),
        (_data(tasks=["mnist"]), "tasks[0]: "),
        (_data(tasks=[_task(name="a b")]), "tasks[0].name: 'a b' is not a task name"),
        (_data(tasks=[_task(name="a/b")]), "tasks[0].name: 'a/b'"),
        (_data(tasks=[_task(name="")]), "tasks[0].name: ''"),
        (_data(tasks=[_task(name="..")]), "tasks[0].name: '..'"),
        (_data(tasks=[_task(), _task()]), "task 'mnist' is listed 2 times"),
        (_data(tasks=[_task(classnames=["one"])]), "tasks[0].classnames: "),
        (_data(tasks=[_task(templates=[])]), "tasks[0].templates: "),
        (_data(tasks=[_task(templates=["a photo"])]), "tasks[0].templates: template 'a photo'"),
        (_data(tasks=[_task(templates=["{} on {}"])]), "tasks[0].templates: template '{} on {}'"),
        (_data(tasks=[_task(templates=["{x} {}"])]), "tasks[0].templates: template '{x} {}'"),
        (_data(tasks=[_task(checkpoint=3)]), "tasks[0].checkpoint: "),
        (_data(method={"granularity": "task"}), "method.name: "),
        (_data(method={"name": "adamerging", "granularity": "layer"}), "method.granularity: "),
        (_data(method={"name": "adamerging", "clamp": "yes"}), "method.clamp: "),
        (_data(method={"name": "adamerging", "init": "big"}), "method.init: "),
        (_data(method={"name": "adamerging", "init": float("nan")}), "method.init: "),
        (_data(method={"name": "ties", "density": 0}), "method.density: "),
        (_data(method={"name": "ties", "density": 1.01}), "method.density: "),
        (_data(method={"name": "ties", "merge": "max"}), "method.merge: "),
        (_data(method={"name": "task_arithmetic", "scaling": float("inf")}), "method.scaling: "),
        (_data(optimizer={"lr": 0}), "optimizer.lr: "),
        (_data(optimizer={"lr": -1}), "optimizer.lr: "),
        (_data(optimizer={"lr": "1e-3x"}), "optimizer.lr: "),
        (_data(optimizer={"name": "sgd"}), "optimizer.name: "),
        (_data(optimizer={"betas": [0.9]}), "optimizer.betas"),
        (
            _data(optimizer={"betas": [0.9, 1.0]}),
            "optimizer.betas: must each lie in [0, 1), got (0.9, 1.0)",
        ),
        (_data(optimizer={"steps": 0}), "optimizer.steps: "),
        (_data(optimizer={"steps": 2.5}), "optimizer.steps: "),
        (_data(optimizer={"batch_size": 0}), "optimizer.batch_size: "),
        (_data(optimizer={"batches": 0}), "optimizer.batches: "),
        (_data(precision="float16"), "precision: "),
        (_data(seed=-1), "seed: "),
        (_data(cluster={"workers": -1}), "cluster.workers: "),
        (_data(cluster={"workers": "many"}), "cluster.workers: "),
        (_data(cluster={"shards": 0}), "cluster.shards: "),
        (_data(cluster={"workers": 5, "shards": 2}), "workers=5 is not a multiple of shards=2"),
        (_data(cluster={"workers": 0, "shards": 2}), "cannot hold 2 shards"),
        (_data(cluster={"cpus_per_worker": 0}), "cluster.cpus_per_worker: "),
        (_data(cluster={"gpus_per_worker": -0.5}), "cluster.gpus_per_worker: "),
        (
            _data(vectors={"location": "files", "dtype": "bfloat16"}),
            "vectors: location: files keeps no vectors",
        ),
        (_data(cluster={"micro_batch": 0}), "cluster.micro_batch: "),
        (_data(cluster={"micro_batch": "some"}), "cluster.micro_batch: "),
        (_data(vectors={"dtype": "float16"}), "vectors.dtype: "),
        (_data(vectors={"location": "gpu"}), "vectors.location: "),
        (_data(vectors={"folder": ""}), "vectors.folder: "),
        (_data(vectors="disk"), "vectors: "),
        (_data(cluster={"step_timeout_s": 0}), "cluster.step_timeout_s: "),
        (_data(state={"every_steps": 0}), "state.every_steps: "),
        (_data(state={"keep": 0}), "state.keep: "),
        (
                _data(preset="oficial"),
                "preset: 'oficial' is unknown; did you mean official? (known: official",
            ),
    ],
)  # fmt: skip
def test_a_broken_rule_is_one_line_that_names_the_key(data, says):
    assert says in _refusal(data)


def test_the_value_that_was_given_is_in_the_message():
    assert _refusal(_data(optimizer={"lr": -0.5})).endswith("got -0.5")
    assert len(_refusal(_data(seed="x" * 10_000))) < 300


def test_an_unknown_method_is_named_with_what_was_meant_and_all_that_are_known():
    message = _refusal(_data(method="adamergin"))
    assert "method.name: 'adamergin' is unknown; did you mean adamerging?" in message
    assert all(name in message for name in METHOD_NAMES)


def test_frank_wolfe_skips_no_step() -> None:
    data = _data(method={"name": "fw_hard"}, optimizer={"nonfinite": "skip"})
    assert "nonfinite: skip is not for fw_hard" in _refusal(data)


# --- shorthands and presets --------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_method_name_alone_is_that_method_with_its_defaults(name):
    if name == "joint":  # whose checkpoint has no default
        assert "method.checkpoint: missing" in _refusal(_data(method=name))
    else:
        assert _parse(_data(method=name)) == _parse(_data(method={"name": name}))


def test_a_model_string_is_its_arch():
    assert _parse(_data(model="hf-hub:org/x")).model.arch == "hf-hub:org/x"
    assert (
        _parse(_data(model="local-dir:/m")).model
        == _parse(_data(model={"arch": "local-dir:/m"})).model
    )


@pytest.mark.parametrize(
    ("merge", "scaling", "expected"), [("sum", None, 0.3), ("mean", None, 1.0), ("mean", 0.0, 0.0)]
)
def test_the_scaling_of_ties_follows_its_merge_unless_given(merge, scaling, expected):
    method = {"name": "ties", "merge": merge, "scaling": scaling}
    assert _parse(_data(method=method)).method.effective_scaling == expected


def test_the_official_preset_is_the_released_code():
    config = _parse(_data(preset="official"))
    assert config.optimizer.images_per_step == 32
    assert (config.optimizer.batch_size, config.optimizer.batches) == (16, 2)
    assert (config.optimizer.lr, config.optimizer.steps) == (1e-3, 500)
    assert (config.method.name, config.method.clamp, config.method.init) == (
        "adamerging",
        "forward",
        0.3,
    )


def test_the_recommended_preset_learns_on_tsv_from_the_experts():
    config = _parse(_data(preset="recommended"))
    assert (config.method.task_vectors, config.method.objective) == ("tsv", "kl")
    assert config.method.effective_init == 1.0
    assert config.method.clamp == "none"
    assert (config.optimizer.steps, config.optimizer.schedule) == (50, "cosine")


def test_what_the_config_gives_wins_over_the_preset():
    config = _parse(
        _data(preset="official", optimizer={"steps": 7}, method={"name": "adamerging", "init": 0.1})
    )
    assert (config.optimizer.steps, config.optimizer.batches) == (7, 2)
    assert (config.method.init, config.method.clamp) == (0.1, "forward")


@pytest.mark.parametrize("name", [n for n in METHOD_NAMES if n != "adamerging"])
def test_the_preset_leaves_methods_that_have_no_clamp_alone(name):
    method = _method(name)
    with_preset = _parse(_data(preset="official", method=method)).method
    assert with_preset == _parse(_data(method=method)).method


# --- paths -------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_configs_own_folder(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    data = _data(model={"arch": "my.json", "pretrained": "../w.pt"}, output="runs/x")
    path = _write(folder, data)
    monkeypatch.chdir(tmp_path)
    for given in (path, Path("configs/config.yaml")):
        config = load_config(given)
        assert config.tasks[0].checkpoint == str(folder / "ckpts/mnist.pt")
        assert config.tasks[0].adapt == str(folder / "d/a")
        assert config.tasks[1].checkpoint == "/abs/dtd.pt"
        assert config.tasks[1].test == str(folder / "t")
        assert config.model.arch == str(folder / "my.json")
        assert Path(config.model.pretrained).resolve() == tmp_path / "w.pt"
        assert config.output == str(folder / "runs/x")


def test_local_dir_is_a_path_and_hub_ids_and_tags_are_not():
    assert _parse(_data(model="local-dir:m")).model.arch == "local-dir:/root/m"
    assert _parse(_data(model="hf-hub:org/m")).model.arch == "hf-hub:org/m"
    assert _parse(_data()).model.pretrained == "openai"
    assert _parse(_data(tasks=[_task(checkpoint="hf-hub:o/m")])).tasks[0].checkpoint == "hf-hub:o/m"


def test_class_names_and_templates_come_from_files_one_per_line(tmp_path):
    (tmp_path / "names.txt").write_text("apple pie\n\n  baby back ribs  \r\ncrème\n", "utf-8")
    (tmp_path / "templates.txt").write_text("a photo of {}.\n{}, a type of food.\n")
    task = _task(classnames="names.txt", templates="templates.txt")
    config = _parse(_data(tasks=[task]), tmp_path)
    assert config.tasks[0].classnames == ("apple pie", "baby back ribs", "crème")
    assert config.tasks[0].templates == ("a photo of {}.", "{}, a type of food.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), (b"\n \n", "has no lines"), (b"\xff\xfe\x00", "not UTF-8")],
)
def test_a_bad_names_file_is_named_with_its_key(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"tasks\[0\]\.classnames: .*names\.txt: .*{reason}"):
        _parse(_data(tasks=[_task(classnames="names.txt")]), tmp_path)


# --- overrides ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optimizer.lr=0.02", lambda c: c.optimizer.lr == 0.02),
        ("optimizer.lr=1e-2", lambda c: c.optimizer.lr == 0.01),
        ("optimizer.betas=[0.5, 0.9]", lambda c: c.optimizer.betas == (0.5, 0.9)),
        ("seed=3", lambda c: c.seed == 3),
        ("method=average", lambda c: c.method.name == "average"),
        ("method.granularity=task", lambda c: c.method.granularity == "task"),
        ("tasks.1.name=new", lambda c: c.task_names == ("mnist", "new")),
        ("tasks.0={name: z, checkpoint: c, classnames: [a, b]}", lambda c: c.task_names[0] == "z"),
        ("cluster.workers=auto", lambda c: c.cluster.workers == "auto"),
        ("cluster.address=ray://h:1", lambda c: c.cluster.address == "ray://h:1"),
        ("preset=official", lambda c: c.optimizer.batches == 2),
        ("output=a=b", lambda c: c.output.endswith("/a=b")),
    ],
)
def test_overrides_are_yaml_at_a_key_path(tmp_path, override, read):
    data = _data(method={"name": "adamerging"}, cluster={"workers": 2})
    assert read(load_config(_write(tmp_path, data), [override]))


def test_an_override_goes_below_a_shorthand(tmp_path):
    config = load_config(_write(tmp_path, _data(method="ties")), ["method.density=0.5"])
    assert (config.method.name, config.method.density) == ("ties", 0.5)


def test_later_overrides_win(tmp_path):
    assert load_config(_write(tmp_path, _data()), ["seed=1", "seed=2"]).seed == 2


def test_overridden_paths_are_relative_to_the_config_too(tmp_path):
    config = load_config(_write(tmp_path, _data()), ["tasks.0.adapt=other"])
    assert config.tasks[0].adapt == str(tmp_path / "other")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "override 'seed': write it as key.path=value"),
        ("=3", "override '=3': write it as key.path=value"),
        ("seed=[1", "is not a YAML value"),
        ("seed.x=1", "seed.x is below a plain value"),
        ("tasks.2.name=x", "tasks.2: the list has items 0 to 1"),
        ("tasks.one.name=x", "tasks.one: the list has items 0 to 1"),
        ("sede=3", "sede: unknown key; did you mean seed?"),
        ("optimizer.stpes=3", "optimizer.stpes: unknown key; did you mean steps?"),
        ("seed=!!python/object/apply:os.getpid []", "is not a YAML value"),
    ],
)
def test_a_bad_override_is_one_line(tmp_path, override, says):
    with pytest.raises(ConfigError) as raised:
        load_config(_write(tmp_path, _data(seed=1)), [override])
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected keys such as model, tasks, method"),
        ("- a\n- b\n", "expected keys such as model"),
        ("just words", "expected keys such as model"),
        ("model: [1\n", "not valid YAML"),
        ("model: a\n\tb: c\n", "not valid YAML"),
        ("a: &a [*b]\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("? [a, b]\n: 1\n", "config"),
        ("1: 2\n", "config"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, says):
    with pytest.raises(ConfigError) as raised:
        load_config(_write(tmp_path, text))
    assert says in str(raised.value)
    assert "config.yaml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tag_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    text = f"model: !!python/object/apply:os.system ['touch {marker}']\n"
    with pytest.raises(ConfigError, match=r"python/object/apply:os\.system"):
        load_config(_write(tmp_path, text))
    assert not marker.exists()
    yaml.unsafe_load(text)  # the bomb is real
    assert marker.exists()


@pytest.mark.parametrize(
    "key", ["x", "seed", "method", "tasks", "output", "cluster", "optimizer", "model"]
)
def test_aliases_that_would_expand_to_billions_are_refused_in_one_line(tmp_path, key):
    """The billion laughs: nine levels of nine references each. Printing it would never end."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    base = _data()
    base.pop(key, None)
    text = yaml.safe_dump(base) + "\n".join(levels) + f"\n{key}: *a9\n"
    with pytest.raises(ConfigError) as raised:
        load_config(_write(tmp_path, text))
    assert len(str(raised.value)) < 500


def test_missing_unreadable_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"x\.yaml: not UTF-8"):
        load_config(tmp_path / "x.yaml")


# --- round trip --------------------------------------------------------------------------------

ROUND_TRIPS = [
    _data(),
    _data(preset="official", seed=9, precision="bfloat16", output="o"),
    _data(method={"name": "ties", "density": 1 / 3, "merge": "mean", "trim_scope": "full"}),
    _data(cluster={"workers": 6, "shards": 3, "gpus_per_worker": 0.25, "micro_batch": 8}),
    _data(optimizer={"lr": 1e-7, "betas": [0.0, 0.1 + 0.2]}, state={"keep": 1}),
    _data(tasks=[_task(classnames=["yes", "no", "1", "null", "é: #", "'q'"], templates=["{}"])]),
    *[_data(method=_method(name)) for name in METHOD_NAMES],
]


@pytest.mark.parametrize("data", ROUND_TRIPS)
def test_a_dumped_config_loads_back_equal(tmp_path, data):
    config = _parse(data)
    text = dump_config(config)
    assert load_config(_write(tmp_path, text)) == config
    assert dump_config(load_config(_write(tmp_path, text))) == text


def test_parsing_does_not_change_what_it_was_given():
    data = _data(preset="official", method="adamerging")
    before = copy.deepcopy(data)
    _parse(data)
    assert data == before


@pytest.mark.parametrize(
    "text",
    ["x: 2001-99-99", "x: !!bool maybe", "x: !!timestamp never", "x: !!int ''", "x: 1" + "0" * 5000,
     "[" * 3000, "? [a, b]\n: 1", "<<: 3", "x: !!python/object/apply:os.getcwd []"],
)  # fmt: skip
def test_yaml_that_python_cannot_hold(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config .*c\.yaml: not valid YAML"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "template", ["{!r:>9999999999}{}", "{.x}{}", "{0}{}", "{}{", "{}{name}", "{}{:9999999999}"]
)
def test_a_template_is_not_formatted_before_it_is_known_to_be_plain(template):
    task = {"name": "a", "test": "x", "classnames": ["a", "b"], "templates": [template]}
    with pytest.raises(ValidationError, match="has braces besides"):
        TaskConfig.model_validate(task)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("model", "\ud800", "holds half of a surrogate pair"), ("output", "\ud800", "valid string")],
)
def test_half_a_character(key, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _parse(_data(**{key: value}))
    assert str(caught.value).encode()


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_has(path):
    with pytest.raises(ConfigError, match=r"classnames: .*cannot be read: not a valid path"):
        _parse(_data(tasks=[_task(classnames=path)]))


def test_a_name_that_is_too_long_for_a_file_is_no_path():
    data = {"model": {"arch": "ViT-B-32", "pretrained": "x" * 5000}, "tasks": [_task()]}
    assert parse_config(data, root=Path("/")).model.pretrained == "x" * 5000


def test_credentials_do_not_reach_the_card():
    card = CardConfig(license="https://me:pw@h/l?token=x", authors=("Ada https://me:pw@h/",))
    assert card.license == "https://h/l"
    assert card.authors == ("Ada https://h/",)


@pytest.mark.parametrize("index", ["²", "9" * 5000, "-1", "1.0", ""])
def test_an_index_that_is_no_number_is_refused(index):
    data = {"tasks": [{"name": "a"}]}
    with pytest.raises(ConfigError, match="the list has items 0 to 0; write one of these numbers"):
        apply_override(data, f"tasks.{index}.name=b")


def test_aliases_that_unfold_to_millions_are_refused(tmp_path):
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for before, name in zip("abcdef", "bcdefg", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="it unfolds to more than 1,000,000 values"):
        read_yaml(tmp_path / "c.yaml")
    flow = f"[{', '.join(line.partition(': ')[2] for line in lines)}]"
    with pytest.raises(ConfigError, match="is not a YAML value"):
        apply_override({}, f"seed={flow}")
    few = "a: &a [1, 2]\nb: [*a, *a]"
    (tmp_path / "c.yaml").write_text(few)
    assert read_yaml(tmp_path / "c.yaml")["b"] == [[1, 2], [1, 2]]
