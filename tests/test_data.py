"""Data sets, their layouts, archives, decoded cache, splits and batches; on digits and on small sets that the tests
write themselves."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import utils

from effnet_lib import TrainConfig
from effnet_study import cli
from effnet_study.data import decode, load, sources
from effnet_study.data.decode import DamagedImages
from effnet_study.data.image_files import read_image
from effnet_study.data.inspect import describe_data, inspect_data, sample_grid
from effnet_study.data.load import load_data


def expect_per_class(monkeypatch, name, counts):
    """Let a complete copy of a data set have so many images of each class in train and in test."""
    monkeypatch.setitem(sources.DATA_SETS, name, dataclasses.replace(sources.DATA_SETS[name], per_class=counts))


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- splits and batches


def test_digits_are_split_as_described():
    """The last 360 are the test set. Minival is drawn from the others by class, and the same in every version."""
    data = load_data("digits", size=8)
    assert data.images.shape == (1797, 8, 8, 3) and data.images.dtype == torch.uint8
    digits = load_digits()
    assert np.array_equal(data.images[:, :, :, 1], (digits.images * 255 / 16).round())
    assert data.labels.tolist() == digits.target.tolist() and data.classes == tuple("0123456789")
    assert data.indices["test"].tolist() == list(range(1437, 1797))
    minival = data.indices["minival"].tolist()
    assert sorted(minival + data.indices["train"].tolist()) == list(range(1437))
    assert minival[:6] == [5, 41, 43, 47, 58, 78]
    held_out = np.bincount(digits.target[minival]) - 0.1 * np.bincount(digits.target[:1437])
    assert len(minival) == 144 and np.abs(held_out).max() < 1  # a tenth of each class
    assert data.fingerprint == "6fac3891123d935e346c139e1e8dcf2c"
    assert data.title == "scikit-learn digits"


def test_fewer_classes_and_images_leave_the_rest_alone():
    whole, part = load_data("digits", size=8), load_data("digits", size=8, train_per_class=5)
    assert torch.bincount(part.labels[part.indices["train"]]).tolist() == [5] * 10
    assert set(part.indices["train"].tolist()) < set(whole.indices["train"].tolist())
    assert all(torch.equal(whole.indices[split], part.indices[split]) for split in ("minival", "test"))
    few = load_data("digits", size=8, classes=4)
    assert few.classes == tuple("0123") and few.title == "scikit-learn digits (4 classes)"
    for split, images in few.indices.items():
        assert set(few.labels[images].tolist()) == {0, 1, 2, 3}, split
    test = whole.indices["test"]
    assert torch.equal(few.indices["test"], test[whole.labels[test] < 4])


def test_validation_images_stand_in_for_the_test_images():
    data = load_data("digits", size=8)
    blind = data.without_test()
    assert torch.equal(blind.indices["test"], data.indices["minival"]) and blind.fingerprint == data.fingerprint
    assert blind.counts == {"train": 1293, "minival": 144, "test": 144}


def test_batches_are_a_function_of_seed_epoch_and_step(digits):
    def epoch(number, seed=0, start=0):
        return list(digits.train_batches(TrainConfig(resolution=16, batch_size=24, seed=seed), number, start))

    first, again = epoch(0), epoch(0)
    assert len(first) == 240 // 24
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    for (x, y), (x2, y2) in zip(first[3:], epoch(0, start=3), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(first[0][1], epoch(1)[0][1])
    assert not torch.equal(first[0][1], epoch(0, seed=1)[0][1])
    assert torch.bincount(torch.cat([y for _, y in first])).tolist() == [24] * 10


def test_batches_are_normalised_by_the_training_images(digits):
    stored, train = digits.images.numpy().astype(float), digits.indices["train"].numpy()
    mean, std = stored[train].mean((0, 1, 2)), stored[train].std((0, 1, 2))
    images, labels = next(digits.eval_batches("test", 16, 50))
    test = digits.indices["test"].numpy()[:50]
    expected = ((stored[test] - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert torch.equal(labels, digits.labels[test])
    augmented, _ = next(digits.train_batches(TrainConfig(resolution=16, batch_size=24), 0))
    assert all(batch.is_contiguous(memory_format=torch.channels_last) for batch in (images, augmented))
    assert sum(len(labels) for _, labels in digits.eval_batches("test", 16, 50)) == 360  # the last batch too


def test_each_channel_has_its_own_normalisation(digits):
    tinted = dataclasses.replace(digits, mean=torch.tensor([10.0, 20.0, 30.0]), std=torch.tensor([1.0, 2.0, 4.0]))
    got = tinted.normalise(torch.full((1, 3, 2, 2), 50.0))
    assert got[0, :, 1, 0].tolist() == pytest.approx([40, 15, 5])


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}])
def test_images_that_are_read_ahead_make_the_same_batches(digits, mixing):
    config = TrainConfig(resolution=16, batch_size=24, **mixing)
    ahead = dataclasses.replace(digits, streamed=True)
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
    monkeypatch.setattr(load, "memory", lambda: 2 * 40 * 12 * 12 * 3 - 1)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    assert data.streamed and data.to("cpu") is data and isinstance(data.decoded.images, np.memmap)
    assert len(list(data.eval_batches("test", 12, 6))) == 4


def test_a_cache_is_mapped_even_if_it_exceeds_the_memory(tmp_path, monkeypatch):
    """A map that could be written to would count as memory."""
    monkeypatch.setattr(decode, "BLOCK", 4_000_000 // 8)
    monkeypatch.setattr(decode.Decoded, "damaged_blocks", lambda *arguments: [])
    path = tmp_path / f"huge-512px-{decode.digest([], 512)}.npy"
    with path.open("wb") as file:  # 3 TB that take no room
        shape = (4_000_000, 512, 512, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape, dtype=np.int64)))
    notes = {"sizes": {}, "modes": {}, "checks": [0] * 8, "identities": [decode.identity([])]}
    path.with_suffix(".json").write_text(json.dumps(notes | {"written": path.stat().st_mtime_ns}))
    assert decode.load_images(tmp_path, [], 512, tmp_path, "huge").images.shape == shape


def test_a_large_batch_is_augmented_in_parts(recipe):
    data = load_data("digits", size=8)
    (images, labels), *_ = data.train_batches(recipe(resolution=8, batch_size=1100, mixup=0.3), 0)
    assert images.shape == (1100, 3, 8, 8) and labels.shape == (1100, 10)
    parts = [next(data.train_batches(recipe(resolution=8, batch_size=1100, mixup=0.3), 0, 0, (i, 2))) for i in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), images)


def test_an_epoch_that_is_left_early_leaves_no_reading_threads(digits):
    before = threading.active_count()
    batches = dataclasses.replace(digits, streamed=True).train_batches(TrainConfig(resolution=16, batch_size=24), 0)
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


def test_a_folder_of_its_own_three_parts_keeps_them(image_folder, tmp_path):
    folder = image_folder(parts=("train", "val", "test"))
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    assert data.counts == {"train": 20, "minival": 20, "test": 20}
    for split, part in (("train", "train"), ("minival", "val"), ("test", "test")):
        assert {data.files[i].split("/")[0] for i in data.indices[split]} == {part}
    with pytest.raises(ValueError, match="minival: .*pictures has a minival of its own, val/; leave the setting out"):
        load_data(f"folder:{folder}", tmp_path, size=12, minival=0.5)
    few, again = (load_data(f"folder:{folder}", tmp_path, size=12, train_per_class=4) for _ in range(2))
    assert few.counts == {"train": 8, "minival": 20, "test": 20} and few.fingerprint == again.fingerprint
    assert [few.files[i] for i in few.indices["train"]] != few.files[:4] + few.files[10:14]  # drawn at random
    assert torch.bincount(few.labels[few.indices["train"]]).tolist() == [4, 4]


def test_a_folder_without_parts_is_split_by_class(image_folder, tmp_path):
    folder = image_folder(parts=("",), count=20)
    data, again = (load_data(f"folder:{folder}", tmp_path, size=12, test=0.25) for _ in range(2))
    assert data.counts == {"train": 27, "minival": 3, "test": 10} and data.fingerprint == again.fingerprint
    assert torch.bincount(data.labels[data.indices["test"]]).tolist() == [5, 5]
    assert sorted(torch.cat(list(data.indices.values())).tolist()) == list(range(40))  # each image in one split
    assert all(torch.equal(images, images.sort().values) for images in data.indices.values())
    other = load_data(f"folder:{folder}", tmp_path, size=12)
    assert other.counts["test"] == 8 and other.fingerprint != data.fingerprint  # although they share a cache


def test_only_the_first_classes_are_decoded(image_folder, tmp_path, no_decoding):
    folder = image_folder(classes=("ant", "bee", "cat"))
    load_data(f"folder:{folder}", tmp_path, size=12)
    data = load_data(f"folder:{folder}", tmp_path, size=12, classes=2)
    assert data.classes == ("ant", "bee") and len(data.images) == 40
    no_decoding()  # the part and the whole have caches of their own
    assert len(load_data(f"folder:{folder}", tmp_path, size=12).classes) == 3
    with pytest.raises(ValueError, match="classes: folder:.* has 3, got 4"):
        load_data(f"folder:{folder}", tmp_path, classes=4)


def test_folders_that_cannot_serve_are_refused(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; tried .*nowhere and .*nowhere.*EFFNET_DATA"):
        load_data("folder:nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has 0 class folders; expected at least 2"):
        load_data("folder:empty", tmp_path)
    folder = image_folder(parts=("train",))
    with pytest.raises(FileNotFoundError, match="has train/; expected train/, and test/ or val/"):
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
    with pytest.raises(FileNotFoundError, match="has test/; expected train/, .*a class cannot be called train"):
        load_data(f"folder:{folder}", tmp_path)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_a_rare_class_is_named_with_the_settings_that_help(images, image_folder, tmp_path):
    folder = image_folder(parts=("",), classes=("ant", "bee"), count=20)
    for file in sorted((folder / "bee").iterdir())[images:]:
        file.unlink()
    with pytest.raises(ValueError, match=r"class 'bee' has .*minival=0.3 test=0.3"):
        load_data(f"folder:{folder}", tmp_path, minival=0.05, test=0.05)
    if images == 5:
        assert (load_data(f"folder:{folder}", tmp_path, minival=0.3, test=0.3).counts["minival"]) > 1


def test_class_folders_without_a_readable_image_are_named(image_folder, tmp_path):
    folder = image_folder(parts=("",), classes=("ant", "bee"))
    for file in list(folder.rglob("*.*")):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match="class 'ant' has 0 of 0 images"):
        load_data(f"folder:{folder}", tmp_path)


def test_all_that_is_wrong_with_the_arguments_is_found_before_anything_is_decoded(image_folder, tmp_path, no_decoding):
    folder = image_folder(parts=("",), classes=("ant", "bee", "cat"))
    no_decoding()
    for options in ({"minival": 1e-9}, {"classes": 4}, {"test": 1e-9}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}: "):
            load_data(f"folder:{folder}", tmp_path, **options)
    for file in (folder / "bee").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"class 'bee' has no image in train \(a file that ends in .jpg, "):
        load_data(f"folder:{folder}", tmp_path)


def test_a_file_name_that_is_no_text_is_read(image_folder, tmp_path):
    folder = image_folder()
    os.rename(folder / "train" / "ant" / "3.png", os.fsencode(folder / "train" / "ant") + b"/\xff.png")
    assert load_data(f"folder:{folder}", tmp_path, size=12).counts["test"] == 20


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
    smooth = Image.fromarray(random_pixels(20, 20, 3)).resize((240, 240), Image.Resampling.BICUBIC)
    got, size, _ = read_image(save(tmp_path, smooth, "image.jpg", quality=95), 60)
    expected = np.asarray(smooth.resize((60, 60), Image.Resampling.BILINEAR)).astype(int)
    assert size == "240x240" and np.abs(got - expected).mean() < 1  # decoded at 60 px, not at 120: 1.9


def write_damaged(folder):
    """Files that are no images, under the names of four that were: path to what is said of it."""
    whole = (folder / "train" / "ant" / "0.png").read_bytes()
    damaged = {
        "train/ant/0.png": (b"", "no image that pillow knows"),
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
    assert cli.main(["data", f"folder:{folder}", "--root", str(tmp_path)]) == 2
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
        monkeypatch.setattr(decode, "_decode", lambda *a: pytest.fail("decoded again"))

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
    changed = load_data(f"folder:{folder}", tmp_path, size=12)
    assert changed.fingerprint != first.fingerprint and changed.images[0].tolist() == [[[255, 0, 0]] * 12] * 12
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1  # the old one is gone
    load_data(f"folder:{folder}", tmp_path, size=8)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # one for each size


def test_the_cache_depends_on_all_that_decides_the_pixels(monkeypatch):
    files = [("a.png", 1, 2), ("b.png", 3, 4)]
    digests = [decode.digest(files, 8), decode.digest(files, 9), decode.digest(files[::-1], 8)]
    digests += [
        decode.digest([changed, files[1]], 8) for changed in (("c.png", 1, 2), ("a.png", 2, 2), ("a.png", 1, 3))
    ]
    for module, name, value in ((decode, "VERSION", -1), (decode, "BLOCK", 7), (decode.PIL, "__version__", "0")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            digests.append(decode.digest(files, 8))
    assert len(set(digests)) == len(digests) == 9 and decode.digest(list(files), 8) == digests[0]


def test_fingerprint_mean_and_deviation_are_those_of_the_files(image_folder, tmp_path):
    """Records hold them: they may never change for the same images."""
    folder = image_folder()
    for file in sorted(folder.glob("test/*/*")):  # another brightness than the training images
        Image.fromarray(np.asarray(Image.open(file)) // 4).save(file)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    digest = hashlib.blake2b(digest_size=16)
    for split, index in data.indices.items():
        digest.update(split.encode() + index.numpy().astype("<i8").tobytes())
        digest.update(data.labels[index].numpy().astype("<i8").tobytes())
    digest.update(data.images.numpy().tobytes())
    assert data.fingerprint == digest.hexdigest()
    train = [np.asarray(Image.open(folder / data.files[i])) for i in data.indices["train"]]
    assert {data.files[i].split("/")[0] for i in data.indices["train"]} == {"train"}
    assert data.mean.tolist() == pytest.approx(np.mean(train, (0, 1, 2)), rel=1e-6)
    assert data.std.tolist() == pytest.approx(np.std(train, (0, 1, 2)), rel=1e-6)


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "notes", "no checks", "zeroed"])
def test_a_damaged_cache_is_noticed_and_made_anew(damage, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 1)
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


def test_blocks_are_decoded_side_by_side_in_order(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 3)
    monkeypatch.setattr(decode.joblib, "cpu_count", lambda: 2)
    folder = image_folder(count=8)
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    for image, file in zip(data.images, data.files, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(folder / file)))
    assert data.files == sorted(data.files, key=lambda file: (file.startswith("test/"), file))
    assert data.decoded.notes["checks"][10] == zlib.crc32(data.images[30:].numpy())
    assert len(data.decoded.notes["checks"]) == 11 and data.decoded.stale_blocks() == []


@pytest.mark.slow
def test_two_processes_that_start_together_decode_once(image_folder, tmp_path):
    folder = image_folder(count=200)
    code = "from effnet_study.data.load import load_data\n"
    code += f"print(load_data('folder:{folder}', {str(tmp_path)!r}).fingerprint)"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=1500)[0] for process in both]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    assert "".join(said).count("decoding 800 images") == 1


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
def test_a_cache_that_cannot_be_written_is_an_error_with_its_cure(trouble, image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    if trouble == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 40 * 12 * 12 * 3 - 1))
        said = "it needs 0.00 GB, 0.00 GB are free"
    elif trouble == "full":
        full = OSError(28, "No space left on device", "x.npy")
        monkeypatch.setattr(decode, "replace_file", Mock(side_effect=full))
        said = "No space left on device"
    else:
        (tmp_path / "cache").write_text("a file where the folder should be, as a user who may not write finds it")
        said = "File exists"
    with pytest.raises(OSError, match=rf"no decoded images can be written to .*cache .*{said}.*; set .EFFNET_CACHE"):
        load_data(f"folder:{folder}", tmp_path, size=12)
    monkeypatch.undo()
    assert load_data(f"folder:{folder}", tmp_path, size=12, cache=tmp_path / "other").counts["test"] == 20


def test_a_cache_of_no_more_use_makes_room(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    load_data(f"folder:{folder}", tmp_path, size=12)
    (old,) = (tmp_path / "cache").glob("*.npy")
    Image.new("RGB", (12, 12), "red").save(folder / "train" / "ant" / "0.png")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0 if old.exists() else 10**6))
    load_data(f"folder:{folder}", tmp_path, size=12)
    (new,) = (tmp_path / "cache").glob("*.npy")
    assert new != old


def test_data_and_cache_are_found_by_argument_and_environment(image_folder, tmp_path, monkeypatch):
    image_folder()
    there = load_data("folder:pictures", tmp_path, size=12, cache=tmp_path / "argument")
    assert len(list((tmp_path / "argument").glob("*.npy"))) == 1
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path))
    monkeypatch.setenv("EFFNET_CACHE", str(tmp_path / "fast"))
    assert load_data("folder:pictures", size=12).fingerprint == there.fingerprint
    assert len(list((tmp_path / "fast").glob("*.npy"))) == 1 and not (tmp_path / "cache").exists()


def test_folders_of_the_same_name_have_caches_of_their_own(image_folder, tmp_path, no_decoding):
    folder = image_folder()
    other = shutil.copytree(folder, tmp_path / "other" / folder.name)
    Image.new("RGB", (12, 12), "red").save(other / "train" / "ant" / "0.png")
    for place in (folder, other):
        load_data(f"folder:{place}", tmp_path, size=12)
    no_decoding()
    assert load_data(f"folder:{folder}", tmp_path, size=12).images[0].tolist() != [[[255, 0, 0]] * 12] * 12


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
    assert cli.main(["data", f"folder:{folder}", "--root", str(tmp_path), "size=12"]) == 0
    printed, folder = capsys.readouterr().out, tmp_path / "reports"
    assert said.splitlines()[5] in printed and data.fingerprint in printed
    (report,), (grid,) = folder.glob("*.json"), folder.glob("*.png")
    assert json.loads(report.read_text())["counts"] == data.counts and Image.open(grid).size[0] > 500


def test_a_cache_that_rots_is_found_by_the_inspection(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 1)
    folder = image_folder()
    data = load_data(f"folder:{folder}", tmp_path, size=12)
    path, written = data.decoded.path, data.decoded.path.stat().st_mtime_ns

    def change(byte):
        content = bytearray(path.read_bytes())
        content[byte] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(written, written))  # no program did it

    change(128 + 3 * 12 * 12 * 3)  # the fourth image, which a start does not look at
    monkeypatch.setattr(cli, "sample_grid", lambda data: Figure())
    assert inspect_data(load_data(f"folder:{folder}", tmp_path, size=12))["cache"]["damaged_blocks"] == [3]
    assert cli.main(["data", f"folder:{folder}", "--root", str(tmp_path), "size=12"]) == 2
    change(-1)  # the last image
    with pytest.warns(UserWarning, match="its pixels have changed"):
        assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint == data.fingerprint


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
        ("digits", {"minival": 0}, "minival: expected a value greater than 0, got 0"),
        ("digits", {"minival": 1e-6}, "minival: cannot hold out"),
        ("digits", {"classes": 11}, "classes: digits has 10, got 11"),
        ("digits", {"size": 0}, "size: expected"),
        ("digits", {"train_per_class": 2.5}, "train_per_class: expected"),
        ("digits", {"test": 0.2}, "test: digits has a test set of its own"),
        ("folder:x", {"test": 1.5}, "test: expected a value less than 1, got 1.5"),
        ("imagenet", {"classes": 1001}, "classes: imagenet has 1000, got 1001"),
    ],
)
def test_bad_arguments_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(name, **options)


def test_a_new_data_set_is_a_reader_and_a_line(image_folder, tmp_path, monkeypatch):
    def read(settings, folder):
        source = sources.Source(["ant", "bee"][: settings.classes], folder)
        source.add_folders({"train": sources.TRAIN, "test": sources.TEST}, source.classes)
        return source

    monkeypatch.setitem(sources.DATA_SETS, "pictures", sources.DataSet("Pictures", 2, 12, read, per_class=(10, 10)))
    image_folder()
    data = load_data("pictures", tmp_path)
    assert data.title == "Pictures" and data.counts == {"train": 18, "minival": 2, "test": 20}
    assert data.images.shape[1:] == (12, 12, 3)
    (tmp_path / "pictures" / "test" / "ant" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="class 'ant' has 9 images for test, expected 10"):
        load_data("pictures", tmp_path)


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
    assert inspect_data(data)["sizes"] == {
        "32x32": 120
    }  # torchvision's array is not contiguous, which once failed here
    assert load_data("cifar10", source.parent, size=16, minival=0.2, download=False).images.shape[1] == 16


@pytest.mark.parametrize("by_hand", [False, True])
def test_cifar10_is_fetched_or_unpacked_into_place(by_hand, small_cifar10, tmp_path):
    root, archive = tmp_path / "root", small_cifar10[1]
    (root / ".fetching-cifar10-abc").mkdir(parents=True)  # left by a killed process
    if by_hand:
        shutil.copy(archive, root)
    assert load_data("cifar10", root, minival=0.2, download=not by_hand).counts["train"] == 80
    there = {place.name for place in root.iterdir()}
    assert there == {"cifar-10-batches-py", ".cifar10.lock"} | ({archive.name} if by_hand else set())


def test_an_archive_without_its_checksum_is_never_unpacked(small_cifar10, tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    archive = tmp_path / "root" / small_cifar10[1].name
    archive.write_bytes(small_cifar10[1].read_bytes() + b"x")
    monkeypatch.setattr(utils, "extract_archive", lambda *a: pytest.fail("unpacked"))
    with pytest.raises(
        ValueError, match=r"cifar-10-python.tar.gz is damaged: its md5 is .*, expected .*; fetch it again"
    ):
        load_data("cifar10", tmp_path / "root", download=False)
    assert archive.exists()


def test_a_damaged_download_leaves_nothing_behind(small_cifar10, tmp_path):
    small_cifar10[1].write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not at .*fetching it failed .*effnet data cifar10"):
        load_data("cifar10", tmp_path / "root")
    assert [place.name for place in (tmp_path / "root").iterdir()] == [".cifar10.lock"]


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
        ours = sources.DATA_SETS[name].archive
        assert (ours.url, ours.md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
    food = sources.DATA_SETS["food101"].archive
    assert (food.url.partition(":")[2], food.md5) == (datasets.Food101._URL.partition(":")[2], datasets.Food101._MD5)


@pytest.fixture
def small_tiny_imagenet(tmp_path, monkeypatch):
    """The published layout: labels of val in a file, some images grey. Three classes, ten images each."""
    folder, rng = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
    expect_per_class(monkeypatch, "tiny-imagenet", (10, 4))
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
    assert data.classes == ("kite", "goldfish", "tench")  # in the order of wnids.txt
    assert data.counts == {"train": 24, "minival": 6, "test": 12}
    test = data.indices["test"]
    assert data.labels[test].tolist() == [0, 1, 2] * 4
    assert [data.files[i] for i in test] == [f"val/images/val_{i}.JPEG" for i in range(12)]
    assert data.files[:2] == ["train/n03/images/n03_0.JPEG", "train/n03/images/n03_1.JPEG"]
    for split in ("train", "minival"):
        wnids = [data.files[i].split("/")[1] for i in data.indices[split]]
        assert [("n03", "n01", "n02").index(wnid) for wnid in wnids] == data.labels[data.indices[split]].tolist()
    assert data.images.shape == (42, 64, 64, 3)


def test_what_is_missing_from_tiny_imagenet_is_named(small_tiny_imagenet, tmp_path):
    (small_tiny_imagenet / "val" / "images" / "val_7.JPEG").unlink()
    lacks = "'goldfish' has 3 images for test, expected 4; complete the copy, or .*classes=N, up to 1"
    with pytest.raises(FileNotFoundError, match=lacks):
        load_data("tiny-imagenet", tmp_path, download=False)
    shutil.rmtree(small_tiny_imagenet / "train" / "n02")
    with pytest.raises(FileNotFoundError, match="'tench' has 0 images for train, expected 10; .*classes=N, up to 2"):
        load_data("tiny-imagenet", tmp_path, download=False)
    data = load_data("tiny-imagenet", tmp_path, classes=1, minival=0.2, download=False)  # which is complete
    assert data.classes == ("kite",) and data.counts == {"train": 8, "minival": 2, "test": 4}
    (small_tiny_imagenet / "val" / "val_annotations.txt").unlink()
    with pytest.raises(ValueError, match=r"damaged .*val_annotations\.txt.*delete it, then: effnet data tiny-imagenet"):
        load_data("tiny-imagenet", tmp_path, download=False)


def test_tiny_imagenet_is_fetched_into_place(small_tiny_imagenet, tmp_path, published):
    shutil.make_archive(tmp_path / "site" / "tiny-imagenet-200", "zip", tmp_path, "tiny-imagenet-200")
    published("tiny-imagenet", tmp_path / "site" / "tiny-imagenet-200.zip")
    data = load_data("tiny-imagenet", tmp_path / "root", minival=0.2)
    assert data.fingerprint == load_data("tiny-imagenet", tmp_path, minival=0.2).fingerprint
    assert not list((tmp_path / "root").glob(".fetching*"))


def test_food101_is_read_in_its_published_layout(tmp_path, monkeypatch):
    folder = tmp_path / "food-101"
    expect_per_class(monkeypatch, "food101", (6, 2))
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
    assert data.classes == ("apple_pie", "baklava", "ceviche") and data.title == "Food-101 (3 classes)"
    assert data.counts == {"train": 14, "minival": 4, "test": 6} and data.images.shape[1:] == (16, 16, 3)
    assert {data.files[i] for i in data.indices["test"]} == {
        f"images/{c}/{i}.jpg" for c in data.classes for i in (6, 7)
    }
    assert load_data("food101", tmp_path, classes=2, size=16, minival=0.2, download=False).counts["test"] == 4
    (folder / "images" / "baklava" / "7.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"'baklava' has 1 images for test, expected 2; .*up to 1"):
        load_data("food101", tmp_path, size=16, download=False)
    for damage in (lambda path: path.write_text("{"), lambda path: path.write_text("{}"), os.unlink):
        damage(folder / "meta" / "test.json")
        with pytest.raises(ValueError, match=r"food-101 is damaged .*; delete it, then: effnet data food101"):
            load_data("food101", tmp_path, download=False)


def write_imagenet(folder, classes, train=2, val=1):
    image = folder / "image.png"
    Image.new("RGB", (4, 4), "red").save(image)
    for number in range(classes):
        for part, count in (("train", train), ("val", val)):
            place = folder / "imagenet" / part / f"n{number:08}"
            place.mkdir(parents=True)
            for i in range(count):
                os.link(image, place / f"{i}.png")
    (folder / "imagenet" / "train" / ".ipynb_checkpoints").mkdir()


def test_imagenet_is_read_from_class_folders(tmp_path, monkeypatch):
    expect_per_class(monkeypatch, "imagenet", (None, 5))
    write_imagenet(tmp_path, 3, train=10, val=5)
    with pytest.raises(FileNotFoundError, match="train has 3 class folders, expected 1000. .*classes=N"):
        load_data("imagenet", tmp_path)
    data = load_data("imagenet", tmp_path, classes=2, size=12)
    assert data.classes == ("n00000000", "n00000001") and data.title == "ImageNet (2 classes)"
    assert data.counts == {"train": 18, "minival": 2, "test": 10}
    for split, part in (("train", "train"), ("minival", "train"), ("test", "val")):
        assert {data.files[i].split("/")[0] for i in data.indices[split]} == {part}
    (tmp_path / "imagenet" / "val" / "n00000001" / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match="'n00000001' has 4 images for test, expected 5; complete the copy"):
        load_data("imagenet", tmp_path, classes=2)
    for wnid in os.listdir(tmp_path / "imagenet" / "val"):
        shutil.rmtree(tmp_path / "imagenet" / "val" / wnid)
    with pytest.raises(FileNotFoundError, match=r"imagenet/val has 0 class folders.*account at image-net.org"):
        load_data("imagenet", tmp_path, classes=2)


def test_all_of_imagenets_classes_have_their_names(tmp_path, monkeypatch):
    expect_per_class(monkeypatch, "imagenet", (None, 1))
    write_imagenet(tmp_path, 1000)
    with pytest.raises(FileNotFoundError, match="train has 2,000 images, expected 1,281,167; complete the copy"):
        load_data("imagenet", tmp_path)
    monkeypatch.setattr(sources, "IMAGENET_TRAIN", 2000)
    data = load_data("imagenet", tmp_path, size=4, minival=0.5)
    assert len(data.classes) == 1000 and data.title == "ImageNet"
    assert (data.classes[0], data.classes[207], data.classes[999]) == ("tench", "golden retriever", "toilet tissue")
