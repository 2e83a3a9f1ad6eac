"""No setting is lost: each field of TrainConfig, from the profile to its effect on a step, a batch or a network.

test_trainer.py follows the formulas of a step and the order in which splits are read. This file tests the rest: that
every field has an effect, how strong each augmentation is, initial weights, precision, the nearest match in FLOPs.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from by_hand import flops_by_hand
from torch import nn

import effnet_study as study
from effnet_lib import (
    Cost,
    EfficientNet,
    MBConv,
    Scaling,
    StochasticDepth,
    TrainConfig,
    Trainer,
    compound_scaling,
    count_cost,
    efficientnet,
    evaluate,
    round_filters,
    round_repeats,
    round_resolution,
)
from effnet_study.data.augment import AUGMENTATION_DEFAULTS, augment, draw
from effnet_study.methods import coefficient_grid, match_flops
from effnet_study.pretrained import create_model
from effnet_study.record import recipe
from effnet_study.run import plan_runs
from effnet_study.training import train
from effnet_study.use import load_trained

CPU = torch.device("cpu")
BASE = {"resolution": 16, "epochs": 2, "batch_size": 12, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3}
BASE |= {
    "warmup_fraction": 0.1,
    "dropout": 0.0,
    "drop_path": 0.0,
    "norm_momentum": 0.1,
    "ema_decay": 0.12,
    "precision": "fp32",
}
BASE |= AUGMENTATION_DEFAULTS
# Another value of every setting that decides the result of a run
CHANGES = {"resolution": 20, "seed": 1, "epochs": 3, "batch_size": 11, "accumulation": 2, "optimizer": "rmsprop"}
CHANGES |= {
    "lr": 0.05,
    "momentum": 0.5,
    "weight_decay": 0.1,
    "schedule": "linear",
    "final_lr_fraction": 0.5,
    "warmup_fraction": 0.4,
}
CHANGES |= {"label_smoothing": 0.3, "dropout": 0.5, "drop_path": 0.7, "se_expanded": True, "zero_init_residual": True}
CHANGES |= {"norm_momentum": 0.3, "clip_norm": 0.1, "ema_decay": 0.03, "precision": "bf16", "crop_area": 0.5}
CHANGES |= {"flip": True, "translate": 0.25, "rotate": 30.0, "color_jitter": 0.5, "hue": 0.3, "randaugment": 20}
CHANGES |= {"erasing": 0.9, "mixup": 0.7, "cutmix": 0.7}
# Another value of every setting that only says how a run is executed
EXECUTION = {"compile": "never", "deterministic": True, "save_seconds": 1e-3, "save_steps": 1}
# They need several GPUs, or published weights: test_training.py, test_use.py
ELSEWHERE = {"sync_norm": True, "pretrained": True, "freeze": True}


@pytest.fixture(scope="module")
def few(digits):
    """24 training images of many colours, and 10 each to score."""
    images = torch.randint(0, 256, digits.images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    indices = {"train": digits.indices["train"][::10], "minival": digits.indices["minival"][:10]}
    return dataclasses.replace(digits, images=images, indices=indices | {"test": digits.indices["test"][:10]})


def network(config):
    torch.manual_seed(0)
    return EfficientNet(Scaling(0.3, 0.25), 10, stem_stride=1, **config.model_options())


def end(config, data):
    """The moving average after two epochs' first two steps, as one row of numbers."""
    trainer = Trainer(network(config), config, CPU)
    for epoch in range(2):
        for step, (images, labels) in enumerate(data.train_batches(config, epoch)):
            trainer.step(images, labels, epoch, step, 2)
    return torch.cat([value.flatten() for value in trainer.ema.state_dict().values() if value.is_floating_point()])


# ---- No field is without effect


def test_every_field_is_known_here():
    """A new setting needs a value above, which says whether it decides the result."""
    assert set(TrainConfig.model_fields) == {*CHANGES, *EXECUTION, *ELSEWHERE}
    config = TrainConfig(**BASE)
    assert all(getattr(config, name) != value for name, value in (CHANGES | EXECUTION | ELSEWHERE).items())


