"""From files to pixels: archives fetched and unpacked, folders listed, images decoded, and kept decoded.

Nothing here knows a data set by name; effnet_data.py does. Images are decoded once for every size at which they are
stored, by all cores, into CACHE/NAME-SIZEpx-DIGEST.npy, uint8 (N, S, S, 3), which is read through a memory map. Its
DIGEST follows from the files' names, sizes and times and from the decoder's version, so a changed source is decoded
anew; the .json beside it holds checksums of its blocks, and is written last.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import filelock
import joblib
import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm import tqdm

from effnet_records import replace_file, write_json

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
BLOCK = 256  # images that are decoded, written and checked together
VERSION = 1  # of the cache; a new one decodes everything anew


# ---- 1. Archives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """A data set as it is published: one file, and the folder that is in it."""

    url: str
    md5: str
    folder: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


def provide(name: str, archive: Archive, root: Path, download: bool) -> Path:
    """The data set's folder in `root`: there already, else unpacked from the archive in `root`, else downloaded.

    The archive is checked before it is unpacked, and the folder is complete or not there. Raises FileNotFoundError with
    the places tried and what to do; ValueError if the archive is damaged or not to be trusted.
    """
    folder, packed = root / archive.folder, root / archive.file
    places = f"{folder.absolute()}, nor {archive.file} beside it (root: as given, else $EFFNET_DATA, else data/)"
    if folder.is_dir():
        return folder
    if not packed.is_file() and not download:
        raise FileNotFoundError(f"{name} is not at {places}; fetch it with: effnet data {name}")
    from torchvision.datasets.utils import calculate_md5, download_url  # takes as long as importing torch

    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f".{name}.lock"):
        for left in root.glob(f".fetching-{name}-*"):  # by a process that was killed
            shutil.rmtree(left)
        if folder.is_dir():  # made by another process meanwhile
            return folder
        with tempfile.TemporaryDirectory(prefix=f".fetching-{name}-", dir=root) as place:
            if not packed.is_file():
                packed = Path(place) / archive.file
                try:
                    download_url(archive.url, place, archive.file, archive.md5)
                except Exception as error:  # URL, socket and checksum errors alike
                    raise FileNotFoundError(
                        f"{name} is not at {places}, and fetching it failed ({type(error).__name__}: {error}). "
                        f"With a network: effnet data {name}; without one: put {archive.file} there by hand"
                    ) from None
            elif (md5 := calculate_md5(packed)) != archive.md5:
                raise ValueError(f"{packed} is damaged: its md5 is {md5}, expected {archive.md5}; fetch it anew")
            unpack(packed, Path(place) / "unpacked")
            shutil.move(Path(place) / "unpacked" / archive.folder, folder)
    return folder


def unpack(archive: Path, place: Path) -> None:
    """Unpack a zip or tar archive. ValueError if it is damaged, or if anything in it would lie outside `place`."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                _check_names(archive, packed.namelist())
                packed.extractall(place)  # checks every member's CRC
        else:
            with tarfile.open(archive) as packed:
                members = packed.getmembers()
                _check_names(archive, [member.name for member in members])
                odd = [member.name for member in members if not (member.isfile() or member.isdir())]
                if odd:
                    raise ValueError(f"{archive}: {odd[0]!r} is a link or a device; this archive is not safe")
                filtered = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # not in Python 3.11.2
                packed.extractall(place, **filtered)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({str(error).splitlines()[0]}); fetch it anew") from None


def _check_names(archive: Path, names: list[str]) -> None:
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ValueError(f"{archive}: {name!r} would be written elsewhere; this archive is not safe")


