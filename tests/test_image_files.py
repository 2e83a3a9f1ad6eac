"""Real image files and folders: every kind of pixels, damaged metadata, names of splits, and what is left out."""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from effnet_study.data import decode
from effnet_study.data.decode import DamagedImages
from effnet_study.data.image_files import open_image, scan
from effnet_study.data.inspect import describe_data, inspect_data
from effnet_study.data.load import load_data

LEVELS = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


def read(path):
    return np.asarray(open_image(path)[0])


def grey(levels):
    return np.repeat(np.asarray(levels, np.uint8)[..., None], 3, 2)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_png(path, pixels, colour, bits, *chunks):
    """Write a PNG of packed rows (height, bytes), all of whose bits are used."""
    height, row = pixels.shape
    width = row * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    rows = b"".join(b"\0" + line.tobytes() for line in pixels)
    body = b"".join([header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_tiff(path, size, bits, photometric, content, order="<", sample_format=1):
    """Write an uncompressed TIFF with one sample a pixel, or three for LAB (8)."""
    width, height = size
    samples = 3 if photometric == 8 else 1
    offset = 8 + 2 + 10 * 12 + 4
    where = offset if samples > 1 else bits  # of BitsPerSample, which does not fit into its entry if there are three
    entries = [(256, width), (257, height), (258, where), (259, 1), (262, photometric), (273, offset + 6)]
    entries += [(277, samples), (278, height), (279, len(content)), (339, sample_format)]
    body = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        counted = samples if tag == 258 else 1
        long = tag in (273, 279) or (tag == 258 and samples > 1)
        packed = struct.pack(order + ("I" if long else "H"), value).ljust(4, b"\0")
        body += struct.pack(order + "HHI", tag, 4 if tag in (273, 279) else 3, counted) + packed
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
    path.write_bytes(head + body + bytes(4) + struct.pack(order + "3H", *[bits] * 3) + content)
    return path


# ---- pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_every_orientation_is_turned_upright(orientation, kind, tmp_path):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turned = [lambda x: x, np.fliplr, lambda x: x[::-1, ::-1], np.flipud]
    turned += [lambda x: x.swapaxes(0, 1), np.rot90, lambda x: x[::-1, ::-1].swapaxes(0, 1), lambda x: np.rot90(x, -1)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation - 1](upright)))
    stored.save(tmp_path / f"x.{kind}", exif=exif, quality=95)
    got = read(tmp_path / f"x.{kind}").astype(int)
    assert got.shape == upright.shape and np.abs(got - upright)[4::8, 6::12].max() < 9


TIFF = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"]
OTHERS = ["png 1", "png L", "png LA", "png P", "png RGB", "png RGBA", "png I;16", "jpg L", "jpg RGB", "jpg CMYK"]
OTHERS += ["webp RGB", "jp2 L", "jp2 RGBA", "jp2 I;16", "bmp 1", "bmp RGB", "gif P", "tga LA", "pgm I"]


@pytest.mark.parametrize("kind", [*(f"tif {mode}" for mode in TIFF), *OTHERS])
def test_every_mode_keeps_its_levels(kind, tmp_path):
    suffix, mode = kind.split()
    if mode.startswith("I"):
        image = Image.fromarray(LEVELS.astype({"I;16": "<u2", "I": "<i4"}[mode]) * 257)
    else:
        image = Image.fromarray(LEVELS).convert("L" if mode in ("1", "P", "PA") else "RGB").convert(mode)
    image.save(tmp_path / f"x.{suffix}", **{"lossless": True} if suffix == "webp" else {"quality": 100})
    got, size, found = open_image(tmp_path / f"x.{suffix}")
    assert (size, found, got.mode) == ("8x8", mode, "RGB")
    expected = np.asarray(image) * 255 if mode == "1" else LEVELS
    lossy = suffix == "jpg" or mode in ("CMYK", "YCbCr")
    assert np.abs(np.asarray(got).astype(int) - grey(expected)).max() <= 3 * lossy


@pytest.mark.parametrize("order, mode", [("<", "I;16"), (">", "I;16B")])
def test_both_byte_orders_are_read(order, mode, tmp_path):
    path = write_tiff(tmp_path / "x.tif", (8, 8), 16, 1, (LEVELS.astype(order + "u2") * 257).tobytes(), order)
    assert Image.open(path).mode == mode and np.array_equal(read(path), grey(LEVELS))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("bits", [1, 4, 8, 16])
