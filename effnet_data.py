"""Images for the study: data sets, decoded cache, splits, and augmentation in batches on the device.

A data set is one uint8 tensor (N, H, W, 3) with labels and three lists of indices: train, minival (held out from
train, for choosing a recipe) and test (read once). Batches come out as normalised floats (N, 3, R, R) in
channels-last memory, at the resolution R that the network is trained and scored at.

Where data lies: the `root` argument, else $EFFNET_DATA, else data/ beside this file (so that a notebook, whose
working folder is its own, finds the same).
"""

import hashlib
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets.utils import download_and_extract_archive

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet", "folder:PATH")
CLASS_COUNTS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


# ---- 1. Data sets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageData:
    """A data set in memory, on one device. Splits are "train", "minival" and "test"."""

    name: str  # as given to load_data
    title: str  # as shown to people
    classes: tuple[str, ...]
    images: Tensor  # (N, H, W, 3) uint8
    labels: Tensor  # (N,) int64
    indices: dict[str, Tensor]  # split to (n,) int64
    fingerprint: str  # of images, labels and splits
    mean: Tensor  # (3,) over the training images, in [0, 255]
    std: Tensor  # (3,)

    @property
    def counts(self) -> dict[str, int]:
        return {split: len(index) for split, index in self.indices.items()}

    def describe(self) -> dict:
        """What a run record says of its data."""
        size = list(self.images.shape[1:3])
        facts = {"name": self.name, "title": self.title, "classes": len(self.classes), "stored_pixels": size}
        return facts | {"counts": self.counts, "fingerprint": self.fingerprint}

    def to(self, device: torch.device | str) -> "ImageData":
        """This data set with all its tensors on `device`; itself if it is there already."""
        if self.images.device == torch.empty(0, device=device).device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("images", "labels", "mean", "std")}
        return replace(self, **moved, indices={split: index.to(device) for split, index in self.indices.items()})

    def train_batches(
        self, config, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of one epoch from step `start` on: images (N, 3, R, R), labels (N,).

        Reads resolution, batch_size, seed, crop_area and flip of `config`. Order and augmentation depend on
        (seed, epoch, step) alone, whatever the device. The last, partial batch is left out: the order changes
        from epoch to epoch, so all images get their turn. shard=(i, n) yields the ith of n equal parts of every batch.
        """
        order = torch.randperm(self.counts["train"], generator=_generator(config.seed, epoch))
        order = self.indices["train"][order.to(self.labels.device)]
        share = config.batch_size // shard[1]
        part = slice(shard[0] * share, (shard[0] + 1) * share)
        for step in range(start, len(order) // config.batch_size):
            index = order[step * config.batch_size : (step + 1) * config.batch_size][part]
            boxes = draw_boxes(config.batch_size, _generator(config.seed, epoch, step), config.crop_area, config.flip)
            columns, rows = (edges[part] for edges in boxes)
            images = _resample(self.images[index], columns, rows, config.resolution)
            yield self.normalise(images), self.labels[index]

    def eval_batches(self, split: str, resolution: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images of a split in order, resized but not augmented: images (N, 3, R, R), labels (N,)."""
        for index in self.indices[split].split(batch_size):
            yield self.normalise(resize(self.images[index], resolution)), self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, R, R) in [0, 255] to zero mean and unit variance per channel, in channels-last memory."""
        images = (images - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)
        return images.contiguous(memory_format=torch.channels_last)


def check_settings(name: str, **settings: object) -> None:
    """Refuse, with a ValueError that names it, a data set or a setting that `load_data` cannot mean."""
    kind, _, path = str(name).partition(":")
    if not isinstance(name, str) or (kind == "folder") != bool(path) or kind not in [n.split(":")[0] for n in NAMES]:
        raise ValueError(f"unknown data set {name!r}. Valid: {', '.join(NAMES)}.")
    for setting, value in settings.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if setting == "minival":
            good, expected = isinstance(value, float | int) and 0 < value < 1, "a share above 0 and below 1"
        elif setting == "title":
            good, expected = isinstance(value, str | None), "text"
        elif setting == "split_seed":
            good, expected = whole and 0 <= value < 2**32, "a whole number of at least 0"
        else:
            good, expected = value is None or (whole and value >= 1), "a whole number of at least 1"
        if not good:
            raise ValueError(f"{setting}: expected {expected}, got {value!r}")


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    size: int | None = None,
    classes: int | None = None,
    train_per_class: int | None = None,
    minival: float = 0.1,
    split_seed: int = 0,
    title: str | None = None,
    download: bool = True,
) -> ImageData:
    """Load digits, cifar10, cifar100, tiny-imagenet, or folder:PATH (with train/CLASS/ and test/CLASS/ or val/CLASS/).

    size: pixels of a side at which images are stored (default: the set's own; 64 for folder:PATH).
    classes: only the first so many classes; None for all.
    train_per_class: only so many training images of each class, drawn by split_seed; None for all.
    minival: share of the training images held out, the same share of each class, drawn by split_seed.
    download: fetch a missing data set that has a public address.

    PATH is absolute, or relative to root or to the working folder. Raises ValueError for bad arguments and damaged
    images (which it names), FileNotFoundError for missing data with the places tried and what to do.
    """
    counts = {"size": size, "classes": classes, "train_per_class": train_per_class}
    check_settings(name, **counts, minival=minival, split_seed=split_seed, title=title)
    kind, _, path = name.partition(":")
    root = Path(root or os.environ.get("EFFNET_DATA") or Path(__file__).parent / "data").expanduser()
    if kind == "digits":
        source = _read_digits(size or 32)
    elif kind in ("cifar10", "cifar100"):
        source = _read_cifar(kind, root, size or 32, download)
    elif kind == "tiny-imagenet":
        source = _read_tiny_imagenet(root, size or 64, classes, download)
    else:
        source = _read_folder(path, root, size or 64)
    titles = {"digits": "scikit-learn digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
    titles |= {"tiny-imagenet": f"Tiny ImageNet ({len(source.classes)} classes)", "folder": Path(path).name}
    title = title or titles[kind]
    return _assemble(str(name), title, source, classes, train_per_class, minival, split_seed)


@dataclass(frozen=True)
class _Source:
    classes: tuple[str, ...]
    images: np.ndarray  # (N, H, W, 3) uint8
    labels: np.ndarray  # (N,)
    is_test: np.ndarray  # (N,) bool


def _assemble(name, title, source: _Source, classes, train_per_class, minival, split_seed) -> ImageData:
    """Choose classes, split train from minival, fingerprint, and measure the training images' mean and deviation."""
    if classes is not None and classes > len(source.classes):
        raise ValueError(f"classes: {name} has {len(source.classes)}, got {classes!r}")
    names = source.classes[:classes]
    chosen = source.labels < len(names)
    train, test = (np.flatnonzero(chosen & (source.is_test == part)) for part in (False, True))
    try:
        train, held_out = train_test_split(
            train, test_size=minival, random_state=split_seed, stratify=source.labels[train]
        )
    except ValueError as error:
        raise ValueError(
            f"minival: cannot hold out {minival} of {name}'s {len(train)} training images: {error}"
        ) from None
    if train_per_class is not None:
        train = np.concatenate([train[source.labels[train] == c][:train_per_class] for c in range(len(names))])
    split = {"train": np.sort(train), "minival": np.sort(held_out), "test": test}
    for part, index in split.items():
        absent = [names[c] for c in range(len(names)) if c not in set(source.labels[index].tolist())]
        if absent:
            raise ValueError(f"{name}: class {absent[0]!r} has no image in {part}; it needs some in every split")
    digest = hashlib.blake2b(digest_size=16)
    for part, index in split.items():
        digest.update(part.encode() + index.astype("<i8").tobytes())
        digest.update(source.labels[index].astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(source.images))
    images = torch.from_numpy(source.images)
    pixels = images[torch.from_numpy(split["train"])].flatten(0, 2)  # (n * H * W, 3)
    histogram = torch.stack([torch.bincount(pixels[:, c], minlength=256) for c in range(3)]).double()
    levels = torch.arange(256, dtype=torch.float64)
    mean = (histogram @ levels) / len(pixels)
    variance = (histogram @ levels.square()) / len(pixels) - mean.square()
    return ImageData(
        name=name,
        title=title,
        classes=names,
        images=images,
        labels=torch.from_numpy(source.labels.astype(np.int64)),
        indices={part: torch.from_numpy(index) for part, index in split.items()},
        fingerprint=digest.hexdigest(),
        mean=mean.float(),
        std=variance.clamp_min(1.0).sqrt().float(),
    )


def _read_digits(size: int) -> _Source:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey with 17 levels, as RGB. The last 360 are the test set."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().byte()  # (N, 8, 8)
    images = resize(grey[..., None].expand(-1, -1, -1, 3), size)
    images = images.round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    is_test = np.arange(len(images)) >= len(images) - 360
    return _Source(tuple(str(d) for d in range(10)), images, digits.target, is_test)


def _read_cifar(kind: str, root: Path, size: int, download: bool) -> _Source:
    """CIFAR-10 or CIFAR-100 through torchvision, which checks the md5 of every file before it reads it."""
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[kind]
    _ensure(kind, root / folder, download, lambda there: reader(there, download=True))
    try:
        train, test = reader(root, train=True), reader(root, train=False)
    except RuntimeError as error:
        raise ValueError(f"{root / folder} is damaged ({error}); delete it, then: effnet data {kind}") from None
    images = np.concatenate([train.data, test.data])
    if size != images.shape[1]:
        images = _resize_stored(images, size)
    is_test = np.arange(len(images)) >= len(train.data)
    return _Source(tuple(train.classes), images, np.array(train.targets + test.targets), is_test)


def _read_tiny_imagenet(root: Path, size: int, classes: int | None, download: bool) -> _Source:
    """Tiny ImageNet in its published layout. Its labelled val set is our test set; its own test set has no labels."""
    folder = root / "tiny-imagenet-200"
    _ensure(
        "tiny-imagenet",
        folder,
        download,
        lambda there: download_and_extract_archive(TINY_IMAGENET[0], there, md5=TINY_IMAGENET[1]),
    )
    for file in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing; delete the copy, then: effnet data tiny-imagenet")
    wnids = (folder / "wnids.txt").read_text().split()[:classes]
    number = {wnid: label for label, wnid in enumerate(wnids)}
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines())
    absent = [wnid for wnid in wnids if not (folder / "train" / wnid / "images").is_dir()]
    if absent:
        have = next(i for i, wnid in enumerate(wnids) if wnid in absent)
        raise FileNotFoundError(
            f"{folder / 'train'}: {len(absent)} of {len(wnids)} classes are missing, the first is {absent[0]}; "
            f"complete the copy, or ask for the first {have} by classes={have}"
        )
    files, labels = [], []
    for label, wnid in enumerate(wnids):
        images = sorted((folder / "train" / wnid / "images").iterdir())
        files += images
        labels += [label] * len(images)
    train_count = len(files)
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        image, wnid = line.split("\t")[:2]
        if wnid in number:
            files.append(folder / "val" / "images" / image)
            labels.append(number[wnid])
    names = tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)
    is_test = np.arange(len(files)) >= train_count
    return _Source(names, _decode(files, size, root), np.array(labels), is_test)


