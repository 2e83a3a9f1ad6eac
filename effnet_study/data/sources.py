"""Data sets by name: which files, classes and labels they have. load.py loads them.

TO ADD A DATA SET, write a reader in section 2, add a line to DATA_SETS in section 3, and name it in docs/data.md. A
download is one archive with one folder (`Archive`); without one, people put the files into ROOT/NAME themselves.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, model_validator

from effnet_lib import Count, Settings
from effnet_study.data.archives import Archive
from effnet_study.data.augment import resize
from effnet_study.data.decode import Decoded
from effnet_study.data.image_files import File, is_hidden, kind_of, scan
from effnet_study.files import plain

TRAIN, MINIVAL, TEST = range(3)  # the part of a data set that an image belongs to
SPLITS = {"train": TRAIN, "training": TRAIN, "val": MINIVAL, "valid": MINIVAL, "validation": MINIVAL, "dev": MINIVAL}
SPLITS |= {"test": TEST, "testing": TEST}  # names of folders, in any case
IMAGENET_TRAIN = 1_281_167  # images
Fraction = Annotated[float, Field(gt=0, lt=1)]
Place = str | Path | None

# ---- 1. Settings and sources ---------------------------------------------------------------------------------------


class DataSettings(Settings):
    """Which images to load: the arguments of `load_data` that a profile may give."""

    name: str  # one of NAMES
    size: Count | None = None  # pixels of a side at which images are stored (default: the data set's)
    classes: Count | None = None  # use only this many classes, the first in the data set's order
    train_per_class: Count | None = None  # use only this many training images per class, drawn at random
    # Fraction of the training images held out at random, the same of each class (default: 0.1, or a folder's val/)
    minival: Fraction | None = None
    test: Fraction | None = None  # fraction to draw as test set, for a folder without one (default: 0.2)
    title: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        kind, _, path = self.name.partition(":")
        if (kind == "folder") != bool(path) or kind not in DATA_SETS:
            raise ValueError(f"unknown data set {self.name!r}. Valid: {', '.join(NAMES)}.")
        if self.test is not None and kind != "folder":
            raise ValueError(f"test: {self.name} has a test set of its own, so a fraction cannot be chosen")
        if self.classes is not None and self.classes > CLASS_COUNTS.get(kind, self.classes):
            raise ValueError(f"classes: {self.name} has {CLASS_COUNTS[kind]}, got {self.classes!r}")
        return self

    @property
    def kind(self) -> str:
        """The name's part before a colon: "folder" of a folder."""
        return self.name.partition(":")[0]

    def given(self) -> dict:
        """Return the settings that were given, without defaults."""
        return self.model_dump(exclude_unset=True)


@dataclass
class Source:
    """The images of a data set before they are split: files in a folder, or decoded images."""

    classes: Sequence[str]
    folder: Path | None = None
    files: list[File] = field(default_factory=list)  # paths in the folder, with bytes and times
    labels: list[int] = field(default_factory=list)  # of each image
    parts: list[int] = field(default_factory=list)  # of each image: TRAIN, MINIVAL or TEST
    decoded: Decoded | None = None
    test_given: bool = True  # False if the test set has to be drawn from the training images
    layout: str = ""  # which folder was taken for which split, in words
    left_out: Counter = field(default_factory=Counter)  # what the folder has besides, by kind

    def add(self, files: list[File], label: int, part: int) -> None:
        """Add images of one class and part."""
        self.files += files
        self.labels += [label] * len(files)
        self.parts += [part] * len(files)

    def add_folders(self, parts: Mapping[str, int], names: Sequence[str]) -> None:
        """Add the images of folder/PART/NAME for every part and for the name of every class. ValueError if they lie in
        several folders deeper, but not in NAME itself, because these folders can be the classes."""
        for part, number in parts.items():
            self.leave_out(part, names)
            for label, name in enumerate(names):
                place = os.path.join(part, name)
                files = scan(self.folder, place, self.left_out)
                deeper = sorted({os.path.dirname(file[0]) for file in files})
                if len(deeper) > 1 and place not in deeper:
                    some = ", ".join(f"{os.path.relpath(path, place)}/" for path in deeper[:3])
                    raise ValueError(
                        f"{self.folder / place} holds no images, only folders ({some}), so it is not clear which "
                        "folders are classes; expected CLASS/ with images in it, or such folders in train/ and test/ "
                        f"(names of splits: {', '.join(SPLITS)})"
                    )
                self.add(files, label, number)

    def leave_out(self, under: str, taken: Iterable[str]) -> None:
        """Count what folder/under has besides the names that are taken."""
        self.left_out.update(kind_of(name) for name in os.listdir(self.folder / under) if name not in taken)

    def describe(self) -> str:
        """Say in a line what was taken for what, and the most common kinds of what was left out."""
        kinds = [f"{kind} ({count:,})" for kind, count in self.left_out.most_common()]
        left_out = f"left out: {', '.join(kinds[:10])}{', ...' * (len(kinds) > 10)}" if kinds else ""
        return plain(f"{self.folder.name}: {'; '.join(filter(None, [self.layout, left_out]))}")