def test_white_as_zero_is_inverted(bits, order, tmp_path):
    levels = np.arange(8) * (2**bits - 1) // 7 if bits > 1 else np.arange(8) % 2
    content = b"".join(struct.pack(order + "H", v) for v in levels) if bits == 16 else levels.astype(np.uint8).tobytes()
    if bits < 8:
        content = np.packbits(np.unpackbits(levels.astype(np.uint8)[:, None], axis=1)[:, -bits:]).tobytes()
    path = write_tiff(tmp_path / "x.tif", (8, 1), bits, 0, content, order)
    if (bits, order) == (16, ">"):
        with pytest.raises(Image.UnidentifiedImageError):  # Pillow does not know it
            read(path)
    else:
        assert read(path).tolist() == grey([np.round(255 - levels * 255 / (2**bits - 1))]).tolist()


@pytest.mark.parametrize(
    "kind", ["png LA", "png RGBA", "webp RGBA", "tif LA", "tif RGBA", "tif PA", "jp2 RGBA", "tga RGBA"]
)
def test_transparency_is_laid_over_white(kind, tmp_path):
    suffix, mode = kind.split()
    image = Image.fromarray(LEVELS).convert("P" if mode == "PA" else "RGB").convert(mode)
    image.putalpha(Image.fromarray(LEVELS.T.copy()))
    image.save(tmp_path / f"x.{suffix}", **{"lossless": True, "exact": True} if suffix == "webp" else {})
    assert open_image(tmp_path / f"x.{suffix}")[2] == mode
    alpha = LEVELS.T / 255
    assert np.abs(read(tmp_path / f"x.{suffix}").astype(int) - grey(LEVELS * alpha + 255 * (1 - alpha))).max() <= 1


def test_12_bits_of_tiff_span_black_to_white(tmp_path):
    path = write_tiff(tmp_path / "x.tif", (2, 1), 12, 1, bytes([0xFF, 0xF8, 0x00]))
    assert read(path).tolist() == grey([[255, 128]]).tolist()


@pytest.mark.parametrize("kind", ["P2", "P5"])
@pytest.mark.parametrize("most", [1, 15, 100, 255, 1023, 4095, 65535])
def test_pgm_is_scaled_by_its_maximum_even_if_it_is_dark(kind, most, tmp_path):
    for values in ([0, most // 2, most], [0, most // 300, most // 280]):
        if kind == "P2":
            body = " ".join(map(str, values)).encode() + b"\n"
        else:
            body = np.array(values, ">u2" if most > 255 else np.uint8).tobytes()
        (tmp_path / "x.pgm").write_bytes(f"{kind} 3 1 {most}\n".encode() + body)
        expected = grey([np.array(values) * 255 / most + 0.5]).astype(int)
        assert np.abs(read(tmp_path / "x.pgm").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_png_becomes_white(bits, tmp_path):
    values = np.arange(16) % 2**bits * (2**bits // 16 or 1)
    packed = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(16, 2), axis=1)[:, -bits:]
    transparent = int(values[1])
    chunks = chunk(b"tRNS", struct.pack(">H", transparent))
    path = write_png(tmp_path / "x.png", np.packbits(packed)[None], 0, bits, chunks)
    expected = np.where(values == transparent, 255, np.round(values * 255 / (2**bits - 1)))
    assert read(path).tolist() == grey([expected]).tolist()


def test_a_transparent_colour_of_png_becomes_white(tmp_path):
    pixels = np.array([[1, 2, 3, 4, 5, 6]], np.uint8)
    path = write_png(tmp_path / "x.png", pixels, 2, 8, chunk(b"tRNS", struct.pack(">3H", 1, 2, 3)))
    assert read(path).tolist() == [[[255, 255, 255], [4, 5, 6]]]
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90]))
    pixels, alpha = np.array([[0, 1, 2]], np.uint8), chunk(b"tRNS", bytes([0, 128]))
    path = write_png(tmp_path / "p.png", pixels, 3, 8, palette, alpha)
    assert np.abs(read(path).astype(int) - [[[255] * 3, [147, 152, 157], [70, 80, 90]]]).max() <= 1
    Image.fromarray(np.array([[0, 1]], np.uint8), "P").save(tmp_path / "x.gif", transparency=0)
    assert read(tmp_path / "x.gif")[0, 0].tolist() == [255] * 3
    path = write_png(tmp_path / "16.png", np.zeros((1, 6), np.uint8), 2, 16, chunk(b"tRNS", bytes(6)))
    with pytest.raises(ValueError, match="16-bit colours, one of them transparent"):
        read(path)


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_16_bit_colours_become_8(colour, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 48), dtype=np.uint8)
    path = write_png(tmp_path / "x.png", pixels, colour, 16)
    values = pixels.view(">u2").reshape(4, -1, {2: 3, 4: 2, 6: 4}[colour]) / 65535
    alpha = 1 if colour == 2 else values[..., -1:]
    values = values[..., :1] if colour == 4 else values[..., :3]
    assert np.abs(read(path) - 255 * (values * alpha + 1 - alpha)).max() < 2.5