@pytest.fixture(scope="module")
def base_end(few):
    return end(TrainConfig(**BASE), few)


@pytest.mark.parametrize("name", CHANGES)
def test_each_setting_of_the_recipe_changes_the_result(name, few, base_end):
    changed = end(TrainConfig(**BASE | {name: CHANGES[name]}), few)
    assert len(changed) != len(base_end) or (changed - base_end).abs().max() > 1e-5


def test_what_says_how_a_run_is_executed_changes_nothing(few, tmp_path):
    states = []
    for name, changes in {"base": {}, "other": EXECUTION}.items():
        config = TrainConfig(**BASE | changes)
        train(network(config), few, config, tmp_path / name, device="cpu")
        states.append(load_trained(tmp_path / name, network(config)).state_dict())
    assert all(map(torch.equal, *(state.values() for state in states)))


def test_what_decides_the_result_makes_another_run():
    decides = recipe(dict(TrainConfig(**BASE)))
    assert set(decides) == {*CHANGES, *ELSEWHERE}
    assert recipe({"epochs": 7})["warmup_fraction"] == TrainConfig().warmup_fraction  # a record older than a setting


LIMITS = {  # of each number: the least and the greatest that are allowed, and what is just refused
    "momentum warmup_fraction label_smoothing dropout drop_path ema_decay": ((0.0, 0.99), (-0.01, 1.0)),
    "crop_area norm_momentum": ((0.01, 1.0), (0.0, 1.01)),
    "final_lr_fraction color_jitter erasing": ((0.0, 1.0), (-0.01, 1.01)),
    "translate hue": ((0.0, 0.5), (-0.01, 0.51)),
    "weight_decay clip_norm mixup cutmix": ((0.0, 1e9), (-1e-9, math.inf)),
    "lr save_seconds": ((1e-9, 1e9), (0.0, -1.0)),
    "rotate": ((0.0, 180.0), (-1.0, 181.0)),
    "randaugment": ((0, 30), (-1, 31)),
    "resolution epochs accumulation": ((1,), (0,)),
    "batch_size": ((2,), (1,)),
    "seed save_steps": ((0,), (-1,)),
}


@pytest.mark.parametrize("names", LIMITS)
def test_settings_have_their_limits(names):
    good, bad = LIMITS[names]
    for name in names.split():
        for value in good:
            assert getattr(TrainConfig(**{name: value}), name) == value
        for value in bad:
            with pytest.raises(ValueError, match=f"{name}: expected"):
                TrainConfig(**{name: value})


# ---- From the profile to the run and its network


def test_every_setting_reaches_the_run(profile_file):
    """Also those that the shared small profile leaves at their defaults."""
    whole = {name: v for name, v in (CHANGES | EXECUTION | ELSEWHERE).items() if name not in ("resolution", "seed")}
    for left_out in (("pretrained", "freeze"), ("se_expanded",)):  # they do not go together
        settings = {name: value for name, value in whole.items() if name not in left_out}
        profile = study.load_profile(profile_file(train=settings, methods=["resolution"], seeds=[4]))
        config = dict(plan_runs(profile)[0].config)
        assert {name: config[name] for name in settings} == settings
        assert config["seed"] == 4 and config["resolution"] == 32  # twice the small profile's 16


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_every_setting_of_the_network_reaches_it(profile_file, stem_stride):
    settings = {name: (CHANGES | EXECUTION)[name] for name in TrainConfig().model_options()}
    profile = study.load_profile(profile_file(train=settings, stem_stride=stem_stride))
    run = plan_runs(profile, methods=["baseline"])[0]
    model = run.model(10)
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert run.cost == count_cost(model, 16)
    assert model.stem.conv.stride == (stem_stride, stem_stride)
    assert model.dropout.p == 0.5 and blocks[-1].drop_path.p == pytest.approx(0.7 * 15 / 16)
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.3, 1e-3)}
    assert blocks[1].se.reduce.out_channels == 6 * 16 // 4  # se_expanded
    assert all((block.project.norm.weight == (0 if block.residual else 1)).all() for block in blocks)