# ---- 2. Readers ----------------------------------------------------------------------------------------------------
# A reader takes the settings and the data set's folder, and returns a Source. Whatever it raises, and a wrong number of
# images, are reported with the way to get a good copy.


def _read_digits(settings: DataSettings, folder: Path) -> Source:
    """Read scikit-learn's 1,797 handwritten digits, 8 x 8 px, grey, as RGB. The last 360 are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (digits.images * 255 / 16).round().astype(np.uint8)  # (N, 8, 8)
    images = np.repeat(grey[..., None], 3, axis=3)
    return _in_memory(settings, list("0123456789"), images, digits.target, len(images) - 360, "L")


def _read_cifar(settings: DataSettings, folder: Path) -> Source:
    """Read CIFAR-10 or CIFAR-100 by torchvision, which checks the md5 of every file first."""
    from torchvision.datasets import CIFAR10, CIFAR100

    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[settings.name]
    train, test = (reader(folder.parent, train=part) for part in (True, False))
    images = np.concatenate([train.data, test.data])
    return _in_memory(settings, train.classes, images, train.targets + test.targets, len(train.data), "RGB")


def _in_memory(
    settings: DataSettings, classes: Sequence[str], images: np.ndarray, labels: Iterable[int], train: int, mode: str
) -> Source:
    """Return the source of images (N, H, W, 3) that need no decoding. The first `train` of them are for training."""
    notes = {"sizes": {"{1}x{0}".format(*images.shape[1:]): len(images)}, "modes": {mode: len(images)}, "checks": []}
    chunks = (resize(chunk, settings.size) for chunk in torch.from_numpy(images).split(1000))
    images = torch.cat([chunk.round().byte().permute(0, 2, 3, 1) for chunk in chunks]).contiguous().numpy()
    parts = [TRAIN] * train + [TEST] * (len(images) - train)
    return Source(classes, labels=list(labels), parts=parts, decoded=Decoded(images, notes))


def _list_tiny_imagenet(settings: DataSettings, folder: Path) -> Source:
    """List Tiny ImageNet in its published layout. Its labelled val set is our test set; its test set has no labels."""
    wnids = (folder / "wnids.txt").read_text(encoding="utf-8").split()[: settings.classes]
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text(encoding="utf-8").splitlines())
    source = Source([words.get(wnid, wnid).split(",")[0] for wnid in wnids], folder)
    for label, wnid in enumerate(wnids):
        source.add(scan(folder, f"train/{wnid}/images"), label, TRAIN)
    there = {file[0]: file for file in scan(folder, "val/images")}
    for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        image, wnid, *_box = line.split("\t")
        if wnid in wnids and f"val/images/{image}" in there:
            source.add([there[f"val/images/{image}"]], wnids.index(wnid), TEST)
    return source


def _list_food101(settings: DataSettings, folder: Path) -> Source:
    """List Food-101 in its published layout: images/CLASS/NUMBER.jpg, and their names in meta/{train,test}.json."""
    lists = [json.loads((folder / "meta" / f"{part}.json").read_text(encoding="utf-8")) for part in ("train", "test")]
    source = Source(sorted(lists[0])[: settings.classes], folder)
    for label, name in enumerate(source.classes):
        there = {file[0]: file for file in scan(folder, f"images/{name}")}
        for part, names in zip((TRAIN, TEST), lists, strict=True):
            paths = [f"images/{image}.jpg" for image in names[name]]
            source.add([there[path] for path in paths if path in there], label, part)
    return source


def _list_imagenet(settings: DataSettings, folder: Path) -> Source:
    """List ImageNet-1k in the usual layout, train/WNID/ and val/WNID/. Its labelled val set is our test set."""
    expected = settings.classes or CLASS_COUNTS["imagenet"]
    wnids, val = (_folders(folder / part)[: settings.classes] for part in ("train", "val"))
    for part, found in {"train": wnids, "val": val}.items():
        if len(found) != expected:
            raise FileNotFoundError(
                f"{(folder / part).absolute()} has {len(found)} class folders, expected {expected}. ImageNet cannot be "
                "downloaded without an account at image-net.org: put (or link) its class folders into train/ and val/, "
                "or use only complete classes, the first ones: classes=N"
            )
    from torchvision.models import ResNet50_Weights  # it has the names of all classes, in the order of their wnids

    source = Source(ResNet50_Weights.DEFAULT.meta["categories"] if settings.classes is None else wnids, folder)
    source.add_folders({"train": TRAIN, "val": TEST}, wnids)
    count = source.parts.count(TRAIN)
    if settings.classes is None and count != IMAGENET_TRAIN:
        raise FileNotFoundError(f"{folder}/train has {count:,} images, expected {IMAGENET_TRAIN:,}; complete the copy")
    return source


def _list_folder(settings: DataSettings, folder: Path) -> Source:
    """List train/CLASS/ and test/CLASS/ (or val/; with both, val is the minival), or CLASS/ alone."""
    names = [name for name in _folders(folder) if name.lower() in SPLITS]
    found = {SPLITS[name.lower()]: name for name in names}
    if names and (TRAIN not in found or len(found) == 1 or len(found) < len(names)):
        raise FileNotFoundError(
            f"{folder} has {' and '.join(f'{name}/' for name in names)}; expected train/, and test/ or val/, of class "
            f"folders, each once (a class cannot be called {', '.join(SPLITS)})"
        )
    if found and settings.test is not None:
        raise ValueError(f"test: {folder} has a test set of its own; leave the setting out")
    classes = _folders(folder / found.get(TRAIN, ""))
    if len(classes) < 2:
        raise ValueError(f"{folder / found.get(TRAIN, '')} has {len(classes)} class folders; expected at least 2")
    for part in found.values():
        if others := set(_folders(folder / part)) - set(classes):
            raise ValueError(f"{folder / part}: class {min(others)!r} is not in {folder / found[TRAIN]}")
    if TEST not in found and MINIVAL in found:
        found[TEST] = found.pop(MINIVAL)
    if MINIVAL in found and settings.minival is not None:
        raise ValueError(f"minival: {folder} has a minival of its own, {found[MINIVAL]}/; leave the setting out")
    source = Source(classes[: settings.classes], folder, test_given=bool(found))
    source.add_folders({name: part for part, name in sorted(found.items())} or {"": TRAIN}, source.classes)
    if found:
        source.leave_out("", names)
    train, minival, test = (f"{found[part]}/" if part in found else "drawn from train" for part in range(3))
    some = ", ".join(source.classes[:5]) + ", ..." * (len(source.classes) > 5)
    source.layout = f"train = {train if found else 'CLASS/'}, minival = {minival}, test = {test}; "
    source.layout += f"{len(source.classes)} classes: {some}"
    return source


def _folders(place: Path) -> list[str]:
    """List the folders in `place` by name, without hidden ones. Empty if there is no such place."""
    if not place.is_dir():
        return []
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not is_hidden(path.name))


# ---- 3. The data sets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is read."""

    title: str  # for people
    classes: int | None
    size: int  # pixels of a side at which its images are stored, unless the settings say otherwise
    read: Callable[[DataSettings, Path], Source]
    archive: Archive | None = None  # where it can be downloaded; without one it lies in root/NAME
    per_class: tuple[int | None, int | None] = (None, None)  # images that each class has in train and test, if checked


