"""Choose the trainer for a config and a device: plain, of several processes, compiled, or captured as a CUDA graph."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from effnet_lib import TrainConfig, Trainer
from effnet_study.cpu_kernels import accelerate_on_cpu
from effnet_study.machine import GPU_CODE, can_compile, compile_blocks
from effnet_study.machine import prepare as prepare_machine
from effnet_study.parallel import Group, ParallelTrainer

GRAPH_PIXELS = 96  # compile: auto captures up to this resolution. Larger images keep a GPU busy without it
WARM_UP = 3  # micro-batches before the capture: cuDNN chooses its kernels, and memory may turn out to be too small


def prepare_trainer(
    model: nn.Module, config: TrainConfig, device: torch.device, group: Group | None = None, accelerated: bool = True
) -> Trainer:
    """Set up this process and return a trainer for it. accelerated: with the fast kernels on a CPU."""
    prepare_machine(device, config.deterministic)
    if device.type == "cpu" and accelerated:
        accelerate_on_cpu(model)
    several = group is not None and group.world > 1
    mode = execution_mode(config, device, several)
    if several:
        trainer = ParallelTrainer(model, config, device, group)
    else:
        trainer = (CapturedTrainer if mode == "graph" else Trainer)(model, config, device)
    trainer.mode = mode
    if mode == "blocks":
        compile_blocks(trainer.model, options=GPU_CODE if device.type == "cuda" else None)
    if several:
        trainer.share()
    return trainer


def count_steps(data, config: TrainConfig) -> int:
    """Return the optimizer steps of an epoch. ValueError if not even one batch can be made of the training images."""
    if data.counts["train"] < config.batch_size:
        raise ValueError(f"batch_size: {config.batch_size} exceeds the training set's {data.counts['train']} images")
    return data.counts["train"] // config.batch_size


def execution_mode(config: TrainConfig, device: torch.device, several: bool) -> str:
    """Return how steps are executed: "blocks" (compiled one by one), "graph" (captured) or "never" (neither)."""
    mode, on_gpu = config.compile, device.type == "cuda"
    obstacle = "it needs a GPU" if not on_gpu else "several processes share each step" if several else None
    if mode == "auto" and on_gpu:
        small = config.resolution <= GRAPH_PIXELS and not obstacle
        mode = "graph" if small else "blocks" if can_compile() else "never"
    if mode == "graph" and obstacle:
        print(f"without a CUDA graph: {obstacle}", flush=True)
        mode = "never"
    return "never" if mode == "auto" else mode


class CapturedTrainer(Trainer):
    """A trainer on one GPU that replays forward and backward pass of a micro-batch as a CUDA graph.

    With small images a GPU computes faster than Python launches kernels, some 1,200 in a step of B0. The graph replaces
    all but those of the optimizer and the moving average, which are few: they stay outside, so that learning rate and
    decay are ordinary numbers. The draws are those of the plain step: a replay begins at the generator's seed.
    If the capture fails, training goes on without it."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device):
        super().__init__(model, config, device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.stream = torch.cuda.Stream(device)  # torch captures on a stream other than the default one
        self.size = self.kind = None  # micro_batch; shapes and weight of the micro-batches that are captured
        self.replay = None  # what runs the captured graph

    def load_state_dict(self, state: Mapping) -> None:
        super().load_state_dict(state)
        self.size = None  # the graph has the scale of the earlier scaler

    def add_gradient(self, images: Tensor, labels: Tensor, weight: float, last: bool) -> Tensor:
        kind = (images.shape, labels.shape, weight)
        if self.size != self.micro_batch:  # the first one, or memory ran out
            self.size, self.kind, self.seen, self.replay = self.micro_batch, kind, 0, None
        captured = kind == self.kind  # a batch that cannot be divided equally has smaller ones too, which run plainly
        self.seen += captured
        if captured and self.replay is None and self.seen > WARM_UP and self.mode == "graph":
            self.capture(images, labels)
        if not captured or self.replay is None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = super().add_gradient(images, labels, weight, last)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        self.images.copy_(images)
        self.labels.copy_(labels)
        earlier = [p.grad for p in self.params]  # of the step's micro-batches before this one
        if earlier[0] is not None:
            earlier = torch._foreach_mul(earlier, 1.0)  # a copy, because the graph overwrites its gradients
        self.replay()
        if earlier[0] is not None:
            torch._foreach_add_(self.gradients, earlier)
        self.attach(self.gradients)
        return self.loss

    def capture(self, images: Tensor, labels: Tensor) -> None:
        """Capture both passes: from self.images and self.labels to self.loss and self.gradients."""
        self.images, self.labels = images.clone(), labels.clone()
        earlier = [p.grad for p in self.params]
        self.attach([None] * len(earlier))  # so that the passes write gradients and do not add to them
        try:
            self.replay = record(self.passes, self.stream)
            self.gradients = [p.grad for p in self.params]
        except RuntimeError as error:
            self.mode = "never"
            print(f"without a CUDA graph, and so slower: {error}", flush=True)
        self.attach(earlier)

    def passes(self) -> None:
        self.loss = super().add_gradient(self.images, self.labels, weight=self.kind[-1], last=True)

    def attach(self, gradients: list[Tensor | None]) -> None:
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient


def record(work: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
    """Capture the kernels that `work` launches, which do not run yet. Return what runs them."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: the threads that read streamed images may allocate memory meanwhile
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay
