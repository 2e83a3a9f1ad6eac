"""Training that survives: `train` runs effnet_lib's loop with a lock, checkpoints, a deadline, and a record at its end.

The loop itself is `effnet_lib.fit`. Everything around it is here: a run continues after a kill, stops in time, shows
its progress, goes on with smaller micro-batches when memory runs out, and ends as diverged when its loss is not finite.
"""

import contextlib
import copy
import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from effnet_lib import Event, TrainConfig, amp_dtype, count_cost, evaluate, fit, learning_rate
from effnet_study.files import (
    HISTORY,
    PREDICTIONS,
    PROGRESS,
    WEIGHTS,
    RunMismatch,
    hold,
    read_checkpoint,
    remove_checkpoints,
    replace_file,
    write_checkpoint,
    write_history,
    write_progress,
)
from effnet_study.machine import choose_device, machine_failed, out_of_memory, peak_memory
from effnet_study.parallel import MICRO_BATCH, Group, join
from effnet_study.record import assemble, check_identity, identity_of, read_record, write_record
from effnet_study.stop import Interrupted, ProcessKilled, Stop
from effnet_study.tensorboard import event_writer
from effnet_study.trainers import count_steps, prepare_trainer


def train(
    model: nn.Module,
    data,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    about: Mapping | None = None,
    device: str | torch.device | None = None,
    deadline: float | None = None,
    tensorboard: bool | None = None,
) -> dict:
    """Train, score test after the last epoch, and return the run's record, which is also written to `run_dir/run.json`.

    data: as in `effnet_lib.fit`; with `to(device)`, `counts` of train, minival and test, `describe()` (a dict with a
        "fingerprint"), and `eval_batches(split, resolution, batch_size)`.
    about: entries of the record, such as profile and method.
    deadline: Unix time before which training stops with a checkpoint (default: $EFFNET_DEADLINE).
    tensorboard: write event files to run_dir/tensorboard (default: whether $EFFNET_TENSORBOARD is set).

    `run_dir` also gets history.jsonl (a line per epoch; minival is scored with the EMA weights), test_correct.npy (per
    image), test_predictions.npz (label, predicted, confidence), weights.safetensors (EMA), and until the end the last
    two checkpoints. Calling again continues an interrupted run exactly, and returns the record of an ended one.

    In each of several processes of torch's elastic launcher this trains one network on all their devices; then
    `data.train_batches` takes shard=(rank, processes) too.

    Raises Interrupted after a stop in time, SIGTERM or SIGINT; ValueError if run_dir holds another run, or a batch
    exceeds the training set; RunLocked if another process trains the run; OSError if a file cannot be read or written;
    ProcessKilled if a GPU fails; ModuleNotFoundError without TensorBoard. All of these leave a run that can be
    continued. Any other error ends it as "failed"; of several processes, their launcher does this.
    """
    run_dir, device, about = Path(run_dir), choose_device(device), about or {}
    count_steps(data, config)  # raises ValueError before anything is written
    dataset, cost = data.describe(), count_cost(model, config.resolution)
    identity = identity_of(config, cost, dataset)
    run_dir.mkdir(parents=True, exist_ok=True)
    device, group = join(device)
    with hold(run_dir) if group.rank == 0 else contextlib.nullcontext():
        record = read_record(run_dir)
        if record is not None:
            check_identity(run_dir / "run.json", record, identity)
            _tidy(run_dir)
            return record
        known = (about, config, cost, dataset, device)  # of the record, whatever the outcome
        label = f"{about.get('method', 'run'):<10} seed {config.seed}"
        wanted = os.environ.get("EFFNET_TENSORBOARD") if tensorboard is None else tensorboard
        events = event_writer(run_dir) if wanted and group.rank == 0 else contextlib.nullcontext(lambda row: None)
        try:
            with Stop(deadline) as stop, events as log:
                outcome = Training(model, data, config, run_dir, device, group, identity, label, stop, log).run()
        # The disk, another kind of device, no TensorBoard: the run itself has not failed
        except (OSError, RunMismatch, ModuleNotFoundError):
            raise
        except Exception as error:
            if machine_failed(error):
                again = "in a new process (a notebook: restart its kernel) it goes on from its checkpoint"
                raise ProcessKilled(f"{type(error).__name__}: {error}; {again}") from error
            if group.world == 1:  # with several processes, the launcher reports the failure
                write_record(run_dir, assemble(*known, {"error": f"{type(error).__name__}: {error}"}))
            raise
        if group.rank == 0:
            write_record(run_dir, assemble(*known, outcome))
            _tidy(run_dir)
            if outcome["status"] == "finished":
                scores = f"top-1 {outcome['test']['top1']:.2f} % (raw weights {outcome['test_raw']['top1']:.2f} %)"
                print(f"{label}  {about.get('scored', 'test')} {scores}", flush=True)
        if group.world > 1:
            dist.barrier()
        return read_record(run_dir)