# ---- 2. Listings ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """Image files to be decoded: their folder, and under it each one's path, bytes and time of change (ns)."""

    folder: Path
    files: list[tuple[str, int, int]]

    def digest(self, size: int) -> str:
        """Of all that the decoded pixels follow from."""
        head = f"{VERSION} {BLOCK} {PIL.__version__} {size}\n"
        lines = "".join(f"{name}\0{length}\0{changed}\n" for name, length, changed in self.files)
        return hashlib.blake2b((head + lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def scan(folder: Path, under: str = "") -> list[tuple[str, int, int]]:
    """The images in folder/under, at any depth, sorted: path from `folder`, bytes, time of change in ns. Names that
    begin with a dot are no images: some systems leave such files beside the true ones."""
    found, deeper = [], []
    with os.scandir(folder / under) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            path = f"{under}/{name}" if under else name
            if name[name.rfind(".") :].lower() in SUFFIXES and entry.is_file():
                stat = entry.stat()
                found.append((path, stat.st_size, stat.st_mtime_ns))
            elif entry.is_dir():
                deeper.append(path)
    for path in deeper:
        found += scan(folder, path)
    return sorted(found)


# ---- 3. Decoding ---------------------------------------------------------------------------------------------------


class DamagedImages(ValueError):
    """Files that cannot be read as images: `files` has each one's path and the reason."""

    def __init__(self, files: list[tuple[Path, str]], total: int):
        self.files = files
        named = "; ".join(f"{path} ({reason})" for path, reason in files[:5])
        more = f"; and {len(files) - 5} more" if len(files) > 5 else ""
        super().__init__(
            f"{len(files)} of {total} files cannot be read as an image: {named}{more}; repair or remove them"
        )


def read_image(file: Path, size: int) -> tuple[np.ndarray, str, str]:
    """An image as 8-bit RGB (size, size, 3), the size it has in the file as "WIDTHxHEIGHT", and Pillow's mode.

    Turned upright as its EXIF data say, the shorter side resized to `size` (antialiased), the middle cut out. Grey,
    palette and CMYK become RGB, 16 bits are scaled to 8, transparency is laid over white. Whatever Pillow
    raises is raised.
    """
    data = io.BytesIO(file.read_bytes())
    with Image.open(data) as image:
        about = f"{image.width}x{image.height}", image.mode
        image.draft(None, (2 * size, 2 * size))  # a much larger JPEG is decoded at a half, a quarter or an eighth
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        image = _to_rgb(image)
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image), *about


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip to white
        pixels = np.asarray(image)
        scale = 1 if image.mode == "I" and pixels.max() <= 255 else 257
        image = Image.fromarray(np.round(pixels / scale).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_block(folder: Path, names: list[str], size: int) -> tuple[np.ndarray, Counter, Counter, list]:
    """Pixels (n, size, size, 3), how often there is each size and each mode, and what is damaged."""
    pixels, sizes, modes, damaged = np.zeros((len(names), size, size, 3), np.uint8), Counter(), Counter(), []
    for i, name in enumerate(names):
        try:
            pixels[i], shape, mode = read_image(folder / name, size)
        except MemoryError:
            raise
        except Exception as error:  # a decoder fed with garbage may raise anything
            damaged.append((folder / name, reason(folder / name, error)))
        else:
            sizes[shape] += 1
            modes[mode] += 1
    return pixels, sizes, modes, damaged


def reason(file: Path, error: Exception) -> str:
    if not file.exists():
        return "it is gone"
    if file.stat().st_size == 0:
        return "it is empty"
    return "no image that Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else str(error)


def _decode(listing: Listing, size: int) -> Iterator[tuple[np.ndarray, Counter, Counter, list]]:
    """`_decode_block` of all images, block after block, by as many processes as there are cores."""
    names = [file[0] for file in listing.files]
    work = [(listing.folder, names[first : first + BLOCK], size) for first in range(0, len(names), BLOCK)]
    processes = joblib.cpu_count() if len(work) > 8 else 1  # starting one takes seconds
    ahead = 4 * processes  # blocks, so that memory stays bounded where decoding is faster than the disk
    begin = time.perf_counter()
    print(f"decoding {len(names):,} images of {listing.folder.name} to {size} px, once", flush=True)
    with (
        joblib.Parallel(n_jobs=processes, return_as="generator") as parallel,
        tqdm(total=len(names), unit=" images", leave=False, disable=None) as bar,
    ):
        for first in range(0, len(work), ahead):
            for block in parallel(joblib.delayed(_decode_block)(*part) for part in work[first : first + ahead]):
                yield block
                bar.update(len(block[0]))
    print(f"decoded in {time.perf_counter() - begin:.0f} s", flush=True)


# ---- 4. The cache --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """Images as they are stored, and what was noted when they were decoded."""

    images: np.ndarray  # (N, size, size, 3) uint8; a memory map where there is a cache
    notes: dict  # sizes and modes in the files with their counts, checks (CRC-32 of each block)
    path: Path | None = None  # of the cache

    def damaged_blocks(self, blocks: list[int] | None = None) -> list[int]:
        """Which blocks of images (all, or these) are not what was written."""
        checks = self.notes["checks"]
        blocks = range(len(checks)) if blocks is None else blocks
        return [b for b in blocks if zlib.crc32(self.images[b * BLOCK : (b + 1) * BLOCK]) != checks[b]]


def load_images(listing: Listing, size: int, cache: Path, name: str) -> Decoded:
    """The images of a listing, from the cache if they are in there, else decoded into it. Raises DamagedImages.

    A cache that is torn, or that cannot be written, is told by a warning; without one the images are decoded into
    memory. Raises OSError if they do not fit there.
    """
    path = cache / f"{name}-{size}px-{listing.digest(size)}.npy"
    kept = _open(path)
    if kept is not None:
        return kept
    shape = (len(listing.files), size, size, 3)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".{name}-{size}px.lock"):
            kept = _open(path, quiet=True)  # made meanwhile by another process
            if kept is None:
                _write(path, listing, size, shape)
                kept = _open(path)
            if kept is None:
                raise OSError(errno.EIO, "what was written is not what can be read", str(path))
            for old in _others(path):
                old.unlink(missing_ok=True)
        return kept
    except OSError as error:
        needed = int(np.prod(shape))
        if needed > memory() // 2:
            raise OSError(
                error.errno,
                f"no decoded cache at {cache} ({error}), and {needed / 1e9:.1f} GB of images do not fit into memory; "
                "free that much there, or set $EFFNET_CACHE to a folder with room",
            ) from None
        warnings.warn(
            f"no decoded cache at {cache} ({error}): the images are decoded into memory, and again at the next start; "
            "set $EFFNET_CACHE to a folder with room",
            stacklevel=2,
        )
    images, notes = np.empty(shape, np.uint8), _Notes()
    for number, block in enumerate(_decode(listing, size)):
        images[number * BLOCK : (number + 1) * BLOCK] = notes.add(block)
    return Decoded(images, notes.closed(shape[0]))


def _others(path: Path) -> list[Path]:
    """Caches of the same data set and size that were made of other files, or by another decoder."""
    same = path.stem[:-32]
    return [other for other in path.parent.glob(f"{same}{'?' * 32}.*") if other.stem != path.stem]


class _Notes:
    """What is noted of blocks as they come."""

    def __init__(self):
        self.sizes, self.modes, self.checks, self.damaged = Counter(), Counter(), [], []

    def add(self, block: tuple[np.ndarray, Counter, Counter, list]) -> np.ndarray:
        pixels, sizes, modes, damaged = block
        self.sizes += sizes
        self.modes += modes
        self.damaged += damaged
        self.checks.append(zlib.crc32(pixels))
        return pixels

    def closed(self, total: int) -> dict:
        if self.damaged:
            raise DamagedImages(self.damaged, total)
        return {"sizes": dict(self.sizes), "modes": dict(self.modes), "checks": self.checks}


def _write(path: Path, listing: Listing, size: int, shape: tuple[int, ...]) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)
    for unfinished in path.parent.glob(f".{path.stem[:-32]}*.partial"):  # of a process that was killed
        unfinished.unlink(missing_ok=True)
    needed = int(np.prod(shape))
    if needed > shutil.disk_usage(path.parent).free:  # then what is of no use any more goes first
        for old in [path, *_others(path)]:
            old.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(path))
    notes = _Notes()

    def write(file: Path) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with file.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for block in _decode(listing, size):
                stream.write(notes.add(block))
        notes.closed(shape[0])

    replace_file(path, write)
    write_json(path.with_suffix(".json"), notes.closed(shape[0]) | {"written": path.stat().st_mtime_ns})


def _open(path: Path, quiet: bool = False) -> Decoded | None:
    """The cache at `path` if it is there and whole: all of it is checked if anybody wrote to it since it was made, else
    a few of its blocks, which takes no time."""
    if not path.with_suffix(".json").exists():
        return None
    try:
        kept = Decoded(np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text()), path)
        blocks, untouched = -(-len(kept.images) // BLOCK), kept.notes["written"] == path.stat().st_mtime_ns
        some = sorted({round((blocks - 1) * i / 7) for i in range(8)}) if untouched else None
        if len(kept.notes["checks"]) != blocks or not {"sizes", "modes"} <= kept.notes.keys():
            raise ValueError("what was noted of it is not complete")
        if not kept.damaged_blocks(some):
            return kept
        reason = "its pixels have changed"
    except (ValueError, KeyError, TypeError, IndexError, EOFError, FileNotFoundError) as error:
        reason = str(error)
    if not quiet:
        warnings.warn(f"{path} is damaged ({reason}); decoding the images again", stacklevel=3)
    return None


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # none, or "max"
            least = min(least, int(Path(limit).read_text()))
    return least