def test_lab_becomes_srgb(tmp_path):
    """The values for white, grey and sRGB's red, green and blue are in every table of CIELAB (D50)."""
    lab = np.array([(100, 0, 0), (53.39, 0, 0), (54.29, 80.8, 69.89), (87.82, -79.27, 80.99), (29.57, 68.3, -112.03)])
    content = (lab * (2.55, 1, 1)).round().astype(np.int16).astype(np.uint8).tobytes()
    got = read(write_tiff(tmp_path / "x.tif", (5, 1), 8, 8, content))[0].astype(int)
    assert np.abs(got - [[255] * 3, [127] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255]]).max() <= 24  # 8 bits of L, a, b


@pytest.mark.parametrize(
    "bits, sample_format, content",
    [
        (8, 2, bytes([0, 200])),
        (16, 2, struct.pack("<2h", -1, 300)),
        (32, 1, struct.pack("<2I", 3, 200)),  # 8 bits, or a dark image of 16
        (32, 1, struct.pack("<2I", 3, 70000)),
        (32, 3, struct.pack("<2f", 0, 1)),
    ],
)
def test_pixels_of_unknown_range_are_refused(bits, sample_format, content, tmp_path):
    path = write_tiff(tmp_path / "x.tif", (2, 1), bits, 1, content, sample_format=sample_format)
    with pytest.raises(ValueError, match="pixels of unknown range"):
        read(path)


# ---- metadata


def damaged_metadata(kind, path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    if kind == "long text":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("comment", "x" * 2 * PngImagePlugin.MAX_TEXT_CHUNK, zip=True)
        image.save(path, pnginfo=texts)
    elif kind in ("text", "EXIF chunk"):
        image.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", pnginfo=None)
        name = b"eXIf" if kind == "EXIF chunk" else b"tEXt"
        broken = chunk(name, b"comment\0words")[:-1] + b"\0"
        path.write_bytes(path.read_bytes()[:33] + broken + path.read_bytes()[33:])
    else:
        image.save(path, exif=b"Exif\0\0no TIFF header")
    return image


@pytest.mark.parametrize(
    "kind, suffix", [("long text", "png"), ("text", "png"), ("EXIF chunk", "png"), ("EXIF", "jpg"), ("EXIF", "webp")]
)
def test_damaged_metadata_are_no_damaged_pixels(kind, suffix, tmp_path):
    image = damaged_metadata(kind, tmp_path / f"x.{suffix}")
    with pytest.warns(UserWarning, match=rf"x.{suffix} has damaged metadata; its pixels are sound"):
        got = read(tmp_path / f"x.{suffix}")
    image.save(tmp_path / f"sound.{suffix}")
    assert np.array_equal(got, Image.open(tmp_path / f"sound.{suffix}"))


@pytest.mark.parametrize("name", [b"PLTE", b"tRNS", b"IDAT", b"PLTX"])
def test_a_damaged_chunk_that_decides_pixels_is_refused(name, tmp_path):
    chunks = {b"PLTE": bytes(range(9)), b"tRNS": b"\0"}
    path = write_png(
        tmp_path / "x.png", np.array([[0, 1, 2]], np.uint8), 3, 8, *(chunk(*each) for each in chunks.items())
    )
    content = bytearray(path.read_bytes())
    at = content.index(b"PLTE" if name == b"PLTX" else name)
    if name == b"PLTX":
        content[at : at + 4] = name
    else:
        content[at + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises((OSError, SyntaxError)):
        read(path)


def test_damaged_texts_do_not_hide_damaged_pixels_or_the_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3))
    stored.save(tmp_path / "x.png", exif=exif)
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[:33] + chunk(b"tEXt", b"a\0b")[:-1] + b"\0" + content[33:])
    with pytest.warns(UserWarning, match="has damaged metadata"):
        assert np.array_equal(read(tmp_path / "x.png"), np.rot90(stored, -1))
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-30])
    with pytest.raises((OSError, SyntaxError)):
        read(tmp_path / "x.png")


