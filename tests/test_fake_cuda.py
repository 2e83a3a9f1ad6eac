"""The CUDA path without a GPU: it mixes no devices, waits for none, keeps channels-last memory, launches few kernels.

tests/fake_cuda.py explains what is fake. Everything fake happens in another process.
"""

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from unittest import mock

import fake_cuda
import pytest
import torch

from effnet_lib import TABLE7, EfficientNet, Scaling, TrainConfig, Trainer, evaluate, fit, round_resolution
from effnet_study import trainers
from effnet_study.data.dataset import ImageData
from effnet_study.machine import compile_blocks
from effnet_study.parallel import Group
from effnet_study.stop import Stop
from effnet_study.training import Training

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
BATCH, CLASSES = 256, 200
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built for CUDA"),
    pytest.mark.xdist_group("faked"),
]


@pytest.fixture(scope="module")
def faked(tmp_path_factory):
    """A function that calls another one in a process which finds the stubs of fake_cuda.c, if they can be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        if COMPILER:
            stubs = tmp_path_factory.mktemp("stubs") / "libcuda.so.1"
            source = Path(fake_cuda.__file__).with_suffix(".c")
            command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{stubs.name}", "-o", stubs, source]
            subprocess.run(command, check=True)
            patch.setenv("LD_PRELOAD", " ".join(filter(None, [str(stubs), os.environ.get("LD_PRELOAD")])))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *arguments: pool.submit(readable, function, *arguments).result()


# ---- In that process


def readable(function, *arguments):
    """Call a function. An error of fake tensors cannot leave the process, so its text does."""
    try:
        return function(*arguments)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None


def make_data(pixels: int, streamed: bool = False) -> ImageData:
    """Make images that are on the device, or in memory if they are streamed."""
    place, n = "cpu" if streamed else "cuda", 5 * BATCH
    images = torch.zeros(n, pixels, pixels, 3, dtype=torch.uint8, device=place)
    labels = torch.zeros(n, dtype=torch.long, device=place)
    indices = {split: torch.arange(n, device=place) for split in ("train", "minival", "test")}
    mean, std = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    classes = tuple(map(str, range(CLASSES)))
    return ImageData("fake", "fake", classes, images, labels, indices, "", mean, std, None, streamed=streamed)


def note_logits(model: EfficientNet, report: dict) -> None:
    """Write the type of the logits of a network, and of its copies, into a report."""
    report["logits"] = set()
    model.classifier.register_forward_hook(lambda module, inputs, output: report["logits"].add(str(output.dtype)))


def watch_training(scaling: Scaling, changes: dict, folder: Path, steps: range = range(2, 3)) -> dict:
    """Report what some steps (from 0) of a run do, from making their batches to looking at their losses."""
    warnings.simplefilter("ignore")  # some are about fake tensors
    config, report = TrainConfig(**{"resolution": 64, "batch_size": BATCH, "compile": "never"} | changes), {}
    model = EfficientNet(scaling, CLASSES, **config.model_options())
    note_logits(model, report)
    with fake_cuda.fake_cuda(), fake_cuda.Watch() as watch:
        device = torch.device("cuda", 0)
        data, group, stop = make_data(64), Group(device), Stop()
        run = Training(model, data, config, folder, device, group, {}, "", stop, lambda row: None)
        run.load()
        run.begin_epoch()
        for event in islice(fit(run.trainer, run), steps.stop):
            run.after_step(event)
            if event.step <= steps.start:
                watch.reset()
    return report | watch.report()


def watch_captured(*arguments) -> dict:
    """Do as `watch_training`, with one plain step before the capture."""
    with mock.patch.object(trainers, "WARM_UP", 1):
        return watch_training(*arguments)


def watch_batch(pixels: int, changes: dict, streamed: bool = False) -> dict:
    """Report what the second training batch of an epoch does."""
    config = TrainConfig(resolution=40, batch_size=BATCH, **{"crop_area": 1.0, "flip": False} | changes)
    with fake_cuda.fake_cuda(), fake_cuda.Watch() as watch:
        batches = make_data(pixels, streamed).train_batches(config, 0)
        next(batches)
        watch.reset()
        images, labels = next(batches)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.device.type == labels.device.type == "cuda"
        copies, waited = torch.cuda.Stream.return_value.record_event, torch.cuda.current_stream.return_value.wait_event
        return watch.report() | {"copied": copies.call_count, "waited": waited.call_count}


def generate_code(scaling: Scaling) -> tuple[int, list[str]]:
    """Take a step of a network at its resolution in the paper. Return its number of different parts: stem, head,
    and the first and further blocks of each stage; and the code that is generated for them."""
    warnings.simplefilter("ignore")
    px = round_resolution(scaling.resolution)
    config = TrainConfig(resolution=px, batch_size=64)
    with fake_cuda.fake_cuda(), fake_cuda.InductorCode() as code:
        model = EfficientNet(scaling, **config.model_options())
        trainer = Trainer(model, config, torch.device("cuda", 0))
        compile_blocks(trainer.model, backend=code)
        images = torch.empty(64, 3, px, px, device="cuda").contiguous(memory_format=torch.channels_last)
        trainer.step(images, torch.zeros(64, dtype=torch.long, device="cuda"), 0, 0, 10)
    return 2 + sum(min(2, len(stage)) for stage in model.stages), list(code)


class BatchesEnd(Exception):
    pass


def watch_evaluation(pixels: int) -> dict:
    """Report what scoring does with five batches, until it reads the scores."""
    report = {}
    model = EfficientNet(Scaling(0.3, 0.25), CLASSES, stem_stride=1)
    note_logits(model, report)
    with fake_cuda.fake_cuda():
        model.to("cuda", memory_format=torch.channels_last)
        data = make_data(pixels)

        def batches(*arguments):
            yield from data.eval_batches(*arguments)
            raise BatchesEnd

        with fake_cuda.Watch() as watch, pytest.raises(BatchesEnd):
            evaluate(model, mock.Mock(eval_batches=batches), "test", 40, batch_size=BATCH)
    return report | watch.report()


def is_streamed_beside_a_cache() -> bool:
    """Tell whether images are streamed to a device whose memory torch keeps, but does not use."""
    with fake_cuda.fake_cuda():
        data = dataclasses.replace(make_data(8, streamed=True), mean=torch.zeros(3), std=torch.ones(3), streamed=False)
        free = mock.Mock(side_effect=lambda device: (2**40 if torch.cuda.empty_cache.called else 0, 2**40))
        with mock.patch.object(torch.cuda, "mem_get_info", free):
            return data.to("cuda").streamed


# ---- Tests


def check(report: dict, launches: int) -> None:
    """Compare a report with a budget of kernel launches, which is near the number that was seen."""
    assert not report["waits"]
    # Of the network alone. The gradient of its last feature map is lost too, but that map is small
    assert not [where for where in report["layouts"] if "augment.py" not in where and "1280, 2, 2)" not in where]
    assert report.get("logits", {"torch.float32"}) == {"torch.float32"}  # in bf16 the best two may be equal
    assert 0.9 * launches < report["launches"] <= launches


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the stubs of a driver")
@pytest.mark.parametrize(
    "method, changes, launches",
    [
        ("baseline", {}, 1260),
        ("baseline", {"accumulation": 2}, 2620),
        ("baseline", {"optimizer": "sgd", "clip_norm": 1.0, "randaugment": 9, "mixup": 0.2}, 1970),
        ("depth", {}, 4810),
    ],
    ids=str,
)
def test_a_training_step(faked, tmp_path, method, changes, launches):
    check(faked(watch_training, TABLE7[method], changes, tmp_path), launches)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the stubs of a driver")
@pytest.mark.parametrize("method", ["depth", "width", "resolution", "compound"])  # depth has the baseline's parts
def test_code_is_generated_for_every_part(faked, method):
    parts, code = faked(generate_code, TABLE7[method])
    assert len(code) == 2 * parts  # forward and backward, and equal blocks share it
    assert all("triton_" in text and "def call(" in text for text in code)
    assert any("aten.rand" in text for text in code)  # stochastic depth draws as without compiling
    assert not any("tl.rand" in text or "inductor_seed" in text for text in code)


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler for the stubs of a driver")
@pytest.mark.parametrize("method, captured, left", [("baseline", 1120, 125), ("depth", 4500, 275)])
def test_a_captured_step(faked, tmp_path, method, captured, left):
    """The second step captures, the third replays. The host neither reads nor writes anything inside the graph."""
    changes, scaling = {"compile": "auto", "optimizer": "rmsprop"}, TABLE7[method]
    second, third = (faked(watch_captured, scaling, changes, tmp_path, step) for step in (range(1, 2), range(2, 3)))
    assert not second["waits"] and 0.9 * captured < second["captured"] <= captured
    assert not third["waits"] and not third["captured"] and 0.9 * left < third["launches"] <= left


@pytest.mark.parametrize(
    "pixels, changes, launches",
    [
        (40, {}, 9),
        (64, {}, 51),
        (64, {"crop_area": 0.25, "flip": True}, 52),
        (40, {"translate": 0.125, "flip": True}, 47),
        (64, {"rotate": 10.0}, 125),
        (64, {"color_jitter": 0.4}, 85),
        (64, {"hue": 0.1}, 135),
        (64, {"erasing": 0.5}, 65),
        (64, {"mixup": 0.2, "cutmix": 1.0}, 85),
        (64, {"randaugment": 9}, 800),
    ],
    ids=str,
)
def test_a_training_batch(faked, pixels, changes, launches):
    check(faked(watch_batch, pixels, changes), launches)


def test_a_streamed_batch(faked):
    report = faked(watch_batch, 64, {"crop_area": 0.25, "flip": True}, True)
    check(report, 51)
    assert report["copied"] == 3 and report["waited"] == 2  # the third batch is copied before the second is used


@pytest.mark.parametrize("pixels, launches", [(40, 1260), (64, 1470)])
def test_an_evaluation(faked, pixels, launches):
    check(faked(watch_evaluation, pixels), launches)


def test_data_goes_to_the_device_into_memory_that_torch_only_keeps(faked):
    assert not faked(is_streamed_beside_a_cache)
