"""One run on several GPUs of a machine: a process for each, started by torch's elastic launcher (or by torchrun)."""

import builtins
import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from effnet_lib import TrainConfig, Trainer
from effnet_study.files import RunLocked, RunMismatch
from effnet_study.stop import Interrupted, ProcessKilled

MICRO_BATCH = "micro_batch"  # file in a run's folder: the size with which processes that ran out of memory start again


class Group:
    """The processes that share each step of a run. Usually there is one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def mean(self, value: Tensor) -> float:
        """Return the mean of a number over all processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.world

    def largest(self, value: Tensor) -> float:
        """Return the largest of a number over all processes."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in one of the processes."""
        return flag if self.world == 1 else bool(self.largest(torch.tensor(float(flag))))

    def _reduced(self, value: Tensor, operation) -> float:
        if self.world > 1:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value, operation)
        return value.item()


def check_shares(batch_size: int, devices: int) -> None:
    """Raise ValueError if devices cannot share a batch equally, two images each or more: batch norm needs two."""
    if batch_size % devices or batch_size < 2 * devices:
        expected = f"a multiple of the {devices} devices, two images for each or more"
        raise ValueError(f"batch_size: expected {expected}, got {batch_size}")


class ParallelTrainer(Trainer):
    """A trainer that takes its share of every batch. DistributedDataParallel averages the gradients. Batch norm sees
    one micro-batch of one process, as it does with `accumulation`, unless the config asks for sync_norm."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, group: Group):
        check_shares(config.batch_size, group.world)
        if config.sync_norm:
            if device.type != "cuda":
                raise ValueError("sync_norm: torch synchronises batch norm on GPUs only; use sync_norm: false on a CPU")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        super().__init__(model, config, device)
        self.rank = group.rank
        self.micro_batch = min(self.micro_batch, config.batch_size // group.world)

    def share(self) -> None:
        """Start to share steps. Call this after compiling and before the first step."""
        self.forward = nn.parallel.DistributedDataParallel(self.model)

    def add_gradient(self, images: Tensor, labels: Tensor, weight: float, last: bool) -> Tensor:
        with contextlib.nullcontext() if last else self.forward.no_sync():
            return super().add_gradient(images, labels, weight, last)


def join(device: torch.device) -> tuple[torch.device, Group]:
    """Meet the other processes of an elastic launch, if this is one. Return this process's device and the group."""
    if not dist.is_torchelastic_launched():
        return device, Group(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # The others wait while the first one scores, which may take longer than NCCL's ten minutes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    if device.type == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # more threads than cores would slow each other down
            torch.set_num_threads(max(1, torch.get_num_threads() // dist.get_world_size()))
        warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1 x 1 kernels, where strides mean nothing
    return device, Group(device)


def launch(processes: int, work: Callable, arguments: tuple, run_dir: Path) -> str | None:
    """Call work(*arguments), which trains `run_dir`, in several processes. Return None, or the error of a failed run.

    Raises Interrupted if they were stopped (`work` returns the reason); OSError, RunLocked, RunMismatch or
    ProcessKilled if the disk or the machine failed and the run did not. If one runs out of memory, all start again
    from the last checkpoint with its smaller micro-batch.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    smaller, options = run_dir / MICRO_BATCH, {"min_nodes": 1, "max_nodes": 1, "max_restarts": 0}
    options |= {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": run_dir.name}
    options["log_line_prefix_template"] = " "  # the lines name their run
    while True:
        before = smaller.read_text() if smaller.exists() else None
        try:
            with tempfile.TemporaryDirectory() as logs:  # a notebook gets the processes' output through it
                options["logs_specs"] = DefaultLogsSpecs(logs, tee=Std.ALL)
                reasons = elastic_launch(LaunchConfig(nproc_per_node=processes, **options), work)(*arguments)
        except SignalException as error:  # the launcher has passed the signal on, and waited
            raise Interrupted(f"{run_dir.name} stopped by {error.sigval.name}") from None
        except ChildFailedError as error:
            if smaller.exists() and smaller.read_text() != before:
                continue
            return _failure(error, processes)
        if reasons and reasons[0] is not None:
            raise Interrupted(reasons[0])
        return None


def _failure(error: ChildFailedError, processes: int) -> str:
    """Return the message of the first process that failed, or raise it if the run itself has not failed."""
    rank, failure = error.get_first_failure()
    message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
    kinds = vars(builtins) | {kind.__name__: kind for kind in (RunLocked, RunMismatch, ProcessKilled)}
    kind = kinds.get(message.partition(":")[0], Exception)
    message = f"process {rank} of {processes}: {message}"
    if failure.exitcode < 0:
        raise ProcessKilled(f"{message}; run again to go on") from None
    if issubclass(kind, OSError | RunLocked | RunMismatch | ProcessKilled):
        raise kind(message) from None
    return message
