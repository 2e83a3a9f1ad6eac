"""Run PyTorch code on fake CUDA tensors on a machine without a GPU, and watch what it would do there.

`fake_cuda` lets torch believe in one GPU whose tensors have shape, strides, type and device by CUDA's rules, but no
contents. `Watch` counts kernel launches, and lists what waits for the device and what loses channels-last memory.
`InductorCode` collects the code that torch.compile generates. A CUDA graph's replay is one launch. While it is captured
any copy from the host counts as a wait, because the graph would copy the old values for ever.
All change global state of torch, so use them in a process of their own.
"""

import contextlib
import copy
import ctypes
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effnet_study.machine import GPU_CODE

# What torch.cuda answers
GPU = {
    "is_available": True,
    "is_bf16_supported": True,
    "current_device": 0,
    "empty_cache": None,
    "manual_seed_all": None,
    "reset_peak_memory_stats": None,
    "Stream": mock.MagicMock(),
    "current_stream": mock.MagicMock(),
    "set_device": mock.MagicMock(),
}


class Graph:
    """A CUDA graph, and the context in which it is captured."""

    captured = replays = 0  # launches in the last graph; runs of graphs
    open = False

    def replay(self) -> None:
        Graph.replays += 1

    @staticmethod
    @contextlib.contextmanager
    def capture(graph: "Graph", stream: object, capture_error_mode: str) -> Iterator[None]:
        Graph.open, Graph.captured = True, 0
        yield
        Graph.open = False


@contextlib.contextmanager
def fake_cuda():
    """Within this context tensors on "cuda" are fake, and what depends on the CPU alone is computed, under a Watch."""
    torch._C._ensureCUDADeviceGuardSet()  # without a driver: a device guard that does nothing
    with contextlib.suppress(ValueError):  # if fake_cuda.c is not preloaded, there are no backward passes
        ctypes.c_byte.in_dll(ctypes.CDLL(None), "fake_devices").value = 127
    clip = sys.modules["torch.nn.utils.clip_grad"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Constants())
        for name, answer in GPU.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.Mock(return_value=answer)))
        patches = [
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", Graph.capture),
            (torch.cuda, "stream", contextlib.nullcontext),
            (torch.nn.Module, "to", _module_to),
            (FakeTensorMode, "avoid_device_init", True),
            (Tensor, "pin_memory", lambda self: self),
            (Tensor, "record_stream", lambda self, stream: None),
            # On a GPU, cuDNN takes every convolution, in channels-last memory if its input or its weight is
            (torch._C, "_select_conv_backend", lambda *arguments, **options: torch._C._ConvBackend.Cudnn),
            (torch._C, "_conv_determine_backend_memory_format", _convolution_format),
            # This knows no subclasses of tensors
            (clip, "_has_foreach_support", lambda tensors, device: True),
            (sys.modules["torch._subclasses.fake_tensor"], "init_gpu_context", lambda device: None),
        ]
        for holder, name, value in patches:
            stack.enter_context(mock.patch.object(holder, name, value))
        yield


def _module_to(module: torch.nn.Module, device: torch.device, memory_format=torch.preserve_format) -> torch.nn.Module:
    """Replace the parameters and buffers of a module. Module.to would change them in place, which fake ones refuse."""
    for part in module.modules():
        for named in (part._parameters, part._buffers):
            for name, x in named.items():
                if x is not None:
                    new = x.detach().to(device, memory_format=memory_format if x.dim() == 4 else torch.preserve_format)
                    named[name] = torch.nn.Parameter(new, x.requires_grad) if named is part._parameters else new
    return module


