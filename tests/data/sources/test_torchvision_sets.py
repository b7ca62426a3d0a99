"""torchvision's data sets, in their true layouts and a few images large."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from raymerge.config.loading import absolute_path
from raymerge.data.decoding import check_image, decode_all
from raymerge.data.preprocess import Preprocess
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.errors import DataError

CFG = PreprocessCfg(size=16)
PREPROCESS = Preprocess((16, 16), CFG.mean, CFG.std, image_transform_v2(CFG, is_train=False))
LABELS = (2, 0, 1, 2, 1)
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)


def _idx(folder: Path, prefix: str = "") -> np.ndarray:
    """Both splits, since torchvision wants both; the training split has one image less."""
    folder.mkdir(parents=True)
    for name, count in ((f"{prefix}test" if prefix else "t10k", 5), (f"{prefix}train", 4)):
        images = struct.pack(">IIII", 2051, count, 28, 28) + GREY[:count].tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(LABELS[:count])
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    return GREY


def _mnist(root: Path) -> np.ndarray:
    return _idx(root / "MNIST" / "raw")


def _fashion(root: Path) -> np.ndarray:
    return _idx(root / "FashionMNIST" / "raw")


def _emnist(root: Path) -> np.ndarray:
    return _idx(root / "EMNIST" / "raw", "emnist-digits-")


def _cifar(root: Path) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = COLOUR.transpose(0, 3, 1, 2).reshape(5, -1)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": rows, "labels": list(LABELS)}))
    names = {"label_names": ["plane", "car", "bird"]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return COLOUR


def _svhn(root: Path) -> np.ndarray:
    root.mkdir(parents=True)
    digits = np.array([10 if label == 0 else label for label in LABELS])[:, None]
    savemat(root / "test_32x32.mat", {"X": COLOUR.transpose(1, 2, 3, 0), "y": digits})
    return COLOUR


def _stl(root: Path) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    large = RNG.integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    (folder / "test_X.bin").write_bytes(large.transpose(0, 3, 2, 1).tobytes())
    (folder / "test_y.bin").write_bytes(bytes(label + 1 for label in LABELS))
    (folder / "class_names.txt").write_text("plane\nbird\ncar\n")
    return large


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix == ".png" else None)


def _gtsrb(root: Path) -> np.ndarray:
    folder = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    lines = ["Filename;ClassId"]
    for i, label in enumerate(LABELS):
        _save(folder / f"{i:05}.ppm", COLOUR[i])
        lines.append(f"{i:05}.ppm;{label}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines))
    return COLOUR


def _png_as_jpg(path: Path, pixels: np.ndarray) -> None:
    """Lossless, whatever the name says: Pillow looks at the content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")


def _dtd(root: Path) -> np.ndarray:
    lines = []
    for i, label in enumerate(LABELS):
        name = f"{['banded', 'dotted', 'woven'][label]}/{i}.jpg"
        _png_as_jpg(root / "dtd" / "dtd" / "images" / name, COLOUR[i])
        lines.append(name)
    meta = root / "dtd" / "dtd" / "labels" / "test1.txt"
    meta.parent.mkdir()
    meta.write_text("\n".join(lines))
    return COLOUR


def _flowers(root: Path) -> np.ndarray:
    base = root / "flowers-102"
    for i in range(5):
        _png_as_jpg(base / "jpg" / f"image_{i + 1:05}.jpg", COLOUR[i])
    savemat(base / "imagelabels.mat", {"labels": np.array([label + 1 for label in LABELS])})
    savemat(base / "setid.mat", {"tstid": np.arange(1, 6), "trnid": [1], "valid": [1]})
    return COLOUR


def _eurosat(root: Path) -> np.ndarray:
    order = sorted(range(5), key=lambda i: LABELS[i])
    for i in order:
        name = ["AnnualCrop", "Forest", "River"][LABELS[i]]
        _png_as_jpg(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", COLOUR[i])
    return COLOUR[order]


def _pets(root: Path) -> np.ndarray:
    base, lines = root / "oxford-iiit-pet", []
    for i, label in enumerate(LABELS):
        name = f"{['beagle', 'sphynx', 'tabby_cat'][label]}_{i}"
        _png_as_jpg(base / "images" / f"{name}.jpg", COLOUR[i])
        lines.append(f"{name} {label + 1} 1 1")
    (base / "annotations").mkdir()
    (base / "annotations" / "test.txt").write_text("\n".join(lines))
    return COLOUR


SETS: dict[str, tuple[Callable[[Path], np.ndarray], list[str] | int]] = {
    "MNIST:test": (_mnist, [str(digit) for digit in range(10)]),
    "FashionMNIST:test": (_fashion, list(datasets.FashionMNIST.classes)),
    "EMNIST:test?split=digits": (_emnist, [str(digit) for digit in range(10)]),
    "CIFAR10:test": (_cifar, ["plane", "car", "bird"]),
    "SVHN:test": (_svhn, 10),
    "STL10:test": (_stl, ["plane", "bird", "car"]),
    "GTSRB:test": (_gtsrb, 43),
    "DTD:test": (_dtd, ["banded", "dotted", "woven"]),
    "Flowers102:test": (_flowers, list(datasets.Flowers102.classes)),
    "EuroSAT": (_eurosat, ["AnnualCrop", "Forest", "River"]),
    "OxfordIIITPet:test": (_pets, ["beagle", "sphynx", "tabby cat"]),
}


@pytest.fixture(autouse=True)
def no_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """These few images do not have the MD5 of the published files."""
    for name in ("CIFAR10", "SVHN", "STL10"):
        monkeypatch.setattr(getattr(datasets, name), "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", ""]])
    for module in ("cifar", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True
        )


@pytest.mark.parametrize("name", SETS)
def test_pixels_labels_and_class_order_are_torchvisions(name, tmp_path):
    write, classes = SETS[name]
    pixels = write(tmp_path / "root")
    place, _, options = name.partition("?")
    reference = f"torchvision:{place}?root={tmp_path / 'root'}" + (f"&{options}" if options else "")
    names = classes if isinstance(classes, list) else [str(i) for i in range(classes)]
    listed = labelled_images(reference, names, "w")
    assert sorted(listed.labels) == sorted(LABELS)
    if place != "EuroSAT":  # sorted by class
        assert listed.labels == LABELS
    files = []
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    assert torch.equal(decode_all(listed.items, PREPROCESS), decode_all(files, PREPROCESS))
    assert [check_image(item) for item in listed.items] == [None] * 5
    reversed_names = names[::-1]
    if isinstance(classes, list):
        turned = labelled_images(reference, reversed_names, "w").labels
        assert turned == tuple(len(names) - 1 - label for label in listed.labels)
    sent = pickle.dumps(listed.items[3])
    assert len(sent) < 1000
    assert torch.equal(
        decode_all([pickle.loads(sent)], PREPROCESS), decode_all(listed.items[3:4], PREPROCESS)
    )


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("torchvision:mnist:test", "'mnist' is unknown; did you mean MNIST"),
        ("torchvision:FakeData", r"'FakeData' is unknown \(known: Caltech101, .*USPS"),
        ("torchvision:datasets.folder:x", "is unknown"),
        ("torchvision:MNIST", "write its split, train or test: torchvision:MNIST:test"),
        ("torchvision:MNIST:dev", "write its split, train or test"),
        ("torchvision:SVHN", "write its split, such as test"),
        ("torchvision:EuroSAT:test", "has no splits; leave 'test' out"),
        (
            "torchvision:SVHN:test?rot=x",
            r"option 'rot' is unknown; did you mean root\? \(known: root",
        ),
        ("torchvision:SVHN:test?download=yes", "download='yes'; write 0 or 1"),
        ("torchvision:MNIST:test?root=ROOT", r"cannot open it in .* \(Dataset not found.*root=DIR"),
        ("torchvision:Food101:nope?root=ROOT", "cannot open it in .*Unknown value 'nope'"),
    ],
)
def test_what_is_wrong_is_one_line(reference, message, tmp_path, monkeypatch):
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("it downloads without being asked")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(DataError, match=f"^w: torchvision:.*{message}") as raised:
        unlabeled_images(reference.replace("ROOT", str(tmp_path)), "w")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_download_is_torchvisions_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: _mnist(Path(self.root)))
    assert len(unlabeled_images(f"torchvision:MNIST:test?root={tmp_path}&download=1", "w")) == 5


def test_the_root_is_relative_to_the_config_and_stays_so_when_read_again(tmp_path):
    reference = absolute_path("torchvision:MNIST:test?download=0&root=a+b/c&limit=3", tmp_path)
    assert reference == f"torchvision:MNIST:test?download=0&root={tmp_path}/a+b/c&limit=3"
    assert absolute_path(reference, tmp_path / "elsewhere") == reference
    _mnist(tmp_path / "a+b" / "c")
    assert len(unlabeled_images(reference, "w")) == 3
    assert absolute_path("x.parquet?image=a", tmp_path) == f"{tmp_path}/x.parquet?image=a"
    assert absolute_path("hf:a/b:test?config=c", tmp_path) == "hf:a/b:test?config=c"
