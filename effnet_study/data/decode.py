"""From a publisher's archive and image files to pixels: fetching, unpacking, decoding, and the cache of decoded images.

The images of a data set are decoded once, to uint8 (N, size, size, 3), and kept as a memory map CACHE/NAME.npy. Beside
it NAME.json has notes of the files and a checksum for every BLOCK of images. The name has a digest of the files' names,
sizes and times, so changed files are decoded again.
"""

import errno
import glob
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import joblib
import numpy as np
import PIL
from PIL import Image, ImageOps
from tqdm import tqdm

from effnet_study.files import replace_file, write_json

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
BLOCK = 256  # images that are decoded, written and checked together
VERSION = 1  # of the cache; another version decodes all images again

# ---- 1. Archives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archive:
    """A data set as it is published: one file, and the folder in it."""

    url: str
    md5: str
    folder: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]


def provide(name: str, archive: Archive, root: Path, download: bool) -> Path:
    """Return a data set's folder in `root`. If it is not there, unpack the archive from `root`, or download it.

    The archive is checked before it is unpacked, and the folder is complete or not there. Raises FileNotFoundError with
    the places tried and what to do; ValueError if the archive is damaged or unsafe."""
    folder, packed = root / archive.folder, root / archive.file
    places = f"{folder.absolute()}, and {archive.file} is not beside it (root: as given, else $EFFNET_DATA, else data/)"
    if folder.is_dir():
        return folder
    if not packed.is_file() and not download:
        raise FileNotFoundError(f"{name} is not at {places}; fetch it with: effnet data {name}")
    from torchvision.datasets.utils import calculate_md5, download_url  # takes as long as importing torch

    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f".{name}.lock"):
        for left in root.glob(f".fetching-{name}-*"):  # by a killed process
            shutil.rmtree(left)
        if folder.is_dir():  # another process has made it meanwhile
            return folder
        with tempfile.TemporaryDirectory(prefix=f".fetching-{name}-", dir=root) as place:
            if not packed.is_file():
                packed = Path(place) / archive.file
                try:
                    download_url(archive.url, place, archive.file, archive.md5)
                except Exception as error:  # of the address, the network or the checksum
                    raise FileNotFoundError(
                        f"{name} is not at {places}, and fetching it failed ({type(error).__name__}: {error}). "
                        f"With a network: effnet data {name}; without one: put {archive.file} there by hand"
                    ) from None
            elif (md5 := calculate_md5(packed)) != archive.md5:
                raise ValueError(f"{packed} is damaged: its md5 is {md5}, expected {archive.md5}; fetch it again")
            unpack(packed, Path(place) / "unpacked")
            (Path(place) / "unpacked" / archive.folder).rename(folder)
    return folder


