"""Data sets, their layouts, archives, decoded cache, splits and batches; on digits and on small sets that the tests
write themselves."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import effnet_data
import effnet_images
from effnet_data import DamagedImages, describe_data, inspect_data, load_data, sample_grid
from effnet_images import read_image, unpack
from effnet_lib import TrainConfig
from effnet_study import main


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- splits and batches


def test_digits_are_split_without_overlap_and_with_all_classes():
    data = load_data("digits", minival=0.1)
    assert data.images.shape == (1797, 32, 32, 3) and data.images.dtype == torch.uint8
    assert sum(data.counts.values()) == 1797 and data.counts["test"] == 360
    parts = [set(index.tolist()) for index in data.indices.values()]
    assert len(set.union(*parts)) == 1797
    for index in data.indices.values():
        assert set(data.labels[index].tolist()) == set(range(10))


def test_the_split_follows_its_seed_alone():
    first, again, other = (load_data("digits", size=8, split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.indices["minival"], again.indices["minival"])
    assert not torch.equal(first.indices["minival"], other.indices["minival"])
    assert torch.equal(first.indices["test"], other.indices["test"])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_fewer_training_images_leave_minival_and_test_alone():
    whole, part = load_data("digits", size=8), load_data("digits", size=8, train_per_class=5)
    assert torch.bincount(part.labels[part.indices["train"]]).tolist() == [5] * 10
    assert all(torch.equal(whole.indices[split], part.indices[split]) for split in ("minival", "test"))


def test_batches_are_a_function_of_seed_epoch_and_step(digits):
    def epoch(number, seed=0, start=0):
        return list(digits.train_batches(TrainConfig(resolution=16, batch_size=24, seed=seed), number, start))

    first, again = epoch(0), epoch(0)
    assert len(first) == 120 // 24
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    for (x, y), (x2, y2) in zip(first[3:], epoch(0, start=3), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(first[0][1], epoch(1)[0][1])
    assert not torch.equal(first[0][1], epoch(0, seed=1)[0][1])
    assert torch.bincount(torch.cat([y for _, y in first])).tolist() == [12] * 10


def test_batches_are_normalised_and_channels_last(digits):
    images, labels = zip(*digits.eval_batches("train", 16, 50), strict=True)
    images = torch.cat(images)
    assert images.shape == (120, 3, 16, 16) and torch.equal(torch.cat(labels), digits.labels[digits.indices["train"]])
    assert images.mean().abs() < 0.01 and images.std() == pytest.approx(1, abs=0.01)
    assert next(digits.eval_batches("train", 16, 50))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}])
def test_images_that_are_read_ahead_make_the_same_batches(digits, mixing):
    config = TrainConfig(resolution=16, batch_size=24, **mixing)
    ahead = digits.to("cpu", whole=False)
    assert ahead.streamed and not digits.streamed and ahead.fingerprint == digits.fingerprint
    for start in (0, 3):
        for batch, same in zip(
            digits.train_batches(config, 1, start), ahead.train_batches(config, 1, start), strict=True
        ):
            assert all(map(torch.equal, batch, same))
    for batch, same in zip(digits.eval_batches("test", 16, 50), ahead.eval_batches("test", 16, 50), strict=True):
        assert all(map(torch.equal, batch, same))


def test_what_exceeds_half_of_the_memory_is_read_ahead(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    assert not load_data(f"folder:{folder}", tmp_path, size=12).streamed
    monkeypatch.setattr(effnet_data, "memory", lambda: 2 * 40 * 12 * 12 * 3 - 1)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    assert data.streamed and data.to("cpu") is data and isinstance(data.decoded.images, np.memmap)
    assert len(list(data.eval_batches("test", 12, 6))) == 4


def test_a_cache_is_mapped_even_if_it_exceeds_the_memory(tmp_path, monkeypatch):
    """A map that could be written to would count as memory."""
    monkeypatch.setattr(effnet_images, "BLOCK", 4_000_000 // 8)
    monkeypatch.setattr(effnet_images.Decoded, "damaged_blocks", lambda self, blocks: [])
    listing = effnet_images.Listing(tmp_path, [])
    path = tmp_path / f"huge-512px-{listing.digest(512)}.npy"
    with path.open("wb") as file:  # 3 TB that take no room
        shape = (4_000_000, 512, 512, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape, dtype=np.int64)))
    notes = {"sizes": {}, "modes": {}, "checks": [], "written": path.stat().st_mtime_ns}
    path.with_suffix(".json").write_text(json.dumps(notes | {"checks": [0] * 8}))
    assert effnet_images.load_images(listing, 512, tmp_path, "huge").images.shape == shape


def test_a_large_batch_is_augmented_in_parts(recipe):
    data = load_data("digits", size=8)
    (images, labels), *_ = data.train_batches(recipe(resolution=8, batch_size=1100, mixup=0.3), 0)
    assert images.shape == (1100, 3, 8, 8) and labels.shape == (1100, 10)
    parts = [next(data.train_batches(recipe(resolution=8, batch_size=1100, mixup=0.3), 0, 0, (i, 2))) for i in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), images)


def test_an_epoch_that_is_left_early_leaves_no_reading_threads(digits):
    before = threading.active_count()
    batches = digits.to("cpu", whole=False).train_batches(TrainConfig(resolution=16, batch_size=24), 0)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


# ---- image folders


def test_an_image_folder_is_read(image_folder, tmp_path):
    folder = image_folder(parts=("train", "val"), size=(20, 14))
    Image.new("L", (9, 9), 200).save(folder / "train" / "ant" / "grey.jpg")
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    (folder / "train" / "ant" / "._0.png").write_text("what a Mac leaves beside an image")
    data = load_data(f"folder:{folder}", tmp_path, size=12, minival=0.2)
    assert data.classes == ("ant", "bee") and data.images.shape == (41, 12, 12, 3)
    assert data.counts == {"train": 16, "minival": 5, "test": 20}
    grey = data.images[data.images.float().std((1, 2, 3)) < 2]
    assert len(grey) == 1 and grey.float().mean() == pytest.approx(200, abs=2)
    assert data.decoded.notes["sizes"] == {"14x20": 40, "9x9": 1} and data.decoded.notes["modes"] == {"RGB": 40, "L": 1}
    assert data.files[0] == "train/ant/0.png" and len(data.files) == 41


def test_a_folder_is_found_under_the_root_and_by_the_environment(image_folder, tmp_path, monkeypatch):
    image_folder()
    by_argument = load_data("folder:pictures", tmp_path, size=12)
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path))
    assert load_data("folder:pictures", size=12).fingerprint == by_argument.fingerprint


def test_a_folder_of_its_own_three_parts_keeps_them(image_folder, tmp_path):
    folder = image_folder(parts=("train", "val", "test"))
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    assert data.counts == {"train": 20, "minival": 20, "test": 20}
    for split, part in (("train", "train"), ("minival", "val"), ("test", "test")):
        assert {data.files[i].split("/")[0] for i in data.indices[split]} == {part}


def test_fewer_training_images_are_drawn_where_minival_is_given_too(image_folder, tmp_path):
    folder = image_folder(parts=("train", "val", "test"))
    chosen = []
    for seed in (0, 0, 1):
        data = load_data(f"folder:{folder}", tmp_path, size=12, train_per_class=4, split_seed=seed)
        assert data.counts == {"train": 8, "minival": 20, "test": 20}
        chosen.append([data.files[i] for i in data.indices["train"]])
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_folder_without_parts_is_split_by_class_and_seed(image_folder, tmp_path):
    folder = image_folder(parts=("",), count=20)
    data = load_data(f"folder:{folder}", tmp_path, size=12, test=0.25)
    assert data.counts == {"train": 27, "minival": 3, "test": 10}
    assert torch.bincount(data.labels[data.indices["test"]]).tolist() == [5, 5]
    again, other = (load_data(f"folder:{folder}", tmp_path, size=12, test=0.25, split_seed=seed) for seed in (0, 1))
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert load_data(f"folder:{folder}", tmp_path, size=12).counts["test"] == 8


def test_only_the_first_classes_are_decoded(image_folder, tmp_path):
    folder = image_folder(classes=("ant", "bee", "cat"))
    data = load_data(f"folder:{folder}", tmp_path, size=12, classes=2)
    assert data.classes == ("ant", "bee") and len(data.images) == 40
    with pytest.raises(ValueError, match="classes: folder:.* has 3, got 4"):
        load_data(f"folder:{folder}", tmp_path, classes=4)


def test_folders_that_cannot_serve_are_refused(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; tried .*nowhere and .*nowhere.*EFFNET_DATA"):
        load_data("folder:nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has 0 class folders; expected at least 2"):
        load_data("folder:empty", tmp_path)
    folder = image_folder(parts=("train",))
    with pytest.raises(FileNotFoundError, match="has train/, but no test/ or val/"):
        load_data(f"folder:{folder}", tmp_path)
    (folder / "test" / "ant").mkdir(parents=True)
    (folder / "test" / "wasp").mkdir()
    with pytest.raises(ValueError, match="class 'wasp' is not in"):
        load_data(f"folder:{folder}", tmp_path)
    (folder / "test" / "wasp").rmdir()
    (folder / "test" / "bee").mkdir()
    with pytest.raises(ValueError, match="'ant' has no image in test"):
        load_data(f"folder:{folder}", tmp_path)
    with pytest.raises(ValueError, match="test: .* has a test set of its own"):
        load_data(f"folder:{folder}", tmp_path, test=0.2)
    shutil.rmtree(folder / "train" / "bee")
    with pytest.raises(ValueError, match="train has 1 class folders; expected at least 2"):
        load_data(f"folder:{folder}", tmp_path)
    shutil.rmtree(folder / "train")
    with pytest.raises(FileNotFoundError, match="has test/, but no train/ .*a class cannot be called train"):
        load_data(f"folder:{folder}", tmp_path)


def test_all_that_is_wrong_with_the_arguments_is_found_before_anything_is_decoded(image_folder, tmp_path, no_decoding):
    folder = image_folder(parts=("",), classes=("ant", "bee", "cat"))
    no_decoding()
    for options in ({"minival": 1e-9}, {"classes": 4}, {"test": 1e-9}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: "):
            load_data(f"folder:{folder}", tmp_path, **options)
    for file in (folder / "bee").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"class 'bee' has no image in train \(a file that ends in .bmp, "):
        load_data(f"folder:{folder}", tmp_path)


def test_a_file_name_that_is_no_text_is_read(image_folder, tmp_path):
    folder = image_folder()
    os.rename(folder / "train" / "ant" / "3.png", os.fsencode(folder / "train" / "ant") + b"/\xff.png")
    assert load_data(f"folder:{folder}", tmp_path, size=12).counts["test"] == 20


def test_an_empty_class_is_named(image_folder, tmp_path):
    folder = image_folder(parts=("",))
    (folder / "cat").mkdir()
    with pytest.raises(ValueError, match="class 'cat' has no image in train"):
        load_data(f"folder:{folder}", tmp_path)


# ---- images of every kind


def save(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_an_image_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    got, size, mode = read_image(save(tmp_path, Image.fromarray(pixels), exif=exif), 8)
    assert got[:4].min() == 255 and got[4:].max() == 0 and (size, mode) == ("8x8", "RGB")


def test_the_middle_of_an_oblong_image_is_taken_antialiased(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60:2] = 200  # stripes of one pixel in the middle, black beside it
    got, size, _ = read_image(save(tmp_path, Image.fromarray(pixels)), 10)
    assert got.shape == (10, 10, 3) and size == "80x40"
    assert got[:, 1:-1].min() >= 90 and got[:, 1:-1].max() <= 110


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path):
    smooth = Image.fromarray(random_pixels(6, 6, 3)).resize((600, 600), Image.Resampling.BICUBIC)
    got, size, _ = read_image(save(tmp_path, smooth, "image.jpg", quality=95), 30)
    expected = np.asarray(smooth.resize((30, 30), Image.Resampling.BILINEAR)).astype(int)
    assert size == "600x600" and np.abs(got - expected).mean() < 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_every_mode_becomes_8_bit_rgb(mode, tmp_path):
    levels = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    grey = Image.fromarray(levels)
    if mode in ("I;16", "I"):
        image = Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = grey.convert(mode) if mode in ("1", "P") else grey.convert("RGB").convert(mode)
    name = {"CMYK": "image.tif", "YCbCr": "image.tif", "I": "image.tif"}.get(mode, "image.png")
    got, _, found = read_image(save(tmp_path, image, name), 8)
    expected = np.where(levels > 127, 255, 0) if mode == "1" else levels
    assert got.dtype == np.uint8 and found[0] == mode[0]
    assert mode == "1" or np.abs(got.astype(int) - expected[..., None]).max() <= 2
    assert mode != "1" or set(got.flatten().tolist()) == {0, 255}  # dithered


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert read_image(save(tmp_path, image), 4)[0].min() == 255


def write_damaged(folder):
    """Files that are no images, under the names of four that were: path to what is said of it."""
    whole = (folder / "train" / "ant" / "0.png").read_bytes()
    damaged = {
        "train/ant/0.png": (b"", "it is empty"),
        "train/bee/1.png": (b"no picture at all", "no image that pillow knows"),
        "test/ant/2.png": (whole[: len(whole) // 2], "truncated"),
    }
    for name, (content, _) in damaged.items():
        (folder / name).write_bytes(content)
    jpeg = folder / "test" / "bee" / "3.jpg"
    Image.fromarray(random_pixels(40, 40, 3)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:600])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "test" / "bee" / "float.tif")
    return {name: said for name, (_, said) in damaged.items()} | {
        "test/bee/3.jpg": "truncated",
        "test/bee/float.tif": "floating-point pixels of unknown range",
    }


def test_damaged_images_are_all_named(image_folder, tmp_path, capsys):
    folder = image_folder()
    damaged = write_damaged(folder)
    with pytest.raises(
        DamagedImages, match="5 of 42 files cannot be read as an image: .*; repair or remove them"
    ) as error:
        load_data(f"folder:{folder}", tmp_path)
    found = {str(path.relative_to(folder)): reason for path, reason in error.value.files}
    assert set(found) == set(damaged) and all(said in found[name].lower() for name, said in damaged.items())
    assert not list((tmp_path / "cache").glob("*.npy")) and not list((tmp_path / "cache").glob(".*partial"))
    assert main(["data", f"folder:{folder}", "--root", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert all(str(folder / name) in said for name in damaged)
    for name in damaged:
        (folder / name).unlink()
    assert sum(load_data(f"folder:{folder}", tmp_path).counts.values()) == 37


# ---- the decoded cache


@pytest.fixture
def no_decoding(monkeypatch):
    """Make decoding fail the test."""

    def forbid():
        monkeypatch.setattr(effnet_images, "_decode", lambda *a: pytest.fail("decoded again"))

    return forbid


def test_decoded_images_are_cached_until_the_source_changes(image_folder, tmp_path, no_decoding, monkeypatch):
    folder = image_folder()
    first = load_data(f"folder:{folder}", tmp_path, size=12)
    assert isinstance(first.decoded.images, np.memmap)
    no_decoding()
    again = load_data(f"folder:{folder}", tmp_path, size=12)
    assert again.fingerprint == first.fingerprint and torch.equal(again.mean, first.mean)
    monkeypatch.undo()
    Image.new("RGB", (12, 12), "red").save(folder / "train" / "ant" / "0.png")
    assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint != first.fingerprint
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # the old one is gone
    load_data(f"folder:{folder}", tmp_path, size=8)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # one for each size


def test_the_fingerprint_is_of_pixels_labels_and_splits(image_folder, tmp_path):
    """Records hold it: it may never change for the same images."""
    folder = image_folder()
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    digest = hashlib.blake2b(digest_size=16)
    for split, index in data.indices.items():
        digest.update(split.encode() + index.numpy().astype("<i8").tobytes())
        digest.update(data.labels[index].numpy().astype("<i8").tobytes())
    digest.update(data.images.numpy().tobytes())
    assert data.fingerprint == digest.hexdigest()
    pixels = data.images[data.indices["train"]].flatten(0, 2).double()
    torch.testing.assert_close(data.mean, pixels.mean(0).float())
    torch.testing.assert_close(data.std, pixels.std(0, correction=0).float())


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "notes", "no checks", "zeroed"])
def test_a_damaged_cache_is_noticed_and_made_anew(damage, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(effnet_images, "BLOCK", 1)
    folder = image_folder()
    first = load_data(f"folder:{folder}", tmp_path, size=12)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    content = bytearray(cached.read_bytes())
    if damage == "cut":
        cached.write_bytes(content[:500])
    elif damage == "flipped":
        content[-100] ^= 1
        cached.write_bytes(content)
    elif damage == "zeroed":  # one image of 40
        content[128 + 5 * 432 : 128 + 6 * 432] = bytes(432)
        cached.write_bytes(content)
    elif damage == "no checks":
        cached.with_suffix(".json").write_text('{"checks": [], "written": 0}')
    elif damage == "garbage":
        cached.write_bytes(b"x" * len(content))
    else:
        cached.with_suffix(".json").write_text("{}")
    with pytest.warns(UserWarning, match="is damaged .*; decoding the images again"):
        assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint == first.fingerprint
    assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint == first.fingerprint


def test_a_large_data_set_is_decoded_by_several_processes_in_order(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(effnet_images, "BLOCK", 3)
    monkeypatch.setattr(effnet_images.joblib, "cpu_count", lambda: 2)
    folder = image_folder(count=8)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    for i in (0, 7, 20, 31):
        assert np.array_equal(data.images[i], np.asarray(Image.open(folder / data.files[i])))
    assert len(data.decoded.notes["checks"]) == 11 and data.decoded.damaged_blocks() == []


def test_two_processes_that_start_together_decode_once(image_folder, tmp_path):
    folder = image_folder(count=200)
    code = f"from effnet_data import load_data; print(load_data('folder:{folder}', {str(tmp_path)!r}).fingerprint)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert "".join(said).count("decoded in") == 1


def test_what_a_killed_process_left_is_removed(image_folder, tmp_path):
    folder = image_folder()
    load_data(f"folder:{folder}", tmp_path, size=12)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    left = cached.with_name(f".{cached.name}.99999.partial")
    left.write_bytes(b"half")
    cached.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        load_data(f"folder:{folder}", tmp_path, size=12)
    assert not left.exists() and cached.exists()


@pytest.mark.parametrize("trouble", ["no room", "full", "not writable"])
def test_without_a_cache_images_are_decoded_into_memory(trouble, image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    if trouble == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        said = "it needs 0.00 GB, 0.00 GB are free"
    elif trouble == "full":
        monkeypatch.setattr(effnet_images, "replace_file", raising(OSError(28, "No space left on device", "x.npy")))
        said = "No space left on device"
    else:
        (tmp_path / "cache").write_text("a file where the folder should be, as a user who may not write finds it")
        said = "File exists"
    with pytest.warns(UserWarning, match=rf"no decoded cache at .*cache \(.*{said}.*\): .*EFFNET_CACHE"):
        data = load_data(f"folder:{folder}", tmp_path, size=12)
    monkeypatch.undo()
    elsewhere = load_data(f"folder:{folder}", tmp_path / "none", size=12)
    assert data.fingerprint == elsewhere.fingerprint and data.decoded.path is None
    monkeypatch.setattr(effnet_images, "memory", lambda: 1000)
    if trouble == "not writable":
        with pytest.raises(OSError, match="do not fit into memory; free that much there, or set .EFFNET_CACHE"):
            load_data(f"folder:{folder}", tmp_path, size=12)


def raising(error):
    def act(*args, **options):
        raise error

    return act


def test_a_cache_of_no_more_use_makes_room(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    load_data(f"folder:{folder}", tmp_path, size=12)
    (old,) = (tmp_path / "cache").glob("*.npy")
    Image.new("RGB", (12, 12), "red").save(folder / "train" / "ant" / "0.png")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0 if old.exists() else 10**6))
    load_data(f"folder:{folder}", tmp_path, size=12)
    (new,) = (tmp_path / "cache").glob("*.npy")
    assert new != old


def test_parts_and_the_whole_of_a_data_set_have_caches_of_their_own(image_folder, tmp_path, no_decoding):
    folder = image_folder(classes=("ant", "bee", "cat"))
    load_data(f"folder:{folder}", tmp_path, size=12)
    load_data(f"folder:{folder}", tmp_path, size=12, classes=2)
    no_decoding()
    assert len(load_data(f"folder:{folder}", tmp_path, size=12).classes) == 3


def test_the_cache_can_lie_elsewhere(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    load_data(f"folder:{folder}", tmp_path, size=12, cache=tmp_path / "argument")
    assert len(list((tmp_path / "argument").glob("*.npy"))) == 1
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "fast"))
    load_data(f"folder:{folder}", tmp_path, size=12)
    assert len(list((tmp_path / "fast").glob("*.npy"))) == 1 and not (tmp_path / "cache").exists()


# ---- what a data set is like


def test_a_data_set_is_described(image_folder, tmp_path, capsys):
    folder = image_folder(size=(20, 14))
    pixels = Image.fromarray(random_pixels(20, 14, 3))
    pixels.save(folder / "train" / "ant" / "twin.png")
    pixels.save(folder / "test" / "bee" / "twin.png")
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    facts = inspect_data(data)
    assert facts["images_per_class"][1] == {"class": "bee", "train": 9, "minival": 1, "test": 11}
    assert facts["sizes"] == {"14x20": 42} and facts["cache"]["damaged_blocks"] == []
    (twins,) = facts["duplicates"]
    assert {image["image"] for image in twins} >= {"train/ant/twin.png", "test/bee/twin.png"}
    said = describe_data(facts)
    assert "1 images occur more than once, 1 of them both in test and outside, 1 under different classes" in said
    assert main(["data", f"folder:{folder}", "--root", str(tmp_path), "--size", "12"]) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "reports"
    assert said.splitlines()[5] in printed and data.fingerprint in printed
    (report,), (grid,) = folder.glob("*.json"), folder.glob("*.png")
    assert json.loads(report.read_text())["counts"] == data.counts and Image.open(grid).size[0] > 500


def test_a_cache_that_rots_is_found_by_the_inspection(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(effnet_images, "BLOCK", 1)
    folder = image_folder(count=20)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    content, path = bytearray(data.decoded.path.read_bytes()), data.decoded.path
    content[128 + 5 * 12 * 12 * 3] ^= 1  # the sixth image, which a start does not look at
    written = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(written, written))  # no program did it
    assert inspect_data(load_data(f"folder:{folder}", tmp_path, size=12))["cache"]["damaged_blocks"] == [5]
    assert main(["data", f"folder:{folder}", "--root", str(tmp_path), "--size", "12"]) == 2


def test_the_grid_has_a_row_for_each_of_some_classes(digits):
    figure = sample_grid(digits, classes=4, columns=5)
    labels = [ax.get_ylabel() for ax in figure.axes[::5]]
    assert labels == ["0", "3", "6", "9"] and all(len(ax.images) == 1 for ax in figure.axes)


# ---- arguments


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cifar", {}, "unknown data set 'cifar'"),
        ("folder", {}, "unknown data set 'folder'"),
        ("digits:x", {}, "unknown data set"),
        ("digits", {"minival": 0}, "minival: expected a share"),
        ("digits", {"minival": 1e-6}, "minival: cannot hold out"),
        ("digits", {"classes": 11}, "classes: digits has 10, got 11"),
        ("digits", {"size": 0}, "size: expected"),
        ("digits", {"train_per_class": 2.5}, "train_per_class: expected"),
        ("digits", {"test": 0.2}, "test: digits has a test set of its own"),
        ("folder:x", {"test": 1.5}, "test: expected a share"),
        ("imagenet", {"classes": 1001}, "classes: imagenet has 1000, got 1001"),
    ],
)
def test_bad_arguments_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(name, **options)


# ---- data sets that are fetched


def write_cifar10(folder, per_batch=20):
    """The published layout of cifar-10-batches-py, with a few random images. Returns torchvision's list of md5s."""
    folder.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = [i % 10 for i in range(per_batch)]
        batch = {"data": rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(batch))
        sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return sums, hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch, published):
    """torchvision's CIFAR10 told to expect a small copy: (folder of the copy, its archive)."""
    source = tmp_path / "source" / "cifar-10-batches-py"
    sums, meta = write_cifar10(source)
    archive = tmp_path / "source" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=source.name)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", sums[:5])
    monkeypatch.setattr(cifar, "test_list", sums[5:])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": meta})
    published("cifar10", archive)
    return source, archive


