"""Images for the study: data sets by name, splits, and batches on the device. Import it all from here.

A data set is one uint8 tensor (N, H, W, 3) with labels and three lists of indices: train, minival (held out from
train, for choosing a recipe) and test (read once). Batches come out as normalised floats (N, 3, R, R) in
channels-last memory, at the resolution R that the network is trained and scored at. What fits goes to the device
whole; what does not stays in its memory map, from which threads read ahead.

Where data lies: the `root` argument, else $EFFNET_DATA, else data/ beside this file (so that a notebook, whose
working folder is its own, finds the same). Where it is kept decoded: $EFFNET_CACHE, else cache/ in there.
"""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effnet_augment import OFF, augment, draw, erase, mix, resize
from effnet_images import SUFFIXES, Archive, DamagedImages, Decoded, Listing, load_images, memory, provide, scan  # noqa: F401
from effnet_records import write_json

if TYPE_CHECKING:  # matplotlib, scikit-learn and torchvision take a second each, and are imported where they are used
    from matplotlib.figure import Figure

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet", "food101", "imagenet", "folder:PATH")
CLASS_COUNTS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200, "food101": 101, "imagenet": 1000}
SIZES = {"digits": 32, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "food101": 160, "imagenet": 160}
ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
    "tiny-imagenet": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", "tiny-imagenet-200"
    ),
    "food101": Archive(
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz", "85eeb15f3717b99a5da872d97d918f87", "food-101"
    ),
}
# Images of each class that a complete copy has, in train and in test
PER_CLASS = {"tiny-imagenet": (500, 50), "food101": (750, 250), "imagenet": (None, 50)}
IMAGENET_TRAIN = 1_281_167