def test_named_networks_have_their_own_dropout_or_the_recipes():
    with torch.device("meta"):
        assert [efficientnet(name).dropout.p for name in ("b0", "b3", "b4")] == [0.2, 0.3, 0.4]  # as released
        assert create_model("b0", dropout=0.15).dropout.p == 0.15
        resnet = create_model("resnet50", 7, dropout=0.35, norm_momentum=0.03)
    assert resnet.fc[0].p == 0.35 and resnet.fc[1].out_features == 7
    assert {module.momentum for module in resnet.modules() if isinstance(module, nn.BatchNorm2d)} == {0.03}


# ---- The network


def test_the_defaults_are_the_papers():
    """And what the paper does not have is off: profiles name only what they change."""
    paper = {"optimizer": "rmsprop", "momentum": 0.9, "weight_decay": 1e-5, "label_smoothing": 0.1, "dropout": 0.2}
    paper |= {"drop_path": 0.2, "norm_momentum": 0.01, "ema_decay": 0.9999, "lr": 0.016, "flip": True}
    chosen = {"resolution": 224, "seed": 0, "epochs": 10, "batch_size": 128, "accumulation": 1, "schedule": "cosine"}
    chosen |= {"warmup_fraction": 0.05, "final_lr_fraction": 0.0, "crop_area": 0.25, "precision": "auto"}
    chosen |= {"compile": "auto", "save_seconds": 300.0}
    off = dict.fromkeys(["translate", "rotate", "color_jitter", "hue", "erasing", "mixup", "cutmix", "clip_norm"], 0.0)
    off |= dict.fromkeys(["randaugment", "save_steps"], 0)
    off |= dict.fromkeys(["se_expanded", "zero_init_residual", "sync_norm", "pretrained", "freeze"], False)
    assert dict(TrainConfig()) == paper | chosen | off | {"deterministic": False}
    with torch.device("meta"):
        model = EfficientNet()
    norms = {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(0.01, 1e-3)} and model.dropout.p == 0.2  # TensorFlow's momentum is 0.99
    assert [m.p for m in model.modules() if isinstance(m, StochasticDepth)][-1] == pytest.approx(0.2 * 15 / 16)
    assert model.stages[1][0].se.reduce.out_channels == 16 // 4  # of the block's input, not of 96 expanded channels
    assert model.stem.conv.stride == (2, 2) and model.classifier.out_features == 1000
    assert not model.zero_init_residual


def test_initial_weights_have_the_authors_spread():
    torch.manual_seed(0)
    model = EfficientNet(num_classes=10)
    last = model.stages[5][1]  # 192 channels, expanded to 1152, 5 x 5
    for conv, fan_out in ((last.expand.conv, 1152), (last.depthwise.conv, 25), (last.project.conv, 192)):
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
    assert last.se.reduce.bias.abs().max() == 0 and model.classifier.bias.abs().max() == 0
    assert 0.99 / math.sqrt(1280) < model.classifier.weight.abs().max() <= 1 / math.sqrt(1280)


def test_a_stages_first_block_has_its_stride_and_table_1_its_kernels_and_channels():
    with torch.device("meta"):
        model = EfficientNet(Scaling(depth=2.0), 10)
    table = ((1, 3, 1, 16, 2), (6, 3, 2, 24, 4), (6, 5, 2, 40, 4), (6, 3, 2, 80, 6), (6, 5, 1, 112, 6))
    table += ((6, 5, 2, 192, 8), (6, 3, 1, 320, 2))
    for stage, (expand, kernel, stride, channels, layers) in zip(model.stages, table, strict=True):
        convs = [block.depthwise.conv for block in stage]
        assert [conv.stride[0] for conv in convs] == [stride] + [1] * (layers - 1)
        assert {conv.kernel_size for conv in convs} == {(kernel, kernel)}
        assert {block.project.conv.out_channels for block in stage} == {channels}
        assert [block.residual for block in stage] == [False] + [True] * (layers - 1)
        assert stage[1].depthwise.conv.out_channels == expand * channels


