"""The library: EfficientNet (all of `effnet_model`, passed on) and its trainer. Import everything from here.

The network, its scaling rules and its cost are in effnet_model.py; this file trains it, in three sections:

1. Recipe     settings, learning rate, optimizer, moving average
2. Training   evaluation, a training step, the resumable loop, on one device or several
3. Records    what a run's record says, and whose it is; effnet_records.py has the files

Units: top-1 and top-5 are percentages, resolutions pixels of a square image, shapes (N, C, H, W), sizes bytes.
"""

import builtins
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from effnet_model import (  # noqa: F401 - most of them only passed on
    HEAD_CHANNELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NEIGHBOURS,
    SE_RATIO,
    STAGES,
    STEM_CHANNELS,
    TABLE7,
    VARIANT_DROPOUT,
    VARIANTS,
    Conv2d,
    ConvNorm,
    Cost,
    EfficientNet,
    FlopsMatch,
    MBConv,
    Scaling,
    SqueezeExcitation,
    Stage,
    StochasticDepth,
    class_activation_map,
    coefficient_grid,
    compile_blocks,
    compound_scaling,
    cost_by_stage,
    count_cost,
    create_model,
    efficientnet,
    freeze_backbone,
    imagenet_weights,
    load_torchvision_weights,
    match_flops,
    published_weights,
    round_filters,
    round_repeats,
    round_resolution,
    scaled_cost,
    set_torchvision_eps,
    unknown_name,
)
from effnet_records import (  # noqa: F401 - some of them only passed on
    CHECKPOINTS,
    PREDICTIONS,
    PROGRESS,
    SCHEMA_VERSION,
    WEIGHTS,
    Held,
    Mismatch,
    can_compile,
    choose_device,
    device_name,
    environment,
    event_writer,
    git_state,
    gpu_count,
    hold,
    holder_of,
    keep_freed_memory,
    machine_gave_way,
    out_of_memory,
    peak_memory,
    read_checkpoint,
    read_record,
    replace_file,
    tell,
    write_checkpoint,
    write_json,
    write_record,
    write_weights,
)

