"""The machine that a run trains on: device, memory, compiler, versions, and the state of the code."""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

from effnet_lib import ConvNorm, MBConv
from effnet_study.files import ROOT

# ---- 1. Device -----------------------------------------------------------------------------------------------------

GPU_FILES = "/dev/nvidia[0-9]*"  # a container that was given no GPU has none, though it sees its host's driver


def gpu_count(device: str | torch.device | None = None) -> int:
    """Count the GPUs to train on. 0 if `device` is the CPU, or the driver is too old for torch."""
    return 0 if str(device) == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return `device`, cpu or cuda, or a GPU if there is one.

    ValueError if torch finds no GPU although one is asked for, or although there is one and no device is asked for:
    without the error a study would silently take days on the CPU."""
    if not device and not torch.cuda.is_available() and torch.version.cuda and _has_visible_gpu():
        raise ValueError(
            f"device: this machine has an NVIDIA GPU, but torch {torch.__version__} for CUDA {torch.version.cuda} "
            "finds no GPU. If the driver is too old for it (see nvidia-smi): update the driver, install its "
            "forward-compatibility package (cuda-compat), or install a torch for CUDA 12. A cluster's job must be "
            "given the GPU. To train on the CPU: --device cpu, or CUDA_VISIBLE_DEVICES=-1"
        )
    device = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", device):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {str(device)!r} was asked for, but torch finds no CUDA GPU; use 'cpu'")
    return device


def _has_visible_gpu() -> bool:
    """Tell whether there is an NVIDIA GPU that $CUDA_VISIBLE_DEVICES does not hide."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not re.match(r"\s*(\d|GPU-|MIG-)", visible)  # CUDA stops at an invalid name
    return not hidden and bool(glob.glob(GPU_FILES))


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = found[1]
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def prepare(device: torch.device, deterministic: bool = False) -> None:
    """Set up this process for training on a device. deterministic: on a GPU, use only kernels that repeat exactly."""
    if device.type != "cuda":
        keep_freed_memory()
        return
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and memory are by default those of this device
    torch.backends.cudnn.benchmark = not deterministic  # all batches have one shape
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.reset_peak_memory_stats(device)


# ---- 2. Memory -----------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for its next step. By default it returns large blocks to the system and
    then fetches every 4 KiB again by a page fault. Without glibc this does nothing."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt  # returns 0 if it refuses a value: older glibc does above 32 MiB
        if mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_THRESHOLD, 2**25):
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # alone it would leave the other at its least value for good


def memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            least = min(least, int(Path(limit).read_text()))
    return least


def peak_memory(device: torch.device) -> int:
    """Return bytes: torch's peak on a GPU since its last reset, on a CPU the peak of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):  # getrusage would include what the parent held at the fork
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error means that memory ran out. Only a GPU's allocator has its own exception, which
    torch.compile puts into the message of another one. A GPU's libraries, torch's allocator on a CPU and oneDNN have
    messages alone, some of which may have another cause. Triton's "out of resource" is about one kernel's needs, and
    smaller batches would not help."""
    words = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
    words += ("OutOfMemoryError", "Triton Error [CUDA]: out of memory")
    words += ("unable to find an engine to execute this computation",)  # cuDNN: none fits into the memory that is left
    words += ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def machine_failed(error: Exception) -> bool:
    """Tell whether a GPU, its libraries or the link between processes failed. Another process may continue the run."""
    words = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL")
    return isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in words)


# ---- 3. Compiler ---------------------------------------------------------------------------------------------------


# Of Inductor: small kernels that do not depend on each other share a launch, and stochastic depth draws as without
# compiling. On a GPU Inductor would otherwise use a generator of its own.
GPU_CODE = {"combo_kernels": True, "fallback_random": True}


def can_compile() -> bool:
    """Tell whether torch.compile can work for this process's GPU. Print what is missing if not."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        lacking = "a C compiler and Python's headers (gcc, python3-dev)"
    elif importlib.util.find_spec("triton") is None:
        lacking = "Triton (pip install triton)"
    elif torch.version.hip is None and torch.cuda.get_device_capability() < (7, 0):
        lacking = "a GPU of compute capability 7.0 or newer"
    else:
        return True
    print(f"not compiled, and so slower: torch.compile needs {lacking}")
    return False


def compile_blocks(model: nn.Module, **options) -> None:
    """Apply torch.compile with these options to stem, blocks and head, one by one. Equal blocks share compiled code, so
    a deeper network takes no longer. Compilation happens at the first batch. torch keeps the code on disk."""
    torch._dynamo.reset()  # what other networks in this process have compiled counts against the limit
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # kinds of blocks, not 8
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    within = {module for block in blocks for module in block.modules()}
    ends = [module for module in model.modules() if isinstance(module, ConvNorm) and module not in within]
    for part in (*ends, *blocks) or (model,):  # a network of another kind in one piece
        part.compile(dynamic=False, **options)


# ---- 4. For the record ---------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict:
    """Return the entries of a record about the machine: device, versions, git."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["torchvision"] = importlib.metadata.version("torchvision")
    versions["cuda"] = torch.version.cuda if device.type == "cuda" else None
    about = {"type": device.type, "name": device_name(device), "processor": processor()}
    return {"device": about, "versions": versions, "git": git_state()}


def processor() -> str:
    """Return vendor, family and model of the processor, and the vector instructions that torch uses: processors of one
    name may differ in them, and so in the last digits of sums."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = dict(re.findall(r"^(vendor_id|cpu family|model)\s*:\s*(\S+)", text, re.MULTILINE))  # equal for all cores
    known = "{vendor_id} family {cpu family} model {model}, ".format_map(found) if len(found) == 3 else ""
    return known + torch.backends.cpu.get_cpu_capability()


def git(*words: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """Run git on this checkout, and on no other one around it. --git-dir makes git accept a checkout that another user
    owns. OSError without git."""
    command = ["git", "-C", str(root), "--git-dir=.git", "--work-tree=.", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def git_state(root: Path = ROOT) -> dict:
    """Return the commit of this project's checkout, and whether its code differs from it. Where there is no checkout,
    as in a container, $EFFNET_COMMIT names the commit."""
    try:
        head = git("rev-parse", "HEAD", root=root)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", root=root)
        if head.returncode == changes.returncode == 0:
            return {"commit": head.stdout.strip(), "dirty": bool(changes.stdout)}
        why = head.stderr or changes.stderr
    except OSError as error:
        why = str(error)
    if (root / ".git").exists():
        print(f"the record names no commit: {why}", file=sys.stderr, flush=True)
    return {"commit": os.environ.get("EFFNET_COMMIT") or None, "dirty": None}