def test_dropout_drops_features_and_not_the_pixels_they_are_the_mean_of():
    model = EfficientNet(Scaling(0.3, 0.25), 10, dropout=0.5, drop_path=0.0, stem_stride=1).train()
    seen = []
    model.dropout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    model(torch.randn(4, 3, 32, 32))
    assert seen == [(4, model.classifier.in_features)]


# ---- Precision


class Dtypes(nn.Module):
    """Batch norm and a matrix. Notes the dtype of its products, in training and in scoring."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.seen = nn.BatchNorm1d(12), nn.Linear(12, 10), set()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.linear.weight.copy_(0.2 * torch.randn(10, 12, generator=generator))
            self.linear.bias.zero_()

    def forward(self, x):
        y = self.linear(self.norm(x.flatten(1)))
        self.seen.add((self.training, y.dtype))
        return y


class Squares:
    """Images of 2 x 2 random pixels."""

    def __init__(self, classes=10):
        self.counts = {"train": 24, "minival": 12, "test": 12}
        self.x = torch.randn(24, 3, 2, 2, generator=torch.Generator().manual_seed(2))
        self.y = torch.arange(24) * classes // 24

    def to(self, device):
        return self

    def describe(self):
        return {"title": "squares", "fingerprint": "squares", "classes": 10, "counts": self.counts}

    def train_batches(self, config, epoch, start=0):
        yield from zip(self.x.split(12)[start:], self.y.split(12)[start:], strict=True)

    def eval_batches(self, split, resolution, batch_size):
        half = slice(12, 24)
        yield self.x[half], self.y[half]


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", None)])
def test_training_and_scoring_are_of_the_precision_asked_for(precision, dtype):
    dtype = dtype or torch.float32  # auto, on a CPU
    data, model = Squares(), Dtypes()
    trainer = Trainer(model, TrainConfig(**BASE | {"precision": precision}), CPU)
    trainer.step(data.x, data.y, 0, 0, 2)
    assert not trainer.scaler.is_enabled()
    scores = evaluate(model, data, "test", 2, precision=precision)
    assert model.seen == {(True, dtype), (False, dtype)} and scores["confidence"].dtype == np.float32


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_a_step_in_fp16_is_that_of_fp32_but_for_rounding(clip_norm):
    """Its gradient is scaled against underflow, and has to be unscaled before it is clipped."""
    data, ends, start = Squares(), [], Dtypes().linear.weight
    for precision in ("fp32", "fp16"):
        config = TrainConfig(**BASE | {"precision": precision, "clip_norm": clip_norm})
        trainer = Trainer(Dtypes(), config, CPU)
        trainer.step(data.x, data.y, 0, 0, 2)
        assert trainer.scaler.is_enabled() == (precision == "fp16")
        assert (True, {"fp32": torch.float32, "fp16": torch.float16}[precision]) in trainer.model.seen
        ends.append(trainer.model.linear.weight.detach() - start.detach())
    assert (ends[1] - ends[0]).norm() < 0.02 * ends[0].norm()


# ---- Draws, order and scores


def test_a_process_draws_for_its_share_what_a_single_one_draws_for_those_images():
    class Drawing(Dtypes):
        def forward(self, x):
            self.drawn = [*getattr(self, "drawn", []), torch.rand(1).item()]
            return super().forward(x)

    data = Squares()
    whole = Trainer(Drawing(), TrainConfig(**BASE | {"batch_size": 24, "accumulation": 2}), CPU)
    whole.backward(data.x, data.y, 1, 1)
    second = Trainer(Drawing(), TrainConfig(**BASE | {"batch_size": 24, "accumulation": 2}), CPU)
    second.rank = 1
    second.backward(data.x[12:], data.y[12:], 1, 1)
    assert len(whole.model.drawn) == 2 and second.model.drawn == whole.model.drawn[1:]


@pytest.fixture
def numbered(digits):
    """The digits, each image's number in its colour, and no normalisation: batches say which images they hold."""
    n = torch.arange(len(digits.images))
    colours = torch.stack([n % 256, n // 256, torch.zeros_like(n)], 1).byte()
    images = colours[:, None, None].expand(-1, 16, 16, -1).contiguous()
    return dataclasses.replace(digits, images=images, mean=torch.zeros(3), std=torch.ones(3))


def numbers(batches):
    """The numbers of the images in batches, having checked that nothing but resizing was done to them."""
    found = []
    for images, _ in batches:
        assert torch.equal(images, images[:, :, :1, :1].expand_as(images))
        found += (images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0]).round().int().tolist()
    return found


def test_an_epoch_has_each_training_image_once_in_an_order_of_its_own(numbered):
    config = TrainConfig(**BASE | {"batch_size": 24})
    orders = [numbers(numbered.train_batches(config, epoch)) for epoch in range(3)]
    orders.append(numbers(numbered.train_batches(config.replace(seed=1), 0)))
    for order in orders:
        assert sorted(order) == numbered.indices["train"].tolist()
    assert len(set(map(tuple, orders))) == 4
    labels = torch.cat([labels for _, labels in numbered.train_batches(config, 0)])
    assert torch.equal(labels, numbered.labels[orders[0]])
    assert numbers(numbered.train_batches(config, 2, 4)) == orders[2][4 * 24 :]
    for split in ("minival", "test"):
        assert numbers(numbered.eval_batches(split, 16, 50)) == numbered.indices[split].tolist()


def test_training_and_scoring_see_images_normalised_by_the_training_images_alone(digits):
    pixels = digits.images.numpy().astype(np.float64)
    training = pixels[digits.indices["train"]]
    mean, std = training.mean((0, 1, 2)), training.std((0, 1, 2))
    expected = ((pixels - mean) / std).transpose(0, 3, 1, 2)
    for split in ("minival", "test"):
        images = torch.cat([images for images, _ in digits.eval_batches(split, 16, 50)]).numpy()
        np.testing.assert_allclose(images, expected[digits.indices[split]], atol=1e-4)
    off = next(digits.train_batches(TrainConfig(**BASE), 0))[0].numpy()  # with all augmentations off
    for image in off:
        assert np.abs(expected[digits.indices["train"]] - image).max((1, 2, 3)).min() < 1e-4


def test_augmentation_draws_anew_for_every_seed_epoch_and_step(few):
    image = few.images[:1].expand(len(few.images), -1, -1, -1)
    one = dataclasses.replace(few, images=image, indices={"train": torch.arange(24)})
    config = TrainConfig(**BASE | {"crop_area": 0.3})
    batches = [*one.train_batches(config, 0), *one.train_batches(config, 1)]
    batches += one.train_batches(config.replace(seed=1), 0)
    sums = {round(images.double().abs().sum().item(), 4) for images, _ in batches}
    assert len(batches) == len(sums) == 6


def test_scores_of_three_classes_and_of_three_hundred(tmp_path, monkeypatch):
    """Top-5 of three classes is always right; three hundred need more than a byte in the file of predictions."""
    monkeypatch.setattr("effnet_study.training.count_cost", lambda model, resolution: Cost(1, 2, 3))
    data = Squares(classes=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    right = (model(data.x[12:]).argmax(1) == data.y[12:]).float().mean().item()
    scores = evaluate(model, data, "test", 2)
    assert scores["top5"] == 100 and scores["top1"] == pytest.approx(100 * right)
    data, model = Squares(classes=300), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 300))
    train(model, data, TrainConfig(**BASE), tmp_path, device="cpu")
    with np.load(tmp_path / "test_predictions.npz") as kept:
        assert kept["label"].tolist() == data.y[12:].tolist() and max(kept["label"]) == 287
        assert kept["predicted"].max() < 300 and len(kept["confidence"]) == 12


