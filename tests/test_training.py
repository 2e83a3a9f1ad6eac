"""The trainer: recipe, schedule, optimizer, EMA, resuming, faults, and one test per known mistake."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from conftest import Disturbed
from torch import nn

from effnet_data import load_data
from effnet_lib import (
    TABLE7,
    EfficientNet,
    Killed,
    RMSpropTF,
    TrainConfig,
    Trainer,
    can_compile,
    ema_pairs,
    evaluate,
    learning_rate,
    load_trained,
    make_optimizer,
    read_record,
    round_resolution,
    step_seed,
    train,
    update_ema,
)

TIMES = ("seconds", "images_per_second")
EASY = {"flip": False, "crop_area": 0.8, "dropout": 0.0, "drop_path": 0.0}  # digits in a few dozen steps


def untimed(run_dir):
    rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(run_dir):
    return safetensors.torch.load_file(run_dir / "weights.safetensors")


# ---- the recipe


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("epochs", [1, 35, 350])
def test_the_learning_rate_peaks_once_and_ends_near_zero(schedule, epochs):
    config = TrainConfig(schedule=schedule, epochs=epochs, lr=0.1, warmup=0.1)
    steps = 400 * epochs
    lr = [learning_rate(config, (step + 0.5) / steps) for step in range(steps)]
    assert max(lr) == pytest.approx(0.1, rel=0.01)
    assert lr[0] < 0.01 * 0.1 * 5 and lr[-1] < 0.01 * 0.1
    peak = int(np.argmax(lr))
    assert np.all(np.diff(lr[:peak]) > 0) and np.all(np.diff(lr[peak + 1 :]) < 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epocs": 3}, "unknown training setting 'epocs'.*Did you mean 'epochs'"),
        ({"lr": "1e-3"}, "lr: expected float, got '1e-3'; in YAML write 1.0e-3"),
        ({"lr": 0.0}, "lr: .*above 0, got 0.0"),
        ({"lr": float("nan")}, "lr"),
        ({"flip": "false"}, "flip: expected bool, got 'false'"),
        ({"epochs": True}, "epochs: expected int"),
        ({"epochs": 0}, "epochs: .*at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size: expected int"),
        ({"dropout": 1.0}, "dropout"),
        ({"compile": True}, "compile: expected str, got True"),
        ({"compile": "allways"}, "unknown compile 'allways'.*Did you mean 'always'"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'.*Did you mean 'sgd'"),
        ({"batch_size": 4, "accumulation": 5}, "accumulation: expected at most the batch size 4"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(changes)


def test_a_config_survives_json():
    config = TrainConfig(lr=0.1, epochs=3)
    assert TrainConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


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
    model, config = tiny_model(), recipe(ema_decay=0.9)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        model.classifier.weight.add_(1)
        model.stem.norm.running_var.add_(1)
        model.stem.norm.num_batches_tracked.add_(7)
    start = ema.classifier.weight.clone()
    pairs = ema_pairs(ema, model)
    update_ema(pairs, config, n=10_000)
    torch.testing.assert_close(ema.classifier.weight, start + 0.1)
    torch.testing.assert_close(ema.stem.norm.running_var, torch.full_like(ema.stem.norm.running_var, 1.1))
    assert ema.stem.norm.num_batches_tracked == 7
    update_ema(pairs, config, n=0)  # warm-up: at first it nearly copies
    torch.testing.assert_close(ema.classifier.weight, start + 1 - 0.9 * 0.1)


def test_step_seeds_differ_by_seed_epoch_and_step():
    seeds = {step_seed(s, e, i) for s in range(4) for e in range(4) for i in range(4)}
    assert len(seeds) == 64


# ---- a run


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_a_run_learns_and_leaves_its_record(tmp_path, tiny_model, recipe, optimizer):
    digits = load_data("digits", size=16, train_per_class=40)
    config = recipe(epochs=8, optimizer=optimizer, lr={"rmsprop": 0.01, "sgd": 0.03}[optimizer], **EASY)
    model = tiny_model(**config.model_options())
    record = train(model, digits, config, tmp_path, about={"method": "tiny", "profile": "test"})
    assert record == read_record(tmp_path) and record["status"] == "finished"
    assert 60 < record["test"]["top1"] <= record["test"]["top5"]
    assert record["method"] == "tiny" and record["config"] == dataclasses.asdict(config)
    assert record["cost"]["params"] == sum(p.numel() for p in tiny_model().parameters())
    assert record["dataset"]["counts"] == digits.counts and record["dataset"]["fingerprint"] == digits.fingerprint
    assert record["versions"]["torch"] == torch.__version__ and record["device"]["type"] == "cpu"
    assert record["started"] <= record["ended"] and record["peak_memory_bytes"] > 1e8
    history = untimed(tmp_path)
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["lr"] < 0.01 * config.lr
    correct = np.load(tmp_path / "test_correct.npy")
    assert correct.dtype == bool and 100 * correct.mean() == pytest.approx(record["test"]["top1"])
    start, end = tiny_model().state_dict(), weights(tmp_path)
    assert not torch.equal(start["classifier.weight"], end["classifier.weight"])
    assert not torch.equal(start["stem.norm.running_mean"], end["stem.norm.running_mean"])


def test_a_trained_network_can_be_loaded_and_scores_the_same(tmp_path, digits, tiny_model, recipe):
    record = train(tiny_model(), digits, recipe(), tmp_path)
    model = load_trained(tmp_path, tiny_model(seed=9))
    assert evaluate(model, digits, "test", 16)["top1"] == pytest.approx(record["test"]["top1"])
    with pytest.raises(FileNotFoundError, match="not committed"):
        load_trained(tmp_path / "nowhere", model)


def test_the_same_seed_repeats_and_another_differs(tmp_path, digits, tiny_model, recipe):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_model(seed), digits, recipe(seed=seed), tmp_path / name)
    a, b, c = (untimed(tmp_path / name) for name in "abc")
    assert a == b != c
    assert all(torch.equal(x, y) for x, y in zip(*(weights(tmp_path / name).values() for name in "ab"), strict=True))


class Kill(BaseException):
    """Not an Exception: the trainer must not mistake it for a failure of the run."""


def killing(data, epoch, error=Kill):
    """A data set that raises in the middle of one epoch."""

    def fail(images):
        raise error("in the middle")

    return Disturbed(data, fail, epoch, step=1)


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd"])
def test_a_killed_run_continues_to_the_same_end(tmp_path, digits, tiny_model, recipe, optimizer):
    config = recipe(optimizer=optimizer, epochs=4)
    train(tiny_model(), digits, config, tmp_path / "whole")
    for epoch in (0, 2, 3):
        with pytest.raises(Kill):
            train(tiny_model(), killing(digits, epoch), config, tmp_path / "killed")
        assert read_record(tmp_path / "killed") is None
    train(tiny_model(seed=5), digits, config, tmp_path / "killed")  # the weights come from the checkpoint
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert np.array_equal(*(np.load(tmp_path / name / "test_correct.npy") for name in ("whole", "killed")))


def test_a_finished_run_is_not_repeated(tmp_path, digits, tiny_model, recipe):
    first = train(tiny_model(), digits, recipe(), tmp_path)
    assert train(tiny_model(), killing(digits, 0), recipe(), tmp_path) == first


def test_how_a_run_is_executed_does_not_make_it_another(tmp_path, digits, tiny_model, recipe):
    first = train(tiny_model(), digits, recipe(), tmp_path)
    assert train(tiny_model(), killing(digits, 0), recipe(checkpointing=True, compile="never"), tmp_path) == first


def test_a_folder_of_another_run_is_refused(tmp_path, digits, tiny_model, recipe):
    train(tiny_model(), digits, recipe(), tmp_path)
    with pytest.raises(ValueError, match=r"config lr = 0\.01, now 0\.02 is asked for; delete"):
        train(tiny_model(), digits, recipe(lr=0.02), tmp_path)
    with pytest.raises(ValueError, match="config seed"):
        train(tiny_model(), digits, recipe(seed=1), tmp_path)
    with pytest.raises(ValueError, match="cost params"):
        train(tiny_model(num_classes=11), digits, recipe(), tmp_path)
    other = dataclasses.replace(digits, fingerprint="0")
    with pytest.raises(ValueError, match="dataset fingerprint"):
        train(tiny_model(), other, recipe(), tmp_path)


def test_a_checkpoint_of_another_config_is_refused(tmp_path, digits, tiny_model, recipe):
    with pytest.raises(Kill):
        train(tiny_model(), killing(digits, 1), recipe(), tmp_path)
    with pytest.raises(ValueError, match="checkpoint.pt was made with config lr"):
        train(tiny_model(), digits, recipe(lr=0.02), tmp_path)


def test_a_torn_checkpoint_is_told_and_the_run_starts_anew(tmp_path, digits, tiny_model, recipe, capsys):
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    with pytest.raises(Kill):
        train(tiny_model(), killing(digits, 2), recipe(), tmp_path / "torn")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = tmp_path / "torn" / name
        path.write_bytes(path.read_bytes()[:-1000])
    train(tiny_model(), digits, recipe(), tmp_path / "torn")
    said = capsys.readouterr().out
    assert said.count("is not used: unreadable") == 2 and "torn continues" not in said
    assert untimed(tmp_path / "torn") == untimed(tmp_path / "whole")


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 1, "status"')
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99, expected 1"):
        read_record(tmp_path)


def test_a_failing_run_is_recorded_and_not_run_again(tmp_path, digits, tiny_model, recipe):
    with pytest.raises(ArithmeticError, match="in the middle"):
        train(tiny_model(), killing(digits, 1, ArithmeticError), recipe(), tmp_path)
    record = train(tiny_model(), digits, recipe(), tmp_path)
    assert record["status"] == "failed" and "in the middle" in record["error"]


def test_divergence_stops_the_run_and_says_where(tmp_path, digits, tiny_model, recipe):
    model = tiny_model()
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    record = train(model, digits, recipe(), tmp_path)
    assert record["status"] == "diverged"
    assert record["diverged"]["epoch"] == 1 and record["diverged"]["lr"] > 0
    assert record == read_record(tmp_path)


def test_two_processes_cannot_hold_one_run(tmp_path, digits, tiny_model, recipe):
    with filelock.FileLock(tmp_path / ".lock"):
        errors = []

        def second():
            try:
                train(tiny_model(), digits, recipe(), tmp_path)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert errors and "held by another process" in errors[0]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tmp_path, digits, tiny_model, recipe, capsys):
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model(dropout=0.0, drop_path=0.0)

        def forward(self, x):
            if self.training and len(x) > 7:
                raise torch.OutOfMemoryError("simulated")
            return self.inner(x)

    record = train(Limited(), digits, recipe(), tmp_path)
    assert record["status"] == "finished" and record["micro_batch"] == 6 and record["config"]["batch_size"] == 24
    assert "out of memory" in capsys.readouterr().out
    assert record["dtype"] == "float32" and record["compiled"] is False


def test_an_attempt_that_ran_out_of_memory_leaves_no_trace_in_batch_norm(tiny_model, recipe):
    class Full(nn.Linear):
        def forward(self, x):
            if len(x) > 12:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return super().forward(x)

    x, y, ends = torch.randn(24, 3, 16, 16), torch.arange(24) % 10, []
    for accumulation in (1, 2):  # the first has to find out
        model = tiny_model()
        full = Full(model.classifier.in_features, 10)
        full.load_state_dict(model.classifier.state_dict())
        model.classifier = full
        trainer = Trainer(model, recipe(accumulation=accumulation), torch.device("cpu"))
        trainer.backward(x, y)
        assert trainer.micro_batch == 12
        ends.append([*model.buffers(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *ends))


def test_a_machine_that_gives_way_leaves_the_run_to_be_continued(tmp_path, digits, tiny_model, recipe):
    def give_way(images):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    config = recipe(save_steps=1)
    with pytest.raises(Killed, match="ECC error.*run again to go on"):
        train(tiny_model(), Disturbed(digits, give_way), config, tmp_path)
    assert read_record(tmp_path) is None and (tmp_path / "checkpoint.pt").exists()
    assert train(tiny_model(), digits, config, tmp_path)["status"] == "finished"


def test_a_run_goes_on_only_in_the_precision_it_was_begun_in(tmp_path, digits, tiny_model, recipe, monkeypatch):
    def leave(images):
        raise OSError("the power is gone")

    with pytest.raises(OSError):
        train(tiny_model(), Disturbed(digits, leave), recipe(), tmp_path)
    with monkeypatch.context() as other_machine:
        other_machine.setattr("effnet_lib.amp_dtype", lambda precision, device: torch.bfloat16)
        with pytest.raises(ValueError, match="was begun in float32 and would go on in bfloat16 here"):
            train(tiny_model(), digits, recipe(), tmp_path)
    assert read_record(tmp_path) is None
    assert train(tiny_model(), digits, recipe(), tmp_path)["status"] == "finished"


def test_without_a_c_compiler_that_is_said_and_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert can_compile() is False and "gcc, python3-dev" in capsys.readouterr().out


def run_python(*words, status=0):
    """What a process of its own prints. It has one thread: with more, sums are taken in another order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_limit_of_memory_halves_the_micro_batch(tmp_path):
    program = tmp_path / "limited.py"
    program.write_text("""
import re, resource
from pathlib import Path
import torch
from effnet_lib import EfficientNet, TrainConfig, Trainer

torch.set_num_threads(1)
trainer = Trainer(EfficientNet(num_classes=10), TrainConfig(64, batch_size=128), torch.device("cpu"))
x, y = torch.randn(128, 3, 64, 64), torch.arange(128) % 10
trainer.step(x[:4], y[:4], 0, 0, 10)  # what torch takes once
size = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + 700 * 2**20, resource.RLIM_INFINITY))
print(trainer.step(x, y, 0, 1, 10).isfinite().item(), trainer.micro_batch)
""")
    *said, last = run_python(program).splitlines()
    finite, micro_batch = last.split()
    assert finite == "True" and 1 <= int(micro_batch) <= 64
    assert said[0] == "out of memory: going on with micro-batches of 64"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", TABLE7)