# ---- folders


def small(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


def write_folder(folder, *places, count=10):
    for place in places:
        for i in range(count):
            small(folder / place / f"{i}.png", (i, len(place), 9))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("Training", None, "Testing"),
        ("TRAIN", "valid", "test"),
        ("train", "validation", "Test"),
        ("train", None, "VALID"),
        ("training", "Dev", "testing"),
    ],
)
def test_the_usual_names_of_splits_are_known(names, tmp_path, capsys):
    folder = write_folder(tmp_path / "D", *(f"{name}/{c}" for name in names if name for c in "ab"))
    data = load_data(f"folder:{folder}", tmp_path, size=4)
    assert data.classes == ("a", "b")
    for split, name in zip(("train", "minival", "test"), names, strict=True):
        assert {data.files[i].split("/")[0] for i in data.indices[split]} == {name or names[0]}
    minival = f"{names[1]}/" if names[1] else "drawn from train"
    assert (
        f"D: train = {names[0]}/, minival = {minival}, test = {names[2]}/; 2 classes: a, b\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "places, said",
    [
        (
            ("a/x", "a/y", "b/x", "b/y"),
            r"D/a holds no images, only folders \(x/, y/\).*expected CLASS/.*train/ and test",
        ),
        (("A/deep/a", "A/deep/b", "B/deep/a", "B/deep/b"), r"D/A holds no images, .*deep/a/, deep/b/"),
        (("train/p/a", "train/p/b", "train/q", "test/p", "test/q"), "train/p holds no images, only folders"),
        (("train/a", "Train/b", "test/a"), "has Train/ and test/ and train/; expected .* each once"),
        (("val/a", "validation/a", "train/a"), "has train/ and val/ and validation/; expected"),
    ],
)
def test_folders_whose_classes_are_unclear_are_refused(places, said, tmp_path):
    folder = write_folder(tmp_path / "D", *places, count=2)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_data(f"folder:{folder}", tmp_path)


def test_images_of_a_class_may_lie_deeper(tmp_path):
    folder = write_folder(tmp_path / "D", "a/images", "b", "b/more")
    data = load_data(f"folder:{folder}", tmp_path, size=4)
    assert data.classes == ("a", "b") and len(data.files) == 30


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "D", "train/a", "train/b", "train/c", "test/a", "test/b", "test/c", "extra/a")
    for name in (
        "train/a/._0.png",
        "train/a/._1.png",
        "train/a/notes.txt",
        "train/b/more.TXT",
        "train/a/.DS_Store",
        "test/b/Thumbs.db",
        "README",
    ):
        (folder / name).write_text("x")
    small(folder / "__MACOSX/a/0.png")
    small(folder / "train/a/@eaDir/0.png")
    small(folder / "train/loose.png")
    (folder / "train" / "d").symlink_to("nowhere")
    data = load_data(f"folder:{folder}", tmp_path, size=4, classes=2)
    assert len(data.files) == 40
    said = next(line for line in capsys.readouterr().out.splitlines() if "left out: " in line)
    kinds = said.partition("left out: ")[2].split(", ")
    assert kinds[0] == "hidden (6)" and sorted(kinds[1:3]) == [".txt (2)", "c (2)"]
    assert sorted(kinds[3:]) == [".png (1)", "README (1)", "d (1)", "extra (1)"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path, capsys):
    folder = write_folder(tmp_path / "D", "a", "b")
    (folder / "a" / "self").symlink_to(".")
    (folder / "b" / "all").symlink_to(folder)
    (tmp_path / "other").mkdir()
    (folder / "a" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(folder / "a")
    assert len(load_data(f"folder:{folder}", tmp_path, size=4).files) == 20
    assert "links to a folder above (3)" in capsys.readouterr().out


def test_a_link_that_leads_nowhere_is_a_damaged_image(tmp_path):
    folder = write_folder(tmp_path / "D", "a", "b")
    (folder / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(DamagedImages, match=r"1 of 21 files .*gone.jpg \(\[Errno 2\] No such file or directory: "):
        load_data(f"folder:{folder}", tmp_path)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "tga", "pbm", "qoi", "JPG"])