# ---- Augmentation: how strong it is


def generator():
    return torch.Generator().manual_seed(0)


def test_nothing_is_drawn_for_what_is_off():
    assert draw(4, generator()) == draw(4, generator(), **AUGMENTATION_DEFAULTS) == {}


def test_crops_have_the_least_area_asked_for():
    for least in (0.95, 0.7, 0.1):
        draws = draw(4000, generator(), crop_area=least)
        columns, rows = draws["columns"], draws["rows"]
        assert (columns[:, 1] > columns[:, 0]).all()  # none mirrored
        square = ((columns[:, 1] - columns[:, 0]) / (rows[:, 1] - rows[:, 0]) - 1).abs() < 0.02
        area = ((columns[:, 1] - columns[:, 0]) * (rows[:, 1] - rows[:, 0]))[square]
        assert area.min() == pytest.approx(least, abs=0.03) and area.min() > least - 1e-4 and area.max() > 0.97


@pytest.mark.parametrize("crop_area", [1.0, 0.6])
def test_half_of_the_images_are_mirrored_cropped_or_not(crop_area):
    ramp = torch.arange(16, dtype=torch.uint8).expand(2000, 16, 16)[..., None].expand(-1, -1, -1, 3).contiguous()
    for flip, share in ((True, 0.5), (False, 0.0)):
        got = augment(ramp, 16, draw(2000, generator(), crop_area=crop_area, flip=flip))
        falling = got[:, 0, 0, 0] > got[:, 0, 0, -1]
        assert falling.float().mean().item() == pytest.approx(share, abs=0.04)


