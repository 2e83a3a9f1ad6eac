"""Kill training at random moments and at the worst ones, go on, and compare its end with that of a run left in peace.

    python tests/kill.py 200    # writes results/reliability/kills.json

A kill is SIGKILL, as by a machine that is switched off. Half of them come at a random time, half at a chosen place:
while a file is half written, before it is flushed, before and after a rename, before a deletion, between two steps,
between two batches of scoring. Each run is killed and started again until it comes to its end; then its weights,
history, answers on test and scores must be those of the run left in peace, bit for bit.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effnet_lib import EfficientNet, Scaling, TrainConfig, Trainer
from effnet_study.data.load import load_data
from effnet_study.files import CHECKPOINTS, WEIGHTS, hold, read_checkpoint, write_json
from effnet_study.machine import environment
from effnet_study.record import read_record
from effnet_study.training import train

PLACES = ("half a file", "flush", "rename", "after a rename", "deletion", "step", "scoring")
CONTEXT = multiprocessing.get_context("forkserver")  # children start with everything imported
CONTEXT.set_forkserver_preload(
    ["effnet_study.training", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]
)


def train_once(folder: str, place: str | None = None, nth: int = 0) -> None:
    """A child: train, or go on; be killed at the `nth` visit to `place`."""
    torch.set_num_threads(1)
    visits = 0

    def at(here: str) -> bool:
        nonlocal visits
        visits += here == place
        return here == place and visits == nth

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(here: str, function, after: str | None = None):
        def call(*arguments, **options):
            if at(here):
                die()
            result = function(*arguments, **options)
            if after is not None and at(after):
                die()
            return result

        return call

    def half(write, mode):
        def call(path, content, *arguments, **options):
            if at("half a file"):
                with open(path, mode) as file:
                    file.write(content[: len(content) // 2])
                    file.flush()
                    die()
            return write(path, content, *arguments, **options)

        return call

    Path.write_text, Path.write_bytes = half(Path.write_text, "w"), half(Path.write_bytes, "wb")
    os.fsync = watched("flush", os.fsync)
    Path.replace = watched("rename", Path.replace, after="after a rename")
    Path.unlink = watched("deletion", Path.unlink)
    Trainer.step = watched("step", Trainer.step)
    torch.Tensor.topk = watched("scoring", torch.Tensor.topk)
    data = load_data("digits", size=16, train_per_class=12, minival=0.3)
    settings = {"resolution": 16, "epochs": 4, "batch_size": 24, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
    config = TrainConfig(**settings, ema_decay=0.9, save_steps=2)
    torch.manual_seed(0)
    model = EfficientNet(Scaling(depth=0.3, width=0.25), 10, stem_stride=1)
    train(model, data, config, folder)


def start(folder: Path, *arguments) -> multiprocessing.Process:
    process = CONTEXT.Process(target=train_once, args=(str(folder), *arguments))
    process.start()
    return process


def hold_for_ever(folder: str, held) -> None:
    """A child: hold a run's folder, set the event `held`, and wait to be killed."""
    with hold(Path(folder)):
        held.set()
        signal.pause()


def end_of(folder: Path) -> dict:
    """All of a finished run that must not depend on kills."""
    record = read_record(folder)
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    times = ("seconds", "images_per_second")
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS, "test_correct.npy")}
    history = [{key: value for key, value in row.items() if key not in times} for row in rows]
    return {"history": history, **files, **{key: record[key] for key in ("status", "test", "test_raw", "minival")}}


def kill(places: Sequence[str | None], folder: Path, seed: int = 0) -> dict:
    """Kill training once at each of `places` (None: at a random time), one after the other, in runs in `folder`.

    Returns what was done; AssertionError if a run came to another end than the one left in peace."""
    rng, left, counted, runs, deepest, begin = random.Random(seed), list(places), Counter(), 0, 0, time.time()
    start(folder / "warm").join()
    started = time.time()
    process = start(folder / "peace")
    process.join()
    assert process.exitcode == 0
    length, peace, here = time.time() - started, end_of(folder / "peace"), 0
    run = folder / f"run_{runs}"
    while left:
        place = left[0]
        process = start(run, place, rng.randint(1, 12))
        if place is None:
            process.join(rng.uniform(0, length))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            counted[left.pop(0) or "any time"] += 1
            here += 1
            record = read_record(run)  # there or not, never half
            if record is None and any((run / name).exists() for name in CHECKPOINTS):
                assert read_checkpoint(run, lambda *_: None) is not None
            continue
        assert process.exitcode == 0
        assert end_of(run) == peace, f"{run} came to another end"
        runs, deepest, here = runs + 1, max(deepest, here), 0
        run = folder / f"run_{runs}"
    process = start(run)
    process.join()
    assert end_of(run) == peace, f"{run} came to another end"
    done = {"kills": sum(counted.values()), "runs": runs + 1, "most_kills_of_one_run": max(deepest, here)}
    return done | {"places": dict(sorted(counted.items())), "seconds": round(time.time() - begin)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    about = environment(torch.device("cpu"))
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    rng = random.Random(seed)
    places = [rng.choice(PLACES) if rng.random() < 0.5 else None for _ in range(int(sys.argv[1]))]
    with tempfile.TemporaryDirectory() as folder:
        done = kill(places, Path(folder), seed)
    done |= {"all_ends_equal": True} | about
    target = Path(__file__).resolve().parents[1] / "results" / "reliability" / "kills.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, done)
    print(json.dumps(done, indent=2))
