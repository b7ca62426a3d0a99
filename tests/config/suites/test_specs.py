"""The specs agree with themselves, and the suites are those of the literature."""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path

import pytest
import torchvision.datasets
import yaml
from pydantic import TypeAdapter, ValidationError

from raymerge.config import TaskConfig
from raymerge.config.suites import DATA_SETS, SUITES, DataSet, load_data_set, load_suite
from raymerge.data.folder import labelled_images
from raymerge.errors import ConfigError

CLASSES = {
    "cars": 196, "cifar10": 10, "cifar100": 100, "dtd": 47, "emnist_digits": 10,
    "emnist_letters": 26, "eurosat": 10, "fashion_mnist": 10, "fer2013": 7, "flowers102": 102,
    "food101": 101, "gtsrb": 43, "kmnist": 10, "mnist": 10, "oxford_pets": 37, "pcam": 2,
    "rendered_sst2": 2, "resisc45": 45, "stl10": 10, "sun397": 397, "svhn": 10,
}  # fmt: skip

EIGHT = {
    "sun397": "5b59d52bb43a52180a194c867d5b647443b610d078a39b20842f9a71b77f195f",
    "cars": "752bb6d89bd431cb5dadc40c5964a10ccaa30d2632acef733ae5a22c1e32e7a3",
    "resisc45": "2809c369261e00c94f78e9dd0e9d78edc6e004d35f9d0248824ee299d05d88d0",
    "eurosat": "ebe97c94c2be5f49d2b473b09d82c50e8d76e5fbf9cfa23dbf9507eff68b9ea3",
    "svhn": "e1a7bc6d173fbf17a65ae1779d48db9b565362afa20196d688b4880a68eec0ce",
    "gtsrb": "d493fc6a471fe0801b4ab21a94928bbd7e221f1f023b511c2102f028944315a5",
    "mnist": "d5163366bb2a887e767a0a08e5c7f2c89ab961f5085c2f92809f66f2fd9eab6b",
    "dtd": "3a800499e51b7023f8a719ab73dbcb9240ccaf46278de6fab7e9fce461a00113",
}
"""SHA-256 of each task's name, class names and templates, as the configs had listed them."""


def _digest(spec: DataSet) -> str:
    text = "\n".join([spec.name, *spec.classnames, "", *spec.templates])
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


# --- every spec ----------------------------------------------------------------------------------


def test_every_file_is_a_spec_and_every_spec_is_in_a_suite() -> None:
    folder = resources.files("raymerge.config.suites") / "data"
    files = sorted(Path(entry.name).stem for entry in folder.iterdir())
    assert files == list(DATA_SETS) == sorted(CLASSES)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_spec_lists_its_classes_once_each(name: str) -> None:
    spec = load_data_set(name)
    assert spec.name == name
    assert spec.classes == CLASSES[name] == len(spec.classnames) == len(set(spec.classnames))
    assert all(text == text.strip() and text for text in spec.classnames)
    assert spec.sizes.keys() == {"train", "test"}
    assert min(spec.sizes.values()) >= spec.classes


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_task_takes_a_cards_classes_and_templates(name: str) -> None:
    """The config has the same rules: one pair of braces in a template, two classes or more."""
    spec = load_data_set(name)
    task = TaskConfig(
        name=name, classnames=spec.classnames, templates=spec.templates, test="somewhere"
    )
    assert task.classnames == spec.classnames
    assert all(template.count("{}") == 1 for template in spec.templates)
    assert len(set(spec.templates)) == len(spec.templates)


@pytest.mark.parametrize("name", DATA_SETS)
def test_class_folders_are_told_apart_by_letters_and_digits(tmp_path: Path, name: str) -> None:
    """A folder cannot be called `T-shirt/top`; one of the same letters and digits stands for it."""
    spec = load_data_set(name)
    for classname in spec.classnames:
        folder = tmp_path / _plain(classname).replace(" ", "_")
        folder.mkdir()
        (folder / "1.png").touch()
    images = labelled_images(str(tmp_path), spec.classnames, name)
    assert images.labels == tuple(range(spec.classes))


@pytest.mark.parametrize("name", DATA_SETS)
def test_labels_are_given_only_where_they_say_more_than_the_class_names(name: str) -> None:
    spec = load_data_set(name)
    if spec.labels is not None:
        pairs = zip(spec.labels, spec.classnames, strict=True)
        assert any(_plain(label) != _plain(classname) for label, classname in pairs)


