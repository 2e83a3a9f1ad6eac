"""The trainer does what the recipe says: each setting against a loop written out, and which images are read when."""

import itertools
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SMALL_PROFILE
from torch import nn

import effnet_study as study
from effnet_lib import Cost, EfficientNet, MBConv, Scaling, TrainConfig, Trainer, evaluate, learning_rate, step_seed
from effnet_study.record import read_record
from effnet_study.run import plan_runs
from effnet_study.stop import Interrupted
from effnet_study.training import train

CPU = torch.device("cpu")
CLASSES, PIXELS, STEPS = 7, 4, 3  # steps of an epoch


class Small(nn.Module):
    """A network that a test can follow by hand: batch norm, dropout, one matrix. Notes what it is called with."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3 * PIXELS**2, momentum=0.1), nn.Linear(3 * PIXELS**2, CLASSES)
        self.p, self.seen = dropout, []
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            self.linear.weight.copy_(0.3 * torch.randn(self.linear.weight.shape, generator=generator))
            self.linear.bias.zero_()

    def __deepcopy__(self, memo):
        new = Small(self.p)
        new.load_state_dict(self.state_dict())
        return new

    def forward(self, x):
        drawn = torch.rand(1).item() if self.training else None
        self.seen.append((self.training, len(x), drawn))
        return self.linear(self.norm(x.flatten(1)))


def batches(epoch, n=10, steps=STEPS):
    rng = torch.Generator().manual_seed(100 + epoch)
    for _ in range(steps):
        yield torch.randn(n, 3, PIXELS, PIXELS, generator=rng), torch.randint(CLASSES, (n,), generator=rng)


# ---- The recipe, against a loop written out


def by_hand(config, epochs=2):
    """Weight, bias and norm's parameters and their moving average after training, by the formulas alone."""
    model = Small()
    names = ("linear.weight", "linear.bias", "norm.weight", "norm.bias")
    p = {name: model.get_parameter(name).detach().double().clone() for name in names}
    mean, var = torch.zeros(3 * PIXELS**2).double(), torch.ones(3 * PIXELS**2).double()
    velocity = {name: torch.zeros_like(value) for name, value in p.items()}
    square = {name: torch.ones_like(value) for name, value in p.items()}
    ema, ema_mean = {name: value.clone() for name, value in p.items()}, mean.clone()
    losses, n = [], 0
    for epoch in range(epochs):
        for images, labels in batches(epoch):
            leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
            total = 0.0
            for part in np.array_split(np.arange(len(labels)), config.accumulation):
                x, y = images[part].flatten(1).double(), labels[part]
                m, v = x.mean(0), x.var(0, unbiased=False)
                normed = (x - m) / (v + 1e-5).sqrt() * leaves["norm.weight"] + leaves["norm.bias"]
                mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * x.var(0, unbiased=True)
                logits = normed @ leaves["linear.weight"].T + leaves["linear.bias"]
                logp = logits - logits.exp().sum(1, keepdim=True).log()
                s = config.label_smoothing
                target = torch.full_like(logp, s / CLASSES)
                target[torch.arange(len(y)), y] += 1 - s
                total = total - (target * logp).sum(1).mean() * len(y) / len(labels)
            total.backward()
            losses.append(total.item())
            grads = {name: leaf.grad for name, leaf in leaves.items()}
            norm = math.sqrt(sum((g**2).sum().item() for g in grads.values()))
            if config.clip_norm and norm > config.clip_norm:
                grads = {name: g * config.clip_norm / norm for name, g in grads.items()}
            # The rate of a step is that of its middle
            at = (n + 0.5) / (config.epochs * STEPS)
            if at < config.warmup_fraction:
                lr = config.lr * at / config.warmup_fraction
            else:
                left = 1 - (at - config.warmup_fraction) / (1 - config.warmup_fraction)
                left = left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
                lr = config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)
            for name, g in grads.items():
                if name == "linear.weight":  # neither norms nor biases decay
                    g = g + config.weight_decay * p[name]
                if config.optimizer == "sgd":  # Nesterov, as Sutskever has it
                    velocity[name] = config.momentum * velocity[name] + g if n else g.clone()
                    p[name] = p[name] - lr * (g + config.momentum * velocity[name])
                else:
                    square[name] = 0.9 * square[name] + 0.1 * g**2
                    velocity[name] = config.momentum * velocity[name] + lr * g / (square[name] + 1e-3).sqrt()
                    p[name] = p[name] - velocity[name]
            decay = min(config.ema_decay, (1 + n) / (10 + n))
            ema = {name: decay * old + (1 - decay) * p[name] for name, old in ema.items()}
            ema_mean = decay * ema_mean + (1 - decay) * mean
            n += 1
    return losses, p, ema, mean, ema_mean


