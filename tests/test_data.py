"""Data sets, splits, cache, augmentation; on digits and on small data sets that the tests write themselves."""

import hashlib
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import effnet_data
from effnet_data import augment, load_data, resize
from effnet_lib import TrainConfig


def random_images(n, size):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


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


# ---- resizing and augmentation


@pytest.mark.parametrize("resolution", [7, 16, 24, 25, 50])
def test_resizing_is_torchs_antialiased_bilinear(resolution):
    images = random_images(4, 24)
    nchw = images.permute(0, 3, 1, 2).float()
    expected = F.interpolate(nchw, size=(resolution, resolution), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize(images, resolution), expected, rtol=1e-5, atol=1e-3)


def test_whole_images_unflipped_are_only_resized():
    images = random_images(4, 24)
    got = augment(images, 17, torch.Generator().manual_seed(0), crop_area=1, flip=False)
    torch.testing.assert_close(got, resize(images, 17), rtol=1e-4, atol=1e-2)


def test_each_sample_is_flipped_on_its_own():
    images = random_images(1, 12).expand(200, -1, -1, -1)
    got = augment(images, 12, torch.Generator().manual_seed(0), crop_area=1, flip=True)
    plain = resize(images[:1], 12)[0]
    same = [torch.allclose(image, plain, atol=1e-2) for image in got]
    mirrored = [torch.allclose(image, plain.flip(2), atol=1e-2) for image in got]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 60 < sum(same) < 140


def test_each_sample_is_cropped_on_its_own_and_within_bounds():
    """A picture whose pixels are their own coordinates tells which box was cut out."""
    ramp = torch.arange(100, dtype=torch.uint8)
    image = torch.stack([ramp.expand(100, 100), ramp.expand(100, 100).T, torch.zeros(100, 100, dtype=torch.uint8)], 2)
    got = augment(image.expand(300, -1, -1, -1), 10, torch.Generator().manual_seed(0), crop_area=0.25, flip=False)
    x, y = got[:, 0].mean(1), got[:, 1].mean(2)  # (N, 10) coordinates of columns and rows
    width, height = ((c[:, -1] - c[:, 0]) / 90 for c in (x, y))
    area, aspect = width * height, width / height
    assert got.min() >= 0 and got.max() <= 99
    assert 0.22 < area.min() < 0.3 and 0.85 < area.max() < 1.05
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert len(x[:, 0].round(decimals=3).unique()) > 250


# ---- image folders


def test_an_image_folder_is_read(image_folder, tmp_path):
    folder = image_folder(parts=("train", "val"), size=(20, 14))
    Image.new("L", (9, 9), 200).save(folder / "train" / "ant" / "grey.jpg")
    (folder / "train" / "ant" / "notes.txt").write_text("no image")
    data = load_data(f"folder:{folder}", tmp_path, size=12, minival=0.2)
    assert data.classes == ("ant", "bee") and data.images.shape == (41, 12, 12, 3)
    assert data.counts == {"train": 16, "minival": 5, "test": 20}
    grey = data.images[data.images.float().std((1, 2, 3)) < 2]
    assert len(grey) == 1 and grey.float().mean() == pytest.approx(200, abs=2)


def test_a_folder_is_found_under_the_root_and_by_the_environment(image_folder, tmp_path, monkeypatch):
    image_folder()
    by_argument = load_data("folder:pictures", tmp_path, size=12)
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path))
    assert load_data("folder:pictures", size=12).fingerprint == by_argument.fingerprint


def test_decoded_images_are_cached_until_the_source_changes(image_folder, tmp_path, monkeypatch):
    folder = image_folder()
    first = load_data(f"folder:{folder}", tmp_path, size=12)
    monkeypatch.setattr(effnet_data, "_decode_one", lambda *a, **k: pytest.fail("decoded again"))
    assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint == first.fingerprint
    monkeypatch.undo()
    Image.new("RGB", (12, 12), "red").save(folder / "train" / "ant" / "0.png")
    assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint != first.fingerprint


def test_a_torn_cache_is_rebuilt(image_folder, tmp_path):
    folder = image_folder()
    first = load_data(f"folder:{folder}", tmp_path, size=12)
    (cached,) = (tmp_path / "cache").glob("*.npy")
    cached.write_bytes(cached.read_bytes()[:500])
    with pytest.warns(UserWarning, match="damaged; decoding"):
        assert load_data(f"folder:{folder}", tmp_path, size=12).fingerprint == first.fingerprint


def test_a_broken_image_is_named(image_folder, tmp_path):
    folder = image_folder()
    (folder / "train" / "bee" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train/bee/3\.png cannot be read as an image"):
        load_data(f"folder:{folder}", tmp_path)


def test_folders_that_cannot_serve_are_refused(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; tried .*nowhere and .*nowhere.*EFFNET_DATA"):
        load_data("folder:nowhere", tmp_path)
    folder = image_folder(parts=("train",))
    with pytest.raises(FileNotFoundError, match="has no test/ or val/"):
        load_data(f"folder:{folder}", tmp_path)
    (folder / "test" / "ant").mkdir(parents=True)
    (folder / "test" / "wasp").mkdir()
    with pytest.raises(ValueError, match="class 'wasp' is not in"):
        load_data(f"folder:{folder}", tmp_path)
    (folder / "test" / "wasp").rmdir()
    (folder / "test" / "bee").mkdir()
    with pytest.raises(ValueError, match="'ant' has no image in test"):
        load_data(f"folder:{folder}", tmp_path)


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
def small_cifar10(tmp_path, monkeypatch):
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
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        yield source, archive
        server.shutdown()


def test_cifar10_is_read_through_torchvision(small_cifar10):
    source, _ = small_cifar10
    data = load_data("cifar10", source.parent, minival=0.2, download=False)
    assert data.counts == {"train": 80, "minival": 20, "test": 20}
    assert data.classes[3] == "cat" and data.images.shape == (120, 32, 32, 3)
    assert load_data("cifar10", source.parent, size=16, minival=0.2, download=False).images.shape[1] == 16


def test_cifar10_is_fetched_into_place(small_cifar10, tmp_path):
    data = load_data("cifar10", tmp_path / "root", minival=0.2)
    assert data.counts["train"] == 80
    assert [place.name for place in (tmp_path / "root").iterdir()] == ["cifar-10-batches-py"]


def test_a_damaged_download_leaves_nothing_behind(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(FileNotFoundError, match=r"cifar10 is not at .*fetching it failed .*effnet data cifar10"):
        load_data("cifar10", tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_damaged_copy_is_named(small_cifar10):
    source, _ = small_cifar10
    (source / "data_batch_2").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is damaged.*delete it"):
        load_data("cifar10", source.parent)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_missing_data_says_where_it_was_sought_and_how_to_fetch_it(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{name} is not at {tmp_path}.*EFFNET_DATA.*effnet data {name}"):
        load_data(name, tmp_path, download=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_tiny_imagenet(tmp_path):
    """The published layout: labels of val in a file, some images grey. Three classes, ten images each."""
    folder, rng = tmp_path / "tiny-imagenet-200", np.random.default_rng(0)
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


def test_shards_are_the_parts_of_the_whole_batch(recipe):
    data, config = load_data("digits", size=16, train_per_class=12), recipe(crop_area=0.3)
    for whole, *parts in zip(
        data.train_batches(config, 3), *(data.train_batches(config, 3, shard=(i, 3)) for i in range(3)), strict=True
    ):
        for i in range(2):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))
