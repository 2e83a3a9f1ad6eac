"""Image files: which there are in a folder, and the pixels of one as 8-bit RGB."""

import io
import os
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageCms, ImageOps

# Formats that Pillow names, but are no photographs, or need other programs
NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Files and folders that systems put beside images, in lower case
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"thumbs.db", "desktop.ini"}

# ---- 1. Finding ----------------------------------------------------------------------------------------------------

# Of an image: path in its data set's folder, bytes, time of change in ns; inode and time of status change in ns
File = tuple[str, int, int, int, int]


def is_hidden(name: str) -> bool:
    """True for files and folders that systems or programs put beside images."""
    return name.startswith(".") or name.lower() in SYSTEM


def kind_of(name: str) -> str:
    """Return what a file or folder that is left out is counted as: "hidden", its ending, or its name."""
    return "hidden" if is_hidden(name) else os.path.splitext(name)[1].lower() or name


def scan(folder: Path, under: str, left_out: Counter | None = None) -> list[File]:
    """List the images in folder/under, at any depth, sorted by path: files with the ending of a format that Pillow can
    open. Count in `left_out` what is not listed, by kind. The list is empty if there is no such folder."""
    found, left_out = [], Counter() if left_out is None else left_out
    formats = Image.registered_extensions().items()
    suffixes = {suffix for suffix, kind in formats if kind in Image.OPEN and kind not in NO_IMAGES}

    def unreadable(error: OSError) -> None:
        left_out[f"{error.filename} ({error.strerror})"] += 1

    for place, folders, names in os.walk(folder / under, followlinks=True, onerror=unreadable):
        left_out.update(kind_of(name) for name in folders if is_hidden(name))
        above = {os.path.realpath(path) for path in (place, *Path(os.path.abspath(place)).parents)}
        for name in [name for name in folders if os.path.realpath(os.path.join(place, name)) in above]:
            folders.remove(name)  # it would be walked again and again
            left_out["links to a folder above"] += 1
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            if is_hidden(name) or os.path.splitext(name)[1].lower() not in suffixes:
                left_out[kind_of(name)] += 1
                continue
            file = os.path.join(place, name)
            status = os.stat(file, follow_symlinks=os.path.exists(file))  # decoding names a link that leads nowhere
            path = file[len(os.path.join(folder, "")) :]
            found.append((path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns))
    return sorted(found)


# ---- 2. Reading ----------------------------------------------------------------------------------------------------


def read_image(file: Path, size: int) -> tuple[np.ndarray, str, str]:
    """Read an image as `open_image` does, as (size, size, 3): its middle square, resized antialiased."""
    image, *about = open_image(file, size)
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)), *about


def open_image(file: Path, needed: int | None = None) -> tuple[Image.Image, str, str]:
    """Open an image as 8-bit RGB. Return the size in its file, "WIDTHxHEIGHT", and Pillow's mode too.

    needed: the shorter side in pixels that suffices; a much larger JPEG is decoded at a half, a quarter or an eighth.

    It is turned upright by its EXIF data. Of several images the first is taken. Transparent parts become white, grey of
    10 to 16 bits is scaled, LAB becomes sRGB; other colour profiles are ignored. Damaged metadata are a warning.
    ValueError for pixels of unknown range (32 bits, signed, floating point), and for 16-bit colours with a transparent
    one, of which Pillow keeps too little. Damaged pixels raise what Pillow raises.
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


def reason(error: Exception) -> str:
    """Say in words why a file could not be read as an image."""
    return "no image that Pillow knows" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