_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar"
_CIFAR10 = Archive(f"{_CIFAR}-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py")
_CIFAR100 = Archive(f"{_CIFAR}-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python")
_TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET = Archive(_TINY, "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200")
_FOOD = "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"
_FOOD101 = Archive(_FOOD, "85eeb15f3717b99a5da872d97d918f87", "food-101")

DATA_SETS = {
    "digits": DataSet("scikit-learn digits", 10, 32, _read_digits),
    "cifar10": DataSet("CIFAR-10", 10, 32, _read_cifar, _CIFAR10),
    "cifar100": DataSet("CIFAR-100", 100, 32, _read_cifar, _CIFAR100),
    "tiny-imagenet": DataSet("Tiny ImageNet", 200, 64, _list_tiny_imagenet, _TINY_IMAGENET, (500, 50)),
    "food101": DataSet("Food-101", 101, 160, _list_food101, _FOOD101, (750, 250)),
    "imagenet": DataSet("ImageNet", 1000, 160, _list_imagenet, None, (None, 50)),
    "folder": DataSet("", None, 64, _list_folder),
}
NAMES = (*(name for name in DATA_SETS if name != "folder"), "folder:PATH")
CLASS_COUNTS = {name: known.classes for name, known in DATA_SETS.items() if known.classes is not None}
SIZES = {name: known.size for name, known in DATA_SETS.items() if name != "folder"}
