"""Benchmarks: training steps of our network and its peers, the input path, and the time that a run will take.

Networks are measured side by side: each has a process of its own, one works at a time and then gives its memory back,
and the order changes every round, so that a slow minute of the machine hits all of them.
"""

import contextlib
import ctypes
import logging
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effnet_lib import TABLE7, EfficientNet, Scaling, TrainConfig, autocast
from effnet_study.data.load import load_data
from effnet_study.execution.notebook import run_notebook
from effnet_study.files import RESULTS, save_table, write_json
from effnet_study.machine import choose_device, device_name, environment, keep_freed_memory, peak_memory, prepare
from effnet_study.methods import scaled_cost
from effnet_study.run import Run
from effnet_study.trainers import count_steps, execution_mode, prepare_trainer

# ---- 1. Training steps ---------------------------------------------------------------------------------------------


QUICK_BATCHES = {224: 256, 64: 1024}  # pixels: images in a batch, so that a large GPU is busy


@dataclass(frozen=True)
class Contender:
    """A network and how it is trained: ours by `Trainer`, a peer's B0 as its users would train it."""

    source: str = "ours"  # ours, torchvision or timm
    resolution: int = 224
    batch_size: int = 128
    scaling: Scaling = TABLE7["baseline"]  # of ours
    run: Run | None = field(default=None, hash=False)  # ours: this run's network and recipe instead of these
    accelerated: bool = True  # ours on a CPU: with the kernels of cpu_kernels.py
    layout: torch.memory_format = torch.channels_last  # a peer's; ours is always this one
    keep_memory: bool = True  # a peer's process keeps freed memory; ours always does
    compile: str = "auto"  # ours: as in TrainConfig; a peer's network is compiled as a whole if "blocks"

    def parts(self, device: torch.device) -> dict[str, Callable[[], object]]:
        """Build the network. Return what is timed: forward; gradient (forward and backward); step (gradient and
        optimizer, ours with the moving average). No call waits for the device. And mode: how steps are executed.

        Images are random. There are 1000 classes and SGD with momentum, unless `run` says otherwise. A GPU uses mixed
        precision."""
        # Compiling imports this module, which warns of a CUDA toolkit without a GPU in the middle of the notebook
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        images = torch.randn(self.batch_size, 3, self.resolution, self.resolution, device=device)
        images = images.contiguous(memory_format=self.layout)
        classes = self.run.profile.num_classes if self.run else 1000
        labels = torch.randint(classes, (self.batch_size,), device=device)

        def forward() -> Tensor:
            with autocast("auto", device):
                return model(images)

        def backward() -> None:
            F.cross_entropy(forward(), labels).backward()

        def step() -> None:
            backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if self.source == "ours":
            recipe = self.run.config if self.run else TrainConfig(optimizer="sgd", lr=0.01)
            config = recipe.replace(resolution=self.resolution, batch_size=self.batch_size, compile=self.compile)
            if self.run:
                model = self.run.model(classes)
            else:
                model = EfficientNet(self.scaling, classes, **config.model_options())
            trainer = prepare_trainer(model, config, device, accelerated=self.accelerated)
            model, optimizer = trainer.model, trainer.optimizer
            backward = partial(trainer.backward, images, labels)
            step, mode = partial(trainer.step, images, labels, epoch=0, step=1, steps=10**6), lambda: trainer.mode
        else:
            model = self._peer().train().to(device, memory_format=self.layout)
            if device.type == "cuda":
                torch.backends.cudnn.benchmark = True
            elif self.keep_memory:
                keep_freed_memory()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            model, mode = torch.compile(model) if self.compile == "blocks" else model, lambda: self.compile

        def gradient() -> None:
            backward()
            optimizer.zero_grad(set_to_none=True)

        return {"forward": forward, "gradient": gradient, "step": step, "mode": mode}

    def _peer(self) -> nn.Module:
        if self.source == "timm":
            from timm import create_model

            return create_model("efficientnet_b0", drop_rate=0.2, drop_path_rate=0.2)
        from torchvision.models import get_model

        return get_model("efficientnet_b0", weights=None)