def test_images_are_moved_by_up_to_the_share_asked_for():
    point = torch.zeros(2000, 16, 16, 3, dtype=torch.uint8)
    point[:, 8, 8] = 255
    got = augment(point, 16, draw(2000, generator(), translate=0.25))[:, 0]
    rows, columns = got.amax(2).argmax(1), got.amax(1).argmax(1)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(4, 13))


@pytest.mark.parametrize(
    "name, value, of, unit",
    [("rotate", 40.0, "angle", 1), ("hue", 0.2, "hue", 2 * math.pi), ("color_jitter", 0.2, "factors", 1)],
)
def test_angles_and_colours_are_drawn_from_the_range_asked_for(name, value, of, unit):
    drawn = draw(2000, generator(), **{name: value})[of] - (1 if name == "color_jitter" else 0)
    assert 0.99 * value * unit < drawn.abs().max() <= value * unit + 1e-6
    assert drawn.mean().item() == pytest.approx(0, abs=0.05 * value * unit)
    assert drawn.std().item() == pytest.approx(value * unit / math.sqrt(3), rel=0.05)  # uniform


def test_randaugment_has_the_magnitude_asked_for():
    images = torch.randint(0, 256, (300, 16, 16, 3), dtype=torch.uint8, generator=generator())
    plain = images.permute(0, 3, 1, 2).float()
    change = [
        (augment(images, 16, draw(300, generator(), randaugment=m)) - plain).abs().mean().item() for m in (1, 9, 30)
    ]
    assert change[0] < 0.9 * change[1] and change[1] < 0.9 * change[2]
    assert set(draw(4, generator(), randaugment=7)["magnitude"].tolist()) == {7}


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_box_of_the_share_of_images_asked_for_is_erased(share):
    left, right, _, _ = draw(4000, generator(), erasing=share)["erased"].unbind(1)
    assert (right > left).float().mean().item() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0.0), (4.0, 0.0), (0.0, 0.5), (0.0, 4.0), (0.5, 4.0), (4.0, 0.5)])