def test_what_pillow_can_open_is_an_image(suffix, tmp_path):
    pixels = Image.fromarray(grey(LEVELS)).convert("1" if suffix == "pbm" else "RGB")
    pixels.save(tmp_path / f"x.{suffix}")
    ((path, *_),) = scan(tmp_path, "")
    assert np.abs(read(tmp_path / path).astype(int) - np.asarray(pixels.convert("RGB"))).max() < 12


def test_measurements_films_and_programs_are_no_images(tmp_path):
    for suffix in ("h5", "eps", "mpg", "fits", "txt", "pdf", "wmf"):
        (tmp_path / f"x.{suffix}").write_text("x")
    assert scan(tmp_path, "") == []


# ---- files that change places


def swap(one, other):
    one.rename(one.with_name("between"))
    other.rename(one)
    one.with_name("between").rename(other)


@pytest.mark.parametrize("what", ["files", "folders", "contents"])
def test_files_that_swap_places_are_decoded_again(what, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "D", "a", "b")
    for i, c in enumerate("ab"):
        for file in (folder / c).iterdir():
            Image.fromarray(np.full((4, 4, 3), 50 + 9 * int(file.stem) + i, np.uint8)).save(file.with_suffix(".bmp"))
            file.unlink()
            os.utime(file.with_suffix(".bmp"), ns=(10**18, 10**18))
    first = load_data(f"folder:{folder}", tmp_path, size=4)
    one, other = (folder / c / "0.bmp" for c in "ab")
    if what == "contents":
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        for file in (one, other):
            os.utime(file, ns=(10**18, 10**18))
    else:
        swap(*((one, other) if what == "files" else (one.parent, other.parent)))
    changed = load_data(f"folder:{folder}", tmp_path, size=4)
    assert changed.fingerprint != first.fingerprint
    for file, pixels in zip(changed.files, changed.images, strict=True):
        assert pixels.tolist() == np.asarray(Image.open(folder / file)).tolist()
    monkeypatch.setattr(decode, "_decode", lambda *a: pytest.fail("decoded again"))
    assert load_data(f"folder:{folder}", tmp_path, size=4).fingerprint == changed.fingerprint


def test_a_copy_of_a_folder_in_its_place_is_decoded_again(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "D", "a", "b")
    first = load_data(f"folder:{folder}", tmp_path, size=4)
    folder.rename(tmp_path / "original")
    shutil.copytree(tmp_path / "original", folder)  # with the times of change
    assert load_data(f"folder:{folder}", tmp_path, size=4).fingerprint == first.fingerprint
    monkeypatch.setattr(decode, "_decode", lambda *a: pytest.fail("decoded again"))
    assert load_data(f"folder:{folder}", tmp_path, size=4).fingerprint == first.fingerprint


def test_a_cache_of_an_older_version_gets_the_same_name_and_fingerprint(tmp_path):
    folder = write_folder(tmp_path / "D", "a", "b")
    first = load_data(f"folder:{folder}", tmp_path, size=4)
    notes = first.decoded.path.with_suffix(".json")
    notes.write_text(notes.read_text().replace("identities", "unknown"))
    again = load_data(f"folder:{folder}", tmp_path, size=4)
    assert (again.fingerprint, again.decoded.path) == (first.fingerprint, first.decoded.path)


def test_the_inspection_compares_the_cache_with_the_files(tmp_path):
    folder = write_folder(tmp_path / "D", "a", "b")
    data = load_data(f"folder:{folder}", tmp_path, size=4)
    assert "equal to the files" in describe_data(inspect_data(data))
    swap(folder / "a" / "0.png", folder / "b" / "1.png")
    facts = inspect_data(data)
    assert facts["cache"]["damaged_blocks"] == [0] and "DIFFERS from the files in 1 blocks" in describe_data(facts)
