"""Speed: a training step of ours and of others', timed side by side, and what a run will take on this machine."""

import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import get_model

import effnet_model
from effnet_data import load_data
from effnet_lib import TrainConfig, Trainer, _autocast, keep_freed_memory, peak_memory, unknown_name
from effnet_model import TABLE7, EfficientNet, Scaling


@dataclass(frozen=True)
class Contender:
    """A network and how it is trained, for `measure`: ours by `Trainer`, a peer's B0 as its users would train it."""

    source: str = "ours"  # ours, torchvision or timm
    resolution: int = 224
    batch_size: int = 128
    scaling: Scaling = TABLE7["baseline"]  # of ours
    short_cuts: bool = True  # ours: on a CPU, those of Conv2d and SqueezeExcitation
    channels_last: bool = True  # a peer's memory layout; ours is always so
    keep_memory: bool = True  # a peer's process calls keep_freed_memory; ours always does
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.source not in ("ours", "torchvision", "timm"):
            raise unknown_name("source", self.source, ("ours", "torchvision", "timm"))

    def calls(self, device: torch.device) -> dict[str, Callable[[], object]]:
        """What is timed, each up to its end and without waiting for the device: forward; gradient (forward and
        backward); step (gradient and optimizer, ours with the moving average). Random images, SGD with momentum, 1000
        classes, mixed precision on a GPU."""
        images = torch.randn(self.batch_size, 3, self.resolution, self.resolution, device=device)
        labels = torch.randint(1000, (self.batch_size,), device=device)
        return (self._ours if self.source == "ours" else self._peer)(images, labels, device)

    def _ours(self, images: Tensor, labels: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
        compiling = "always" if self.compiled else "never"
        config = TrainConfig(self.resolution, batch_size=self.batch_size, optimizer="sgd", lr=0.01, compile=compiling)
        if not self.short_cuts:  # in this process
            effnet_model._by_hand = lambda x: False
        trainer = Trainer(EfficientNet(self.scaling, 1000, **config.model_options()), config, device)
        images = images.contiguous(memory_format=torch.channels_last)

        def forward() -> Tensor:
            with _autocast("auto", device):
                return trainer.shared(images)

        def gradient() -> None:
            trainer.backward(images, labels)
            trainer.optimizer.zero_grad(set_to_none=True)

        return {"forward": forward, "gradient": gradient, "step": lambda: trainer.step(images, labels, 0, 1, 10**6)}

    def _peer(self, images: Tensor, labels: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
        if self.source == "timm":
            from timm import create_model  # only the benchmark needs it

            model = create_model("efficientnet_b0", drop_rate=0.2, drop_path_rate=0.2)
        else:
            model = get_model("efficientnet_b0", weights=None)
        if self.keep_memory and device.type == "cpu":
            keep_freed_memory()
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model, images = model.train().to(device, memory_format=layout), images.contiguous(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        model = torch.compile(model) if self.compiled else model

        def forward() -> Tensor:
            with _autocast("auto", device):
                return model(images)

        def backward() -> None:
            with _autocast("auto", device):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

        def gradient() -> None:
            backward()
            optimizer.zero_grad(set_to_none=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            backward()
            optimizer.step()

        return {"forward": forward, "gradient": gradient, "step": step}


def measure(
    contenders: Mapping[str, Contender],
    device: str,
    *,
    rounds: int = 15,
    repeat: int = 1,
    parts: Sequence[str] = ("step",),
) -> tuple[list[dict], dict[str, dict]]:
    """Time the contenders side by side, each in a process of its own, one at a time, in a new random order every round.

    Returns rows {"contender", "round", "part", "seconds"} (of one call, the mean of `repeat`), and by contender
    {"first_seconds"} (the first step, with all compiling) and {"peak_memory_bytes"}. RuntimeError if one fails.
    """
    context, order, rows, about = multiprocessing.get_context("spawn"), random.Random(0), [], {}
    pipes, processes = {}, []
    try:
        for name, contender in contenders.items():
            pipes[name], theirs = context.Pipe()
            arguments = (theirs, contender, device, torch.get_num_threads())
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
        for name in contenders:
            pipes[name].send("begin")
            about[name] = {"first_seconds": _answer(name, pipes[name])}
        for turn in range(rounds + 1):  # the first one warms up
            for name in order.sample(list(contenders), len(contenders)):
                for part in parts:
                    pipes[name].send((part, repeat))
                    row = {"contender": name, "round": turn, "part": part, "seconds": _answer(name, pipes[name])}
                    rows += [row] if turn else []
        for name in contenders:
            pipes[name].send(None)
            about[name]["peak_memory_bytes"] = _answer(name, pipes[name])
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return rows, about


def _answer(name: str, pipe) -> float:
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "its process died, perhaps for want of memory"
    if isinstance(answer, str):
        raise RuntimeError(f"benchmark of {name}: {answer}")
    return answer


def _serve(pipe, contender: Contender, device: str, threads: int) -> None:
    """A contender's process: tells the seconds of its first step, then of each call asked for, then its memory."""
    device = torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.set_num_threads(threads)

    def seconds(call: Callable[[], object], repeat: int, warm: bool = True) -> float:
        if warm:  # another process had the caches until now
            call()
        wait()
        begin = time.perf_counter()
        for _ in range(repeat):
            call()
        wait()
        return (time.perf_counter() - begin) / repeat

    try:
        pipe.recv()  # until it is this one's turn to start
        calls = contender.calls(device)
        pipe.send(seconds(calls["step"], 1, warm=False))
        while (order := pipe.recv()) is not None:
            pipe.send(seconds(calls[order[0]], order[1]))
        pipe.send(peak_memory(device))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def write_tiles(folder: Path, px: int) -> None:
    """The two photographs that scikit-learn brings, cut into overlapping JPEG tiles: folder/PHOTOGRAPH/NUMBER.jpg."""
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        height, width, _ = photograph.shape
        corners = [(y, x) for y in range(0, height - px, 12) for x in range(0, width - px, 12)]
        for number, (y, x) in enumerate(corners):
            Image.fromarray(photograph[y : y + px, x : x + px]).save(folder / name / f"{number}.jpg", quality=90)


class _InMemory(Dataset):
    """Decoded images that become PIL's again one by one, as in torchvision's CIFAR10."""

    def __init__(self, images: np.ndarray, transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), 0


def measure_input(
    px: int, device: torch.device, *, batch_size: int = 128, rounds: int = 9, workers: int = 2, least: float = 0.5
) -> list[dict]:
    """Time the input path alone, from stored images to batches for training on the device, side by side: a random
    resized crop and flip by PIL in a DataLoader and by ours, and ours with other augmentations.

    Returns rows {"path", "round", "images_per_second"}; a measurement is at least one pass and `least` seconds.
    """
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory() as place:
        write_tiles(Path(place) / "tiles", px)
        data = load_data("folder:tiles", place, size=px, test=0.05, cache=place).to(device)
        field = transforms.Compose(
            [
                transforms.RandomResizedCrop(px, scale=(0.25, 1)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((data.mean / 255).tolist(), (data.std / 255).tolist()),
            ]
        )
        stored = data.decoded.images[data.indices["train"].cpu().numpy()]
        peers = {
            f"PIL, JPEG files, {workers} workers": ImageFolder(Path(place) / "tiles", field),
            f"PIL, images in memory, {workers} workers": _InMemory(stored, field),
        }
        options = {"batch_size": batch_size, "shuffle": True, "drop_last": True, "num_workers": workers}
        options |= {"persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
        loaders = {name: DataLoader(peer, **options) for name, peer in peers.items()}
        passes = {
            name: lambda loader=loader: ((x.to(device, non_blocking=True), y) for x, y in loader)
            for name, loader in loaders.items()
        }
        ours = {"crop and flip": {}, "translation and flip": {"crop_area": 1.0, "translate": 0.125}}
        ours |= {
            "crop, flip, RandAugment": {"randaugment": 9},
            "crop, flip, mixup, CutMix": {"mixup": 0.2, "cutmix": 1.0},
        }
        for name, changes in ours.items():
            config = TrainConfig(px, batch_size=batch_size, **changes)
            passes[f"ours: {name}"] = lambda config=config: data.train_batches(config, 0)
        rows, order = [], random.Random(0)
        for turn in range(rounds + 1):  # the first one warms up
            for name in order.sample(list(passes), len(passes)):
                images, begin, seconds = 0, time.perf_counter(), 0.0
                while not images or seconds < least:
                    images += sum(len(x) for x, _ in passes[name]())
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds = time.perf_counter() - begin
                rows += [{"path": name, "round": turn, "images_per_second": images / seconds}] if turn else []
        return rows


def estimate_seconds(model: nn.Module, data, config: TrainConfig, device: torch.device, budget: float = 10) -> float:
    """What `train` will take here, scoring included, from as many steps as `budget` seconds allow, two at least, and
    eight on a GPU, whose first ones compile and choose kernels."""
    begin, least = time.perf_counter(), 8 if device.type == "cuda" else 2
    trainer, data = Trainer(model, config, device), data.to(device)
    steps, marks = data.counts["train"] // config.batch_size, []
    for step, (images, labels) in enumerate(data.train_batches(config, 0)):
        trainer.step(images, labels, 0, step, steps).item()  # waits for the device
        marks.append(time.perf_counter())
        if step + 1 >= least and marks[-1] - marks[0] > 0.8 * budget:
            break
    trainer.ema.eval()
    images, _ = next(data.eval_batches("minival", config.resolution, 256))
    with torch.no_grad(), _autocast(config.precision, device):
        if device.type == "cuda":
            trainer.ema(images).sum().item()
        start = time.perf_counter()
        (trainer.ema(images) + trainer.ema(images)).sum().item()
    score = (time.perf_counter() - start) / 2 / len(images)  # of one image
    first, step = marks[0] - begin, float(np.median(np.diff(marks))) if len(marks) > 1 else marks[0] - begin
    return (
        first
        + config.epochs * steps * step
        + score * (config.epochs * data.counts["minival"] + 2 * data.counts["test"])
    )