def test_images_are_mixed_by_weights_of_their_own_beta_distribution(mixup, cutmix):
    draws = draw(6000, generator(), mixup=mixup, cutmix=cutmix)
    left, right, upper, lower = draws["pasted"].unbind(1)
    cut = right > left
    kinds = {mixup: draws["own"][~cut], cutmix: (1 - (right - left) * (lower - upper))[cut]}
    for alpha, weights in kinds.items():
        if alpha == 0:
            assert len(weights) < 6  # a box may be too small to be seen
            continue
        share = 0.5 if mixup and cutmix else 1
        assert len(weights) / 6000 == pytest.approx(share, abs=0.03)
        assert weights.mean().item() == pytest.approx(0.5, abs=0.03)
        assert weights.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


# ---- Scaling


def test_the_match_in_flops_is_the_nearer_neighbour():
    """FLOPs jump from one network to the next. A target a little below the middle has the lower one as its match."""
    levels = sorted({flops_by_hand(1 + i / 100, 1, 32, 10) for i in range(200)})
    assert len(levels) > 8
    for below, above in zip(levels[:-1:2], levels[1::2], strict=False):
        for share, expected in ((0.0, below), (0.499, below), (0.501, above), (1.0, above)):
            target = below + int(share * (above - below))
            found = match_flops("depth", target, 32, num_classes=10)
            assert found.flops == expected and found.residual == pytest.approx((expected - target) / target)


def test_compounds_phi_is_matched_to_a_hundredth():
    target = flops_by_hand(1.2**0.57, 1.1**0.57, round(64 * 1.15**0.57), 10)
    found = match_flops("compound", target, 64, num_classes=10)
    phi = math.log(found.scaling.depth) / math.log(1.2)
    assert found.residual == 0 and 0.5 < phi < 0.6 and 100 * phi == pytest.approx(round(100 * phi))


def test_resolution_is_matched_in_whole_pixels():
    found = match_flops("resolution", flops_by_hand(1, 1, 37, 10), 32, num_classes=10)
    # Feature maps are whole, so 38 px costs the same; the smaller network is taken
    assert found.residual == 0 and found.scaling == Scaling(resolution=37 / 32)


def test_rounding_by_hand():
    # 18 rounds to 16, which is less than 90 % of it; 17.5 rounds to 16 and keeps more
    assert [round_filters(16, width) for width in (1.0, 1.09, 1.125, 1.2, 1.3, 0.5, 0.1)] == [16, 16, 24, 24, 24, 8, 8]
    assert [round_filters(320, width) for width in (1.01, 1.0125, 1.1, 2.0)] == [320, 328, 352, 640]
    assert round_filters(16, 5 / 9) == 8  # 90 % of it exactly
    assert [round_repeats(4, depth) for depth in (1.0, 1.01, 1.25, 1.26, 0.1)] == [4, 5, 5, 6, 1]
    assert 4 * (12.5 * 1.1) > 55 and round_repeats(4, 12.5 * 1.1) == 55  # above it by floating point alone
    assert [round_resolution(r, 48) for r in (1.0, 1.2, 1.3, 1.34, 2.0)] == [48, 58, 62, 64, 96]  # 57.6, 62.4, 64.3


def test_compound_scaling_has_the_papers_coefficients():
    assert dataclasses.astuple(compound_scaling(1)) == (1.2, 1.1, 1.15)
    assert dataclasses.astuple(compound_scaling(3)) == pytest.approx((1.728, 1.331, 1.520875))


@pytest.mark.parametrize("tenths, low, high", [(1, 1.9, 2.1), (2, 1.5, 2.5)])
def test_the_grid_of_coefficients_is_whole(tenths, low, high):
    """Counted in whole tenths: 10 is a coefficient of 1."""
    axis = range(10, int(10 * high) + 1, tenths)
    within = {(a, b, g) for a in axis for b in axis for g in axis if low * 1e5 <= a * b * b * g * g <= high * 1e5}
    grid = coefficient_grid(tenths / 10, low, high)
    assert len(grid) == len(within) and {tuple(round(10 * c) for c in abg) for abg in grid} == within