BASE = {"epochs": 2, "batch_size": 10, "optimizer": "sgd", "lr": 0.3, "momentum": 0.8, "weight_decay": 0.02}
BASE |= {"warmup_fraction": 0.25, "label_smoothing": 0.2, "ema_decay": 0.25, "precision": "fp32"}
RECIPES = {
    "sgd": {},
    "rmsprop": {"optimizer": "rmsprop", "lr": 0.02},
    "linear": {"schedule": "linear"},
    "not annealed": {"final_lr_fraction": 0.6},
    "no warm-up": {"warmup_fraction": 0.0},
    "no smoothing": {"label_smoothing": 0.0},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"momentum": 0.0},
    "clipped": {"clip_norm": 0.3},
    "accumulated, in 4, 3 and 3 images": {"accumulation": 3},
    "a longer schedule": {"epochs": 5},
    "a slow average, which warms up": {"ema_decay": 0.999},
    "half the rate": {"lr": 0.15},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_steps_follow_the_recipe(changes):
    config = TrainConfig(**BASE | changes)
    trainer = Trainer(Small(), config, CPU)
    losses = [
        trainer.step(images, labels, epoch, step, STEPS).item()
        for epoch in range(2)
        for step, (images, labels) in enumerate(batches(epoch))
    ]
    expected, p, ema, mean, ema_mean = by_hand(config)
    assert losses == pytest.approx(expected, rel=1e-5)
    for model, values, statistic in ((trainer.model, p, mean), (trainer.ema, ema, ema_mean)):
        for name, value in values.items():
            torch.testing.assert_close(model.get_parameter(name).double(), value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(model.norm.running_mean.double(), statistic, rtol=1e-4, atol=1e-6)


def test_a_network_without_batch_norm_is_trained_and_averaged():
    config, (images, labels) = TrainConfig(**BASE), next(batches(0))
    trainer = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS**2, CLASSES)), config, CPU)
    before = trainer.ema[1].weight.clone()
    trainer.step(images, labels, 0, 0, STEPS)
    # A tenth of the old weights stays at the first step, since the average warms up
    torch.testing.assert_close(trainer.ema[1].weight, 0.1 * before + 0.9 * trainer.model[1].weight)


def test_each_of_these_recipes_ends_elsewhere():
    """Else the comparison above could not notice that a setting is ignored."""
    ends = [
        torch.cat([by_hand(TrainConfig(**BASE | changes))[part]["linear.weight"].flatten() for part in (1, 2)])
        for changes in RECIPES.values()
    ]
    for i, one in enumerate(ends):
        assert all((one - other).abs().max() > 1e-3 for other in ends[:i])


def test_the_learning_rate_at_points_worked_out_by_hand():
    cosine = TrainConfig(lr=2.0, warmup_fraction=0.2)
    assert learning_rate(cosine, 0.1) == pytest.approx(1.0) and learning_rate(cosine, 0.2) == pytest.approx(2.0)
    assert learning_rate(cosine, 0.6) == pytest.approx(1.0) and learning_rate(cosine, 1.0) == pytest.approx(
        0, abs=1e-12
    )
    assert learning_rate(cosine, 0.4) == pytest.approx(2 * 0.8535534)  # (1 + cos 45 degrees) / 2
    assert learning_rate(cosine.replace(schedule="linear"), 0.4) == pytest.approx(1.5)
    assert learning_rate(cosine.replace(final_lr_fraction=0.3), 1.0) == pytest.approx(0.6)


def draws(seed=0, epoch=0, step=0, accumulation=1):
    trainer = Trainer(Small(), TrainConfig(**BASE | {"seed": seed, "accumulation": accumulation}), CPU)
    images, labels = next(batches(0))
    trainer.step(images, labels, epoch, step, STEPS)
    return [drawn for training, _, drawn in trainer.model.seen if training]