# ---- 1. A data set -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageData:
    """A data set, whose batches come out on one device. Splits are "train", "minival" and "test"."""

    name: str  # as given to load_data
    title: str  # as shown to people
    classes: tuple[str, ...]
    images: Tensor  # (N, H, W, 3) uint8; in memory, in a memory map, or on the device
    labels: Tensor  # (N,) int64
    indices: dict[str, Tensor]  # split to (n,) int64
    fingerprint: str  # of images, labels and splits
    mean: Tensor  # (3,) over the training images, in [0, 255]
    std: Tensor  # (3,)
    decoded: Decoded  # the images as they were read, and what the files were like
    files: Sequence[str] = field(default=(), repr=False)  # each image's; none if they have none of their own
    streamed: bool = False  # images, labels and indices stay in memory (or a memory map), and are read ahead

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(index) for split, index in self.indices.items()}

    @property
    def device(self) -> torch.device:
        """Where batches come out."""
        return self.mean.device

    def describe(self) -> dict:
        """What a run record says of its data."""
        size = list(self.images.shape[1:3])
        facts = {"name": self.name, "title": self.title, "classes": len(self.classes), "stored_pixels": size}
        facts |= {"counts": self.counts, "fingerprint": self.fingerprint, "class_names": list(self.classes)}
        return facts | {"mean": self.mean.tolist(), "std": self.std.tolist()}  # what a prediction needs

    def to(self, device: torch.device | str, whole: bool | None = None) -> "ImageData":
        """This data set with its batches on `device`; itself if they come out there already.

        whole: whether the images go there too, or are read ahead from where they are; None: if they take no more than
        half of what is free there.
        """
        device = torch.empty(0, device=device).device
        if self.device == device and whole is None:
            return self
        if whole is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()
            whole = self.images.nbytes <= free // 2
        moved = {name: getattr(self, name).to(device) for name in ("mean", "std")}
        if whole:
            moved |= {name: getattr(self, name).to(device) for name in ("images", "labels")}
            moved["indices"] = {split: index.to(device) for split, index in self.indices.items()}
        return replace(self, **moved, streamed=not whole)

    def train_batches(
        self, config, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of one epoch from step `start` on: images (N, 3, R, R), labels (N,), or (N, classes) where
        images are mixed.

        Reads resolution, batch_size, seed and the augmentations (effnet_augment.OFF) of `config`. Order and draws
        depend on (seed, epoch, step) alone, whatever the device. The last, partial batch is left out: the order changes
        from epoch to epoch, so all images get their turn. shard=(i, n) yields the ith of n equal parts of every batch.
        """
        n, augmentations = config.batch_size, {name: getattr(config, name) for name in OFF}
        order = torch.randperm(self.counts["train"], generator=_generator(config.seed, epoch))
        order = self.indices["train"][order.to(self.labels.device)]
        mixed = config.mixup > 0 or config.cutmix > 0
        # Of every batch: this process's part, and, after it, what each image of that is mixed with, if it is not in it
        part = torch.arange(n).view(shard[1], -1)[shard[0]]
        rows = torch.cat([part, (part + 1) % n]) if mixed and shard[1] > 1 else part
        steps, there = range(start, len(order) // n), rows.to(order.device)
        batches = self._read(order[step * n : (step + 1) * n][there] for step in steps)
        for step, (images, labels) in zip(steps, batches, strict=True):
            draws = draw(n, _generator(config.seed, epoch, step), **augmentations)
            # A large batch in parts, for what lies between its stored and its augmented images is many times as large
            parts = [
                augment(some, config.resolution, {name: values[of] for name, values in draws.items()})
                for some, of in zip(images.split(512), rows.split(512), strict=True)
            ]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
            del parts  # else they lie there while the step is taken
            draws = {name: values[part] for name, values in draws.items()}
            if mixed:
                if len(rows) > len(part):
                    (images, others), (labels, their_labels) = images.chunk(2), labels.chunk(2)
                else:
                    others, their_labels = images.roll(-1, 0), labels.roll(-1, 0)
                images, labels = mix(images, labels, others, their_labels, draws, len(self.classes))
            images = self.normalise(images)
            yield (erase(images, draws) if config.erasing else images), labels

    def eval_batches(self, split: str, resolution: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, resized but not augmented: images (N, 3, R, R), labels (N,)."""
        for images, labels in self._read(self.indices[split].split(batch_size)):
            yield self.normalise(resize(images, resolution)), labels

    def _read(self, batches: Iterable[Tensor], threads: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored images and labels of each of `batches` (indices), on the device. Streamed ones are read by threads,
        some batches ahead, into pinned memory, from which they are copied without the host waiting for it."""
        if not self.streamed:
            yield from ((self.images[index], self.labels[index]) for index in batches)
            return

        def read(index: Tensor) -> tuple[Tensor, Tensor]:
            batch = self.images[index], self.labels[index]
            return tuple(part.pin_memory() for part in batch) if self.device.type == "cuda" else batch

        def fetch(batch: Future) -> tuple[Tensor, Tensor]:
            return tuple(part.to(self.device, non_blocking=True) for part in batch.result())

        waiting = deque()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for index in batches:
                    waiting.append(pool.submit(read, index))
                    if len(waiting) > min(2 * threads, 2**31 // (len(index) * self.images[0].nbytes)):  # or 2 GiB
                        yield fetch(waiting.popleft())
                yield from map(fetch, waiting)
            finally:
                pool.shutdown(cancel_futures=True)

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, R, R) in [0, 255] to zero mean and unit variance per channel, in channels-last memory."""
        normal = torch.empty_like(images, memory_format=torch.channels_last)
        return torch.addcmul((-self.mean / self.std).view(3, 1, 1), images, (1 / self.std).view(3, 1, 1), out=normal)


def data_root(root: str | Path | None = None) -> Path:
    """Where data lies: `root` if given, else $EFFNET_DATA, else data/ beside this file."""
    return Path(root or os.environ.get("EFFNET_DATA") or Path(__file__).parent / "data").expanduser()


def check_settings(name: str, **settings: object) -> None:
    """Refuse, with a ValueError that names it, a data set or a setting that `load_data` cannot mean."""
    kind, _, path = str(name).partition(":")
    if not isinstance(name, str) or (kind == "folder") != bool(path) or kind not in [n.split(":")[0] for n in NAMES]:
        raise ValueError(f"unknown data set {name!r}. Valid: {', '.join(NAMES)}.")
    for setting, value in settings.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if setting in ("minival", "test"):
            good, expected = isinstance(value, float | int) and 0 < value < 1, "a share above 0 and below 1"
            good = good or (setting == "test" and value is None)
        elif setting == "title":
            good, expected = isinstance(value, str | None), "text"
        elif setting == "split_seed":
            good, expected = whole and 0 <= value < 2**32, "a whole number of at least 0"
        else:
            good, expected = value is None or (whole and value >= 1), "a whole number of at least 1"
        if not good:
            raise ValueError(f"{setting}: expected {expected}, got {value!r}")
    if settings.get("test") is not None and kind != "folder":
        raise ValueError(f"test: {name} has a test set of its own, and a share of it cannot be chosen")


def class_count(name: str, root: str | Path | None = None) -> int:
    """How many classes a data set has; those of a folder are counted, without reading an image."""
    check_settings(name)
    kind, _, path = name.partition(":")
    return CLASS_COUNTS.get(kind) or len(_list_folder(path, data_root(root), None, None, 0).classes)


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    size: int | None = None,
    classes: int | None = None,
    train_per_class: int | None = None,
    minival: float = 0.1,
    test: float | None = None,
    split_seed: int = 0,
    title: str | None = None,
    download: bool = True,
    cache: str | Path | None = None,
) -> ImageData:
    """Load a data set: one of NAMES.

    size: pixels of a side at which images are stored (default: SIZES; 64 for folder:PATH).
    classes: only the first so many classes, in the data set's own order; None for all.
    train_per_class: only so many training images of each class, drawn by split_seed; None for all.
    minival: share of the training images held out, the same share of each class, drawn by split_seed.
    test: of a folder without a test set, the share of each class that becomes it, drawn by split_seed (default 0.2).
    download: fetch a missing data set that has a public address.
    cache: where images are kept decoded (default: $EFFNET_CACHE, else cache/ in root).

    folder:PATH has train/CLASS/ and test/CLASS/ (or val/; with both, val is the minival), or CLASS/ alone. PATH is
    absolute, or relative to root or to the working folder. imagenet has imagenet/train/WNID/ and imagenet/val/WNID/.

    Raises ValueError for bad arguments and damaged images (which it names), FileNotFoundError for missing data with
    the places tried and what to do.
    """
    counts = {"size": size, "classes": classes, "train_per_class": train_per_class}
    check_settings(name, **counts, minival=minival, test=test, split_seed=split_seed, title=title)
    kind, _, path = name.partition(":")
    root, size = data_root(root), size or SIZES.get(kind, 64)
    if classes is not None and classes > CLASS_COUNTS.get(kind, classes):
        raise ValueError(f"classes: {name} has {CLASS_COUNTS[kind]}, got {classes!r}")
    if kind == "folder":
        source = _list_folder(path, root, classes, test, split_seed)
    elif kind == "digits":
        source = _read_digits(size)
    elif kind in ("cifar10", "cifar100"):
        source = _read_cifar(kind, root, size, download)
    elif kind == "imagenet":
        source = _list_imagenet(root, classes)
    else:
        source = {"tiny-imagenet": _list_tiny_imagenet, "food101": _list_food101}[kind](root, classes, download)
    # All that can be wrong with the arguments is found before anything is decoded
    split = _split(name, source, classes, train_per_class, minival, split_seed)
    if source.decoded is None:
        listing, cache = Listing(source.folder, source.files), cache or os.environ.get("EFFNET_CACHE") or root / "cache"
        slug = kind
        if kind == "folder":
            place = hashlib.blake2b(os.fsencode(source.folder.absolute()), digest_size=4).hexdigest()
            slug = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', source.folder.name)}-{place}"
        slug += f"-{classes}" if classes is not None else ""
        source.decoded = load_images(listing, size, Path(cache).expanduser(), slug)
    fingerprint, mean, std = _measured(source, split)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anybody write
        images = torch.from_numpy(source.decoded.images)
    names = tuple(source.classes[:classes])
    titles = {"digits": "scikit-learn digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "food101": "Food-101"}
    titles |= {"tiny-imagenet": f"Tiny ImageNet ({len(names)} classes)", "folder": Path(path).name}
    titles |= {"imagenet": "ImageNet" if len(names) == 1000 else f"ImageNet ({len(names)} classes)"}
    return ImageData(
        name=name,
        title=title or titles[kind],
        classes=names,
        images=images,
        labels=torch.tensor(source.labels),
        indices={part: torch.from_numpy(index) for part, index in split.items()},
        fingerprint=fingerprint,
        mean=torch.tensor(mean),
        std=torch.tensor(std),
        decoded=source.decoded,
        files=[file[0] for file in source.files],
        streamed=images.nbytes > memory() // 2,
    )


@dataclass
class _Source:
    """What is in a data set: images with label and part (0 train, 1 minival, which few have, 2 test), as files under a
    folder (as in Listing), or decoded already."""

    classes: Sequence[str]
    labels: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    folder: Path | None = None
    files: list[tuple[str, int, int]] = field(default_factory=list)
    decoded: Decoded | None = None

    def add(self, files: list[tuple[str, int, int]], label: int, part: int) -> None:
        self.files += files
        self.labels += [label] * len(files)
        self.parts += [part] * len(files)


def _split(name, source: _Source, classes, train_per_class, minival, split_seed) -> dict[str, np.ndarray]:
    """Which images are train, minival and test: those of the chosen classes, minival held out of train."""
    if classes is not None and classes > len(source.classes):
        raise ValueError(f"classes: {name} has {len(source.classes)}, got {classes!r}")
    count, labels, parts = len(source.classes[:classes]), np.array(source.labels, int), np.array(source.parts, int)
    train, held_out, test = (np.flatnonzero((labels < count) & (parts == part)) for part in range(3))
    if not len(held_out):
        from sklearn.model_selection import train_test_split

        _check_classes(name, source, {"train": train, "test": test}, count)
        try:
            train, held_out = train_test_split(
                train, test_size=minival, random_state=split_seed, stratify=labels[train]
            )
        except ValueError as error:
            raise ValueError(
                f"minival: cannot hold out {minival} of {name}'s {len(train)} training images: {error}"
            ) from None
    else:  # what was not split has not been shuffled either
        train = np.random.default_rng(split_seed).permutation(train)
    if train_per_class is not None:
        train = np.concatenate([train[labels[train] == c][:train_per_class] for c in range(count)])
    split = {"train": np.sort(train), "minival": np.sort(held_out), "test": test}
    _check_classes(name, source, split, count)
    return split


def _check_classes(name: str, source: _Source, split: dict[str, np.ndarray], count: int) -> None:
    for part, index in split.items():
        images = np.bincount(np.array(source.labels, int)[index], minlength=count)
        if not images.all():
            kinds = f" (a file that ends in {', '.join(sorted(SUFFIXES))})" if source.folder else ""
            lacking = source.classes[images.argmin()]
            raise ValueError(f"{name}: class {lacking!r} has no image in {part}{kinds}; it needs some in every split")


def _measured(source: _Source, split: dict[str, np.ndarray]) -> tuple[str, list[float], list[float]]:
    """Fingerprint of images, labels and split; mean and standard deviation of the training images, per channel. Looked
    up where the cache has them, for they need all pixels."""
    about, labels = hashlib.blake2b(digest_size=16), np.array(source.labels)
    for part, index in split.items():
        about.update(part.encode() + index.astype("<i8").tobytes())
        about.update(labels[index].astype("<i8").tobytes())
    key, notes, images = about.hexdigest(), source.decoded.notes, source.decoded.images
    if key not in notes.setdefault("splits", {}):
        histogram, training = torch.zeros(3, 256, dtype=torch.float64), np.zeros(len(images), bool)
        training[split["train"]] = True
        for first in range(0, len(images), 1000):
            block = np.ascontiguousarray(images[first : first + 1000])
            about.update(block)
            pixels = torch.from_numpy(block[training[first : first + 1000]]).flatten(0, 2)  # (n * H * W, 3)
            histogram += torch.stack([torch.bincount(pixels[:, c], minlength=256) for c in range(3)])
        levels = torch.arange(256, dtype=torch.float64)
        mean = (histogram @ levels) / histogram.sum(1)
        variance = (histogram @ levels.square()) / histogram.sum(1) - mean.square()
        std = variance.clamp_min(1.0).sqrt()
        notes["splits"][key] = [about.hexdigest(), mean.float().tolist(), std.float().tolist()]
        if source.decoded.path is not None:
            with contextlib.suppress(OSError):  # a full disk, a read-only folder: then it is measured again next time
                write_json(source.decoded.path.with_suffix(".json"), notes)
    return notes["splits"][key]


# ---- 2. Data sets by name ------------------------------------------------------------------------------------------


def _in_memory(classes: Sequence[str], images: np.ndarray, labels, train: int, original: str, mode: str) -> _Source:
    """A data set whose images are decoded already, the first `train` of them for training."""
    notes = {"sizes": {original: len(images)}, "modes": {mode: len(images)}, "checks": []}
    parts = [0] * train + [2] * (len(images) - train)
    return _Source(classes, list(labels), parts, decoded=Decoded(images, notes))


def _read_digits(size: int) -> _Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey with 17 levels, as RGB. The last 360 are the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().byte()  # (N, 8, 8)
    images = _resize_stored(grey[..., None].expand(-1, -1, -1, 3).numpy(), size)
    return _in_memory([str(d) for d in range(10)], images, digits.target, len(images) - 360, "8x8", "L")


def _read_cifar(kind: str, root: Path, size: int, download: bool) -> _Source:
    """CIFAR-10 or CIFAR-100 through torchvision, which checks the md5 of every file before it reads it."""
    from torchvision.datasets import CIFAR10, CIFAR100

    folder = provide(kind, ARCHIVES[kind], root, download)
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind]
    try:
        train, test = reader(root, train=True), reader(root, train=False)
    except RuntimeError as error:
        raise ValueError(f"{folder} is damaged ({error}); delete it, then: effnet data {kind}") from None
    images = _resize_stored(np.concatenate([train.data, test.data]), size)
    return _in_memory(train.classes, images, train.targets + test.targets, len(train.data), "32x32", "RGB")


def _resize_stored(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[1] == size:
        return images
    chunks = (resize(chunk, size) for chunk in torch.from_numpy(images).split(1000))
    return torch.cat([chunk.round().byte().permute(0, 2, 3, 1) for chunk in chunks]).contiguous().numpy()


def _listed(files: list[tuple[str, int, int]], names: Sequence[str], where: Path) -> list[tuple[str, int, int]]:
    """Of `files` those with these names (paths). FileNotFoundError tells what the list at `where` has and they lack."""
    there = {file[0]: file for file in files}
    absent = [name for name in names if name not in there]
    if absent:
        raise FileNotFoundError(
            f"{where} names {len(absent)} images that are not there, the first is {absent[0]}; complete the copy"
        )
    return [there[name] for name in names]


def _check_complete(name: str, source: _Source) -> _Source:
    """Refuse a copy in which images of a class are missing."""
    for part, expected in zip((0, 2), PER_CLASS[name], strict=True):
        labels = np.array(source.labels, int)[np.array(source.parts, int) == part]
        counts = np.bincount(labels, minlength=len(source.classes))
        if expected is not None and (counts != expected).any():
            label = int((counts != expected).argmax())
            raise FileNotFoundError(
                f"{source.folder}: class {source.classes[label]!r} has {counts[label]} images for "
                f"{'test' if part else 'train'}, expected {expected}; complete the copy"
            )
    return source


def _text(path: Path, name: str) -> str:
    """A file of a data set's description."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; delete the copy, then: effnet data {name}")
    return path.read_text()


def _list_tiny_imagenet(root: Path, classes: int | None, download: bool) -> _Source:
    """Tiny ImageNet in its published layout. Its labelled val set is our test set; its own test set has no labels."""
    folder = provide("tiny-imagenet", ARCHIVES["tiny-imagenet"], root, download)
    wnids, words, annotations = (
        [line for line in _text(folder / file, "tiny-imagenet").splitlines() if line.strip()]
        for file in ("wnids.txt", "words.txt", "val/val_annotations.txt")
    )
    wnids = [wnid.strip() for wnid in wnids][:classes]
    number = {wnid: label for label, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in words if line.partition("\t")[0] in number)  # of 82,000 others too
    absent = [wnid for wnid in wnids if not (folder / "train" / wnid / "images").is_dir()]
    if absent:
        have = wnids.index(absent[0])
        raise FileNotFoundError(
            f"{folder / 'train'}: {len(absent)} of {len(wnids)} classes are missing, the first is {absent[0]}; "
            f"complete the copy, or ask for the first {have} by classes={have}"
        )
    source = _Source([words.get(wnid, wnid).split(",")[0] for wnid in wnids], folder=folder)
    for label, wnid in enumerate(wnids):
        source.add(scan(folder, f"train/{wnid}/images"), label, 0)
    rows = [line.split("\t")[:2] for line in annotations]
    labelled = [(f"val/images/{image}", number[wnid]) for image, wnid in rows if wnid in number]
    where = folder / "val" / "val_annotations.txt"
    images = _listed(scan(folder, "val/images"), [image for image, _ in labelled], where)
    for image, (_, label) in zip(images, labelled, strict=True):
        source.add([image], label, 2)
    return _check_complete("tiny-imagenet", source)


def _list_food101(root: Path, classes: int | None, download: bool) -> _Source:
    """Food-101 in its published layout: images/CLASS/NUMBER.jpg, and meta/{train,test}.json with the names by class."""
    folder, lists = provide("food101", ARCHIVES["food101"], root, download), {}
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        try:
            lists[part] = json.loads(_text(path, "food101"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete the copy, then: effnet data food101") from None
    source = _Source(sorted(lists["train"])[:classes], folder=folder)
    for label, name in enumerate(source.classes):
        there = scan(folder, f"images/{name}") if (folder / "images" / name).is_dir() else []
        for part, number in (("train", 0), ("test", 2)):
            wanted = [f"images/{image}.jpg" for image in lists[part].get(name, [])]
            source.add(_listed(there, wanted, folder / "meta" / f"{part}.json"), label, number)
    return _check_complete("food101", source)


def _list_imagenet(root: Path, classes: int | None) -> _Source:
    """ImageNet-1k as everybody lays it out: train/WNID/ and val/WNID/. Its labelled val set is our test set."""
    folder, expected = root / "imagenet", classes or CLASS_COUNTS["imagenet"]
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"imagenet: {(folder / part).absolute()} is not there. It cannot be downloaded without an account at "
                f"image-net.org: put (or link) its class folders into train/ and val/ of {folder.absolute()}"
            )
    wnids = _folders(folder / "train")[:classes]
    if len(wnids) != expected:
        raise FileNotFoundError(
            f"{folder / 'train'} has {len(wnids)} class folders, expected {expected}; complete the copy, or ask for "
            "the first so many by classes=N"
        )
    absent = [wnid for wnid in wnids if not (folder / "val" / wnid).is_dir()]
    if absent:
        raise FileNotFoundError(
            f"{folder / 'val'} has no folder {absent[0]}: sort the validation images into folders as in train"
        )
    from torchvision.models import ResNet50_Weights

    # It has the names of all classes, in the order of their wnids
    source = _Source(ResNet50_Weights.DEFAULT.meta["categories"] if classes is None else wnids, folder=folder)
    for part, number in (("train", 0), ("val", 2)):
        for label, wnid in enumerate(wnids):
            source.add(scan(folder, f"{part}/{wnid}"), label, number)
    count = source.parts.count(0)
    if classes is None and count != IMAGENET_TRAIN:
        expected = f"{IMAGENET_TRAIN:,}"
        raise FileNotFoundError(f"{folder}/train has {count:,} images, expected {expected}; complete the copy")
    return _check_complete("imagenet", source)


def _list_folder(path: str, root: Path, classes: int | None, test: float | None, split_seed: int) -> _Source:
    """PATH/{train,test}/CLASS/ (or val for test; with both it is the minival), else PATH/CLASS/, split by class.
    Classes are folders, sorted; the images may lie deeper."""
    tried = [Path(path).expanduser()] if Path(path).expanduser().is_absolute() else [root / path, Path(path)]
    folder = next((place for place in tried if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"folder:{path}: no such folder; tried {' and '.join(str(place.absolute()) for place in tried)}. "
            "Put the images there, or set $EFFNET_DATA to the folder that holds it"
        )
    there = _folders(folder)
    parts = [part for part in ("train", "val", "test") if part in there]
    if parts and ("train" not in parts or len(parts) == 1):
        lacks = "train/" if "train" not in parts else "test/ or val/"
        raise FileNotFoundError(
            f"{folder} has {' and '.join(f'{part}/' for part in parts)}, but no {lacks} of class folders (a class "
            "cannot be called train, val or test)"
        )
    if parts and test is not None:
        raise ValueError(f"test: {folder} has a test set of its own; leave the setting out")
    known = _folders(folder / "train") if parts else there
    if len(known[:classes]) < 2:
        place = folder / "train" if parts else folder
        raise ValueError(f"{place} has {len(known[:classes])} class folders; expected at least 2")
    source = _Source(known[:classes], folder=folder)
    for part in parts:
        foreign = [name for name in _folders(folder / part) if name not in known]
        if foreign:
            raise ValueError(f"{folder / part / foreign[0]}: class {foreign[0]!r} is not in {folder / 'train'}")
        number = {"train": 0, "val": 1 if "test" in parts else 2, "test": 2}[part]
        for label, name in enumerate(source.classes):
            if (folder / part / name).is_dir():
                source.add(scan(folder, f"{part}/{name}"), label, number)
    if not parts:
        for label, name in enumerate(source.classes):
            source.add(scan(folder, name), label, 0)
        from sklearn.model_selection import train_test_split

        count, share = len(source.files), 0.2 if test is None else test
        _check_classes(f"folder:{path}", source, {"train": np.arange(count)}, len(source.classes))
        try:
            _, chosen = train_test_split(range(count), test_size=share, random_state=split_seed, stratify=source.labels)
        except ValueError as error:
            raise ValueError(f"test: cannot hold out {share} of {count} images in {folder}: {error}") from None
        for index in chosen:
            source.parts[index] = 2
    return source


def _folders(place: Path) -> list[str]:
    return sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _generator(seed: int, epoch: int, step: int | None = None) -> torch.Generator:
    """The random numbers of an epoch's order (step None) or of one step's augmentation."""
    words = np.random.SeedSequence([seed, epoch, *([] if step is None else [step + 1])])
    return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))


# ---- 3. What a data set is like ------------------------------------------------------------------------------------


def inspect_data(data: ImageData) -> dict:
    """Counts per class and split, sizes and modes of the files, mean and deviation, images that occur more than once,
    and whether the cache holds what was written into it. Reads every pixel."""
    labels, indices = data.labels.numpy(), {split: index.numpy() for split, index in data.indices.items()}
    counts = {split: np.bincount(labels[index], minlength=len(data.classes)) for split, index in indices.items()}
    split_of = {i: split for split, index in indices.items() for i in index.tolist()}
    same = defaultdict(list)
    for i in sorted(split_of):
        same[hashlib.blake2b(data.images[i].numpy(), digest_size=16).digest()].append(i)
    same = [group for group in same.values() if len(group) > 1]
    notes = data.decoded.notes
    return {
        **data.describe(),
        "images_per_class": [
            {"class": name, **{split: int(count[c]) for split, count in counts.items()}}
            for c, name in enumerate(data.classes)
        ],
        "sizes": dict(sorted(notes["sizes"].items(), key=lambda item: -item[1])),
        "modes": dict(sorted(notes["modes"].items(), key=lambda item: -item[1])),
        "duplicates": [
            [
                {"image": data.files[i] if data.files else i, "split": split_of[i], "class": data.classes[labels[i]]}
                for i in group
            ]
            for group in same
        ],
        "cache": data.decoded.path
        and {
            "path": str(data.decoded.path),
            "bytes": data.images.nbytes,
            "damaged_blocks": data.decoded.damaged_blocks(),
        },
    }


def describe_data(facts: dict) -> str:
    """What `inspect_data` found, in words."""
    splits, per_class = list(facts["counts"]), facts["images_per_class"]
    lines = [f"{facts['title']}: {len(per_class)} classes, stored at {facts['stored_pixels'][0]} px"]
    for split in splits:
        least, most = (bound(row[split] for row in per_class) for bound in (min, max))
        few = next(row["class"] for row in per_class if row[split] == least)
        each = f"{least} of each class" if least == most else f"{least} ({few}) to {most} of a class"
        lines.append(f"  {split:<8} {facts['counts'][split]:>9,} images, {each}")
    sizes, total = facts["sizes"], sum(facts["sizes"].values())
    common = ", ".join(f"{size} ({count / total:.0%})" for size, count in list(sizes.items())[:3])
    sides = [min(map(int, size.split("x"))) for size in sizes]
    other = f", shorter sides from {min(sides)} to {max(sides)} px" if len(sizes) > 1 else ""
    lines.append(f"  files    {len(sizes)} {'size' if len(sizes) == 1 else 'sizes'}: {common}{other}")
    lines.append(f"  modes    {', '.join(f'{mode} {count:,}' for mode, count in facts['modes'].items())}")
    for name in ("mean", "std"):
        lines.append(f"  {name:<8} {', '.join(f'{value:.2f}' for value in facts[name])} (of 255; RGB, training images)")
    groups = facts["duplicates"]
    leaks = [group for group in groups if len({image["split"] == "test" for image in group}) == 2]
    torn = [group for group in groups if len({image["class"] for image in group}) > 1]
    lines.append(
        f"  repeated {len(groups)} images occur more than once, {len(leaks)} of them both in test and outside, "
        f"{len(torn)} under different classes"
    )
    for group in (leaks + [group for group in torn if group not in leaks])[:5]:
        named = (f"{image['image']} ({image['class']}, {image['split']})" for image in group)
        lines.append(f"           {' = '.join(named)}")
    if facts["cache"]:
        cache = facts["cache"]
        whole = f"DAMAGED in {len(cache['damaged_blocks'])} blocks: delete it" if cache["damaged_blocks"] else "whole"
        lines.append(f"  cache    {cache['path']} ({cache['bytes'] / 1e9:.2f} GB, {whole})")
    lines.append(f"  images, labels and splits have the fingerprint {facts['fingerprint']}")
    return "\n".join(lines)


def sample_grid(data: ImageData, classes: int = 12, columns: int = 10) -> "Figure":
    """Training images as they are stored, a row for each of so many classes, spread over all."""
    chosen = np.unique(np.linspace(0, len(data.classes) - 1, min(classes, len(data.classes))).round().astype(int))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * 0.8 + 1.6, len(chosen) * 0.8), layout="constrained")
    axes = figure.subplots(len(chosen), columns, squeeze=False)
    train = data.indices["train"]
    for row, c in zip(axes, chosen, strict=True):
        images = train[data.labels[train] == c]
        for ax, i in zip(row, images[:: max(1, len(images) // columns)].tolist(), strict=False):
            ax.imshow(data.images[i].numpy())
        for ax in row:
            ax.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(data.classes[c][:18], rotation=0, ha="right", va="center", fontsize=8)
    return figure