def measure(
    contenders: Mapping[str, Contender], device: str, rounds: int, repeat: int = 1, parts: Sequence[str] = ("step",)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Time the contenders side by side.

    Returns a table of times (contender, round, part, and the seconds of one call, the mean of `repeat`), and a table of
    contenders (the index): first_step_seconds, with all compiling; peak_memory_GiB; mode."""
    spawn, order, threads = multiprocessing.get_context("spawn"), random.Random(0), torch.get_num_threads()
    rows, about = [], {}
    with contextlib.ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in contenders}

        def ask(name: str, part: str, repeat: int, warm: bool) -> dict[str, float]:
            try:
                return pools[name].submit(time_part, contenders[name], device, threads, part, repeat, warm).result()
            except Exception as error:
                raise RuntimeError(f"benchmark of {name}: {type(error).__name__}: {error}") from error

        for name in contenders:
            about[name] = {"first_step_seconds": ask(name, "step", 1, warm=False)["seconds"]}
        for turn in range(rounds + 1):  # the first one warms up
            for name in order.sample(list(contenders), len(contenders)):
                for part in parts:
                    answer = ask(name, part, repeat, warm=True)
                    rows.append({"contender": name, "round": turn, "part": part, "seconds": answer.pop("seconds")})
                    about[name] |= answer
    times = pd.DataFrame(rows)
    return times[times["round"] > 0], pd.DataFrame.from_dict(about, orient="index")


built = cache(Contender.parts)  # each contender once in its process


def time_part(contender: Contender, device: str, threads: int, part: str, repeat: int, warm: bool) -> dict[str, float]:
    """Time calls of a part in this process, which is the contender's. Then give its memory back, for the others.
    warm: call it once before the measurement, because another process had the caches until now."""
    device = torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.set_num_threads(threads)
    parts = built(contender, device)
    call = parts[part]
    if warm:
        call()
    wait()
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    wait()
    seconds = (time.perf_counter() - begin) / repeat
    torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # there is no glibc
        ctypes.CDLL(None).malloc_trim(0)
    return {"seconds": seconds, "peak_memory_GiB": peak_memory(device) / 2**30, "mode": parts["mode"]()}


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a plain copy on this device reads and writes."""
    from torch.utils.benchmark import Timer  # it warns of a CUDA toolkit without a GPU

    source = torch.ones(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    names = {"source": source, "target": torch.empty_like(source)}
    timer = Timer("target.copy_(source)", globals=names, num_threads=torch.get_num_threads())
    return 2 * len(source) / timer.blocked_autorange(min_run_time=1).median


def least_bytes(px: int, device: torch.device) -> int:
    """Return the bytes of memory traffic that training needs at least for an image of B0: 06_throughput explains the 14
    passes."""
    return 14 * scaled_cost(TABLE7["baseline"], px).activations * (2 if device.type == "cuda" else 4)


def quick_bench(
    results: str | Path | None = None,
    *,
    device: str | None = None,
    batches: Mapping[int, int] = QUICK_BATCHES,
    modes: Sequence[str] = ("never", "blocks", "graph"),
    rounds: int = 5,
) -> pd.DataFrame:
    """Time B0's step in each mode of TrainConfig.compile, and timm's compiled one. Save and return a row for each.

    batches: images in a batch by resolution. limit_percent: of the images per second at which a plain copy on the
    device moves `least_bytes`. The table goes to RESULTS/throughput/DEVICE/quick.csv."""
    place = choose_device(device)
    bandwidth, tables = copy_bandwidth(place), []
    for px, images in batches.items():
        size = {"resolution": px, "batch_size": images}
        contenders = {f"ours, {mode}": Contender(**size, compile=mode) for mode in modes}
        contenders["timm, compiled"] = Contender("timm", **size, compile="blocks")
        times, about = measure(contenders, str(place), rounds, repeat=10 if place.type == "cuda" else 1)
        about["images_per_second"] = images / times.groupby("contender")["seconds"].median()
        about["limit_percent"] = 100 * about["images_per_second"] * least_bytes(px, place) / bandwidth
        tables.append(about.rename_axis("network").reset_index().assign(px=px))
    folder, table = throughput_folder(place, results), pd.concat(tables, ignore_index=True)
    save_table(table, folder / "quick.csv")
    write_json(folder / "quick.json", environment(place) | {"rounds": rounds})
    return table


# ---- 2. Input ------------------------------------------------------------------------------------------------------


def _write_tiles(folder: Path, px: int) -> None:
    """Cut scikit-learn's two photographs into overlapping JPEG tiles: folder/PHOTOGRAPH/NUMBER.jpg."""
    from sklearn.datasets import load_sample_images

    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        height, width, _ = photograph.shape
        corners = [(y, x) for y in range(0, height - px, 12) for x in range(0, width - px, 12)]
        for number, (y, x) in enumerate(corners):
            Image.fromarray(photograph[y : y + px, x : x + px]).save(folder / name / f"{number}.jpg", quality=90)


def measure_input(px: int, device: torch.device, batch_size: int, rounds: int, least: float) -> pd.DataFrame:
    """Time the input path alone, from stored images to batches for training on the device: a random resized crop and
    flip by PIL in a DataLoader and by ours, and ours with other augmentations.

    Returns columns path, round, images_per_second; a measurement is at least one pass and `least` seconds."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    prepare(device)
    with tempfile.TemporaryDirectory() as place:
        _write_tiles(Path(place) / "tiles", px)
        data = load_data("folder:tiles", place, size=px, test=0.05, cache=place).to(device)
        crop = [transforms.RandomResizedCrop(px, scale=(0.25, 1)), transforms.RandomHorizontalFlip()]
        normalise = transforms.Normalize((data.mean / 255).tolist(), (data.std / 255).tolist())
        field = transforms.Compose([*crop, transforms.ToTensor(), normalise])
        files = ImageFolder(Path(place) / "tiles", field)
        pixels = {path: np.asarray(Image.open(path)) for path, _ in files.samples}
        from_memory = transforms.Compose([transforms.ToPILImage(), field])
        decoded = ImageFolder(files.root, from_memory, loader=pixels.get)
        options = {"batch_size": batch_size, "shuffle": True, "drop_last": True, "num_workers": 2}
        options |= {"persistent_workers": True, "pin_memory": device.type == "cuda"}
        passes = {
            "PIL, JPEG files, 2 workers": partial(iter, DataLoader(files, **options)),
            "PIL, images in memory, 2 workers": partial(iter, DataLoader(decoded, **options)),
        }
        for name, changes in {
            "crop and flip": {},
            "translation and flip": {"crop_area": 1.0, "translate": 0.125},
            "crop, flip, RandAugment": {"randaugment": 9},
            "crop, flip, mixup, CutMix": {"mixup": 0.2, "cutmix": 1.0},
        }.items():
            config = TrainConfig(resolution=px, batch_size=batch_size, **changes)
            passes[f"ours: {name}"] = partial(data.train_batches, config, 0)
        rows, order = [], random.Random(0)
        for turn in range(rounds + 1):  # the first one warms up
            for name in order.sample(list(passes), len(passes)):
                images, begin, seconds = 0, time.perf_counter(), 0.0
                while not images or seconds < least:
                    for batch, _ in passes[name]():
                        images += len(batch.to(device, non_blocking=True))
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds = time.perf_counter() - begin
                rows.append({"path": name, "round": turn, "images_per_second": images / seconds})
    measured = pd.DataFrame(rows)
    return measured[measured["round"] > 0]


# ---- 3. The time of a run ------------------------------------------------------------------------------------------


def estimate_seconds(
    model: nn.Module, data, config: TrainConfig, device: torch.device, budget: float = 10, processes: int = 1
) -> float:
    """Estimate the seconds that `training.train` will take here, scoring included, from as many steps as `budget`
    seconds allow: at least two, on a GPU at least eight, because the first ones compile and choose kernels.
    processes: GPUs that share each step. One share is measured, without the exchange of gradients."""
    marks, least = [time.perf_counter()], 8 if device.type == "cuda" else 2
    steps = count_steps(data, config)
    config = config.replace(compile=execution_mode(config, device, processes > 1))
    trainer, data = prepare_trainer(model, config, device), data.to(device)
    for step, (images, labels) in enumerate(data.train_batches(config, 0, shard=(0, processes))):
        trainer.step(images, labels, 0, step, steps).item()  # waits for the device
        marks.append(time.perf_counter())
        if step + 1 >= least and marks[-1] - marks[1] > 0.8 * budget:
            break
    first, *others = np.diff(marks)
    per_step = np.median(others or [first])
    trainer.ema.eval()
    images, _ = next(data.eval_batches("minival", config.resolution, 256))
    with torch.no_grad(), autocast(config.precision, device):
        trainer.ema(images).sum().item()  # the first time is slower
        start = time.perf_counter()
        trainer.ema(images).sum().item()
    per_image = (time.perf_counter() - start) / len(images)
    scored = config.epochs * data.counts["minival"] + 2 * data.counts["test"]
    return first + config.epochs * steps * per_step + per_image * scored


def bench(
    results: str | Path | None = None, *, device: str | None = None, rounds: int = 15, models: bool = False
) -> None:
    """Execute 06_throughput on this device, or 07_models, and print its tables."""
    kind = choose_device(device)
    folder, notebook = throughput_folder(kind, results), "07_models" if models else "06_throughput"
    parameters = {"device": str(kind), "results": results and str(Path(results).absolute())}
    run_notebook(notebook, folder / f"{notebook}.ipynb", parameters | ({} if models else {"rounds": rounds}))
    for name in ("models",) if models else ("peers", "methods"):
        print(f"\n{pd.read_csv(folder / f'{name}.csv').to_string(index=False, na_rep='-')}", flush=True)


def throughput_folder(device: torch.device, results: str | Path | None = None) -> Path:
    """Return the folder for measurements of this device."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path(results or RESULTS).absolute() / "throughput" / name