# ---- 1. Recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """One run's recipe. Validated on construction; `from_dict` also refuses unknown keys.

    dropout, drop_path, se_expanded, norm_momentum and checkpointing are the network's: give it
    `config.model_options()`. So are pretrained and freeze, which `effnet_runs` sees to.
    """

    resolution: int = 224  # pixels, for training and for every evaluation
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128  # per optimizer step, whatever the accumulation
    accumulation: int = 1  # micro-batches per step; batch norm sees one micro-batch at a time
    optimizer: str = "rmsprop"  # rmsprop (as TensorFlow defines it) or sgd (Nesterov)
    lr: float = 0.016  # peak, at this batch size; the field uses 0.016 per 256 images for rmsprop
    momentum: float = 0.9
    weight_decay: float = 1e-5  # L2, not on norms and biases
    schedule: str = "cosine"  # cosine or linear, from the peak to final_lr over all steps
    final_lr: float = 0.0  # share of the peak at the end; above 0 it is not annealed, a mistake to be measured
    warmup: float = 0.05  # fraction of all steps with linearly rising LR
    label_smoothing: float = 0.1
    dropout: float = 0.2
    drop_path: float = 0.2  # stochastic depth: 1 - survival probability of the last block
    se_expanded: bool = False  # squeeze-and-excitation sized from the expanded channels, a mistake to be measured
    norm_momentum: float = 0.01  # batch norm's, PyTorch's way round; short runs need more, or scores lag behind
    clip_norm: float = (
        0.0  # of the whole gradient; 0 is off. Norms grow with depth, so a limit slows deep networks most
    )
    ema_decay: float = 0.9999  # reached after a warm-up, min(decay, (1 + n) / (10 + n)) at step n
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp16, fp32 on a CPU (a GPU's convolutions: TF32)
    crop_area: float = 0.25  # random resized crop: least area drawn, before sides are cut to the image's; 1 is off
    flip: bool = True  # random horizontal flip; not for digits
    translate: float = 0.0  # by up to this share of a side, mirrored at the edges; CIFAR's 4 of 32 pixels are 0.125
    rotate: float = 0.0  # by up to so many degrees, mirrored at the edges
    color_jitter: float = 0.0  # brightness, contrast and saturation by up to this share
    hue: float = 0.0  # turned by up to this share of the circle
    randaugment: int = 0  # magnitude, of 30, of two of torchvision's 14 operations for each image; 0 is off
    erasing: float = 0.0  # random erasing: share of the images
    mixup: float = 0.0  # alpha of its Beta distribution; 0 is off
    cutmix: float = 0.0  # the same; with both, each image undergoes one of them
    sync_norm: bool = False  # on several GPUs: batch norm over all of a step's images, not over each GPU's own
    checkpointing: bool = False  # less memory, more time, the same result: see EfficientNet
    pretrained: bool = False  # begin with torchvision's ImageNet weights and a new classifier
    freeze: bool = False  # train the classifier alone
    compile: str = "auto"  # torch.compile the blocks: always, never, or auto: on a GPU
    deterministic: bool = False  # on a GPU: only kernels that repeat bit for bit; slower. A CPU's do
    save_seconds: float = 300.0  # a checkpoint is written so often, and after every epoch
    save_steps: int = 0  # and after so many steps of an epoch; 0 is off

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
                hint = "; in YAML write 1.0e-3, not 1e-3" if field.type is float and isinstance(value, str) else ""
                raise ValueError(f"{field.name}: expected {field.type.__name__}, got {value!r}{hint}")
        choices = {
            "optimizer": ("rmsprop", "sgd"),
            "schedule": ("cosine", "linear"),
            "precision": ("auto", "bf16", "fp16", "fp32"),
            "compile": ("auto", "always", "never"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise unknown_name(name, getattr(self, name), valid)
        rules = (
            ("resolution epochs accumulation", "at least 1", lambda v: v >= 1),
            ("save_steps", "at least 0", lambda v: v >= 0),
            ("save_seconds", "above 0", lambda v: v > 0),
            ("batch_size", "at least 2", lambda v: v >= 2),
            ("seed weight_decay clip_norm mixup cutmix", "finite and at least 0", lambda v: 0 <= v < math.inf),
            ("lr", "finite and above 0", lambda v: 0 < v < math.inf),
            ("crop_area norm_momentum", "above 0 and at most 1", lambda v: 0 < v <= 1),
            ("final_lr color_jitter erasing", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("translate hue", "in [0, 0.5]", lambda v: 0 <= v <= 0.5),
            ("rotate", "in [0, 180]", lambda v: 0 <= v <= 180),
            ("randaugment", "in [0, 30]", lambda v: 0 <= v <= 30),
            ("momentum warmup label_smoothing dropout drop_path ema_decay", "in [0, 1)", lambda v: 0 <= v < 1),
        )
        for names, meaning, holds in rules:
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name}: expected a value {meaning}, got {getattr(self, name)!r}")
        if self.freeze and not self.pretrained:
            raise ValueError(
                "freeze: a backbone that has learnt nothing cannot be frozen; use it with pretrained: true"
            )
        if self.pretrained and self.se_expanded:
            raise ValueError("se_expanded: there are no ImageNet weights of such a network; use it without pretrained")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation: expected at most the batch size {self.batch_size}, got {self.accumulation}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "TrainConfig":
        """A config from names and values, as a profile or a run record holds them."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown_name("training setting", name, names)
        return cls(**values)

    def model_options(self) -> dict[str, float | bool]:
        """The settings of this recipe that the network is built with."""
        names = ("dropout", "drop_path", "se_expanded", "norm_momentum", "checkpointing")
        return {name: getattr(self, name) for name in names}