def test_cifar10_is_read_through_torchvision(small_cifar10):
    source, _ = small_cifar10
    data = load_data("cifar10", source.parent, minival=0.2, download=False)
    assert data.counts == {"train": 80, "minival": 20, "test": 20}
    assert data.classes[3] == "cat" and data.images.shape == (120, 32, 32, 3)
    assert load_data("cifar10", source.parent, size=16, minival=0.2, download=False).images.shape[1] == 16


def test_cifar10_is_fetched_into_place(small_cifar10, tmp_path):
    data = load_data("cifar10", tmp_path / "root", minival=0.2)
    assert data.counts["train"] == 80
    assert [place.name for place in (tmp_path / "root").iterdir() if place.name[0] != "."] == ["cifar-10-batches-py"]


def test_an_archive_that_a_user_put_there_is_unpacked(small_cifar10, tmp_path):
    (tmp_path / "root").mkdir()
    shutil.copy(small_cifar10[1], tmp_path / "root")
    assert load_data("cifar10", tmp_path / "root", minival=0.2, download=False).counts["train"] == 80
    assert (tmp_path / "root" / small_cifar10[1].name).exists()


def test_an_archive_without_its_checksum_is_never_unpacked(small_cifar10, tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    archive = tmp_path / "root" / small_cifar10[1].name
    archive.write_bytes(small_cifar10[1].read_bytes() + b"x")
    monkeypatch.setattr(effnet_images, "unpack", lambda *a: pytest.fail("unpacked"))
    with pytest.raises(
        ValueError, match=r"cifar-10-python.tar.gz is damaged: its md5 is .*, expected .*; fetch it anew"
    ):
        load_data("cifar10", tmp_path / "root", download=False)
    assert archive.exists()


def test_a_damaged_download_leaves_nothing_behind(small_cifar10, tmp_path):
    small_cifar10[1].write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not at .*fetching it failed .*effnet data cifar10"):
        load_data("cifar10", tmp_path / "root")
    assert [place.name for place in (tmp_path / "root").iterdir()] == [".cifar10.lock"]


def test_what_a_killed_fetch_left_is_removed(small_cifar10, tmp_path):
    (tmp_path / "root" / ".fetching-cifar10-abc").mkdir(parents=True)
    load_data("cifar10", tmp_path / "root", minival=0.2)
    assert not list((tmp_path / "root").glob(".fetching*"))


def test_a_damaged_copy_is_named(small_cifar10):
    source, _ = small_cifar10
    (source / "data_batch_2").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is damaged.*delete it"):
        load_data("cifar10", source.parent)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet", "food101"])
def test_missing_data_says_where_it_was_sought_and_how_to_fetch_it(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{name} is not at {tmp_path}.*EFFNET_DATA.*effnet data {name}"):
        load_data(name, tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


def test_the_archives_are_those_that_torchvision_knows():
    datasets = torchvision.datasets
    for name, theirs in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        ours = effnet_data.ARCHIVES[name]
        assert (ours.url, ours.md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
        assert ours.file == theirs.filename
    food = effnet_data.ARCHIVES["food101"]
    assert (food.url.partition(":")[2], food.md5) == (datasets.Food101._URL.partition(":")[2], datasets.Food101._MD5)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_an_archive_that_would_write_elsewhere_is_refused(kind, name, tmp_path):
    archive = tmp_path / f"archive.{kind}"
    (tmp_path / "content").write_text("x")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(tmp_path / "content", "inside")
            packed.writestr(name, "x")
    else:
        with tarfile.open(archive, "w") as packed:
            packed.add(tmp_path / "content", "inside")
            member = packed.gettarinfo(tmp_path / "content")
            member.name = name
            packed.addfile(member, (tmp_path / "content").open("rb"))
    with pytest.raises(ValueError, match="archive.* is not safe"):
        unpack(archive, tmp_path / "place")
    assert not (tmp_path / "outside").exists() and not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize("safeguard", [True, False])
def test_an_archive_with_a_link_is_refused(safeguard, tmp_path, monkeypatch):
    if not safeguard:  # as in Python 3.11.2
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "content").write_text("x")
    with tarfile.open(tmp_path / "good.tar", "w") as packed:
        packed.add(tmp_path / "content", "inside")
    unpack(tmp_path / "good.tar", tmp_path / "place")
    assert (tmp_path / "place" / "inside").read_text() == "x"
    with tarfile.open(tmp_path / "bad.tar", "w") as packed:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        packed.addfile(link)
    with pytest.raises(ValueError, match="bad.tar: 'link' is a link or a device; this archive is not safe"):
        unpack(tmp_path / "bad.tar", tmp_path / "place")


@pytest.mark.parametrize("kind, damage", [("zip", "cut"), ("zip", "changed"), ("tar.gz", "cut"), ("tar", "nonsense")])
def test_a_damaged_archive_is_refused(kind, damage, tmp_path):
    archive = tmp_path / f"archive.{kind}"
    (tmp_path / "content").write_bytes(random_pixels(20000).tobytes())
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed:
            packed.write(tmp_path / "content", "inside")
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as packed:
            packed.add(tmp_path / "content", "inside")
    content = bytearray(archive.read_bytes())
    content[9000] ^= 255
    archive.write_bytes({"cut": content[:9000], "changed": content, "nonsense": b"nonsense"}[damage])
    with pytest.raises(ValueError, match="archive.* is damaged .*; fetch it anew"):
        unpack(archive, tmp_path / "place")


@pytest.fixture
def small_tiny_imagenet(tmp_path, monkeypatch):
    """The published layout: labels of val in a file, some images grey. Three classes, ten images each."""
    folder, rng = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    monkeypatch.setitem(effnet_data.PER_CLASS, "tiny-imagenet", (10, 4))
    wnids, lines = ["n03", "n01", "n02"], []
    (folder / "val" / "images").mkdir(parents=True)
    for wnid in wnids:
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 256, (64, 64) if i == 0 else (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "val/images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttench\nn03\tkite\nn99\tother\n")
    return folder


def test_tiny_imagenet_is_read_in_its_published_layout(small_tiny_imagenet, tmp_path):
    data = load_data("tiny-imagenet", tmp_path, minival=0.2, download=False)
    assert data.classes == ("kite", "goldfish", "tench")
    assert data.counts == {"train": 24, "minival": 6, "test": 12}
    assert data.labels[data.indices["test"]].tolist() == [0, 1, 2] * 4
    assert data.images.shape == (42, 64, 64, 3)


def test_a_part_of_tiny_imagenet_is_read_only_when_asked_for(small_tiny_imagenet, tmp_path):
    os.rename(small_tiny_imagenet / "train" / "n02", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="1 of 3 classes are missing, the first is n02.*classes=2"):
        load_data("tiny-imagenet", tmp_path, download=False)
    data = load_data("tiny-imagenet", tmp_path, classes=2, minival=0.2, download=False)
    assert data.classes == ("kite", "goldfish") and data.counts["test"] == 8


def test_an_incomplete_tiny_imagenet_is_refused(small_tiny_imagenet, tmp_path):
    (small_tiny_imagenet / "val" / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is missing"):
        load_data("tiny-imagenet", tmp_path, download=False)


def test_what_is_missing_from_tiny_imagenet_is_named(small_tiny_imagenet, tmp_path):
    (small_tiny_imagenet / "val" / "images" / "val_7.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations.txt names 1 images that are not there.*val_7.JPEG"):
        load_data("tiny-imagenet", tmp_path, download=False)
    assert load_data("tiny-imagenet", tmp_path, classes=1, minival=0.2, download=False).counts["test"] == 4  # not of it
    (small_tiny_imagenet / "train" / "n01" / "images" / "n01_3.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 images that are not there"):
        load_data("tiny-imagenet", tmp_path, classes=2, download=False)
    (small_tiny_imagenet / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn03\t0\t0\t62\t62\n")
    with pytest.raises(
        FileNotFoundError, match="class 'goldfish' has 9 images for train, expected 10; complete the copy"
    ):
        load_data("tiny-imagenet", tmp_path, download=False)


def test_tiny_imagenet_is_fetched_into_place(small_tiny_imagenet, tmp_path, published):
    shutil.make_archive(tmp_path / "site" / "tiny-imagenet-200", "zip", tmp_path, "tiny-imagenet-200")
    published("tiny-imagenet", tmp_path / "site" / "tiny-imagenet-200.zip")
    data = load_data("tiny-imagenet", tmp_path / "root", minival=0.2)
    assert data.fingerprint == load_data("tiny-imagenet", tmp_path, minival=0.2).fingerprint
    assert not list((tmp_path / "root").glob(".fetching*"))


def test_food101_is_read_in_its_published_layout(tmp_path, monkeypatch):
    folder = tmp_path / "food-101"
    monkeypatch.setitem(effnet_data.PER_CLASS, "food101", (6, 2))
    lists = {"train": {}, "test": {}}
    for name in ("apple_pie", "baklava", "ceviche"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(8):
            lists["train" if i < 6 else "test"].setdefault(name, []).append(f"{name}/{i}")
            Image.fromarray(random_pixels(30 + i, 40, 3)).save(folder / "images" / name / f"{i}.jpg")
    (folder / "meta").mkdir()
    for part, names in lists.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(names))
    data = load_data("food101", tmp_path, size=16, minival=0.2, download=False)
    assert data.classes == ("apple_pie", "baklava", "ceviche") and data.title == "Food-101"
    assert data.counts == {"train": 14, "minival": 4, "test": 6} and data.images.shape[1:] == (16, 16, 3)
    assert {data.files[i] for i in data.indices["test"]} == {
        f"images/{c}/{i}.jpg" for c in data.classes for i in (6, 7)
    }
    assert load_data("food101", tmp_path, classes=2, size=16, minival=0.2, download=False).counts["test"] == 4
    (folder / "images" / "baklava" / "7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.json names 1 images that are not there, .*baklava/7.jpg"):
        load_data("food101", tmp_path, size=16, download=False)
    (folder / "meta" / "test.json").write_text("{")
    with pytest.raises(ValueError, match=r"test.json is damaged .*; delete the copy, then: effnet data food101"):
        load_data("food101", tmp_path, download=False)
    (folder / "meta" / "test.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.json is missing"):
        load_data("food101", tmp_path, download=False)


def write_imagenet(folder, classes, train=2, val=1):
    for number in range(classes):
        for part, count in (("train", train), ("val", val)):
            place = folder / "imagenet" / part / f"n{number:08}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (number % 256, i, 0)).save(place / f"{i}.png")
    (folder / "imagenet" / "train" / ".ipynb_checkpoints").mkdir()


def test_imagenet_is_read_from_class_folders(tmp_path, monkeypatch):
    monkeypatch.setitem(effnet_data.PER_CLASS, "imagenet", (None, 5))
    write_imagenet(tmp_path, 3, train=10, val=5)
    with pytest.raises(FileNotFoundError, match="train has 3 class folders, expected 1000; .*classes=N"):
        load_data("imagenet", tmp_path)
    data = load_data("imagenet", tmp_path, classes=2, size=12)
    assert data.classes == ("n00000000", "n00000001") and data.title == "ImageNet (2 classes)"
    assert data.counts == {"train": 18, "minival": 2, "test": 10}
    (tmp_path / "imagenet" / "val" / "n00000000" / "3.png").unlink()
    with pytest.raises(
        FileNotFoundError, match="class 'n00000000' has 4 images for test, expected 5; complete the copy"
    ):
        load_data("imagenet", tmp_path, classes=2)
    (tmp_path / "imagenet" / "val" / "n00000001").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="val has no folder n00000001: sort the validation images into folders"):
        load_data("imagenet", tmp_path, classes=2)
    shutil.rmtree(tmp_path / "imagenet" / "val")
    with pytest.raises(FileNotFoundError, match=r"imagenet: .*val is not there.*account at image-net.org"):
        load_data("imagenet", tmp_path)


def test_all_of_imagenets_classes_have_their_names(tmp_path, monkeypatch):
    monkeypatch.setitem(effnet_data.PER_CLASS, "imagenet", (None, 1))
    write_imagenet(tmp_path, 1000)
    with pytest.raises(FileNotFoundError, match="train has 2,000 images, expected 1,281,167; complete the copy"):
        load_data("imagenet", tmp_path)
    monkeypatch.setattr(effnet_data, "IMAGENET_TRAIN", 2000)
    data = load_data("imagenet", tmp_path, size=4, minival=0.5)
    assert len(data.classes) == 1000 and data.classes[0] == "tench" and data.title == "ImageNet"
