"""Augmentation: every sample with its own draws, which follow from (seed, epoch, step), and each as it is defined."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as tv
from PIL import Image

from effnet_lib import TrainConfig
from effnet_study.data.augment import AUGMENTATION_DEFAULTS, OPERATIONS, augment, draw, erase, mix, randaugment, resize
from effnet_study.data.load import load_data

# One setting for each augmentation that switches it on
ON = {
    "crop_area": 0.25,
    "flip": True,
    "translate": 0.2,
    "rotate": 30.0,
    "color_jitter": 0.5,
    "hue": 0.3,
    "randaugment": 15,
    "erasing": 0.5,
    "mixup": 1.0,
    "cutmix": 1.0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, size):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=generator())


def smooth_images(n, size):
    """Random images without fine detail, on which two ways of interpolating agree."""
    return resize(random_images(n, 4), size).round().byte().permute(0, 2, 3, 1).contiguous()


# ---- resizing, crop and flip


@pytest.mark.parametrize("resolution", [7, 16, 24, 25, 50])
def test_resizing_is_torchs_antialiased_bilinear(resolution):
    images = random_images(4, 24)
    nchw = images.permute(0, 3, 1, 2).float()
    expected = F.interpolate(nchw, size=(resolution, resolution), mode="bilinear", antialias=True)
    torch.testing.assert_close(resize(images, resolution), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("resolution", [7, 16, 24, 50])
def test_resizing_is_pillows(resolution):
    images = random_images(3, 24)
    for image, got in zip(images, resize(images, resolution), strict=True):
        expected = np.asarray(Image.fromarray(image.numpy()).resize([resolution] * 2, Image.Resampling.BILINEAR))
        assert np.abs(got.permute(1, 2, 0).numpy() - expected).max() < 1.01  # Pillow rounds twice


def test_an_oblong_image_keeps_its_sides_apart():
    image = torch.zeros(1, 8, 12, 3, dtype=torch.uint8)
    image[:, :4, :, 0] = 200  # the upper half
    image[:, :, 6:, 1] = 100  # the right half
    red, green, blue = resize(image, 4)[0]
    assert red[:, 1].tolist() == pytest.approx([200, 175, 25, 0]) and torch.equal(red[:, 0], red[:, 3])
    assert green[1].tolist() == pytest.approx([0, 100 / 9, 800 / 9, 100]) and torch.equal(green[0], green[3])
    assert blue.max() == 0


def test_whole_images_unflipped_are_only_resized():
    images = random_images(4, 24)
    torch.testing.assert_close(augment(images, 17, draw(4, generator())), resize(images, 17), rtol=1e-4, atol=1e-2)


def test_a_fine_pattern_becomes_grey_and_no_coarse_one_in_training_and_scoring_alike(digits):
    """Stripes of one pixel at half their resolution: what aliases shows black, white, or stripes."""
    stripes = torch.zeros_like(digits.images)
    stripes[:, :, ::2] = 255
    data = dataclasses.replace(digits, images=stripes, mean=torch.zeros(3), std=torch.ones(3))
    config = TrainConfig(resolution=8, batch_size=24, crop_area=1.0)
    seen = [images for images, _ in data.train_batches(config, 0)]
    seen += [images for split in ("minival", "test") for images, _ in data.eval_batches(split, 8, 50)]
    for images in seen:
        assert images.shape[1:] == (3, 8, 8)
        assert images[..., 1:-1].min() > 120 and images[..., 1:-1].max() < 135


def test_each_sample_is_flipped_on_its_own():
    images = random_images(1, 12).expand(200, -1, -1, -1)
    got = augment(images, 12, draw(200, generator(), flip=True))
    plain = resize(images[:1], 12)[0]
    same = [torch.allclose(image, plain, atol=1e-2) for image in got]
    mirrored = [torch.allclose(image, plain.flip(2), atol=1e-2) for image in got]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 60 < sum(same) < 140


def test_each_sample_is_cropped_on_its_own_and_within_bounds():
    """A picture whose pixels are their own coordinates tells which box was cut out."""
    ramp = torch.arange(100, dtype=torch.uint8)
    image = torch.stack([ramp.expand(100, 100), ramp.expand(100, 100).T, torch.zeros(100, 100, dtype=torch.uint8)], 2)
    got = augment(image.expand(300, -1, -1, -1), 10, draw(300, generator(), crop_area=0.25))
    x, y = got[:, 0].mean(1), got[:, 1].mean(2)  # (N, 10) coordinates of columns and rows
    width, height = ((c[:, -1] - c[:, 0]) / 90 for c in (x, y))
    area, aspect = width * height, width / height
    assert got.min() >= 0 and got.max() <= 99
    assert 0.22 < area.min() < 0.3 and 0.85 < area.max() < 1.05
    assert 0.72 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.4
    assert len(x[:, 0].round(decimals=3).unique()) > 250


# ---- the others, each against its definition or the library's


def test_translation_is_the_crop_of_a_reflect_padded_image():
    images, pad = random_images(200, 16), 2
    draws = draw(200, generator(), translate=pad / 16)
    got, moves = augment(images, 16, draws), (draws["shift"] * (2 * pad + 1)).floor().int() - pad
    padded = F.pad(images.permute(0, 3, 1, 2).float(), [pad] * 4, mode="reflect")
    for image, whole, (right, down) in zip(got, padded, moves.tolist(), strict=True):
        x, y = pad - right, pad - down
        torch.testing.assert_close(image, whole[:, y : y + 16, x : x + 16], rtol=1e-4, atol=1e-2)
    assert len({tuple(m) for m in moves.tolist()}) == 25  # as often each


def test_rotation_turns_each_image_by_its_angle():
    images = smooth_images(3, 16)
    draws = draw(3, generator(), rotate=90.0)
    assert len(set(draws["angle"].tolist())) == 3 and draws["angle"].abs().max() <= 90
    draws["angle"] = torch.tensor([0.0, 90.0, 180.0])
    expected = [torch.rot90(image, turns, (1, 2)) for turns, image in enumerate(resize(images, 16))]
    torch.testing.assert_close(augment(images, 16, draws), torch.stack(expected), rtol=1e-3, atol=0.5)
    draws["angle"] = torch.tensor([10.0, -20.0, 30.0])
    for image, got, angle in zip(resize(images, 16), augment(images, 16, draws), draws["angle"].tolist(), strict=True):
        expected = tv.rotate(image, angle, interpolation=v2.InterpolationMode.BILINEAR)
        torch.testing.assert_close(got[:, 5:11, 5:11], expected[:, 5:11, 5:11], rtol=1e-3, atol=0.5)


def test_colour_jitter_is_torchvisions_each_sample_by_its_factors():
    images = smooth_images(8, 12)
    draws = draw(8, generator(), color_jitter=0.4)
    factors = draws["factors"]
    assert factors.shape == (8, 3) and 0.6 <= factors.min() < 0.7 and 1.3 < factors.max() <= 1.4
    for image, got, (brightness, contrast, saturation) in zip(
        resize(images, 12) / 255, augment(images, 12, draws), factors.tolist(), strict=True
    ):
        expected = tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast)
        torch.testing.assert_close(got, 255 * tv.adjust_saturation(expected, saturation), rtol=0, atol=0.6)


def test_hue_is_torchvisions():
    assert 0.95 * math.pi < draw(200, generator(), hue=0.5)["hue"].abs().max() <= math.pi  # half a turn
    images = smooth_images(6, 12)
    draws = draw(6, generator(), hue=0.5)
    for image, got, angle in zip(resize(images, 12) / 255, augment(images, 12, draws), draws["hue"], strict=True):
        expected = tv.adjust_hue(image, max(-0.5, min(0.5, angle.item() / (2 * math.pi))))
        torch.testing.assert_close(got, 255 * expected, rtol=0, atol=0.6)


@pytest.mark.parametrize("magnitude", [1, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_operations_of_randaugment_are_torchvisions(name, magnitude, monkeypatch):
    images = (random_images(4, 24) // 2 + 20).permute(0, 3, 1, 2).contiguous()
    theirs = v2.RandAugment(num_ops=1, magnitude=magnitude, interpolation=v2.InterpolationMode.BILINEAR)
    theirs._AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}
    for coin, sign in ((0.9, 1), (0.1, -1)):
        monkeypatch.setattr(torch, "rand", lambda shape, coin=coin: torch.full(shape, coin))
        expected = theirs(images)
        monkeypatch.undo()
        drawn = torch.full((4, 1), list(OPERATIONS).index(name)), torch.full((4, 1), sign)
        got = randaugment(images, *drawn, magnitude)
        difference = (got.int() - expected.int()).abs()  # of rounding
        assert difference.max() <= 1 and difference.float().mean() < 0.05
        assert name == "Identity" or magnitude < 30 or not torch.equal(got, images)


def test_the_list_of_operations_is_torchvisions():
    assert list(OPERATIONS) == list(v2.RandAugment._AUGMENTATION_SPACE)


def test_randaugment_gives_each_sample_operations_of_its_own():
    draws = draw(500, generator(), randaugment=9)
    operations, signs = draws["operations"], draws["signs"]
    assert operations.shape == (500, 2) and set(operations.flatten().tolist()) == set(range(14))
    assert set(signs.flatten().tolist()) == {-1, 1}
    images = random_images(1, 16).expand(100, -1, -1, -1)
    got = augment(images, 16, {name: values[:100] for name, values in draws.items()})
    for i in range(0, 100, 5):
        alone = randaugment(images[i : i + 1].permute(0, 3, 1, 2), operations[i : i + 1], signs[i : i + 1], 9)
        assert torch.equal(got[i], alone[0].float())
    assert len(got.flatten(1).unique(dim=0)) > 60


def test_erasing_blots_out_a_box_in_the_share_of_images():
    draws = draw(1000, generator(), erasing=0.3)
    erased = erase(torch.ones(1000, 3, 32, 32), draws) == 0
    assert torch.equal(erased[:, 0], erased[:, 2])
    area = erased[:, 0].float().mean((1, 2))
    assert 0.25 < (area > 0).float().mean() < 0.35
    assert area[area > 0].min() > 0.01 and 0.3 < area.max() < 0.36
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None, :])  # boxes, nothing else


def test_a_box_lies_where_its_edges_say():
    box = torch.tensor([[0.5, 1.0, 0.0, 0.25]])  # left, right, upper, lower
    erased = erase(torch.ones(1, 3, 8, 8), {"erased": box})
    expected = torch.ones(1, 3, 8, 8)
    expected[..., :2, 4:] = 0  # the upper right
    assert torch.equal(erased, expected)


def test_mixup_weighs_labels_as_it_weighs_pixels():
    draws = draw(400, generator(), mixup=0.4)
    images, labels = mix(
        torch.ones(400, 3, 4, 4), torch.zeros(400).long(), torch.zeros(400, 3, 4, 4), torch.ones(400).long(), draws, 3
    )
    torch.testing.assert_close(images[:, 0, 0, 0], labels[:, 0])
    torch.testing.assert_close(images, images[:, :1, :1, :1].expand_as(images))
    torch.testing.assert_close(labels.sum(1), torch.ones(400))
    assert 0.4 < labels[:, 0].mean() < 0.6 and labels[:, 0].std() > 0.3  # Beta(0.4, 0.4), each its own
    assert labels[:, 2].abs().max() == 0


def test_cutmix_weighs_labels_by_the_pasted_area():
    draws = draw(400, generator(), cutmix=1.0)
    images, labels = mix(
        torch.ones(400, 3, 20, 20),
        torch.zeros(400).long(),
        torch.zeros(400, 3, 20, 20),
        torch.ones(400).long(),
        draws,
        2,
    )
    assert set(images.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(images.mean((1, 2, 3)), labels[:, 0])
    assert labels[:, 0].quantile(0.1) < 0.2 and labels[:, 0].quantile(0.9) > 0.8  # Beta(1, 1)


def test_with_both_each_image_undergoes_mixup_or_cutmix():
    draws = draw(400, generator(), mixup=1.0, cutmix=1.0)
    pasted = draws["pasted"][:, 1] > draws["pasted"][:, 0]
    assert 0.4 < pasted.float().mean() < 0.6 and torch.equal(pasted, draws["own"] == 1)


# ---- all of them


@pytest.mark.parametrize("name", AUGMENTATION_DEFAULTS)
def test_each_augmentation_is_a_setting_that_changes_every_batch_in_its_own_way(name, digits, recipe):
    digits = dataclasses.replace(digits, images=random_images(len(digits.images), 16))  # of all colours
    off = recipe(**AUGMENTATION_DEFAULTS, batch_size=24)
    config = off.replace(**{name: ON[name]})
    (plain, labels), (first, other), (again, _) = (next(digits.train_batches(c, 0)) for c in (off, config, config))
    assert torch.equal(first, again) and first.shape == plain.shape and torch.isfinite(first).all()
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not torch.allclose(first, plain, atol=1e-3)
    assert not torch.allclose(first, next(digits.train_batches(config, 1))[0], atol=1e-3)
    # One image in place of all: what differs now are the draws
    one = dataclasses.replace(digits, images=random_images(1, 16).expand(len(digits.images), -1, -1, -1))
    kinds = len(next(one.train_batches(config, 0))[0].flatten(1).unique(dim=0))
    assert kinds > 8 if name not in ("flip", "mixup", "cutmix") else kinds == (2 if name == "flip" else 1)
    if name in ("mixup", "cutmix"):
        torch.testing.assert_close(other.sum(1), torch.ones(24))
        assert other.shape == (24, 10) and (other.gather(1, labels[:, None]) > 0).all()
    else:
        assert torch.equal(other, labels)


def test_shards_are_the_parts_of_the_whole_batch(recipe):
    data = load_data("digits", size=16, train_per_class=12)
    for config in (recipe(crop_area=0.3), recipe(**ON), recipe(**ON | {"translate": 0.0, "cutmix": 0.0})):
        batches = data.train_batches(config, 3, 7), *(data.train_batches(config, 3, 7, (i, 3)) for i in range(3))
        for whole, *parts in zip(*batches, strict=True):
            for i in range(2):
                torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i], rtol=1e-5, atol=1e-5)


def test_order_and_pairs_of_mixing_are_as_documented():
    """Without this the order of a run could change unnoticed: all other tests compare runs with each other."""
    data = load_data("digits", size=8, train_per_class=12)
    words = np.random.SeedSequence([5, 2]).generate_state(1, np.uint64)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(int(words[0] >> 1)))[24:36]
    own = data.labels[data.indices["train"][order]]
    _, labels = next(data.train_batches(TrainConfig(resolution=8, batch_size=12, seed=5, cutmix=1.0), 2, 2))
    _, plain = next(data.train_batches(TrainConfig(resolution=8, batch_size=12, seed=5), 2, 2))
    assert torch.equal(plain, own)
    for row, mine, its in zip(labels, own.tolist(), own.roll(-1).tolist(), strict=True):
        assert set(row.nonzero()[:, 0].tolist()) <= {mine, its} and row[mine] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False])
def test_a_gpu_makes_the_batches_that_a_cpu_makes(whole, digits, recipe):
    there = digits.to("cuda")
    assert there.images.is_cuda and not there.streamed
    if not whole:
        there = dataclasses.replace(digits, mean=there.mean, std=there.std, streamed=True)
    for config in (recipe(), recipe(**ON | {"randaugment": 0})):
        for mine, theirs in zip(digits.train_batches(config, 1), there.train_batches(config, 1), strict=True):
            assert theirs[0].device.type == theirs[1].device.type == "cuda"
            torch.testing.assert_close(theirs[0].cpu(), mine[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(theirs[1].cpu(), mine[1])


@pytest.mark.parametrize(
    "name, value",
    (
        {
            "translate": 0.6,
            "rotate": 181,
            "color_jitter": -0.1,
            "hue": 0.51,
            "randaugment": 31,
            "erasing": 2,
            "mixup": -1,
        }
        | {"cutmix": math.inf, "flip": 1}
    ).items(),
)
def test_impossible_augmentations_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
        TrainConfig(**{name: value})


def test_the_settings_of_augmentations_are_those_of_the_recipe():
    assert set(AUGMENTATION_DEFAULTS) == set(ON) and set(ON) <= set(TrainConfig.model_fields)