def learning_rate(config: TrainConfig, fraction: float) -> float:
    """LR at `fraction` (0 to 1) of all steps: linear warm-up, then down to its end at 1, however long the run."""
    if fraction < config.warmup:
        return config.lr * fraction / config.warmup
    rest = (fraction - config.warmup) / (1 - config.warmup)
    left = 1 - rest if config.schedule == "linear" else (1 + math.cos(math.pi * rest)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * left)


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 defines it and the paper used it. Differs from torch.optim.RMSprop threefold:
    epsilon is inside the root, the mean square starts at one, and the momentum buffer holds LR-scaled steps."""

    def __init__(self, params, lr: float, decay: float = 0.9, momentum: float = 0.9, eps: float = 1e-3):
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p] = {"square": torch.ones_like(p), "buffer": torch.zeros_like(p)}
            squares = [self.state[p]["square"] for p in params]
            buffers = [self.state[p]["buffer"] for p in params]
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            root = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_div_(grads, root)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads, alpha=group["lr"])
            torch._foreach_sub_(params, buffers)


def make_optimizer(model: nn.Module, config: TrainConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The config's optimizer, with weight decay on kernels and matrices only. With a gradient scaler `fused` must be
    False: if the very first step overflows, torch's fused SGD skips it but keeps an uninitialised momentum."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "momentum": config.momentum}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, nesterov=config.momentum > 0, fused=fused, **options)
    return RMSpropTF(groups, **options)


def ema_pairs(ema: nn.Module, model: nn.Module) -> dict[bool, tuple[list[Tensor], list[Tensor]]]:
    """The tensors that a moving average follows, in `ema` and in `model`: under True weights and batch norm's
    statistics, under False its counts of batches. They stay the same tensors, and collecting them takes time."""
    both = list(zip(*(m.state_dict(keep_vars=True).values() for m in (ema, model)), strict=True))
    return {
        kind: tuple(zip(*[p for p in both if p[0].is_floating_point() == kind], strict=True)) for kind in (True, False)
    }


@torch.no_grad()
def update_ema(pairs: dict[bool, tuple[list[Tensor], list[Tensor]]], config: TrainConfig, n: int) -> None:
    """Move the moving average (`ema_pairs`) of weights and batch-norm statistics on, after `n` earlier updates.

    Early on it forgets faster, min(decay, (1 + n) / (10 + n)), so as not to drag the random initial weights along.
    """
    decay = min(config.ema_decay, (1 + n) / (10 + n))
    torch._foreach_lerp_(*pairs[True], 1 - decay)
    torch._foreach_copy_(*pairs[False])


def step_seed(seed: int, epoch: int, step: int, first: int = 0) -> int:
    """The seed of all random draws of the micro-batch that starts at image `first` of a step: a resumed run draws what
    an uninterrupted one would, and so do several processes that share the step."""
    return int(np.random.SeedSequence([seed, epoch, step, first]).generate_state(1, np.uint64)[0] >> 1)


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's `precision` on a device."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- 2. Training ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data,
    split: str,
    resolution: int,
    *,
    batch_size: int = 256,
    precision: str = "auto",
    between: Callable[[], None] = lambda: None,
) -> dict:
    """Score `model` on a split ("minival" or "test") at `resolution`, on the device the model is on.

    Returns top1 and top5 in percent (top5 is top-k for k = the number of classes if there are fewer), the mean
    cross-entropy as loss, and arrays of shape (images,), in the split's order: correct (bool), label and predicted (the
    classes' numbers), confidence (the predicted class's probability). Out of memory, it starts again with half the
    batch. `between` is called after each batch; what it raises ends the scoring."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, top5, answers = torch.zeros((), device=device), torch.zeros((), device=device), []
    try:
        for images, labels in data.to(device).eval_batches(split, resolution, batch_size):
            with _autocast(precision, device):
                logits = model(images)
            logits = logits.float()  # (N, classes)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5)
            top5 += (ranked == labels[:, None]).sum()
            answers.append((labels, ranked[:, 0], logits.softmax(1).amax(1)))
            between()
    except RuntimeError as error:
        if not out_of_memory(error) or batch_size == 1:
            raise
        answers = images = labels = logits = ranked = None
    finally:
        model.train(was_training)
    if answers is None:  # outside the handler, whose traceback would keep the failed batch alive
        smaller = {"batch_size": batch_size // 2, "precision": precision, "between": between}
        return evaluate(model, data, split, resolution, **smaller)
    label, predicted, confidence = (torch.cat(part).cpu().numpy() for part in zip(*answers, strict=True))
    correct = predicted == label
    scores = {"top1": 100 * float(correct.mean()), "top5": 100 * top5.item() / len(correct)}
    arrays = {"correct": correct, "label": label, "predicted": predicted, "confidence": confidence}
    return scores | {"loss": loss.item() / len(correct), **arrays}


class Trainer:
    """A network in training, its moving average and its optimizer: what `train` and the benchmark take steps with.

    Where torch's elastic launcher started several processes, each holds its share of every batch, and gradients are
    averaged by DistributedDataParallel; batch norm sees one micro-batch of one process, as it does with `accumulation`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device):
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        if config.batch_size % self.world:
            raise ValueError(f"batch_size: expected a multiple of the {self.world} devices, got {config.batch_size}")
        self.config, self.device = config, device
        # At most a device's share of the batch; less if `accumulation` asks for it or memory runs out
        self.micro_batch = min(math.ceil(config.batch_size / config.accumulation), config.batch_size // self.world)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not config.deterministic  # all batches have one shape
            if config.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(config.deterministic)
        else:
            keep_freed_memory()
        model = model.to(device, memory_format=torch.channels_last)
        if config.sync_norm and several:
            if device.type != "cuda":
                raise ValueError("sync_norm: torch synchronises batch norm on GPUs only; use sync_norm: false on a CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False)
        self.averaged = ema_pairs(self.ema, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config.precision, device) == torch.float16)
        self.optimizer = make_optimizer(model, config, fused=not self.scaler.is_enabled())
        self.compiled = config.compile == "always" or (
            config.compile == "auto" and device.type == "cuda" and can_compile()
        )
        if self.compiled:
            compile_blocks(model)
        self.shared = nn.parallel.DistributedDataParallel(model) if several else model
        self.bad_step = torch.full((), -1, device=device)  # the first with a loss or gradient that is not finite
        self.fits = False  # whether a step has gone through
        self.model.train()

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int, steps: int) -> Tensor:
        """One optimizer step, the `step`th of `steps` in `epoch`, on this process's images; their mean loss, detached.

        Nothing here waits for the device, but for fp16's gradient scaler.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, (epoch * steps + step + 0.5) / (config.epochs * steps))
        # Forward and backward, in micro-batches that fit into memory
        loss = self.backward(images, labels, epoch, step)
        # Clip the whole gradient, take the step, follow it with the moving average
        if config.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        # A scaler skips the steps that overflow: there only the loss counts
        bad = ~torch.isfinite(loss if self.scaler.is_enabled() else loss + norm) & (self.bad_step < 0)
        self.bad_step = torch.where(bad, epoch * steps + step, self.bad_step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.taken = epoch * steps + step
        update_ema(self.averaged, config, self.taken)
        return loss

    def backward(self, images: Tensor, labels: Tensor, epoch: int = 0, step: int = 0) -> Tensor:
        """Gradient of the loss over these images, which it returns. Out of memory: again with half the micro-batch.

        One of several processes cannot repeat a step alone: there the error is raised, with the micro-batch halved.
        """
        # The failed attempt may have moved batch norm's statistics. Memory runs out at the first step, if it does
        before = [] if self.fits else [buffer.clone() for buffer in self.model.buffers()]
        while True:
            try:
                loss = self._micro_batches(images, labels, epoch, step)
                self.fits = True
                return loss
            except RuntimeError as error:
                if not out_of_memory(error) or self.micro_batch == 1:
                    raise
                self.micro_batch = math.ceil(self.micro_batch / 2)
                print(f"out of memory: going on with micro-batches of {self.micro_batch}", flush=True)
                if self.world > 1:
                    raise
            # Outside the handler, whose traceback would keep the failed attempt's tensors alive
            self.model.zero_grad(set_to_none=True)
            for buffer, value in zip(self.model.buffers(), before, strict=False):
                buffer.copy_(value)
            torch.cuda.empty_cache()

    def _micro_batches(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Tensor:
        config, total = self.config, torch.zeros((), device=self.device)
        for first in range(0, len(labels), self.micro_batch):
            x, y = images[first : first + self.micro_batch], labels[first : first + self.micro_batch]
            # Dropout and stochastic depth
            torch.manual_seed(step_seed(config.seed, epoch, step, self.rank * len(labels) + first))
            unfinished = self.world > 1 and first + self.micro_batch < len(labels)
            with self.shared.no_sync() if unfinished else contextlib.nullcontext():
                with _autocast(config.precision, self.device):
                    loss = F.cross_entropy(self.shared(x), y, label_smoothing=config.label_smoothing)
                loss = loss * (len(y) / len(labels))
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.world

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of the processes."""
        return flag if self.world == 1 else bool(self._reduced(torch.tensor(float(flag)), dist.ReduceOp.MAX))

    def diverged(self) -> int:
        """The first step, counted over all epochs, at which loss or gradient were not finite; -1 if none. Waits for the
        device. A scaler that has gone down to nothing counts as well: its steps are no longer taken."""
        bad = int(self._reduced(self.bad_step, dist.ReduceOp.MAX))
        return self.taken if bad < 0 and self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3 else bad

    def _reduced(self, value: Tensor, operation) -> float:
        if self.world > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value, operation)
        return value.item()

    def state_dict(self) -> dict:
        """All that a step changes."""
        return {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "scaler")}

    def load_state_dict(self, state: Mapping) -> None:
        for name in ("model", "ema", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and did, between two steps and with a checkpoint: the same call goes on from there."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this instead of where in the code it was
        return [f"{str(self).strip()}. Run the cell again to go on."]


class Killed(RuntimeError):
    """A process that trains was killed from outside, say for want of memory: the same call goes on from there."""


class _Stop:
    """Whether training is to stop: the time is up, the file $EFFNET_STOP is there, or SIGTERM or SIGINT came, which
    meanwhile only leave word here.

    deadline: in Unix time; default $EFFNET_DEADLINE, else none. SIGINT interrupts at once if it comes again later.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline or float(os.environ.get("EFFNET_DEADLINE", "inf"))
        self.file = os.environ.get("EFFNET_STOP")
        self.reason, self.last, self.noted = None, None, math.inf

    def __enter__(self) -> "_Stop":
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere signals are not ours
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT) if in_main}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and time.monotonic() - self.noted > 2:  # a launcher may pass on what all have got
            raise KeyboardInterrupt
        self.reason, self.noted = signal.Signals(number).name, min(self.noted, time.monotonic())

    def due(self, to_save: float = 1.0) -> bool:
        """Called between steps; to_save: seconds that a checkpoint takes."""
        now = time.time()
        step, self.last = now - (self.last or now), now
        if now + 2 * (step + to_save) > self.deadline:
            self.reason = self.reason or "the end of its time"
        if self.file is not None and os.path.exists(self.file):
            self.reason = self.reason or "its study"
        return self.reason is not None


def train(
    model: nn.Module,
    data,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    about: Mapping | None = None,
    device=None,
    deadline: float | None = None,
    each_epoch: Callable[[dict], bool | None] | None = None,
) -> dict:
    """Train, score once on test, and return the run record, which is also written to `run_dir/run.json`.

    `data` is any object with `to(device)`, `counts` ({"train": n, "minival": n, "test": n}), `describe()` (a dict
    with a "fingerprint"), `train_batches(config, epoch, start)` (from step `start` on) and `eval_batches(split,
    resolution, batch_size)`; both yield (images (N, 3, R, R) float, labels (N,), or (N, classes) of mixed images).
    `about` is added to the record.

    `run_dir` also gets history.jsonl (a line per epoch, minival with the EMA weights), test_correct.npy (per image, EMA
    weights) and test_predictions.npz (label, predicted, confidence), in the end weights.safetensors (EMA), and until
    then the last two checkpoints. Calling again continues an interrupted run as if nothing had happened, and returns
    the record of an ended one. In time for `deadline` (Unix time; default $EFFNET_DEADLINE), or on SIGTERM or SIGINT,
    it stops at the next step with a checkpoint and raises Interrupted. `each_epoch` is called with every epoch's row of
    the history, those of a continued or ended run first; where it returns true before the last epoch, the run ends with
    status "pruned", not scored on test and without weights.

    Called in each of several processes of torch's elastic launcher (torchrun), it trains one network on all their
    devices; `data.train_batches` then takes shard=(rank, processes) too. There memory running out raises the error, and
    starting all of them again goes on after the last checkpoint with half the micro-batch.

    Raises ValueError if run_dir holds a run of another config, model or data, or a batch exceeds the training
    set; Held (a RuntimeError) if another process holds run_dir; OSError if a file cannot be read or written, or Killed
    (a RuntimeError) if a GPU gives way: both leave the run to be continued. Any other error ends it as "failed".
    """
    run_dir, about = Path(run_dir), dict(about or {})
    device = choose_device(device)
    if data.counts["train"] < config.batch_size:
        raise ValueError(f"batch_size: {config.batch_size} exceeds the training set's {data.counts['train']} images")
    dataset, cost = data.describe(), dataclasses.asdict(count_cost(model, config.resolution))
    identity = {"config": recipe(dataclasses.asdict(config)), "cost": cost}
    identity |= {"dataset": {"fingerprint": dataset["fingerprint"]}}
    run_dir.mkdir(parents=True, exist_ok=True)
    device, first, several = _join(device)
    with hold(run_dir) if first else contextlib.nullcontext():
        record = read_record(run_dir)
        if record is not None:
            _check_identity(run_dir / "run.json", record, identity)
            _tidy(run_dir, record)
            if each_epoch is not None and (run_dir / "history.jsonl").exists():
                for line in (run_dir / "history.jsonl").read_text().splitlines():
                    each_epoch(json.loads(line))
            return record
        checkpoint = read_checkpoint(
            run_dir, lambda path, checkpoint: _check_identity(path, checkpoint["identity"], identity)
        )
        label = f"{about.get('method', 'run'):<10} seed {config.seed}"
        head = {"status": "failed", **about, "seed": config.seed}
        head |= {"config": dataclasses.asdict(config), "cost": cost, "dataset": dataset}
        head |= environment(device)  # the code that runs, not what it becomes
        if checkpoint is None and first:  # of an attempt that was set aside
            for name in ("history.jsonl", PROGRESS):
                (run_dir / name).unlink(missing_ok=True)
        stop = _Stop(deadline)
        try:
            with stop, event_writer(run_dir if first else None) as note:

                def each_row(row: dict) -> bool | None:
                    note(row)
                    return each_epoch(row) if each_epoch is not None else False

                place = (run_dir, device, label, checkpoint, identity, stop)
                record = head | _train(model, data, config, *place, each_row)
        except (OSError, Mismatch):  # a full disk, a folder that is gone, another kind of device: not the run's failure
            raise
        except Exception as error:
            if machine_gave_way(error):
                raise Killed(f"{type(error).__name__}: {error}; run again to go on") from error
            if not several:  # else it may be the echo of another process's error: for the launcher to judge
                write_record(run_dir, head | {"error": f"{type(error).__name__}: {error}"})
            raise
        if first:
            write_record(run_dir, record)
            _tidy(run_dir, record)
            if record["status"] == "finished":
                scores = f"top-1 {record['test']['top1']:.2f} % (raw weights {record['test_raw']['top1']:.2f} %)"
                print(f"{label}  {about.get('scored', 'test')} {scores}", flush=True)
        if several:
            dist.barrier()
        return read_record(run_dir)


def _tidy(run_dir: Path, record: Mapping) -> None:
    """A finished run that has its weights needs no checkpoint any more, nor does a pruned one."""
    (run_dir / PROGRESS).unlink(missing_ok=True)
    for name in CHECKPOINTS if (run_dir / WEIGHTS).exists() or record["status"] == "pruned" else ():
        (run_dir / name).unlink(missing_ok=True)


def _join(device: torch.device) -> tuple[torch.device, bool, bool]:
    """Meet the other processes of an elastic launch: this one's device, whether it is the first, whether of several."""
    if not dist.is_torchelastic_launched():
        return device, True, False
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The others wait while the first scores, longer than NCCL's ten minutes if need be
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # processes with more threads than cores stand in each other's way
            torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 kernels, where strides mean nothing
    return device, dist.get_rank() == 0, True


def launch(processes: int, work: Callable, arguments: tuple, run_dir: Path) -> str | None:
    """Call work(*arguments), which trains `run_dir`, in several processes. Returns None, or what one of them failed of.
    Raises Interrupted if they were, as `work` then says by returning why; OSError, Held, Mismatch or RuntimeError if
    what failed is not the run, but a disk, or a process that was killed.

    One that runs out of memory ends them all: then again with its smaller micro-batch, from the last checkpoint.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    smaller, options = run_dir / "micro_batch", {"min_nodes": 1, "max_nodes": 1, "max_restarts": 0}
    options |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": run_dir.name}
    options["log_line_prefix_template"] = " "  # the lines say whose they are
    while True:
        before = smaller.read_text() if smaller.exists() else None
        try:
            with tempfile.TemporaryDirectory() as logs:  # through which a notebook gets what the processes print
                options["logs_specs"] = DefaultLogsSpecs(logs, tee=Std.ALL)
                said = elastic_launch(LaunchConfig(nproc_per_node=processes, **options), work)(*arguments)
            if said and said[0] is not None:
                raise Interrupted(said[0])
            return None
        except SignalException as error:  # the launcher has passed it on, and waited
            raise Interrupted(f"{run_dir.name} stopped by {error.sigval.name}") from None
        except ChildFailedError as error:
            if smaller.exists() and smaller.read_text() != before:
                continue
            rank, failure = error.get_first_failure()
            said = failure.message["message"] if isinstance(failure.message, dict) else failure.message
            name = said.partition(":")[0]
            kinds = {"Held": Held, "Mismatch": Mismatch, "Killed": Killed}
            kind = kinds.get(name) or getattr(builtins, name, Exception)
            said = f"process {rank} of {processes}: {said}"
            if failure.exitcode < 0:
                raise Killed(f"{said}; run again to go on") from None
            if issubclass(kind, OSError | Held | Mismatch | Killed):
                raise kind(said) from None
            return said


def _train(model, data, config, run_dir, device, label, checkpoint, identity, stop, each_epoch) -> dict:
    """The loop of `train`: what the record says of how it went."""
    trainer, data = Trainer(model, config, device), data.to(device)
    progress = {"history": [], "step": 0, "loss": 0.0, "seconds": 0.0}  # the last three: of the epoch that is under way
    progress |= {"started": datetime.now(UTC).isoformat(timespec="seconds"), "micro_batch": trainer.micro_batch}
    progress["dtype"] = str(amp_dtype(config.precision, device)).removeprefix("torch.")
    if checkpoint is not None:
        if (begun := checkpoint["progress"].get("dtype", progress["dtype"])) != progress["dtype"]:
            raise Mismatch(
                f"{run_dir} was begun in {begun} and would go on in {progress['dtype']} here; go on where it was "
                "begun, or delete it to run anew"
            )
        trainer.load_state_dict(checkpoint)
        progress |= checkpoint["progress"]
        trainer.micro_batch = min(trainer.micro_batch, progress["micro_batch"])
        epochs, step = len(progress["history"]), progress["step"]
        where = f"in epoch {epochs + 1} after step {step}" if step else f"after epoch {epochs}"
        print(f"{label}  continues {where}", flush=True)
    smaller = run_dir / "micro_batch"  # left by one of several processes that ran out of memory
    if smaller.exists():
        trainer.micro_batch = min(trainer.micro_batch, int(smaller.read_text()))
    history, first, saved, to_save = progress["history"], trainer.rank == 0, time.monotonic(), 1.0
    said, at_checkpoint = -math.inf, progress["step"]
    shard = {} if trainer.world == 1 else {"shard": (trainer.rank, trainer.world)}
    steps = data.counts["train"] // config.batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def save() -> None:
        nonlocal saved, to_save, at_checkpoint
        begin = time.monotonic()
        progress["micro_batch"] = trainer.micro_batch
        if first:
            write_checkpoint(run_dir, trainer.state_dict() | {"progress": progress, "identity": identity})
        saved, at_checkpoint = time.monotonic(), progress["step"]
        to_save = saved - begin

    def say(step: int, seconds: float) -> None:  # to those who look on; the loss is that of the last look at it
        nonlocal said
        said, known = time.monotonic(), progress["step"]
        at = {"epoch": len(history) + 1, "step": step, "steps": steps, "seconds": seconds}
        at |= {"images_per_second": step * config.batch_size / seconds}
        tell(run_dir, **at, loss=progress["loss"] / known if known else None, saved=at_checkpoint)

    def pause() -> None:
        save()
        if first and progress["step"]:
            say(progress["step"], progress["seconds"])
        epochs, step = len(history), progress["step"]
        raise Interrupted(f"{label}  stopped by {stop.reason} in epoch {epochs + 1} after step {step} of {steps}")

    def between() -> None:  # two batches of scoring
        if trainer.world == 1 and stop.due(to_save):
            pause()

    pruned = any([each_epoch(row) for row in history])
    for epoch in range(len(history), config.epochs):
        if trainer.any(bool(pruned)):
            print(f"{label}  pruned after epoch {epoch}", flush=True)
            return {"status": "pruned"} | _closing(trainer, progress)
        begin, loss = time.perf_counter() - progress["seconds"], torch.full((), progress["loss"], device=device)
        batches = data.train_batches(config, epoch, progress["step"], **shard)
        quiet = not (first and sys.stdout.isatty())
        bar = tqdm(batches, f"{label}  epoch {epoch + 1}", steps, False, initial=progress["step"], disable=quiet)
        for step, (images, labels) in enumerate(bar, progress["step"] + 1):
            try:
                loss += trainer.step(images, labels, epoch, step - 1, steps)
            except RuntimeError as error:
                if trainer.world > 1 and out_of_memory(error):
                    replace_file(smaller, lambda file: file.write_text(str(trainer.micro_batch)))
                raise
            if first and time.monotonic() - said > 2:
                say(step, time.perf_counter() - begin)
            by_steps = config.save_steps > 0 and step % config.save_steps == 0
            if trainer.world > 1 and step % 10 and not by_steps and step != steps:
                continue  # several processes have to meet for what follows
            stopping, by_time = trainer.any(stop.due(to_save)), time.monotonic() - saved > config.save_seconds
            saving = trainer.any(by_time or by_steps)
            if not (stopping or saving or step % 50 == 0 or step == steps):
                continue
            if (bad := trainer.diverged()) >= 0:  # this waits for the device, so only now and then
                lr = learning_rate(config, (bad + 0.5) / (config.epochs * steps))
                diverged = {"epoch": bad // steps + 1, "step": bad % steps + 1, "lr": lr}
                print(
                    "{}  diverged in epoch {epoch}, step {step}, at LR {lr:.3g}".format(label, **diverged), flush=True
                )
                return {"status": "diverged", "diverged": diverged} | _closing(trainer, progress)
            progress |= {"step": step, "loss": trainer.mean(loss), "seconds": time.perf_counter() - begin}
            if stopping:
                pause()
            if saving and step != steps:
                save()
        row = {
            "epoch": epoch + 1,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "train_loss": progress["loss"] / steps,
        }
        if first:  # the others wait for it at their next step
            options = {"precision": config.precision, "between": between}
            minival = evaluate(trainer.ema, data, "minival", config.resolution, **options)
            row |= {f"minival_{name}": minival[name] for name in ("top1", "top5", "loss")}
        row |= {"images_per_second": steps * config.batch_size / progress["seconds"]}
        history.append(row | {"seconds": time.perf_counter() - begin})
        progress |= {"step": 0, "loss": 0.0, "seconds": 0.0}
        if first:
            lines = "".join(json.dumps(row) + "\n" for row in history)
            replace_file(run_dir / "history.jsonl", lambda path, lines=lines: path.write_text(lines))
            print(_epoch_line(label, history, config.epochs), flush=True)
        save()
        pruned = each_epoch(history[-1])

    if not first:
        return {}
    begin, options = time.perf_counter(), {"precision": config.precision, "between": between}
    test = evaluate(trainer.ema, data, "test", config.resolution, **options)
    raw = copy.deepcopy(trainer.model)  # without the compiled code, which is for batches of the training's shape
    raw = evaluate(raw, data, "test", config.resolution, **options)
    arrays = {name: test.pop(name) for name in ("correct", "label", "predicted", "confidence")}
    raw = {name: raw[name] for name in test}
    replace_file(run_dir / "test_correct.npy", lambda path: path.write_bytes(_bytes(np.save, arrays["correct"])))
    kinds = {"label": np.uint16, "predicted": np.uint16, "confidence": np.float16}
    kept = {name: arrays[name].astype(kind) for name, kind in kinds.items()}
    replace_file(run_dir / PREDICTIONS, lambda path: path.write_bytes(_bytes(np.savez_compressed, **kept)))
    write_weights(run_dir / WEIGHTS, trainer.ema.state_dict())
    progress["test_seconds"] = time.perf_counter() - begin
    smaller.unlink(missing_ok=True)
    return {"status": "finished", "test": test, "test_raw": raw} | _closing(trainer, progress)


def _bytes(save: Callable, *arrays: np.ndarray, **named: np.ndarray) -> bytes:
    body = io.BytesIO()
    save(body, *arrays, **named)
    return body.getvalue()


# ---- 3. Records ----------------------------------------------------------------------------------------------------


def load_trained(run_dir: str | Path, model: nn.Module) -> nn.Module:
    """`model` with the final EMA weights of a finished run, in evaluation mode."""
    path = Path(run_dir) / WEIGHTS
    if not path.exists() or read_record(run_dir) is None:
        raise FileNotFoundError(f"{path} of a finished run is not there (weights are not committed): run it first")
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def recipe(config: Mapping) -> dict:
    """What of a record's config decides its result: with the defaults of settings younger than the record, without
    those that only say how it is executed."""
    settings = dataclasses.asdict(TrainConfig()) | dict(config)
    execution = ("compile", "checkpointing", "deterministic", "save_seconds", "save_steps")
    return {name: value for name, value in settings.items() if name not in execution}


def _check_identity(path: Path, found: dict, expected: dict) -> None:
    """Refuse a record or checkpoint that was made with another config, network or data set."""
    for part, wanted in expected.items():
        made = recipe(found["config"]) if part == "config" else found.get(part, {})
        for key, new in wanted.items():
            if (old := made.get(key)) != new:
                raise Mismatch(
                    f"{path} was made with {part} {key} = {old!r}, now {new!r} is asked for; delete "
                    f"{path.parent} to run anew, or keep it and give another results folder"
                )


def _epoch_line(label: str, history: list[dict], epochs: int) -> str:
    last = history[-1]
    left = timedelta(seconds=int((epochs - len(history)) * np.median([row["seconds"] for row in history])))
    return (
        f"{label}  epoch {last['epoch']:>3}/{epochs}  loss {last['train_loss']:.3f}  "
        f"minival top-1 {last['minival_top1']:5.2f} %  {last['images_per_second']:,.0f} images/s  left {left}"
    )


def _closing(trainer: Trainer, progress: dict) -> dict:
    """The closing part of a record: time, speed, memory."""
    history = progress["history"]
    row = history[-1] if history else {}  # empty if it diverged in the first epoch
    speeds, seconds = [row["images_per_second"] for row in history], [row["seconds"] for row in history]
    return {
        "minival": {name: row.get(f"minival_{name}") for name in ("top1", "top5", "loss")},
        "seconds": sum(seconds) + progress.get("test_seconds", 0.0),
        "images_per_second": float(np.median(speeds)) if speeds else None,
        "peak_memory_bytes": peak_memory(trainer.device),
        "micro_batch": trainer.micro_batch,
        "dtype": progress["dtype"],
        "compiled": trainer.compiled,
        "devices": trainer.world,
        "started": progress["started"],
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