@pytest.mark.parametrize("name", DATA_SETS)
def test_torchvision_has_the_class_or_the_spec_says_why_not(name: str) -> None:
    source = load_data_set(name).torchvision
    assert source.note if source.name is None else hasattr(torchvision.datasets, source.name)


def test_the_hub_counts_eurosat_in_the_order_of_its_folders() -> None:
    spec = load_data_set("eurosat")
    assert spec.huggingface is not None
    assert spec.huggingface.order is not None
    assert spec.labels is not None
    folder = dict(zip(spec.classnames, spec.labels, strict=True))
    folders = [folder[classname] for classname in spec.huggingface.order]
    assert folders == sorted(folders)


def test_torchvisions_own_class_names_are_in_the_same_order() -> None:
    flowers, kana = torchvision.datasets.Flowers102, torchvision.datasets.KMNIST
    clothes = torchvision.datasets.FashionMNIST
    assert list(load_data_set("kmnist").labels or ()) == kana.classes
    assert list(load_data_set("fashion_mnist").classnames) == clothes.classes
    labels = load_data_set("flowers102").labels or ()
    own = getattr(flowers, "classes", labels)  # newer releases list them
    assert [_plain(name) for name in labels] == [_plain(name) for name in own]


# --- the suites ----------------------------------------------------------------------------------


def test_the_suites_are_nested() -> None:
    sizes = {name: len(set(members)) for name, members in SUITES.items()}
    assert sizes == {"vit-8": 8, "vit-14": 14, "vit-20": 20, "vit-20-digits": 20}
    for twenty in ("vit-20", "vit-20-digits"):
        assert SUITES[twenty][:14] == SUITES["vit-14"]
    assert SUITES["vit-14"][:8] == SUITES["vit-8"]


def test_the_twenties_differ_in_the_emnist_alone() -> None:
    letters, digits = set(SUITES["vit-20"]), set(SUITES["vit-20-digits"])
    assert letters - digits == {"emnist_letters"}
    assert digits - letters == {"emnist_digits"}


def test_a_suite_is_read_once_with_its_specs() -> None:
    suite = load_suite("vit-14")
    assert tuple(spec.name for spec in suite.data_sets) == SUITES["vit-14"]
    assert load_suite("vit-14") is suite
    assert load_data_set("mnist") is suite.data_sets[6]


def test_the_eight_tasks_are_what_they_always_were() -> None:
    """Another class name or template would make another head, and other numbers."""
    assert {spec.name: _digest(spec) for spec in load_suite("vit-8").data_sets} == EIGHT


# --- what is no spec -----------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_data_set, load_suite])
def test_an_unknown_name_is_one_line_with_the_known_ones(load: object) -> None:
    name, meant = ("eurosta", "eurosat") if load is load_data_set else ("vit8", "vit-8")
    with pytest.raises(ConfigError, match=f"'{name}' is unknown; did you mean {meant}") as raised:
        load(name)  # type: ignore[operator]
    assert "\n" not in str(raised.value)
    assert "known: " in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"clases": 2}, "clases"),
        ({"classes": 11}, "classnames: 10 distinct of 10 names, but classes is 11"),
        ({"classnames": ["0"] * 10}, "classnames: 1 distinct of 10"),
        ({"labels": ["0"]}, "labels: 1 distinct of 1"),
        ({"templates": ["a photo"]}, "a template needs exactly one {}"),
        ({"torchvision": {"name": None}}, "neither a name nor a reason"),
        ({"huggingface": {"id": "a/b"}}, "splits"),
        (
            {"huggingface": {"id": "a/b", "splits": {}, "image": "i", "label": "l",
                             "order": ["0"]}},
            "huggingface.order must hold the classnames",
        ),
    ],
)  # fmt: skip
def test_a_spec_whose_parts_do_not_agree_is_refused(change: dict[str, object], says: str) -> None:
    spec = resources.files("raymerge.config.suites") / "data" / "mnist.yaml"
    data = {"name": "mnist", **yaml.safe_load(spec.read_text(encoding="utf-8")), **change}
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(DataSet).validate_python(data)
    assert says in str(raised.value)