def test_every_row_of_table_7_trains_within_24_gb_of_a_gpu(method):
    total, limit = torch.cuda.get_device_properties(0).total_memory, 24e9
    if total < limit:
        pytest.skip("a GPU of less than 24 GB")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        px = round_resolution(TABLE7[method].resolution)
        trainer = Trainer(EfficientNet(TABLE7[method]), TrainConfig(px, batch_size=256), torch.device("cuda"))
        images, labels = torch.randn(256, 3, px, px, device="cuda"), torch.arange(256, device="cuda")
        assert trainer.step(images, labels, 0, 0, 10).isfinite()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_scoring_out_of_memory_starts_again_with_half_the_batch(digits, tiny_model):
    class Limited(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, x):
            if len(x) > 50:
                raise torch.OutOfMemoryError("simulated")
            return self.inner(x)

    limited = Limited()
    whole = evaluate(limited.inner, digits, "test", 16)
    assert evaluate(limited, digits, "test", 16)["loss"] == pytest.approx(whole["loss"])


def test_batch_norm_over_all_devices_needs_gpus(tiny_model, recipe):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="sync_norm: torch synchronises batch norm on GPUs only"):
            Trainer(tiny_model(), recipe(sync_norm=True), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


SHARED = """
import sys
import torch
from effnet_data import load_data
from effnet_lib import EfficientNet, Scaling, TrainConfig, train

class Limited(torch.nn.Module):
    # The second process alone has no room for more than so many images at a time, once it has taken ten steps
    def __init__(self, inner, limit):
        super().__init__()
        self.inner, self.limit, self.calls = inner, limit, 0

    def forward(self, x):
        self.calls += x.device.type == "cpu" and self.training
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.training and self.calls > 10 and rank == 1 and len(x) > self.limit:
            raise torch.OutOfMemoryError("simulated")
        return self.inner(x)

torch.manual_seed(0)
config = TrainConfig(16, epochs=4, batch_size=24, accumulation=2, optimizer="sgd", lr=0.02)
inner = EfficientNet(Scaling(depth=0.3, width=0.25), 10, stem_stride=1, **config.model_options())
model = Limited(inner, int(sys.argv[2]))
train(model, load_data("digits", size=16, train_per_class=12), config, sys.argv[1], device="cpu")
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_processes_that_share_a_run_follow_a_single_one(tmp_path):
    """Same data order, same draws, same loss; batch norm sees what it sees with two micro-batches in one process."""
    (tmp_path / "share.py").write_text(SHARED)
    run_python(tmp_path / "share.py", tmp_path / "one", 99)
    run_python(*TORCHRUN, tmp_path / "share.py", tmp_path / "two", 99)
    one, two = (untimed(tmp_path / name) for name in ("one", "two"))
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], abs=1e-4)
    record = read_record(tmp_path / "two")
    assert record["status"] == "finished" and record["devices"] == 2 and record["micro_batch"] == 12
    assert read_record(tmp_path / "one")["devices"] == 1


def test_one_of_several_processes_out_of_memory_makes_the_next_start_go_on_with_less(tmp_path):
    (tmp_path / "share.py").write_text(SHARED)
    command = (*TORCHRUN, tmp_path / "share.py", tmp_path / "run", 6)
    assert "going on with micro-batches of 6" in run_python(*command, status=1)
    assert read_record(tmp_path / "run") is None  # not failed: it can go on
    assert "continues after epoch 2" in run_python(*command)
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished" and record["micro_batch"] == 6 and record["config"]["batch_size"] == 24
    assert len(untimed(tmp_path / "run")) == 4 and not (tmp_path / "run" / "micro_batch").exists()


def test_accumulation_gives_the_whole_batchs_gradient(tiny_model, recipe):
    """In evaluation mode, where batch norm does not depend on the micro-batch."""
    x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 10
    gradients = []
    for accumulation in (1, 4):
        trainer = Trainer(tiny_model(), recipe(accumulation=accumulation), torch.device("cpu"))
        trainer.model.eval()
        gradients.append([trainer.backward(x, y), *(p.grad for p in trainer.model.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path, digits, tiny_model, recipe):
    with pytest.raises(ValueError, match=r"batch_size: 1000 exceeds the training set's 120 images"):
        train(tiny_model(), digits, recipe(batch_size=1000), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_said(tmp_path, digits, tiny_model, recipe):
    with pytest.raises(ValueError, match="finds no CUDA GPU; use 'cpu'"):
        train(tiny_model(), digits, recipe(), tmp_path, device="cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns(tmp_path, tiny_model, recipe, precision):
    """On the CPU, where it is slow but the same code; fp16 goes through the gradient scaler."""
    digits = load_data("digits", size=16, train_per_class=40)
    config = recipe(epochs=4, optimizer="sgd", lr=0.03, precision=precision, clip_norm=20.0, **EASY)
    record = train(tiny_model(**config.model_options()), digits, config, tmp_path, device="cpu")
    assert record["status"] == "finished" and record["test"]["top1"] > 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_same_model_trains_on_a_gpu(tmp_path, tiny_model, recipe, precision):
    digits = load_data("digits", size=16, train_per_class=40)
    config = recipe(epochs=8, optimizer="sgd", lr=0.03, precision=precision, **EASY)
    record = train(tiny_model(**config.model_options()), digits, config, tmp_path, device="cuda")
    assert record["status"] == "finished" and record["test"]["top1"] > 60


def test_networks_are_scored_at_the_resolution_they_were_trained_at(tmp_path, digits, tiny_model, recipe):
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = tiny_model(), set()

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
    train(model, digits, recipe(resolution=20, epochs=1), tmp_path)
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
