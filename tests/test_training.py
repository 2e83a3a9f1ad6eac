"""Training: recipe, schedule, optimizer, EMA, resuming, faults, and one test per known mistake."""

import copy
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Disturbed
from kill import end_of
from limited_memory import RandomImages
from small import small_config, small_net
from torch import nn

from effnet_lib import (
    TABLE7,
    EfficientNet,
    RMSpropTF,
    TrainConfig,
    Trainer,
    evaluate,
    learning_rate,
    make_optimizer,
    round_resolution,
    step_seed,
    update_ema,
)
from effnet_study.data.load import load_data
from effnet_study.files import RunLocked, load_history
from effnet_study.machine import can_compile, keep_freed_memory
from effnet_study.parallel import MICRO_BATCH, Group, ParallelTrainer
from effnet_study.record import read_record
from effnet_study.stop import ProcessKilled
from effnet_study.training import train
from effnet_study.use import load_trained

CPU, HERE = torch.device("cpu"), Path(__file__).parent
EASY = {"flip": False, "crop_area": 0.8, "dropout": 0.0, "drop_path": 0.0}  # digits in a few dozen steps


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def weights(run_dir):
    return safetensors.torch.load_file(run_dir / "weights.safetensors")


# ---- the recipe


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("epochs", [1, 20])
def test_the_learning_rate_peaks_once_and_ends_near_zero(schedule, epochs):
    config = TrainConfig(schedule=schedule, epochs=epochs, lr=0.1, warmup_fraction=0.1)
    steps = 400 * epochs
    lr = [learning_rate(config, (step + 0.5) / steps) for step in range(steps)]
    assert max(lr) == pytest.approx(0.1, rel=0.01)
    assert lr[0] < 0.01 * 0.1 * 5 and lr[-1] < 0.01 * 0.1
    peak = int(np.argmax(lr))
    assert np.all(np.diff(lr[:peak]) > 0) and np.all(np.diff(lr[peak + 1 :]) < 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epocs": 3}, "unknown setting 'epocs'.*Did you mean 'epochs'"),
        ({"lr": "1e-3"}, "lr: expected a valid number, got '1e-3'"),
        ({"lr": 0.0}, "lr: expected .*greater than 0, got 0.0"),
        ({"lr": float("nan")}, "lr: expected a finite number, got nan"),
        ({"flip": "false"}, "flip: expected a valid boolean, got 'false'"),
        ({"epochs": True}, "epochs: expected a valid integer, got True"),
        ({"epochs": 0}, "epochs: .*greater than or equal to 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected a valid integer, got 1.5"),
        ({"dropout": 1.0}, "dropout: expected .*less than 1, got 1.0"),
        ({"compile": True}, "unknown compile True"),
        ({"compile": "block"}, "unknown compile 'block'. Did you mean 'blocks'"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'. Did you mean 'sgd'"),
        ({"batch_size": 5, "accumulation": 3}, "accumulation: expected at most half of batch_size, 2, got 3"),
        ({"batch_size": 1}, "batch_size: expected a value greater than or equal to 2, got 1"),
        ({"seed": -1}, "seed: expected a value greater than or equal to 0, got -1"),
        ({"seed": 2**63}, "seed: expected a value less than 9223372036854775808, got 9223372036854775808"),
        ({"flip": "no"}, "flip: expected a valid boolean, got 'no'; in YAML write true or false"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_a_config_survives_json():
    config = TrainConfig(lr=0.1, epochs=3)
    assert TrainConfig(**json.loads(json.dumps(dict(config)))) == config


def test_rmsprop_is_tensorflows():
    """Against the formula of tf.compat.v1.train.RMSPropOptimizer, written out for one number."""
    p = nn.Parameter(torch.tensor([1.5]))
    optimizer = RMSpropTF([p], lr=0.1, decay=0.9, momentum=0.8, eps=1e-3)
    value, square, momentum = 1.5, 1.0, 0.0
    for gradient in (0.3, -2.0, 0.5, 0.0):
        p.grad = torch.tensor([gradient])
        optimizer.step()
        square = 0.9 * square + 0.1 * gradient**2
        momentum = 0.8 * momentum + 0.1 * gradient / (square + 1e-3) ** 0.5
        value -= momentum
        assert p.item() == pytest.approx(value, rel=1e-6)


def test_rmsprop_decays_weights_as_l2():
    a, b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    first, second = RMSpropTF([{"params": [a], "weight_decay": 0.1}], lr=0.1), RMSpropTF([b], lr=0.1)
    a.grad, b.grad = torch.tensor([0.4]), torch.tensor([0.4 + 0.1 * 2.0])
    first.step()
    second.step()
    assert a.item() == pytest.approx(b.item())


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_norms_and_biases_are_not_decayed(tiny_model, recipe, optimizer):
    model = tiny_model()
    decayed, free = make_optimizer(model, recipe(optimizer=optimizer, weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
    kernels = {m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(decayed["params"]) == kernels
    assert set(free["params"]) == set(model.parameters()) - kernels


def test_the_moving_average_follows_weights_and_statistics(tiny_model, recipe):
    trainer = Trainer(tiny_model(), recipe(ema_decay=0.9), CPU)
    model, ema = trainer.model, trainer.ema
    with torch.no_grad():
        model.classifier.weight.add_(1)
        model.stem.norm.running_var.add_(1)
        model.stem.norm.num_batches_tracked.add_(7)
    start = ema.classifier.weight.clone()
    update_ema(*trainer.averaged, 0.9, n=10_000)
    torch.testing.assert_close(ema.classifier.weight, start + 0.1)
    torch.testing.assert_close(ema.stem.norm.running_var, torch.full_like(ema.stem.norm.running_var, 1.1))
    update_ema(*trainer.averaged, 0.9, n=0)  # warm-up: at first it nearly copies
    torch.testing.assert_close(ema.classifier.weight, start + 1 - 0.9 * 0.1)
    trainer.step(torch.randn(12, 3, 16, 16), torch.arange(12) % 10, 0, 0, 10)
    assert ema.stem.norm.num_batches_tracked == model.stem.norm.num_batches_tracked == 8  # copied, not averaged


def test_step_seeds_differ_by_seed_epoch_and_step():
    seeds = {step_seed(s, e, i) for s in range(4) for e in range(4) for i in range(4)}
    assert len(seeds) == 64


# ---- a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """The folder of a run that was never interrupted."""
    run_dir, about = tmp_path_factory.mktemp("whole"), {"method": "tiny", "profile": "test"}
    train(small_net(), digits, small_config(), run_dir, about=about, device="cpu", tensorboard=False)
    return run_dir


def test_the_time_of_an_epoch_includes_waiting_for_the_device(digits, tmp_path, monkeypatch):
    """On a GPU the last steps are still computed when Python has launched them. `largest` waits for them."""
    largest = Group.largest
    monkeypatch.setattr(Group, "largest", lambda group, value: time.sleep(1) or largest(group, value))
    train(small_net(), digits, small_config(epochs=1), tmp_path, device="cpu")
    assert rows_of(tmp_path)[0]["images_per_second"] < 240


def test_a_run_learns_and_leaves_its_record(whole, digits):
    record, config = read_record(whole), small_config()
    assert record["schema"] == 3 and record["status"] == "finished"
    assert 75 < record["test"]["top1"] < record["test"]["top5"] < 100
    assert record["method"] == "tiny" and record["profile"] == "test" and record["config"] == dict(config)
    # 3 x 8 kernels of 5 x 5, and 8 maps of 8 x 8; a matrix of 128 x 10
    flops = 24 * 25 * 64 + 1280
    assert record["cost"] == {"params": 600 + 16 + 1290, "flops": flops, "activations": 512 + 10}
    assert record["dataset"]["counts"] == {"train": 240, "minival": 144, "test": 360}
    assert record["dataset"]["fingerprint"] == digits.fingerprint
    assert record["weights_sha256"] == hashlib.sha256((whole / "weights.safetensors").read_bytes()).hexdigest()
    assert record["versions"]["torch"] == torch.__version__ and record["device"]["type"] == "cpu"
    assert record["device"]["processor"].endswith(torch.backends.cpu.get_cpu_capability())
    assert record["peak_memory_bytes"] > 1e8
    assert (record["dtype"], record["compiled"], record["devices"], record["micro_batch"]) == ("float32", False, 1, 24)
    begin, end = (datetime.fromisoformat(record[name]) for name in ("started", "ended"))
    assert -1 <= (end - begin).total_seconds() - record["seconds"] < 60  # files are written in between
    history = rows_of(whole)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    # The rate of an epoch's last step: a cosine from 0.05 after 5 % of warm-up
    left = [(1 + math.cos(math.pi * ((step - 0.5) / 30 - 0.05) / 0.95)) / 2 for step in (10, 20, 30)]
    assert [row["lr"] for row in history] == pytest.approx([0.05 * share for share in left])
    assert record["seconds"] > sum(row["seconds"] for row in history)
    assert record["images_per_second"] == sorted(row["images_per_second"] for row in history)[1]
    assert all(0 < 240 / row["images_per_second"] < row["seconds"] for row in history)
    assert {name: record["minival"][name] for name in ("top1", "loss")} == {
        name: history[-1][f"minival_{name}"] for name in ("top1", "loss")
    }
    start, end = small_net().state_dict(), weights(whole)
    assert all(not torch.equal(start[name], end[name]) for name in start)
    left_behind = {path.name for path in whole.iterdir()} - {".lock", ".holder"}
    assert left_behind == {"run.json", "history.jsonl", "test_correct.npy", "test_predictions.npz"} | {
        "weights.safetensors"
    }


def test_a_trained_network_answers_as_its_files_say(whole, digits):
    """Worked out by the network's own output, without `evaluate`."""
    record, model = read_record(whole), load_trained(whole, small_net(seed=9))
    ((images, labels),) = digits.eval_batches("test", 16, 500)
    with torch.no_grad():
        probability, predicted = model(images).softmax(1).max(1)
    top5 = model(images).argsort(1)[:, -5:]
    kept = np.load(whole / "test_predictions.npz")
    assert (kept["label"] == labels.numpy()).all() and (kept["predicted"] == predicted.numpy()).all()
    assert (kept["label"] == digits.labels[digits.indices["test"]].numpy()).all()
    np.testing.assert_allclose(kept["confidence"], probability, atol=1e-3)
    assert [kept[name].dtype for name in ("label", "predicted", "confidence")] == [np.uint16, np.uint16, np.float16]
    correct = np.load(whole / "test_correct.npy", allow_pickle=False)
    assert correct.dtype == bool and (correct == (predicted == labels).numpy()).all()
    assert record["test"]["top1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
    assert record["test"]["top5"] == pytest.approx(100 * (top5 == labels[:, None]).any(1).float().mean().item())
    with pytest.raises(FileNotFoundError, match="not committed"):
        load_trained(whole / "nowhere", model)


def test_the_same_seed_repeats_and_another_differs(tmp_path, digits, whole):
    for seed in (0, 1):
        train(small_net(seed), digits, small_config(seed=seed), tmp_path / str(seed))
    assert end_of(tmp_path / "0") == end_of(whole)
    assert end_of(tmp_path / "1")["history"] != end_of(whole)["history"]


class Kill(BaseException):
    """Not an Exception: the trainer must not mistake it for a failure of the run."""


def killing(data, epoch, error=Kill):
    """A data set that raises in the middle of one epoch."""

    def fail(images):
        raise error("in the middle")

    return Disturbed(data, fail, epoch, step=1)


def test_a_killed_run_continues_to_the_same_end(tmp_path, digits, whole):
    for epoch in (0, 2, 2):
        with pytest.raises(Kill):
            train(small_net(), killing(digits, epoch), small_config(), tmp_path)
        assert read_record(tmp_path) is None
    train(small_net(seed=5), digits, small_config(), tmp_path)  # the weights come from the checkpoint
    assert end_of(tmp_path) == end_of(whole)


def test_efficientnet_goes_on_bit_for_bit(tmp_path, digits, tiny_model, recipe):
    """With RMSProp, stochastic depth, every kind of mixed image, and the fast kernels."""
    config = recipe(epochs=2, batch_size=60, optimizer="rmsprop", lr=0.005, save_steps=1, mixup=0.2, cutmix=0.2)
    train(tiny_model(), digits, config, tmp_path / "whole")
    with pytest.raises(Kill):
        train(tiny_model(), killing(digits, 1), config, tmp_path / "killed")
    train(tiny_model(seed=5), digits, config, tmp_path / "killed")
    assert end_of(tmp_path / "killed") == end_of(tmp_path / "whole")


def test_a_finished_run_is_not_repeated(digits, whole):
    """Nor does another way to execute it make it another run."""
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    otherwise = small_config(deterministic=True, save_steps=1, save_seconds=9.0, compile="never")
    for config in (small_config(), otherwise):
        assert train(small_net(seed=5), killing(digits, 0), config, whole) == read_record(whole)
    after = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert {**after, ".holder": None} == {**before, ".holder": None}


def test_a_folder_of_another_run_is_refused(whole, digits):
    with pytest.raises(ValueError, match=r"config lr = 0\.05, now 0\.02 is asked for; delete"):
        train(small_net(), digits, small_config(lr=0.02), whole)
    with pytest.raises(ValueError, match="config seed"):
        train(small_net(), digits, small_config(seed=1), whole)
    with pytest.raises(ValueError, match="cost params"):
        train(small_net(num_classes=11), digits, small_config(), whole)
    other = dataclasses.replace(digits, fingerprint="0")
    with pytest.raises(ValueError, match="dataset fingerprint"):
        train(small_net(), other, small_config(), whole)


def test_a_checkpoint_of_another_config_is_refused(tmp_path, digits):
    with pytest.raises(Kill):
        train(small_net(), killing(digits, 1), small_config(), tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt was made with config lr"):
        train(small_net(), digits, small_config(lr=0.02), tmp_path)


def test_torn_checkpoints_are_reported_and_the_run_starts_again(tmp_path, digits, whole, capsys):
    with pytest.raises(Kill):
        train(small_net(), killing(digits, 2), small_config(), tmp_path)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1000])
    train(small_net(), digits, small_config(), tmp_path)
    said = capsys.readouterr().out
    assert said.count("is not used: unreadable") == 2 and "continues" not in said
    assert end_of(tmp_path) == end_of(whole)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 2, "status"')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99, expected 2"):
        read_record(tmp_path)


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"epoch": 1, "tr')
    with pytest.raises(ValueError, match="history.jsonl is damaged .*; restore it"):
        load_history(tmp_path)


def test_a_failing_run_is_recorded_and_not_run_again(tmp_path, digits):
    with pytest.raises(ArithmeticError, match="in the middle"):
        train(small_net(), killing(digits, 1, ArithmeticError), small_config(), tmp_path)
    record = train(small_net(), digits, small_config(), tmp_path)
    assert record["status"] == "failed" and "in the middle" in record["error"]


def test_a_run_is_held_by_one_process(tmp_path, digits):
    with filelock.FileLock(tmp_path / ".lock"), ThreadPoolExecutor() as pool:
        second = pool.submit(train, small_net(), digits, small_config(), tmp_path)
        with pytest.raises(RunLocked, match="held by another process"):
            second.result()
    assert not (tmp_path / "history.jsonl").exists()


class Full(nn.Linear):
    """A classifier that in training runs out of memory at more than `limit` images, after `last` calls that fit."""

    def __init__(self, classifier, seen, limit=12, last=0):
        super().__init__(classifier.in_features, classifier.out_features)
        self.load_state_dict(classifier.state_dict())
        self.seen, self.limit, self.last = seen, limit, last

    def __deepcopy__(self, memo):  # the moving average and the count of the cost see through the same eyes
        return Full(self, self.seen, self.limit, self.last)

    def forward(self, x):
        if self.training and not x.is_meta:
            if len(x) > self.limit and len(self.seen) >= self.last:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            self.seen.append(len(x))
        return super().forward(x)


def full(seen, **options):
    model = small_net()
    model.classifier = Full(model.classifier, seen, **options)
    return model


@pytest.mark.parametrize("limit, fits, accumulation", [(12, 12, 2), (7, 6, 4)])
def test_an_attempt_that_ran_out_of_memory_leaves_no_trace(tmp_path, digits, capsys, limit, fits, accumulation):
    record = train(full([], limit=limit), digits, small_config(epochs=1), tmp_path / "found", device="cpu")
    assert record["status"] == "finished" and record["micro_batch"] == fits and record["config"]["batch_size"] == 24
    assert capsys.readouterr().out.count("out of memory: going on with micro-batches of") == accumulation // 2
    asked = small_config(epochs=1, accumulation=accumulation)
    train(small_net(), digits, asked, tmp_path / "asked", device="cpu")
    assert end_of(tmp_path / "found") == end_of(tmp_path / "asked")


def test_out_of_memory_goes_on_from_the_last_checkpoint(tmp_path, digits, capsys):
    seen = []
    train(full(seen, last=5), digits, small_config(epochs=2, save_steps=2), tmp_path, device="cpu")
    said = capsys.readouterr().out
    assert "out of memory: going on with micro-batches of 12" in said and "continues in epoch 1 after step 4" in said
    assert seen[:5] == [24] * 5 and Counter(seen) == {24: 5, 12: 2 * (20 - 4)}


def test_a_run_goes_on_with_the_micro_batch_that_fitted(tmp_path, digits):
    """Also after an interruption, and also if the smaller one was found before the first checkpoint."""
    with pytest.raises(Kill):
        train(full([]), killing(digits, 1), small_config(), tmp_path)
    seen = []
    assert train(full(seen, limit=24), digits, small_config(), tmp_path)["micro_batch"] == 12
    assert set(seen) == {12}


def test_no_micro_batch_that_memory_asks_for_has_one_image(tmp_path, digits):
    """Halving leads from 9 to 5, 3 and 2 images; in twos, the last one of nine would be alone."""
    seen = []
    record = train(full(seen, limit=3), digits, small_config(epochs=1, batch_size=9), tmp_path, device="cpu")
    assert record["status"] == "finished" and set(seen) == {3}
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        train(full([], limit=2), digits, small_config(epochs=1, batch_size=3), tmp_path / "two", device="cpu")


def test_two_images_that_do_not_fit_are_a_failure(tmp_path, digits):
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        train(full([], limit=0), digits, small_config(), tmp_path)
    assert read_record(tmp_path) is None  # of the machine, not of the run


def test_a_machine_that_fails_leaves_the_run_to_be_continued(tmp_path, digits):
    def fail(images):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    config = small_config(save_steps=1)
    with pytest.raises(ProcessKilled, match="ECC error.*in a new process .* it goes on from its checkpoint"):
        train(small_net(), Disturbed(digits, fail), config, tmp_path)
    assert read_record(tmp_path) is None and (tmp_path / "checkpoint.pt").exists()
    assert train(small_net(), digits, config, tmp_path)["status"] == "finished"


def test_a_run_goes_on_only_in_the_precision_it_was_begun_in(tmp_path, digits, monkeypatch):
    with pytest.raises(OSError, match="in the middle"):
        train(small_net(), killing(digits, 1, OSError), small_config(), tmp_path)
    with monkeypatch.context() as other_machine:
        other_machine.setattr("effnet_study.training.amp_dtype", lambda precision, device: torch.bfloat16)
        with pytest.raises(ValueError, match="was started in float32, but would continue in bfloat16 here"):
            train(small_net(), digits, small_config(), tmp_path)
    assert read_record(tmp_path) is None
    assert train(small_net(), digits, small_config(), tmp_path)["status"] == "finished"


def test_without_a_c_compiler_that_is_said_and_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert can_compile() is False and "gcc, python3-dev" in capsys.readouterr().out


@pytest.mark.parametrize("triton, capability, lacking", [(False, (9, 0), "Triton"), (True, (6, 1), "capability 7.0")])
def test_without_triton_or_a_gpu_for_it_that_is_said(monkeypatch, capsys, tmp_path, triton, capability, lacking):
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if triton else None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert can_compile() is False and lacking in capsys.readouterr().out


@pytest.mark.parametrize("most, accepted", [(2**31, 2**31 - 1), (2**25, 2**25), (0, None)])
def test_freed_memory_is_kept_also_by_an_older_glibc(monkeypatch, most, accepted):
    """It refuses a threshold above 32 MiB. The other threshold alone would give more page faults, not fewer."""
    values = {}

    def mallopt(threshold, value):
        known = threshold == -1 or value <= most
        return values.update({threshold: value}) or 1 if known else 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert values == ({-3: accepted, -1: 2**31 - 1} if accepted else {})


def test_a_step_that_failed_half_way_leaves_no_trace_in_the_scaler():
    """Memory may run out after the gradients were unscaled: the same step, taken again, unscales its own."""
    config, device = TrainConfig(precision="fp16", optimizer="sgd", clip_norm=1.0), torch.device("cpu")
    torch.manual_seed(0)
    trainer = Trainer(torch.nn.Linear(3, 2), config, device)
    trainer.forward = lambda images: trainer.model(images[..., 0, 0])
    batch, before = (torch.randn(4, 3, 1, 1), torch.tensor([0, 1, 0, 1])), copy.deepcopy(trainer.state_dict())

    def step():
        trainer.step(*batch, epoch=0, step=0, steps=1)
        return copy.deepcopy(trainer.model.state_dict())

    taken = step()
    trainer.load_state_dict(before)
    failing = mock.patch.object(trainer.optimizer, "step", side_effect=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError), failing:
        step()
    trainer.model.zero_grad()
    trainer.load_state_dict(before)
    torch.testing.assert_close(step(), taken, rtol=0, atol=0)


def run_python(*words, status=0):
    """Return what a process of its own prints. It has one thread: with more, sums are taken in another order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_limit_of_memory_halves_the_micro_batch(tmp_path):
    said = run_python(HERE / "limited_memory.py", tmp_path)
    record = read_record(tmp_path / "limited")
    assert record["status"] == "finished" and 1 <= record["micro_batch"] <= 64
    assert said.index("out of memory: going on with micro-batches of 64") > 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", TABLE7)
def test_every_row_of_table_7_trains_within_24_gb_of_a_gpu(tmp_path, method):
    total, limit = torch.cuda.get_device_properties(0).total_memory, 24e9
    if total < limit:
        pytest.skip("a GPU of less than 24 GB")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        px = round_resolution(TABLE7[method].resolution)
        config, data = TrainConfig(resolution=px, batch_size=256, epochs=1), RandomImages(256, px, "cuda")
        assert train(EfficientNet(TABLE7[method]), data, config, tmp_path, device="cuda")["status"] == "finished"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_scoring_out_of_memory_starts_again_with_half_the_batch(tmp_path, digits, whole):
    sizes = []

    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()

        def forward(self, x):
            sizes.append(len(x))
            if not self.training and len(x) > 64:
                raise torch.OutOfMemoryError("simulated")
            return self.inner(x)

    limited, expected = train(Limited(), digits, small_config(), tmp_path, device="cpu"), read_record(whole)
    for name in ("test", "test_raw", "minival"):
        assert limited[name] == pytest.approx(expected[name], rel=1e-5)
    assert limited["micro_batch"] == 24  # of training, which had room
    assert sizes[-8:] == [256, 128, 64, 64, 64, 64, 64, 40]  # the 360 images of test


def test_settings_that_several_processes_cannot_share_are_refused():
    group = Group(CPU)
    group.world = 5
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 5 devices.* got 24"):
        ParallelTrainer(small_net(), small_config(), CPU, group)
    with pytest.raises(ValueError, match="sync_norm: torch synchronises batch norm on GPUs only"):
        ParallelTrainer(small_net(), small_config(sync_norm=True), CPU, Group(CPU))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "shared_run.py")


@pytest.mark.slow
def test_processes_that_share_a_run_follow_a_single_one(tmp_path):
    """Same data order, same draws, same loss; batch norm sees what it sees with two micro-batches in one process."""
    run_python(HERE / "shared_run.py", tmp_path / "one", 99)
    run_python(*TORCHRUN, tmp_path / "two", 99)
    one, two = (rows_of(tmp_path / name) for name in ("one", "two"))
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], abs=1e-4)
    record = read_record(tmp_path / "two")
    assert record["status"] == "finished" and record["devices"] == 2 and record["micro_batch"] == 12
    assert read_record(tmp_path / "one")["devices"] == 1


@pytest.mark.slow
def test_one_of_several_processes_out_of_memory_makes_the_next_start_go_on_with_less(tmp_path):
    command = (*TORCHRUN, tmp_path / "run", 6)
    run_python(*command, status=1)
    assert (tmp_path / "run" / MICRO_BATCH).read_text() == "6"
    assert read_record(tmp_path / "run") is None  # not failed: it can go on
    assert "continues after epoch 2" in run_python(*command)
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished" and record["micro_batch"] == 6 and record["config"]["batch_size"] == 24
    assert len(rows_of(tmp_path / "run")) == 4 and not (tmp_path / "run" / MICRO_BATCH).exists()


def test_accumulation_gives_the_whole_batchs_gradient(tiny_model, recipe):
    """In evaluation mode, where batch norm does not depend on the micro-batch."""
    x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 10
    gradients = []
    for accumulation in (1, 4):
        trainer = Trainer(tiny_model(), recipe(accumulation=accumulation), CPU)
        trainer.model.eval()
        gradients.append([trainer.backward(x, y), *(p.grad for p in trainer.model.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path, digits):
    with pytest.raises(ValueError, match=r"batch_size: 1000 exceeds the training set's 240 images"):
        train(small_net(), digits, small_config(batch_size=1000), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_said(tmp_path, digits):
    with pytest.raises(ValueError, match="finds no CUDA GPU; use 'cpu'"):
        train(small_net(), digits, small_config(), tmp_path, device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(tmp_path, tiny_model, recipe, precision):
    """On the CPU, where it is slow but the same code; fp16 goes through the gradient scaler."""
    digits = load_data("digits", size=16, train_per_class=40)
    config = recipe(epochs=4, optimizer="sgd", lr=0.03, precision=precision, clip_norm=20.0, **EASY)
    record = train(tiny_model(**config.model_options()), digits, config, tmp_path, device="cpu")
    assert record["status"] == "finished" and record["test"]["top1"] > 50


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_same_model_trains_on_a_gpu(tmp_path, tiny_model, recipe, precision):
    digits = load_data("digits", size=16, train_per_class=40)
    config = recipe(epochs=8, optimizer="sgd", lr=0.03, precision=precision, **EASY)
    record = train(tiny_model(**config.model_options()), digits, config, tmp_path, device="cuda")
    assert record["status"] == "finished" and record["test"]["top1"] > 60


def test_networks_are_scored_at_the_resolution_they_were_trained_at(tmp_path, digits):
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = small_net(), set()

        def forward(self, x):
            self.seen.add((self.training, *x.shape[2:]))
            assert x.is_meta or x.is_contiguous(memory_format=torch.channels_last)
            return self.inner(x)

        def __deepcopy__(self, memo):  # the EMA and the cost count see through the same eyes
            copied = object.__new__(type(self))
            nn.Module.__init__(copied)
            copied.inner, copied.seen = copy.deepcopy(self.inner, memo), self.seen
            return copied

    model = Watching()
    train(model, digits, small_config(resolution=20, epochs=1), tmp_path)
    assert model.seen == {(True, 20, 20), (False, 20, 20)}


def test_evaluate_counts_right_answers(digits):
    class Oracle(nn.Module):
        """Puts the label that `order` says on top; the first 100 answers are wrong but second best."""

        def __init__(self, labels):
            super().__init__()
            self.labels, self.at, self.unused = labels, 0, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            logits = torch.zeros(len(x), 10)
            for i in range(len(x)):
                label = self.labels[self.at]
                logits[i, label] = 1
                if self.at < 100:
                    logits[i, (label + 1) % 10] = 2
                self.at += 1
            return logits

    labels = digits.labels[digits.indices["test"]]
    scores = evaluate(Oracle(labels), digits, "test", 16, batch_size=50)
    assert scores["top1"] == pytest.approx(100 * 260 / 360) and scores["top5"] == 100
    assert not scores["correct"][:100].any() and scores["correct"][100:].all()
