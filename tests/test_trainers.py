"""Which trainer a config gets, and that a captured step is the plain step."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch

from effnet_lib import Trainer
from effnet_study import machine, trainers
from effnet_study.trainers import CapturedTrainer, execution_mode, prepare_trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "compile, resolution, device, several, mode",
    [
        ("auto", 96, CPU, False, "never"),
        ("auto", 96, GPU, False, "graph"),
        ("auto", 97, GPU, False, "blocks"),
        ("auto", 64, GPU, True, "blocks"),
        ("graph", 224, GPU, False, "graph"),
        ("blocks", 64, GPU, False, "blocks"),
        ("blocks", 64, CPU, False, "blocks"),
        ("never", 64, GPU, False, "never"),
    ],
)
def test_how_steps_are_executed(recipe, monkeypatch, capsys, compile, resolution, device, several, mode):
    monkeypatch.setattr(trainers, "can_compile", lambda: True)
    assert execution_mode(recipe(compile=compile, resolution=resolution), device, several) == mode
    assert not capsys.readouterr().out


def test_streams_are_those_of_the_runs_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restored afterwards
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for device in (torch.device("cuda", 1), GPU):
        machine.prepare(device)
    assert chosen == [torch.device("cuda", 1)]


@pytest.mark.parametrize("device, several, why", [(CPU, False, "needs a GPU"), (GPU, True, "several processes")])
def test_a_graph_that_cannot_be_captured_is_refused_once(recipe, capsys, device, several, why):
    assert execution_mode(recipe(compile="graph"), device, several) == "never"
    out = capsys.readouterr().out
    assert out.count("without a CUDA graph") == 1 and why in out


def test_without_a_compiler_larger_images_are_trained_by_the_plain_step(recipe, monkeypatch):
    monkeypatch.setattr(trainers, "can_compile", lambda: False)
    assert execution_mode(recipe(resolution=224), GPU, False) == "never"


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on a CPU: a capture changes nothing, each run writes the same tensors again. A list of their runs."""
    runs = []

    def record(work, stream):
        trainer = work.__self__
        before, draws = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
        work()
        trainer.model.load_state_dict(before)
        torch.set_rng_state(draws)
        gradients, loss = [p.grad for p in trainer.params], trainer.loss
        runs.append(0)

        def replay():
            runs[-1] += 1
            now = [p.grad for p in trainer.params]
            trainer.attach([None] * len(now))
            work()
            for gradient, p in zip(gradients, trainer.params, strict=True):
                gradient.copy_(p.grad)
            trainer.attach(now)
            trainer.loss = loss.copy_(trainer.loss)

        return replay

    monkeypatch.setattr(trainers, "record", record)
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    return runs


def captured_trainer(model, config):
    trainer = CapturedTrainer(model, config, CPU)
    trainer.mode = "graph"
    return trainer


def take_steps(trainer, mixed=False, before=lambda step: None):
    """Take eight steps, and return their losses. `mixed`: labels are distributions over classes."""
    config, rng, losses = trainer.config, torch.Generator().manual_seed(1), []
    for step in range(8):
        before(step)
        images = torch.randn(config.batch_size, 3, config.resolution, config.resolution, generator=rng)
        labels = torch.randint(10, (config.batch_size,), generator=rng)
        labels = torch.nn.functional.one_hot(labels, 10).float() if mixed else labels
        losses.append(trainer.step(images, labels, 0, step, 8).item())
    return losses


def same(ours, plain):
    """Tell whether networks, their averages and their optimizers are equal to the bit."""
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=0)
    return True


@pytest.mark.parametrize(
    "changes, mixed, runs",
    [
        ({}, False, [5]),
        ({"optimizer": "rmsprop", "clip_norm": 0.5, "lr": 0.01}, False, [5]),
        ({"accumulation": 2}, False, [13]),  # captured between the two micro-batches of the second step
        ({"batch_size": 12, "accumulation": 3}, True, [21]),
        ({"batch_size": 10, "accumulation": 3}, False, [5]),  # of 4, 3 and 3 images: the first kind alone is captured
    ],
    ids=str,
)
def test_captured_steps_are_the_plain_steps(tiny_model, recipe, graphs, changes, mixed, runs):
    config = recipe(**{"batch_size": 16, "dropout": 0.3, "drop_path": 0.3} | changes)
    plain = Trainer(tiny_model(**config.model_options()), config, CPU)
    captured = captured_trainer(tiny_model(**config.model_options()), config)
    assert take_steps(captured, mixed) == take_steps(plain, mixed)
    assert same(captured, plain) and graphs == runs


def test_a_graph_that_no_longer_fits_is_captured_again(tiny_model, recipe, graphs):
    config = recipe(batch_size=16)
    plain, captured = Trainer(tiny_model(), config, CPU), captured_trainer(tiny_model(), config)

    def halve(trainer, step):
        trainer.micro_batch = 16 if step < 4 else 8

    losses = [take_steps(t, before=partial(halve, t)) for t in (plain, captured)]
    assert losses[0] == losses[1] and same(captured, plain) and graphs == [1, 5]


def test_where_nothing_can_be_captured_the_plain_step_goes_on(tiny_model, recipe, graphs, monkeypatch, capsys):
    monkeypatch.setattr(trainers, "record", mock.Mock(side_effect=RuntimeError("not permitted while capturing")))
    config = recipe(batch_size=16, accumulation=2)
    plain, captured = Trainer(tiny_model(), config, CPU), captured_trainer(tiny_model(), config)
    assert take_steps(captured) == take_steps(plain) and same(captured, plain)
    assert capsys.readouterr().out.count("not permitted while capturing") == 1 and captured.mode == "never"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_captured_steps_on_a_gpu(tiny_model, recipe, precision):
    """The captured kernels are those of the plain step, with its draws; the order of some sums is not fixed."""
    config = recipe(batch_size=16, accumulation=2, dropout=0.3, drop_path=0.3, deterministic=True, precision=precision)
    losses = {}
    for mode in ("never", "graph"):
        trainer = prepare_trainer(tiny_model(**config.model_options()), config.replace(compile=mode), GPU)
        rng, losses[mode] = torch.Generator("cuda").manual_seed(1), []
        for step in range(8):
            images = torch.randn(16, 3, 16, 16, generator=rng, device=GPU)
            labels = torch.randint(10, (16,), generator=rng, device=GPU)
            losses[mode].append(trainer.step(images, labels, 0, step, 8).item())
    assert trainer.mode == "graph" and trainer.replay is not None
    assert losses["graph"] == pytest.approx(losses["never"], rel=1e-2 if precision != "fp32" else 1e-5)