class _Constants(TorchFunctionMode):
    """Make torch.tensor(numbers, device=...) the copy that it is, which no dispatch mode sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and (device := kwargs.pop("device", None)) is not None:
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def _convolution_format(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    last = any(_is_channels_last(y) and not y.is_contiguous() for y in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


# Operations whose result the host reads
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount", "_linalg_check_errors"}
# Operations that launch no kernel, beside views, or more than one
NO_LAUNCH = {"_unsafe_view", "unsqueeze_", "detach_", "prim::device"}
LAUNCHES = {"native_batch_norm": 3, "native_batch_norm_backward": 2, "convolution_backward": 2}


class Watch(TorchDispatchMode):
    """Watch operations on fake CUDA tensors: `launches` of kernels, `waits` for the device, `layouts` that were lost.

    The last two count descriptions, which end with the innermost lines of code outside torch."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.launches, self.waits, self.layouts = 0, Counter(), Counter()
        Graph.captured = Graph.replays = 0

    def report(self) -> dict:
        found = {"launches": round(self.launches + Graph.replays), "captured": round(Graph.captured)}
        return found | {"waits": dict(self.waits), "layouts": dict(self.layouts)}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cpu" and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():  # on the host: it is computed, because the program reads it
                return operation(*args, **kwargs)
        out = None if name == "_fused_sgd_" else operation(*args, **kwargs)  # torch has no fake version of it
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in tensors + outs):
            launches = 0 if operation.is_view or "empty" in name or name in NO_LAUNCH else LAUNCHES.get(name, 1)
            if name.startswith(("_foreach", "_fused")):
                launches = max(1, len(args[0]) / 50)  # a kernel takes about 50 tensors
            if Graph.open:
                Graph.captured += launches
            else:
                self.launches += launches
            self._check_waits(name, args, kwargs, tensors, outs)
            if name in ("convolution", "convolution_backward", "native_batch_norm"):
                self._check_layout(name, outs[:1] + tensors[:2])
        return out

    def _check_waits(self, name: str, args: tuple, kwargs: dict, tensors: list, outs: list) -> None:
        if name in READS:
            self.waits[f"{name} at {_where()}"] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            scalar = name != "index" and args[2].numel() == 1  # a scalar is filled in by a mask without a wait
            for index in (x for x in args[1] if x is not None):
                if (index.dtype == torch.bool and not scalar) or (index.device.type == "cpu" and index.dim()):
                    self.waits[f"{name} by {index.dtype} on {index.device.type} at {_where()}"] += 1
        copied = {"_to_copy": (tensors + outs)[:2], "copy_": args[:2][::-1]}.get(name, ())
        if len({x.device.type for x in copied}) == 2:
            free = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if not free or copied[1].device.type == "cpu" or Graph.open:
                self.waits[f"copy to {copied[1].device.type} at {_where()}"] += 1

    def _check_layout(self, name: str, tensors: list) -> None:
        for x in tensors:
            if x.dim() == 4 and min(x.shape[2:]) > 1 and not _is_channels_last(x):
                self.layouts[f"{name} {tuple(x.shape)} at {_where()}"] += 1


def _where() -> str:
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames[-3:]))


# What Inductor asks of an H100 (compute capability 9.0)
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "total_memory": 80 * 2**30,
    "multi_processor_count": 132,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_block": 1024,
    "warp_size": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 50 * 2**20,
    "gcnArchName": "",
    "uuid": "",
}
INDUCTOR = {"get_device_properties": SimpleNamespace(**H100), "get_device_capability": (9, 0), "device_count": 1}
INDUCTOR |= {"is_initialized": True, "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0}
INDUCTOR |= {"mem_get_info": (79 * 2**30, 80 * 2**30), "get_rng_state": torch.zeros(16, dtype=torch.uint8)}
INDUCTOR |= {"set_rng_state": None, "synchronize": None, "is_current_stream_capturing": False}


class InductorCode(list):
    """The code that Inductor generates within this context for an H100, a text for each graph. Triton does not compile
    it: the graphs are run without it. As a backend of torch.compile this is to be used within `fake_cuda`."""

    def __enter__(self):
        from torch._dynamo.device_interface import CudaInterface
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver

        self.stack = contextlib.ExitStack()
        properties = INDUCTOR["get_device_properties"]
        interface = {"get_device_properties": properties, "current_device": 0, "device_count": 1}
        interface |= {"get_compute_capability": 90, "is_bf16_supported": True, "is_available": True}
        worker = {"get_device_properties": properties, "current_device": 0}
        for holder, answers in ((torch.cuda, INDUCTOR), (CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, answer in answers.items():
                self.stack.enter_context(mock.patch.object(holder, name, mock.Mock(return_value=answer)))
        copied = mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True)
        self.stack.enter_context(copied)
        utils = SimpleNamespace(get_device_properties=lambda device: H100)
        place = {"get_current_device": lambda: 0, "get_active_torch_device": lambda: torch.device("cuda", 0)}
        place |= {"get_current_target": lambda: GPUTarget("cuda", 90, 32), "get_current_stream": lambda device=None: 0}
        driver.set_active(SimpleNamespace(**place, utils=utils, is_active=lambda: True))
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs, inner_compile=self._generate, config_patches=GPU_CODE)

    def _generate(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options):
        from torch._functorch.aot_autograd import make_boxed_func
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.graph import GraphLowering

        def keep(lowered: GraphLowering) -> SimpleNamespace:
            self.append(lowered.codegen()[0].value)
            return SimpleNamespace(call=None)

        with mock.patch.object(GraphLowering, "_compile_to_module", keep), config.patch(force_disable_caches=True):
            compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        return make_boxed_func(graph.forward)