@dataclass
class Training:
    """One attempt at a run, from its last checkpoint on. `fit` and `evaluate` take their batches through it."""

    model: nn.Module
    data: object
    config: TrainConfig
    run_dir: Path
    device: torch.device
    group: Group
    identity: Mapping
    label: str
    stop: Stop
    log: Callable[[Mapping], None]  # is given each row of the history

    def __post_init__(self) -> None:
        self.data, self.counts = self.data.to(self.device), self.data.counts
        self.steps = count_steps(self.data, self.config)
        self.trainer = prepare_trainer(self.model, self.config, self.device, self.group)
        self.dtype = str(amp_dtype(self.config.precision, self.device)).removeprefix("torch.")
        # step, loss (summed) and seconds are those of the epoch that is under way
        self.progress = {"history": [], "step": 0, "loss": 0.0, "seconds": 0.0}
        self.progress |= {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.progress |= {"micro_batch": self.trainer.micro_batch, "dtype": self.dtype}
        self.initial = copy.deepcopy(self.state())
        self.to_save = 1.0  # seconds that a checkpoint takes

    @property
    def history(self) -> list[dict]:
        return self.progress["history"]

    # ---- The loop

    def run(self) -> dict:
        """Train to the end and return the outcome. If memory runs out, go on from the last checkpoint with half the
        micro-batch; several processes write the new size to a file and fail, to start again."""
        self.load()
        for row in self.history:
            self.log(row)
        while True:
            try:
                return self.loop()
            except RuntimeError as error:
                if not out_of_memory(error) or self.trainer.micro_batch <= 2:
                    raise
                smaller = math.ceil(self.trainer.micro_batch / 2)
                print(f"out of memory: going on with micro-batches of {smaller}", flush=True)
                if self.group.world > 1:
                    replace_file(self.run_dir / MICRO_BATCH, str(smaller))
                    raise
            # Outside the handler, whose traceback would keep the failed attempt's tensors alive
            self.trainer.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self.trainer.micro_batch = smaller
            self.load()

    def loop(self) -> dict:
        self.begin_epoch()
        for event in fit(self.trainer, self, len(self.history), self.progress["step"]):
            if event.loss is None:
                self.end_epoch()
                self.begin_epoch()
            elif (bad := self.after_step(event)) >= 0:
                return self.diverged(bad)
        return self.finish() if self.group.rank == 0 else {}

    def begin_epoch(self) -> None:
        self.saved_at, self.shown_at = time.monotonic(), -math.inf
        self.begin = time.perf_counter() - self.progress["seconds"]
        self.loss = torch.full((), self.progress["loss"], device=self.device)
        self.bad = torch.full((), -1, device=self.device)  # the first step whose loss or gradient was not finite
        quiet = self.group.rank > 0 or not sys.stdout.isatty() or len(self.history) == self.config.epochs
        text, start = f"{self.label}  epoch {len(self.history) + 1}", self.progress["step"]
        self.bar = tqdm(desc=text, total=self.steps, leave=False, initial=start, disable=quiet)

    def after_step(self, event: Event) -> int:
        """Save, show or stop, if it is time for it. Return the step in which training diverged, else -1."""
        self.bar.update()
        self.loss += event.loss
        scaler, number = self.trainer.scaler, event.epoch * self.steps + event.step - 1
        # A gradient scaler skips the steps that overflow: there only the loss counts
        finite = torch.isfinite(event.loss if scaler.is_enabled() else event.loss + self.trainer.norm)
        self.bad = torch.where(~finite & (self.bad < 0), number, self.bad)
        now = time.monotonic()
        if self.group.rank == 0 and now - self.shown_at > 2:
            self.show(event.step, time.perf_counter() - self.begin)
        last = event.step == self.steps
        by_steps = self.config.save_steps > 0 and event.step % self.config.save_steps == 0
        if self.group.world > 1 and event.step % 10 and not by_steps and not last:
            return -1  # what follows needs all processes, so it is done every ten steps
        stopping = self.group.any(self.stop.due(self.to_save))
        saving = self.group.any(now - self.saved_at > self.config.save_seconds or by_steps)
        if not (stopping or saving or event.step % 50 == 0 or last):
            return -1
        bad = int(self.group.largest(self.bad))  # this waits for the device, so it is not done at every step
        seconds = time.perf_counter() - self.begin
        if bad < 0 and scaler.is_enabled() and scaler.get_scale() < 1e-3:
            bad = number  # a scale this small means that no step is taken any more
        if bad < 0:
            self.progress |= {"step": event.step, "loss": self.group.mean(self.loss), "seconds": seconds}
            if stopping:
                self.pause()
            if saving and not last:
                self.save()
        return bad

    def end_epoch(self) -> None:
        self.bar.close()
        row = {"epoch": len(self.history) + 1, "lr": self.trainer.optimizer.param_groups[0]["lr"]}
        row["train_loss"] = self.progress["loss"] / self.steps
        if self.group.rank == 0:  # the others wait for it at their next step
            minival = self.score(self.trainer.ema, "minival")
            row |= {f"minival_{name}": minival[name] for name in ("top1", "top5", "loss")}
        row["images_per_second"] = self.steps * self.config.batch_size / self.progress["seconds"]
        row["seconds"] = time.perf_counter() - self.begin
        self.history.append(row)
        self.progress |= {"step": 0, "loss": 0.0, "seconds": 0.0}
        if self.group.rank == 0:
            write_history(self.run_dir, self.history)
            self.log(row)
            print(_epoch_line(self.label, self.history, self.config.epochs), flush=True)
        self.save()

    def finish(self) -> dict:
        """Score test once, write predictions and weights, and return the outcome."""
        begin = time.perf_counter()
        test = self.score(self.trainer.ema, "test")
        raw = self.score(copy.deepcopy(self.trainer.model), "test")  # a copy, so without the training's compiled code
        _write_arrays(self.run_dir / "test_correct.npy", np.save, test.pop("correct"))
        kinds = {"label": np.uint16, "predicted": np.uint16, "confidence": np.float16}
        kept = {name: test.pop(name).astype(kind) for name, kind in kinds.items()}
        _write_arrays(self.run_dir / PREDICTIONS, np.savez_compressed, **kept)
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.trainer.ema.state_dict().items()}
        replace_file(self.run_dir / WEIGHTS, weights := safetensors.torch.save(weights))
        (self.run_dir / MICRO_BATCH).unlink(missing_ok=True)
        outcome = {"status": "finished", "test": test, "test_raw": {name: raw[name] for name in test}}
        outcome["weights_sha256"] = hashlib.sha256(weights).hexdigest()
        return outcome | self.closing(time.perf_counter() - begin)

    def diverged(self, bad: int) -> dict:
        lr = learning_rate(self.config, (bad + 0.5) / (self.config.epochs * self.steps))
        where = {"epoch": bad // self.steps + 1, "step": bad % self.steps + 1, "lr": lr}
        print("{}  diverged in epoch {epoch}, step {step}, at LR {lr:.3g}".format(self.label, **where), flush=True)
        return {"status": "diverged", "diverged": where} | self.closing()

    def closing(self, test_seconds: float = 0.0) -> dict:
        """Return the part of the outcome about minival, time, speed and memory."""
        row = self.history[-1] if self.history else {}  # empty if it diverged in the first epoch
        speeds = [row["images_per_second"] for row in self.history]
        return {
            "minival": {name: row.get(f"minival_{name}") for name in ("top1", "top5", "loss")},
            "seconds": sum(row["seconds"] for row in self.history) + test_seconds,
            "images_per_second": float(np.median(speeds)) if speeds else None,
            "peak_memory_bytes": peak_memory(self.device),
            "micro_batch": self.trainer.micro_batch,
            "dtype": self.dtype,
            "compiled": self.trainer.mode == "blocks",
            "captured": getattr(self.trainer, "replay", None) is not None,
            "devices": self.group.world,
            "started": self.progress["started"],
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    # ---- Checkpoints

    def state(self) -> dict:
        return self.trainer.state_dict() | {"progress": self.progress, "identity": self.identity}

    def save(self) -> None:
        begin = time.monotonic()
        self.progress["micro_batch"] = self.trainer.micro_batch
        if self.group.rank == 0:
            write_checkpoint(self.run_dir, self.state())
        self.saved_at, self.saved_step = time.monotonic(), self.progress["step"]
        self.to_save = self.saved_at - begin

    def load(self) -> None:
        """Go back to the last checkpoint, or to the beginning if there is none."""
        found = read_checkpoint(
            self.run_dir, lambda path, state: check_identity(path, state["identity"], self.identity)
        )
        state = found or copy.deepcopy(self.initial)
        if (begun := state["progress"].get("dtype", self.dtype)) != self.dtype:
            raise RunMismatch(
                f"{self.run_dir} was started in {begun}, but would continue in {self.dtype} here; continue where it "
                "was started, or delete it to start again"
            )
        self.trainer.load_state_dict(state)
        self.progress = self.progress | state["progress"]
        left = self.run_dir / MICRO_BATCH  # by several processes, one of which ran out of memory
        sizes = [int(left.read_text())] if left.exists() else []
        self.trainer.micro_batch = min(self.trainer.micro_batch, self.progress["micro_batch"], *sizes)
        self.saved_step = step = self.progress["step"]
        if found is not None:
            epochs = len(self.history)
            where = f"in epoch {epochs + 1} after step {step}" if step else f"after epoch {epochs}"
            print(f"{self.label}  continues {where}", flush=True)
        elif self.group.rank == 0:  # files of an attempt that was set aside
            for name in (HISTORY, PROGRESS):
                (self.run_dir / name).unlink(missing_ok=True)

    def pause(self) -> None:
        """Save and raise Interrupted."""
        self.save()
        if self.group.rank == 0 and self.progress["step"]:
            self.show(self.progress["step"], self.progress["seconds"])
        where = f"epoch {len(self.history) + 1} after step {self.progress['step']} of {self.steps}"
        if len(self.history) == self.config.epochs:
            where = "the scoring of test, which will start again"
        raise Interrupted(f"{self.label}  stopped by {self.stop.reason} in {where}")

    def show(self, step: int, seconds: float) -> None:
        """Write the progress. The loss is the one that was read last: reading it again would wait for the device."""
        self.shown_at, known = time.monotonic(), self.progress["step"]
        loss = self.progress["loss"] / known if known else None
        at = {"epoch": len(self.history) + 1, "step": step, "steps": self.steps, "seconds": seconds}
        speed = step * self.config.batch_size / seconds
        write_progress(self.run_dir, **at, images_per_second=speed, loss=loss, saved=self.saved_step)

    # ---- Data and scores

    def train_batches(self, config: TrainConfig, epoch: int, start: int) -> Iterator:
        """Yield this process's share of the batches."""
        shard = {} if self.group.world == 1 else {"shard": (self.group.rank, self.group.world)}
        return self.data.train_batches(config, epoch, start, **shard)

    def eval_batches(self, split: str, resolution: int, batch_size: int) -> Iterator:
        """Yield the batches of a split. A run with one process can stop between two of them."""
        for batch in self.data.eval_batches(split, resolution, batch_size):
            yield batch
            if self.group.world == 1 and self.stop.due(self.to_save):
                self.pause()

    def score(self, model: nn.Module, split: str, batch_size: int = 256) -> dict:
        """Score a split; if memory runs out, with half the batch."""
        options = {"batch_size": batch_size, "precision": self.config.precision}
        try:
            return evaluate(model, self, split, self.config.resolution, **options)
        except RuntimeError as error:
            if not out_of_memory(error) or batch_size == 1:
                raise
        return self.score(model, split, batch_size // 2)  # outside the handler, which keeps tensors alive


def _tidy(run_dir: Path) -> None:
    """Remove the progress file of an ended run, and its checkpoints if it has its final weights."""
    if (run_dir / PROGRESS).exists():  # a read-only file system refuses also what is not there
        (run_dir / PROGRESS).unlink(missing_ok=True)
    if (run_dir / WEIGHTS).exists():
        remove_checkpoints(run_dir)


def _write_arrays(path: Path, save: Callable, *arrays: np.ndarray, **named: np.ndarray) -> None:
    body = io.BytesIO()
    save(body, *arrays, **named)
    replace_file(path, body.getbuffer())


def _epoch_line(label: str, history: list[dict], epochs: int) -> str:
    last = history[-1]
    left = timedelta(seconds=int((epochs - len(history)) * np.median([row["seconds"] for row in history])))
    return (
        f"{label}  epoch {last['epoch']:>3}/{epochs}  loss {last['train_loss']:.3f}  "
        f"minival top-1 {last['minival_top1']:5.2f} %  {last['images_per_second']:,.0f} images/s  left {left}"
    )
