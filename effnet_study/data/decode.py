"""Decoded images and their cache.

The images of a data set are decoded once, to uint8 (N, size, size, 3), and kept as a memory map CACHE/NAME.npy. Beside
it NAME.json has notes of the files and a checksum for every BLOCK of images. The name has a digest of the files' names,
sizes and times; the notes have one of their inodes and times of status change. Files that differ are decoded again.
"""

import errno
import hashlib
import json
import shutil
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import joblib
import numpy as np
import PIL
from tqdm.contrib.concurrent import thread_map

from effnet_study.data.image_files import File, read_image, reason
from effnet_study.files import replace_file, write_json

BLOCK = 256  # images that are decoded, written and checked together
VERSION = 1  # of the cache; another version decodes all images again


class DamagedImages(ValueError):
    """Files that cannot be read as images. `files` has the path of each, and the reason."""

    def __init__(self, files: list[tuple[Path, str]], total: int):
        self.files = files
        named = "; ".join(f"{path} ({reason})" for path, reason in files[:5]) + "; ..." * (len(files) > 5)
        super().__init__(f"{len(files)} of {total} files cannot be read as an image: {named}; repair or remove them")


def digest(files: list[File], size: int) -> str:
    """Return a digest of all that the decoded pixels depend on, and that copies of a folder have in common."""
    head = f"{VERSION} {BLOCK} {PIL.__version__} {size}\n"
    lines = "".join(f"{name}\0{length}\0{changed}\n" for name, length, changed, *_ in files)
    return hashlib.blake2b((head + lines).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def identity(files: list[File]) -> str:
    """Return a digest of the inodes and times of status change. It shows files that have swapped places."""
    return hashlib.blake2b(repr([file[3:] for file in files]).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Decoded:
    """Decoded images, and the notes of their files."""

    images: np.ndarray  # (N, size, size, 3) uint8; a memory map where there is a cache
    notes: dict  # counts of sizes and modes in the files, checks (CRC-32 of each block)
    path: Path | None = None  # of the cache
    source: tuple[Path, list[File]] | None = None  # folder and files that were decoded

    def damaged_blocks(self, blocks: Iterable[int], checks: list[int]) -> list[int]:
        """List those of `blocks` whose checksum is not the one in `checks`."""
        return [b for b in blocks if zlib.crc32(self.images[b * BLOCK : (b + 1) * BLOCK]) != checks[b]]

    def stale_blocks(self) -> list[int]:
        """Decode the files again, and list the blocks that differ from them. Raises DamagedImages."""
        checks = _decode(*self.source, self.images.shape[1])["checks"]
        return self.damaged_blocks(range(len(checks)), checks)


def load_images(folder: Path, files: list[File], size: int, cache: Path, name: str) -> Decoded:
    """Return the images of `files`, paths in `folder`, from the cache. Decode them into it if they are not there.

    Warns of a damaged cache. Raises DamagedImages, and OSError if the cache cannot be written."""
    path = cache / f"{name}-{size}px-{digest(files, size)}.npy"
    if (kept := _open(path, folder, files)) is not None:
        return kept
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f".{name}-{size}px.lock"):  # another process may have made it meanwhile
            return _open(path, folder, files) or _write(path, folder, files, size)
    except OSError as error:
        cure = "set $EFFNET_CACHE to a folder with room"
        raise OSError(error.errno, f"no decoded images can be written to {cache} ({error}); {cure}") from None


def _write(path: Path, folder: Path, files: list[File], size: int) -> Decoded:
    """Decode images into the cache at `path`. To free disk space, first delete the temporary files of killed processes,
    and caches of the same name and size that were made of other files."""
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
    notes |= {"identities": [identity(files)], "written": path.stat().st_mtime_ns}
    write_json(path.with_suffix(".json"), notes)
    return Decoded(np.load(path, mmap_mode="r"), notes, path, (folder, files))


def _decode(folder: Path, files: list[File], size: int, stream: BinaryIO | None = None) -> dict:
    """Decode all images on all cores, and write their pixels to `stream`, from where it stands, if there is one. Return
    counts of the files' sizes and modes, and the checks of the blocks. Raises DamagedImages at the end."""
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
                damaged.append((folder / name, reason(error)))
        if stream:
            with lock:
                stream.seek(begin + first * size * size * 3)
                stream.write(pixels)
        return zlib.crc32(pixels)

    print(f"decoding {len(names):,} images of {folder.name} to {size} px", flush=True)
    bar = {"unit": " blocks", "leave": False, "disable": None}
    # In threads, because Pillow decodes without Python's lock
    checks = thread_map(decode_block, range(0, len(names), BLOCK), max_workers=joblib.cpu_count(), **bar)
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
        kept, checks = Decoded(np.load(path, mmap_mode="r"), notes, path, (folder, files)), notes["checks"]
        blocks = range(len(checks))
        if notes["written"] == path.stat().st_mtime_ns:
            blocks = {round((len(checks) - 1) * i / 7) for i in range(8)}
        if len(checks) != -(-len(kept.images) // BLOCK) or kept.damaged_blocks(blocks, checks):
            raise ValueError("its pixels have changed")
        return kept if identity(files) in notes.get("identities", []) else None
    except (ValueError, KeyError, EOFError, FileNotFoundError) as error:
        warnings.warn(f"{path} is damaged ({error}); decoding the images again", stacklevel=3)
        return None