def test_dropout_and_stochastic_depth_draw_differently_in_every_epoch_step_micro_batch_and_seed():
    every = draws(accumulation=2) + draws(epoch=1) + draws(step=1) + draws(seed=1)
    assert len(every) == 5 and len(set(every)) == 5
    assert draws(seed=1, epoch=2, step=1) == draws(seed=1, epoch=2, step=1)


@pytest.mark.parametrize("images", range(2, 14))
def test_micro_batches_are_even_and_none_has_a_single_image(images):
    """Batch norm cannot train on one. What divides the batch is split as it was always split."""
    x, y = torch.randn(images, 3, PIXELS, PIXELS), torch.arange(images) % CLASSES
    for size in range(1, images + 1):
        trainer = Trainer(Small(), TrainConfig(**BASE), CPU)
        trainer.micro_batch = size
        trainer.step(x, y, 0, 0, STEPS)
        sizes = [n for training, n, _ in trainer.model.seen if training]
        assert sum(sizes) == images and min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= max(size, 3) and (size == 1 or images % size or set(sizes) == {size})


# ---- The recipe reaches the network


def test_the_settings_of_the_recipe_are_in_the_network():
    config = TrainConfig(dropout=0.35, drop_path=0.6, norm_momentum=0.07, se_expanded=True, zero_init_residual=True)
    model = EfficientNet(Scaling(0.5, 0.25), 10, **config.model_options())
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.dropout.p == 0.35 and {norm.momentum for norm in norms} == {0.07} and {n.eps for n in norms} == {1e-3}
    assert [block.drop_path.p for block in blocks] == pytest.approx([0.6 * i / len(blocks) for i in range(len(blocks))])
    assert blocks[1].se.reduce.out_channels == blocks[1].depthwise.conv.out_channels // 4
    assert any((norm.weight == 0).all() for norm in norms)
    # And off, where they are off
    config = TrainConfig(dropout=0.0, drop_path=0.0)
    model = EfficientNet(Scaling(0.5, 0.25), 10, **config.model_options())
    assert {norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.01}
    assert all((norm.weight == 1).all() for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model.train()(x), model.train()(x))


def test_batch_norm_moves_by_its_momentum():
    model = EfficientNet(Scaling(0.5, 0.25), 10, norm_momentum=0.07).train()
    x = torch.randn(8, 3, 16, 16)
    y = model.stem.conv(x)
    model.stem(x)
    mean, var = y.mean((0, 2, 3)), y.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(model.stem.norm.running_mean, 0.07 * mean)
    torch.testing.assert_close(model.stem.norm.running_var, 0.93 + 0.07 * var)


def test_dropout_acts_on_what_the_classifier_is_given():
    model = EfficientNet(Scaling(0.5, 0.25), 10, dropout=0.4, drop_path=0.0, stem_stride=1).train()
    given = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].detach()))
    x = torch.randn(16, 3, 16, 16)
    torch.manual_seed(0)
    model(x)
    pooled = model.features(x).mean((2, 3)).detach()
    kept = given[0] != 0
    assert 0.55 < kept.float().mean() < 0.65
    torch.testing.assert_close(given[0][kept], pooled[kept] / 0.6, rtol=1e-4, atol=1e-5)
    model.eval()(x)
    torch.testing.assert_close(given[1], model.features(x).mean((2, 3)))


