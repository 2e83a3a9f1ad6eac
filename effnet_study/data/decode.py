"""From a publisher's archive and image files to pixels: fetching, unpacking, decoding, and the cache of decoded images.

The images of a data set are decoded once, to uint8 (N, size, size, 3), and kept as a memory map CACHE/NAME.npy. Beside
it NAME.json has notes of the files and a checksum for every BLOCK of images. The name has a digest of the files' names,
sizes and times; the notes have their inodes and times of status change. Files that differ are decoded again.
"""

import contextlib
import errno
import functools
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
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from effnet_study.files import replace_file, write_json

# Formats that Pillow names, but are no photographs, or need other programs
NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Files and folders that systems put beside images, in lower case
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"thumbs.db", "desktop.ini"}
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

# Of an image: path in its data set's folder, bytes, time of change in ns; inode and time of status change in ns
File = tuple[str, int, int, int, int]


def digest(files: list[File], size: int) -> str:
    """Return a digest of all that the decoded pixels depend on, and that copies of a folder have in common."""
    head = f"{VERSION} {BLOCK} {PIL.__version__} {size}\n"
    lines = "".join(f"{name}\0{length}\0{changed}\n" for name, length, changed, *_ in files)
    return hashlib.blake2b((head + lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def identity(files: list[File]) -> str:
    """Return a digest of the inodes and times of status change. Files that swap places, or are written to while their
    size and time are kept, change it."""
    return hashlib.blake2b(repr([file[3:] for file in files]).encode(), digest_size=16).hexdigest()


@functools.cache
def suffixes() -> frozenset[str]:
    """Return the endings of images, in lower case: those of all formats that the installed Pillow can open."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind in Image.OPEN and kind not in NO_IMAGES)


def is_hidden(name: str) -> bool:
    """True for files and folders that systems or programs put beside images."""
    return name.startswith(".") or name.lower() in SYSTEM


def kind_of(name: str, is_folder: bool) -> str:
    """Return what a file or folder that is left out is counted as: its ending, or its name if that tells more."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("._"):  # what a Mac leaves beside every file
        return "._*"
    return f"{name}/" if is_folder else name if is_hidden(name) or not suffix else f"*{suffix}"


def scan(folder: Path, under: str, left_out: Counter | None = None) -> list[File]:
    """List the images in folder/under, at any depth, sorted by path. Count in `left_out` what is not listed, by kind.

    A link that leads nowhere is listed, so decoding names it. The list is empty if there is no such folder."""
    found, left_out = [], Counter() if left_out is None else left_out

    def unreadable(error: OSError) -> None:
        left_out[f"{error.filename}/, {error.strerror}"] += 1

    for place, folders, names in os.walk(folder / under, followlinks=True, onerror=unreadable):
        left_out.update(kind_of(name, True) for name in folders if is_hidden(name))
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            file = os.path.join(place, name)
            image = not is_hidden(name) and os.path.splitext(name)[1].lower() in suffixes()
            if image and (os.path.isfile(file) or os.path.islink(file)):
                status = os.stat(file, follow_symlinks=os.path.exists(file))
                path = file[len(os.path.join(folder, "")) :]
                found.append((path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns))
            else:
                left_out[kind_of(name, False)] += 1
    return sorted(found)


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

    needed: the shorter side in pixels that suffices; a much larger JPEG is decoded at a half, a quarter or an eighth.

    | in the file                                              | what happens                                        |
    |----------------------------------------------------------|-----------------------------------------------------|
    | EXIF orientation 1 to 8                                  | turned upright                                      |
    | several images (animation, pages)                        | the first                                           |
    | 1, L, P, RGB, CMYK, YCbCr, grey of 10 to 16 bits (I;16)  | scaled to 8-bit RGB, without colour profile         |
    | white as zero (TIFF)                                     | inverted                                            |
    | LAB                                                      | converted to sRGB                                   |
    | LA, PA, RGBA, P or L or RGB with a transparent colour    | laid over white                                     |
    | damaged metadata                                         | read without it, with a warning                     |
    | RGB of 16 bits with a transparent colour                 | ValueError: Pillow keeps too little of the colour   |
    | I, grey of 32 bits: up to 65535, and not all below 256   | taken for 16 bits                                   |
    | I otherwise, F, signed samples                           | ValueError: unknown range                           |
    | damaged or unknown                                       | what Pillow raises                                  |
    """
    data, damaged = file.read_bytes(), False
    try:
        image, *about = _load(data, needed)
    except Exception:  # a PNG with damaged or very long texts fails as one with damaged pixels does
        if not data.startswith(b"\x89PNG"):
            raise
        damaged, (image, *about) = True, _load(_bare_png(data), needed)
    try:
        Image.Exif().load(image.info.get("exif", b""))  # of a JPEG, Pillow itself forgets the error
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # the pixels are sound, because they have been loaded
        damaged = True
    if damaged:
        warnings.warn(f"{file} has damaged metadata; its pixels are sound, and were read", stacklevel=2)
    return _to_rgb(image, data), *about


def _load(data: bytes, needed: int | None) -> tuple[Image.Image, str, str]:
    image = Image.open(io.BytesIO(data))
    about = f"{image.width}x{image.height}", image.mode
    if needed is not None:
        image.draft(None, (2 * needed, 2 * needed))
    image.load()
    return image, *about


def _bare_png(data: bytes) -> bytes:
    """Return a PNG without metadata, except sound EXIF data, which have the orientation."""
    kept, at = data[:8], 8
    while at < len(data):
        chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4])]
        sound = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4)
        if chunk[4:5].isupper() or chunk[4:8] == b"tRNS" or (chunk[4:8] == b"eXIf" and sound):  # capital: critical
            kept += chunk
        at += len(chunk)
    return kept


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    tags, transparent = getattr(image, "tag_v2", {}), image.info.get("transparency")
    # Bits of a sample. Pillow scales deep PGM and JPEG 2000 to 16
    bits = {"PNG": int.from_bytes(data[24:25]), "TIFF": tags.get(258, (1,))[0], "PPM": 16, "JPEG2000": 16}
    bits = bits.get(image.format)
    wide, known = image.mode[0] in "IF", image.mode != "F" and not set(tags.get(339, (1,))) - {1, 4}
    if image.mode == "I" and image.format != "PPM":  # 16 bits in 32, or what nobody knows
        low, high = image.getextrema()
        bits, known = 16, low >= 0 and 255 < high <= 65535
    if not known or (wide and bits is None):
        raise ValueError("signed, 32-bit or floating-point pixels of unknown range; save it with 8 or 16 bits")
    if wide:  # Pillow's own conversion would clip to white
        pixels, white = np.asarray(image), 2**bits - 1
        grey = np.round((white - pixels if tags.get(262) == 0 else pixels) / (white / 255)).astype(np.uint8)
        return Image.fromarray(np.where(pixels == transparent, np.uint8(255), grey)).convert("RGB")
    if transparent is not None and image.format == "PNG":
        if bits == 16:
            raise ValueError("16-bit colours, one of them transparent; save it with 8 bits, or with an alpha channel")
        if image.mode == "L":  # Pillow scales the pixels to 8 bits, but not this
            image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.mode == "LAB":  # Pillow's own conversion takes L, a and b for red, green and blue
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(file: Path, error: Exception) -> str:
    """Say in words why a file could not be read as an image."""
    if not file.exists():
        return "it is a link that leads nowhere" if file.is_symlink() else "it is gone"
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
    source: tuple[Path, list[File]] | None = None  # folder and files that were decoded

    def damaged_blocks(self, blocks: Iterable[int] | None = None, checks: list[int] | None = None) -> list[int]:
        """List the damaged blocks, whose checksum differs, among `blocks` (default: all).

        checks: what they should be (default: what they were when the images were decoded)."""
        checks = self.notes["checks"] if checks is None else checks
        blocks = range(len(checks)) if blocks is None else blocks
        return [b for b in blocks if zlib.crc32(self.images[b * BLOCK : (b + 1) * BLOCK]) != checks[b]]

    def stale_blocks(self) -> list[int]:
        """Decode the files again, and list the blocks that differ from them. Raises DamagedImages."""
        return self.damaged_blocks(checks=_decode(*self.source, self.images.shape[1])["checks"])


def load_images(folder: Path, files: list[File], size: int, cache: Path, name: str) -> Decoded:
    """Return the images of `files`, paths in `folder`, from the cache. Decode them into it if they are not there.

    Warns of a damaged cache. Raises DamagedImages, and OSError if the cache cannot be written."""
    path = cache / f"{name}-{size}px-{digest(files, size)}.npy"
    if (kept := _open(path, folder, files)) is not None:
        return kept
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".{name}-{size}px.lock"):
            if (kept := _open(path, folder, files)) is None:  # another process may have made it meanwhile
                _write(path, folder, files, size)
                kept = _open(path, folder, files)
        return kept
    except OSError as error:
        cure = "set $EFFNET_CACHE to a folder with room"
        raise OSError(error.errno, f"no decoded images can be written to {cache} ({error}); {cure}") from None


def _write(path: Path, folder: Path, files: list[File], size: int) -> None:
    """Decode images into the cache at `path`. Remove what is of no more use first, because it takes room.

    That is what a killed process left, and caches of the same name and size that were made of other files. Copies of a
    folder can take turns: the notes keep the identities of all files that gave the same pixels."""
    before = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
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
    same = before.get("identities", []) if before.get("checks") == notes["checks"] else []
    notes |= {"identities": [*same[-99:], identity(files)], "written": path.stat().st_mtime_ns}
    write_json(path.with_suffix(".json"), notes)


def _decode(folder: Path, files: list[File], size: int, stream: BinaryIO | None = None) -> dict:
    """Decode all images on all cores, and write their pixels to `stream`, from where it stands, if there is one.

    Returns notes: counts of the files' sizes and modes, and the checks of the blocks. Raises DamagedImages at the end.
    """
    names, found, damaged = [file[0] for file in files], [], []
    begin, lock = stream and stream.tell(), threading.Lock()

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
        if stream:
            with lock:
                stream.seek(begin + first * size * size * 3)
                stream.write(pixels)
        return zlib.crc32(pixels)

    purpose = "once" if stream else "to compare the cache with them"
    print(f"decoding {len(names):,} images of {folder.name} to {size} px, {purpose}", flush=True)
    starts = range(0, len(names), BLOCK)
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:  # Pillow decodes without Python's lock
        blocks = pool.map(decode_block, starts)
        checks = list(tqdm(blocks, total=len(starts), unit=" blocks", leave=False, disable=None))
    if damaged:
        raise DamagedImages(sorted(damaged), len(names))
    sizes, modes = (dict(Counter(values)) for values in zip(*found, strict=True))
    return {"sizes": sizes, "modes": modes, "checks": checks}


def _open(path: Path, folder: Path, files: list[File]) -> Decoded | None:
    """Open the cache at `path`. None if it is not there, or made of other files, or, with a warning, if it is damaged.

    If the file was written to since it was made, all blocks are checked. Otherwise eight are, which takes no time."""
    if not path.with_suffix(".json").exists():
        return None
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        kept = Decoded(np.load(path, mmap_mode="r"), notes, path, (folder, files))
        count = len(notes["checks"])
        untouched = notes["written"] == path.stat().st_mtime_ns
        some = {round((count - 1) * i / 7) for i in range(8)} if untouched else None
        if count != -(-len(kept.images) // BLOCK) or kept.damaged_blocks(some):
            raise ValueError("its pixels have changed")
        return kept if identity(files) in notes.get("identities", []) else None
    except (ValueError, KeyError, EOFError, FileNotFoundError) as error:
        warnings.warn(f"{path} is damaged ({error}); decoding the images again", stacklevel=3)
        return None