def _read_folder(path: str, root: Path, size: int) -> _Source:
    """PATH/train/CLASS/* and PATH/test/CLASS/* (or val/ for test/). Classes are the folders of train, sorted."""
    tried = [Path(path).expanduser()] if Path(path).expanduser().is_absolute() else [root / path, Path(path)]
    folder = next((place for place in tried if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"folder:{path}: no such folder; tried {' and '.join(str(place.absolute()) for place in tried)}. "
            "Put the images there, or set $EFFNET_DATA to the folder that holds it"
        )
    parts = [next((folder / p for p in names if (folder / p).is_dir()), None) for names in (["train"], ["test", "val"])]
    if None in parts:
        raise FileNotFoundError(f"{folder} has no {'train/' if parts[0] is None else 'test/ or val/'} of class folders")
    classes = tuple(sorted(place.name for place in parts[0].iterdir() if place.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"{parts[0]} has {len(classes)} class folders; expected at least 2")
    foreign = [place.name for place in parts[1].iterdir() if place.is_dir() and place.name not in classes]
    if foreign:
        raise ValueError(f"{parts[1] / foreign[0]}: class {foreign[0]!r} is not in {parts[0]}")
    files, labels, is_test = [], [], []
    for part in parts:
        for label, name in enumerate(classes):
            images = sorted(f for f in (part / name).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
            files += images
            labels += [label] * len(images)
            is_test += [part is parts[1]] * len(images)
    return _Source(classes, _decode(files, size, root), np.array(labels), np.array(is_test))


# ---- 2. Fetching and decoding --------------------------------------------------------------------------------------


def _ensure(name: str, folder: Path, download: bool, fetch: Callable[[Path], object]) -> None:
    """Make sure that `folder` is there: fetch(PLACE) beside it, then rename, so that it is never half there."""
    if folder.is_dir():
        return
    missing = f"{name} is not at {folder.absolute()} (the root given, else $EFFNET_DATA, else data/)"
    if not download:
        raise FileNotFoundError(f"{missing}; fetch it with: effnet data {name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as place:
        try:
            fetch(Path(place))
            shutil.move(Path(place) / folder.name, folder)
        except Exception as error:  # URL, socket, checksum and archive errors alike
            raise FileNotFoundError(
                f"{missing}, and fetching it failed ({type(error).__name__}: {error}). "
                f"With a network: effnet data {name}; without one: unpack the original archive there by hand"
            ) from None


def _decode(files: list[Path], size: int, root: Path) -> np.ndarray:
    """Images (N, size, size, 3) uint8 of `files`, decoded once and kept in root/cache under a name that follows
    from the files' paths, sizes and times, so that a changed source is decoded anew."""
    listing = hashlib.blake2b(f"{size} {Image.__version__}".encode(), digest_size=12)
    for file in files:
        stat = file.stat()
        listing.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    cached = root / "cache" / f"{listing.hexdigest()}.npy"
    if cached.exists():
        try:
            images = np.load(cached)
            if images.shape == (len(files), size, size, 3) and images.dtype == np.uint8:
                return images
        except (ValueError, EOFError, OSError):
            pass
        warnings.warn(f"{cached} is damaged; decoding the images again", stacklevel=2)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = np.stack(list(pool.map(partial(_decode_one, size=size), files)))
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".partial", delete=False) as file:
            np.save(file, images)
        os.replace(file.name, cached)
    except OSError as error:
        warnings.warn(f"no decoded cache ({error}); the images will be decoded again next time", stacklevel=2)
    return images


def _decode_one(file: Path, size: int) -> np.ndarray:
    """One image as (size, size, 3) RGB: upright, the shorter side resized, the middle cut out."""
    try:
        with Image.open(file) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}); repair or remove it") from None


def _resize_stored(images: np.ndarray, size: int) -> np.ndarray:
    chunks = (resize(chunk, size) for chunk in torch.from_numpy(images).split(1000))
    return torch.cat([chunk.round().byte().permute(0, 2, 3, 1) for chunk in chunks]).contiguous().numpy()


# ---- 3. Resizing and augmentation, in batches, on the device -------------------------------------------------------


def resize(images: Tensor, resolution: int) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, R, R) in [0, 255]: bilinear, antialiased where it shrinks."""
    if images.shape[1:3] == (resolution, resolution):
        return images.permute(0, 3, 1, 2).float()
    whole = torch.tensor([[0.0, 1.0]])
    return _resample(images, whole, whole, resolution)


def augment(
    images: Tensor, resolution: int, generator: torch.Generator, crop_area: float = 0.25, flip: bool = True
) -> Tensor:
    """Random resized crop and horizontal flip, each sample its own: uint8 (N, H, W, 3) to float (N, 3, R, R)."""
    return _resample(images, *draw_boxes(len(images), generator, crop_area, flip), resolution)


def draw_boxes(n: int, generator: torch.Generator, crop_area: float, flip: bool) -> tuple[Tensor, Tensor]:
    """The boxes of n random crops: left and right edges, upper and lower edges, (n, 2) each, in [0, 1].

    A crop covers a share of the image drawn from [crop_area, 1], with an aspect ratio from 3/4 to 4/3 (both as
    torchvision's RandomResizedCrop); crop_area = 1 takes whole images. Half of them have left and right exchanged
    if `flip`. `generator` lives on the CPU, so that the same draws are made for every device.
    """
    area, ratio, left, top, mirrored = torch.rand(5, n, generator=generator)
    if crop_area < 1:
        area = crop_area + (1 - crop_area) * area
        ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    else:
        width = height = torch.ones(n)
    x0, y0 = left * (1 - width), top * (1 - height)
    columns, rows = torch.stack([x0, x0 + width], 1), torch.stack([y0, y0 + height], 1)
    if flip:
        columns = torch.where(mirrored[:, None] < 0.5, columns.flip(1), columns)
    return columns, rows


def _resample(images: Tensor, columns: Tensor, rows: Tensor, resolution: int) -> Tensor:
    """Cut the box columns x rows out of each image and resize it: two products with interpolation matrices.

    columns, rows: (N or 1, 2) edges in [0, 1]; a right edge before the left mirrors. One code for crop, resize and
    flip, per sample and antialiased: torch's own interpolate does one box for the whole batch, grid_sample aliases.
    """
    columns, rows = columns.to(images.device, non_blocking=True), rows.to(images.device, non_blocking=True)
    x = images.permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    down = _interpolation(rows, x.shape[2], resolution)  # (N or 1, R, H)
    across = _interpolation(columns, x.shape[3], resolution)  # (N or 1, R, W)
    return down[:, None] @ x @ across[:, None].mT


def _interpolation(edges: Tensor, length: int, resolution: int) -> Tensor:
    """Weights (N, resolution, length) of bilinear interpolation over the box `edges`, its triangle as wide as an
    output pixel where that is wider than an input pixel (antialiasing), as in Pillow and torch's interpolate."""
    first, last = edges[:, :1] * length, edges[:, 1:] * length  # (N, 1) in input pixels
    scale = (last - first) / resolution
    centre = first + scale * (torch.arange(resolution, device=edges.device) + 0.5)  # (N, R)
    pixel = torch.arange(length, device=edges.device) + 0.5  # (length,)
    reach = scale.abs().clamp_min(1)[..., None]
    weights = (1 - (pixel - centre[..., None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(2, keepdim=True)


def _generator(seed: int, epoch: int, step: int | None = None) -> torch.Generator:
    """The random numbers of an epoch's order (step None) or of one step's augmentation."""
    words = np.random.SeedSequence([seed, epoch, *([] if step is None else [step + 1])])
    return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