def test_stochastic_depth_drops_the_branch_of_whole_samples_in_training_alone():
    torch.manual_seed(0)
    block = MBConv(8, 8, 4, 3, 1, drop_path=0.5)
    branch = []
    block.project.register_forward_hook(lambda module, inputs, output: branch.append(output.detach()))
    x = torch.randn(64, 8, 6, 6)
    y = block.train()(x).detach()
    dropped = (y == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(y[~dropped], (x + 2 * branch[0])[~dropped])
    y = block.eval()(x).detach()
    torch.testing.assert_close(y, x + branch[1])


# ---- Scoring


class Scored:
    """Images that are their own logits, in two batches of unequal size."""

    def __init__(self, logits, labels):
        self.parts, self.asked = [(logits[:5], labels[:5]), (logits[5:], labels[5:])], []

    def to(self, device):
        return self

    def eval_batches(self, split, resolution, batch_size):
        self.asked.append((split, resolution))
        yield from self.parts


class Copy(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.modes = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.modes.append(self.training)
        return x * self.one


def test_scores_are_those_worked_out_by_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(13, 9)).astype(np.float32), rng.integers(9, size=13)
    data, model = Scored(torch.from_numpy(logits), torch.from_numpy(labels)), Copy().train()
    scores = evaluate(model, data, "minival", 24, precision="fp32")
    order = np.argsort(-logits, axis=1)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert scores["top1"] == pytest.approx(100 * (order[:, 0] == labels).mean())
    assert scores["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).mean())
    assert 0 < scores["top1"] < scores["top5"] < 100
    assert scores["loss"] == pytest.approx(-np.log(probability[np.arange(13), labels]).mean(), rel=1e-5)
    assert scores["confidence"] == pytest.approx(probability.max(1), rel=1e-5)
    assert (scores["predicted"] == order[:, 0]).all() and (scores["label"] == labels).all()
    assert (scores["correct"] == (order[:, 0] == labels)).all()
    assert data.asked == [("minival", 24)] and model.modes == [False, False] and model.training


class Watched:
    """A data set that notes what is read when, and by which weights it is scored."""

    def __init__(self):
        self.read, self.counts = [], {"train": STEPS * 10, "minival": 10, "test": 10}

    def to(self, device):
        return self

    def describe(self):
        return {"title": "watched", "fingerprint": "watched", "classes": CLASSES, "counts": self.counts}

    def train_batches(self, config, epoch, start=0):
        self.read.append(("train", epoch, start))
        yield from itertools.islice(batches(epoch), start, None)

    def eval_batches(self, split, resolution, batch_size):
        self.read.append((split, resolution))
        yield next(batches({"minival": 50, "test": 60}[split]))


def score(state, split):
    """Top-1 and loss on the images of a split by weights (a state dict), with running statistics."""
    images, labels = next(batches({"minival": 50, "test": 60}[split]))
    x = images.flatten(1)
    x = (x - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt()
    logits = (x * state["norm.weight"] + state["norm.bias"]) @ state["linear.weight"].T + state["linear.bias"]
    loss = -(logits.log_softmax(1)[torch.arange(len(labels)), labels]).mean().item()
    return 100 * (logits.argmax(1) == labels).float().mean().item(), loss


@pytest.fixture
def costless(monkeypatch):
    """The cost is not counted, because the network of these tests takes images of one size only."""
    monkeypatch.setattr("effnet_study.training.count_cost", lambda model, resolution: Cost(1, 2, 3))


def test_minival_is_scored_after_every_epoch_by_the_average_and_test_once_at_the_end(tmp_path, costless):
    data, config = Watched(), TrainConfig(**BASE | {"resolution": 4, "ema_decay": 0.5})
    record = train(Small(), data, config, tmp_path, device="cpu")
    minival, test = ("minival", 4), ("test", 4)
    assert data.read == [("train", 0, 0), minival, ("train", 1, 0), minival, test, test]
    # The same steps once more, to have both kinds of weights after each epoch
    trainer, rows = Trainer(Small(), config, CPU), []
    for epoch in range(2):
        for step, (images, labels) in enumerate(batches(epoch)):
            trainer.step(images, labels, epoch, step, STEPS)
        rows.append(score(trainer.ema.state_dict(), "minival"))
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [(row["minival_top1"], row["minival_loss"]) for row in history] == [
        pytest.approx(row, rel=1e-5) for row in rows
    ]
    ema, raw = (score(m.state_dict(), "test") for m in (trainer.ema, trainer.model))
    assert abs(ema[1] - raw[1]) > 1e-3  # else they could be taken for each other
    assert (record["test"]["top1"], record["test"]["loss"]) == pytest.approx(ema, rel=1e-5)
    assert (record["test_raw"]["top1"], record["test_raw"]["loss"]) == pytest.approx(raw, rel=1e-5)
    assert record["minival"]["loss"] == history[-1]["minival_loss"]
    kept = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in trainer.ema.state_dict().items())
    images, labels = next(batches(60))
    correct = np.load(tmp_path / "test_correct.npy")
    assert 100 * correct.mean() == pytest.approx(ema[0])
    losses = [row["train_loss"] for row in history]
    assert losses == pytest.approx(np.reshape(by_hand(config)[0], (2, STEPS)).mean(1).tolist(), rel=1e-4)
    # The rate of an epoch's last step
    assert history[0]["lr"] == pytest.approx(learning_rate(config, (STEPS - 0.5) / (2 * STEPS)))


class Stopping(Watched):
    """Asks training to stop at the first batch of every start."""

    def __init__(self, file):
        super().__init__()
        self.file = file

    def train_batches(self, config, epoch, start=0):
        for batch in super().train_batches(config, epoch, start):
            self.file.touch()
            yield batch


@pytest.mark.parametrize("changes", [{}, {"optimizer": "rmsprop", "lr": 0.02, "ema_decay": 0.999}, {"accumulation": 3}])
def test_a_run_stopped_after_every_step_ends_where_the_formulas_lead(changes, tmp_path, costless, monkeypatch):
    """A run that goes on is compared with formulas, because a mistake would also be in an uninterrupted run."""
    config = TrainConfig(**BASE | {"resolution": 4} | changes)
    data, seen, record = Stopping(tmp_path / "stop"), [], None
    monkeypatch.setenv("EFFNET_STOP", str(data.file))
    while record is None:
        data.file.unlink(missing_ok=True)
        model = Small()
        try:
            record = train(model, data, config, tmp_path / "run", device="cpu")
        except Interrupted:
            assert len([entry for entry in model.seen if entry[0]]) == config.accumulation  # one step
        seen += [entry for entry in model.seen if entry[0]]
    losses, _, ema, _, ema_mean = by_hand(config)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    averages = np.reshape(losses, (2, STEPS)).mean(1).tolist()
    assert [row["train_loss"] for row in history] == pytest.approx(averages, rel=1e-5)
    kept = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    for name, value in {**ema, "norm.running_mean": ema_mean}.items():
        torch.testing.assert_close(kept[name].double(), value, rtol=1e-4, atol=1e-6)
    assert kept["norm.num_batches_tracked"] == 2 * STEPS * config.accumulation
    firsts = [part[0] for part in np.array_split(np.arange(10), config.accumulation)]
    places = itertools.product(range(2), range(STEPS), firsts)
    drawn = [torch.rand(1, generator=torch.Generator().manual_seed(step_seed(0, *place))).item() for place in places]
    assert [entry[2] for entry in seen] == drawn


# ---- From a profile to the record


def test_no_setting_of_the_small_profile_is_the_default():
    given, defaults = SMALL_PROFILE["train"], dict(TrainConfig())
    execution = {"resolution", "seed", "compile", "deterministic", "save_seconds", "save_steps"}
    # These have tests of their own; those of the second row are slow to import or to draw
    elsewhere = {"pretrained", "freeze", "sync_norm", "precision", "accumulation", "se_expanded"}
    elsewhere |= {"rotate", "color_jitter", "hue", "randaugment"}
    assert set(given) >= set(defaults) - execution - elsewhere
    assert [name for name, value in given.items() if value == defaults[name]] == []


def test_every_setting_of_a_profile_reaches_the_run_and_its_record(profile_file, tmp_path):
    profile = study.load_profile(profile_file(seeds=[3], methods=["baseline"], baseline={"depth": 0.3, "width": 0.25}))
    run = plan_runs(profile, tmp_path)[0]
    wanted = SMALL_PROFILE["train"] | {"seed": 3, "resolution": 16}
    run.train(study.load_data(**profile.data.given()), "cpu")
    for config in (dict(run.config), read_record(run.run_dir)["config"]):
        assert {name: config[name] for name in wanted} == wanted


def test_the_shared_recipe_learns(digits, tiny_model, recipe, tmp_path):
    """Networks that answer one class for every image would make tests that compare scores compare nothing."""
    config = recipe()
    record = train(tiny_model(), digits, config, tmp_path, device="cpu")
    predicted = np.load(tmp_path / "test_predictions.npz")["predicted"]
    assert record["test"]["top1"] > 40 and (np.bincount(predicted, minlength=10) > 0).sum() >= 8
