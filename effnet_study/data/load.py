"""Loading a data set: find it, decode its images, split it, and measure its training images.

Data lies in `root`: as given, else $EFFNET_DATA, else data/ in the project's folder. Decoded images are cached in
$EFFNET_CACHE, else in root/cache.
"""

import contextlib
import hashlib
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torch

from effnet_study.data.archives import provide
from effnet_study.data.dataset import ImageData
from effnet_study.data.decode import BLOCK, load_images
from effnet_study.data.sources import DATA_SETS, MINIVAL, TEST, TRAIN, DataSettings, Place, Source
from effnet_study.files import ROOT, write_json
from effnet_study.machine import memory

SPLIT_SEED = 0  # of all random choices of images, so that every run sees the same splits


def data_root(root: Place = None) -> Path:
    """Return where data lies: `root` if given, else $EFFNET_DATA, else data/ in the project's folder."""
    return Path(root or os.environ.get("EFFNET_DATA") or ROOT / "data").expanduser()


def load_data(name: str, root: Place = None, *, download: bool = True, cache: Place = None, **settings) -> ImageData:
    """Load a data set: one of NAMES. `settings` are those of DataSettings. PATH of folder:PATH is absolute, or relative
    to root or to the working folder. download: fetch a missing data set that has a public address.

    Raises ValueError for bad arguments, damaged copies and damaged images (which it names), FileNotFoundError for
    missing data with the places tried and what to do."""
    settings, root = DataSettings(name=name, **settings), data_root(root)
    known = DATA_SETS[settings.kind]
    settings = settings.replace(size=settings.size or known.size)
    source = find_source(settings, root, download)
    if source.layout or source.left_out:
        print(source.describe(), flush=True)
    indices = _split(settings, source)  # so every error in the settings comes before anything is decoded
    if source.decoded is None:
        cache, name = Path(cache or os.environ.get("EFFNET_CACHE") or root / "cache").expanduser(), settings.kind
        if name == "folder":
            place = hashlib.blake2b(os.fsencode(source.folder.absolute()), digest_size=4).hexdigest()
            name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', source.folder.name)}-{place}"
        name += "" if settings.classes is None else f"-{settings.classes}"
        source.decoded = load_images(source.folder, source.files, settings.size, cache, name)
    fingerprint, mean, std = _measured(source, indices)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        images = torch.from_numpy(source.decoded.images)
    classes, title = tuple(source.classes[: settings.classes]), known.title or source.folder.name
    if known.classes and len(classes) < known.classes:
        title = f"{title} ({len(classes)} classes)"
    return ImageData(
        name=settings.name,
        title=settings.title or title,
        classes=classes,
        images=images,
        labels=torch.tensor(source.labels),
        indices={split: torch.from_numpy(index) for split, index in indices.items()},
        fingerprint=fingerprint,
        mean=torch.tensor(mean),
        std=torch.tensor(std),
        decoded=source.decoded,
        files=[file[0] for file in source.files],
        streamed=images.nbytes > memory() // 2,
    )


def find_source(settings: DataSettings, root: Path, download: bool = False) -> Source:
    """Find a data set's folder, or fetch it, and list what is in it. Raise an error if the copy is not complete."""
    known, path = DATA_SETS[settings.kind], Path(settings.name.partition(":")[2]).expanduser()
    if settings.kind == "folder":
        folder = root / path if (root / path).is_dir() else path
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{settings.name}: no such folder; tried {(root / path).absolute()} and {path.absolute()}. "
                "Put the images there, or set $EFFNET_DATA to the folder that holds it"
            )
    elif known.archive is not None:
        folder = provide(settings.name, known.archive, root, download)
    else:
        folder = root / settings.name
    try:
        source = known.read(settings, folder)
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        if known.archive is None:
            raise
        cure = f"delete it, then: effnet data {settings.name}"
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}); {cure}") from None
    labels, parts = np.array(source.labels, int), np.array(source.parts, int)  # int, also of no images
    for part, expected in zip((TRAIN, TEST), known.per_class, strict=True):
        counts = np.bincount(labels[parts == part], minlength=len(source.classes))
        if expected is not None and (counts != expected).any():
            label = int((counts != expected).argmax())
            cure = f"complete the copy, or use only complete classes, the first ones: classes=N, up to {label}"
            raise FileNotFoundError(
                f"{folder}: class {source.classes[label]!r} has {counts[label]} images for "
                f"{'test' if part == TEST else 'train'}, expected {expected}; {cure}"
            )
    return source


def _split(settings: DataSettings, source: Source) -> dict[str, np.ndarray]:
    """Return the images of each split, sorted, of the chosen classes. Minival is held out of train."""
    from sklearn.model_selection import train_test_split

    count = len(source.classes[: settings.classes])
    labels, parts = np.array(source.labels, int), np.array(source.parts, int)
    if settings.classes is not None and settings.classes > count:
        raise ValueError(f"classes: {settings.name} has {count}, got {settings.classes!r}")
    larger = "Larger shares for minival and test help rare classes: minival=0.3 test=0.3"

    def hold_out(part: str, fraction: float) -> list[np.ndarray]:
        try:
            return train_test_split(train, test_size=fraction, random_state=SPLIT_SEED, stratify=labels[train])
        except ValueError as error:
            images = np.bincount(labels[train], minlength=count)
            rarest = f"class {source.classes[images.argmin()]!r} has {images.min()} of {len(train)} images"
            raise ValueError(
                f"{part}: cannot hold out {fraction} of each class of {settings.name}: {error} {rarest}. {larger}"
            ) from None

    train, minival, test = (np.flatnonzero((labels < count) & (parts == part)) for part in (TRAIN, MINIVAL, TEST))
    if not source.test_given:
        train, test = hold_out("test", settings.test or 0.2)
        train = np.sort(train)
    if len(minival):  # train has not been shuffled by a split
        train = np.random.default_rng(SPLIT_SEED).permutation(train)
    else:
        train, minival = hold_out("minival", settings.minival or 0.1)
    if settings.train_per_class is not None:
        train = np.concatenate([train[labels[train] == c][: settings.train_per_class] for c in range(count)])
    split = {"train": np.sort(train), "minival": np.sort(minival), "test": np.sort(test)}
    for part, index in split.items():
        if empty := sorted(set(range(count)) - set(labels[index])):
            raise ValueError(
                f"{settings.name}: class {source.classes[empty[0]]!r} has no image in {part} (a file that ends in "
                f".jpg, .png or another way that Pillow knows); it needs some in every split. {larger}"
            )
    return split


def _measured(source: Source, split: dict[str, np.ndarray]) -> tuple[str, list[float], list[float]]:
    """Return the fingerprint of images, labels and split, and each channel's mean and standard deviation over the
    training images. They need all pixels, so the cache keeps them."""
    digest, labels = hashlib.blake2b(digest_size=16), np.array(source.labels)
    for part, index in split.items():
        digest.update(part.encode() + index.astype("<i8").tobytes())
        digest.update(labels[index].astype("<i8").tobytes())
    key, notes, images = digest.hexdigest(), source.decoded.notes, source.decoded.images
    if key not in notes.setdefault("splits", {}):
        histogram, training = np.zeros((3, 256)), np.zeros(len(images), bool)  # of the levels of each channel
        training[split["train"]] = True
        for first in range(0, len(images), BLOCK):
            block = np.ascontiguousarray(images[first : first + BLOCK])
            digest.update(block)
            pixels = block[training[first : first + BLOCK]].reshape(-1, 3)
            histogram += [np.bincount(channel, minlength=256) for channel in pixels.T]
        levels, total = np.arange(256.0), histogram.sum(1)
        mean = histogram @ levels / total
        std = np.sqrt(np.maximum(histogram @ levels**2 / total - mean**2, 1.0))
        notes["splits"][key] = [digest.hexdigest(), *(values.astype(np.float32).tolist() for values in (mean, std))]
        if source.decoded.path is not None:
            with contextlib.suppress(OSError):  # on a full disk or in a read-only folder they are measured again
                write_json(source.decoded.path.with_suffix(".json"), notes)
    return notes["splits"][key]