def unpack(archive: Path, place: Path) -> None:
    """Unpack a zip or tar archive. Nothing is written outside `place`. ValueError if it is damaged or unsafe."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(place)  # zipfile verifies checksums, and removes ".." and roots from names
            return
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():  # tarfile has no filter in Python 3.11.2
                inside = (place / member.name).resolve().is_relative_to(place.resolve())
                if not inside or not (member.isfile() or member.isdir()):
                    raise ValueError(f"{archive}: {member.name!r} lies outside, or is a link; this archive is not safe")
            packed.extractall(place, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is damaged ({str(error).splitlines()[0]}); fetch it again") from None


# ---- 2. Files ------------------------------------------------------------------------------------------------------

File = tuple[str, int, int]  # of an image: path in its data set's folder, bytes, time of change in ns


def digest(files: list[File], size: int) -> str:
    """Return a digest of all that the decoded pixels depend on."""
    head = f"{VERSION} {BLOCK} {PIL.__version__} {size}\n"
    lines = "".join(f"{name}\0{length}\0{changed}\n" for name, length, changed in files)
    return hashlib.blake2b((head + lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def scan(folder: Path, under: str) -> list[File]:
    """List the images in folder/under, at any depth, sorted by path. Names that begin with a dot are left out: some
    systems put such files beside images. The list is empty if there is no such folder."""
    found = []
    for name in sorted(glob.glob("**", root_dir=folder / under, recursive=True)):
        path = os.path.join(under, name)
        if os.path.splitext(name)[1].lower() in SUFFIXES and os.path.isfile(folder / path):
            status = os.stat(folder / path)
            found.append((path, status.st_size, status.st_mtime_ns))
    return found


class DamagedImages(ValueError):
    """Files that cannot be read as images. `files` has the path of each, and the reason."""

    def __init__(self, files: list[tuple[Path, str]], total: int):
        self.files = files
        named = "; ".join(f"{path} ({reason})" for path, reason in files[:5])
        more = f"; and {len(files) - 5} more" if len(files) > 5 else ""
        super().__init__(
            f"{len(files)} of {total} files cannot be read as an image: {named}{more}; repair or remove them"
        )


def read_image(file: Path, size: int) -> tuple[np.ndarray, str, str]:
    """Read an image as 8-bit RGB (size, size, 3). Return the size in its file, "WIDTHxHEIGHT", and Pillow's mode too.

    The image is resized (antialiased) until its shorter side is `size`, and its middle is cut out. See `open_image`.
    """
    image, *about = open_image(file, size)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image), *about


def open_image(file: Path, needed: int | None = None) -> tuple[Image.Image, str, str]:
    """Open an image as 8-bit RGB. Return the size in its file, "WIDTHxHEIGHT", and Pillow's mode too.

    The image is turned upright by its EXIF data. Grey, palette and CMYK become RGB, 16 bits become 8, transparent parts
    white. needed: the shorter side in pixels that suffices; a much larger JPEG is decoded at a half, a quarter or an
    eighth. Raises what Pillow raises.
    """
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        about = f"{image.width}x{image.height}", image.mode
        if needed is not None:
            image.draft(None, (2 * needed, 2 * needed))
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image), *about


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip to white
        pixels = np.asarray(image)
        scale = 1 if image.mode == "I" and pixels.max() <= 255 else 257
        image = Image.fromarray(np.round(pixels / scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(file: Path, error: Exception) -> str:
    """Say in words why a file could not be read as an image."""
    if not file.exists():
        return "it is gone"
    if file.stat().st_size == 0:
        return "it is empty"
    return "no image that Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else str(error)


# ---- 3. Decoding and the cache -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    """Decoded images, and the notes of their files."""

    images: np.ndarray  # (N, size, size, 3) uint8; a memory map where there is a cache
    notes: dict  # counts of sizes and modes in the files, checks (CRC-32 of each block)
    path: Path | None = None  # of the cache

    def damaged_blocks(self, blocks: Iterable[int] | None = None) -> list[int]:
        """List the damaged blocks, whose checksum differs, among `blocks` (default: all)."""
        checks = self.notes["checks"]
        blocks = range(len(checks)) if blocks is None else blocks
        return [b for b in blocks if zlib.crc32(self.images[b * BLOCK : (b + 1) * BLOCK]) != checks[b]]


def load_images(folder: Path, files: list[File], size: int, cache: Path, name: str) -> Decoded:
    """Return the images of `files`, paths in `folder`, from the cache. Decode them into it if they are not there.

    Warns of a damaged cache. Raises DamagedImages, and OSError if the cache cannot be written."""
    path = cache / f"{name}-{size}px-{digest(files, size)}.npy"
    if (kept := _open(path)) is not None:
        return kept
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".{name}-{size}px.lock"):
            if (kept := _open(path)) is None:  # another process may have made it meanwhile
                _write(path, folder, files, size)
                kept = _open(path)
        return kept
    except OSError as error:
        cure = "set $EFFNET_CACHE to a folder with room"
        raise OSError(error.errno, f"no decoded images can be written to {cache} ({error}); {cure}") from None


def _write(path: Path, folder: Path, files: list[File], size: int) -> None:
    """Decode images into the cache at `path`. Remove what is of no more use first, because it takes room.

    That is what a killed process left, and caches of the same name and size that were made of other files."""
    for old in path.parent.iterdir():
        if old.name.removeprefix(".").startswith(path.stem[:-32]):
            old.unlink(missing_ok=True)
    needed, free = len(files) * size * size * 3, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", str(path))
    notes = {}

    def write(file: Path) -> None:
        with file.open("wb") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), size, size, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
            notes.update(_decode(folder, files, size, stream))

    replace_file(path, write)
    write_json(path.with_suffix(".json"), notes | {"written": path.stat().st_mtime_ns})


def _decode(folder: Path, files: list[File], size: int, stream: BinaryIO) -> dict:
    """Decode all images on all cores, and write their pixels to `stream`, from where it stands.

    Returns notes: counts of the files' sizes and modes, and the checks of the blocks. Raises DamagedImages at the end.
    """
    names, found, damaged = [file[0] for file in files], [], []
    begin, lock = stream.tell(), threading.Lock()

    def decode_block(first: int) -> int:
        some = names[first : first + BLOCK]
        pixels = np.zeros((len(some), size, size, 3), np.uint8)
        for i, name in enumerate(some):
            try:
                pixels[i], *about = read_image(folder / name, size)
                found.append(about)
            except MemoryError:
                raise
            except Exception as error:  # a decoder that reads garbage may raise anything
                damaged.append((folder / name, reason(folder / name, error)))
        with lock:
            stream.seek(begin + first * size * size * 3)
            stream.write(pixels)
        return zlib.crc32(pixels)

    print(f"decoding {len(names):,} images of {folder.name} to {size} px, once", flush=True)
    starts = range(0, len(names), BLOCK)
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:  # Pillow decodes without Python's lock
        blocks = pool.map(decode_block, starts)
        checks = list(tqdm(blocks, total=len(starts), unit=" blocks", leave=False, disable=None))
    if damaged:
        raise DamagedImages(sorted(damaged), len(names))
    sizes, modes = (dict(Counter(values)) for values in zip(*found, strict=True))
    return {"sizes": sizes, "modes": modes, "checks": checks}


def _open(path: Path) -> Decoded | None:
    """Open the cache at `path`. None if it is not there, or, with a warning, if it is damaged.

    If the file was written to since it was made, all blocks are checked. Otherwise eight are, which takes no time."""
    if not path.with_suffix(".json").exists():
        return None
    try:
        notes = json.loads(path.with_suffix(".json").read_text())
        kept, count = Decoded(np.load(path, mmap_mode="r"), notes, path), len(notes["checks"])
        untouched = notes["written"] == path.stat().st_mtime_ns
        some = {round((count - 1) * i / 7) for i in range(8)} if untouched else None
        if count != -(-len(kept.images) // BLOCK) or kept.damaged_blocks(some):
            raise ValueError("its pixels have changed")
        return kept
    except (ValueError, KeyError, EOFError, FileNotFoundError) as error:
        warnings.warn(f"{path} is damaged ({error}); decoding the images again", stacklevel=3)
        return None
