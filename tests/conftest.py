"""Shared small things: a tiny network's recipe, a data set in memory, a study profile that runs in seconds."""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import effnet_lib
from effnet_study import record as record_module
from effnet_study.data import sources
from effnet_study.data.load import load_data

matplotlib.use("Agg")
pytest.register_assert_rewrite("documents")  # shared fixtures with assertions
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, and so are the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))  # else as asked, where other work goes on

SMALL_PROFILE = {
    "title": "Tiny",
    "purpose": "check",
    "data": {"name": "digits", "size": 16, "train_per_class": 4},
    "base_resolution": 16,
    "stem_stride": 2,
    "methods": ["baseline", "depth", "width", "resolution", "compound"],
    "seeds": [0],
    "train": {  # each at another value than the default, so that a lost one is noticed
        "epochs": 1,
        "batch_size": 20,
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.85,
        "weight_decay": 1.0e-4,
        "schedule": "linear",
        "final_lr_fraction": 0.01,
        "warmup_fraction": 0.1,
        "label_smoothing": 0.05,
        "dropout": 0.1,
        "drop_path": 0.1,
        "zero_init_residual": True,
        "norm_momentum": 0.1,
        "clip_norm": 5.0,
        "ema_decay": 0.9,
        "crop_area": 0.8,
        "flip": False,
        "translate": 0.1,
        "erasing": 0.1,
        "mixup": 0.1,
        "cutmix": 0.1,
    },
}


SHARED = ("executed", "benched", "rebuilt", "trained", "base_end", "lab", "undisturbed", "probed", "kept_together")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Let one worker run all tests that share a fixture which takes long to make. Skip what needs a GPU without one."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if shared := next((name for name in SHARED if name in item.fixturenames), None):
            item.add_marker(pytest.mark.xdist_group(shared))


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item):
    """Skip what begins after $EFFNET_TESTS_UNTIL, a Unix time."""
    if time.time() > float(os.environ.get("EFFNET_TESTS_UNTIL", "inf")):
        pytest.skip("the time for tests is over")


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, or else the test is skipped."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium, or another package that brings one")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def digits():
    return load_data("digits", size=16, train_per_class=24)


@pytest.fixture
def tiny_model():
    """A function that builds the smallest network of the family, its weights drawn by `seed`."""

    def build(seed: int = 0, num_classes: int = 10, **options) -> effnet_lib.EfficientNet:
        torch.manual_seed(seed)
        scaling, start = effnet_lib.Scaling(depth=0.3, width=0.25), {"zero_init_residual": True, "norm_momentum": 0.1}
        return effnet_lib.EfficientNet(scaling, num_classes, stem_stride=1, **start | options)

    return build


@pytest.fixture
def recipe():
    """A function that makes a TrainConfig of a few quick steps, in which the tiny network learns the digits."""

    def make(**changes) -> effnet_lib.TrainConfig:
        values = {"resolution": 16, "epochs": 3, "batch_size": 12, "optimizer": "sgd", "lr": 0.05, "ema_decay": 0.9}
        values |= {"norm_momentum": 0.1, "zero_init_residual": True, "crop_area": 0.8, "flip": False}
        return effnet_lib.TrainConfig(**values | changes)

    return make


@pytest.fixture
def profile_file(tmp_path):
    """A function that writes a small, valid profile with some keys changed (None removes one); returns its path."""

    def write(name: str = "tiny", **changes):
        values = {key: value for key, value in (SMALL_PROFILE | changes).items() if value is not None}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def image_folder(tmp_path):
    """A function that writes PATH/{train,test}/{ant,bee}/N.png of random pixels and returns PATH."""

    def write(parts=("train", "test"), classes=("ant", "bee"), count=10, size=(12, 12)):
        rng = np.random.default_rng(0)
        for part in parts:
            for name in classes:
                folder = tmp_path / "pictures" / part / name
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        return tmp_path / "pictures"

    return write


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A function that serves an archive as if a data set's publisher did, and makes it the one that is expected."""
    servers = []

    def publish(name, archive):
        handler = partial(SimpleHTTPRequestHandler, directory=archive.parent)
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        known = sources.DATA_SETS[name]
        archive = dataclasses.replace(known.archive, url=url, md5=md5)
        monkeypatch.setitem(sources.DATA_SETS, name, dataclasses.replace(known, archive=archive))

    yield publish
    for server in servers:
        server.shutdown()
        server.server_close()


def write_record(run, top1=50.0, **changes):
    """Write the record of a finished run that never took place, with some entries changed."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    record = {"status": "finished", "config": dict(run.config), "seed": run.seed}
    record |= {"cost": {"params": 1, "flops": 2, "activations": 3}, "minival": {"top1": 40.0}, "micro_batch": 20}
    record |= {"test": {"top1": top1, "top5": 90.0, "loss": 1.0}, "test_raw": {"top1": 45.0}}
    counts = {"train": 9, "minival": 9, "test": 1000}
    record |= {"dataset": {"title": "T", "classes": 10, "counts": counts}, "git": {"commit": "abc"}}
    record |= {"versions": {"python": "3", "torch": "2"}}
    record |= {"seconds": 9.0, "images_per_second": 7.0, "peak_memory_bytes": 5, "device": {"name": "box"}}
    record |= {"started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T04:04:05+00:00"}
    record_module.write_record(run.run_dir, record | changes)


class Disturbed:
    """A data set in which something happens in the middle of an epoch: `act(images)` gives the images to go on with."""

    def __init__(self, data, act, epoch=1, step=2):
        self.data, self.act, self.where = data, act, (epoch, step)

    def __getattr__(self, name):
        return getattr(self.data, name)

    def to(self, device):
        return self

    def train_batches(self, config, epoch, start=0):
        for step, (images, labels) in enumerate(self.data.train_batches(config, epoch, start), start):
            yield (self.act(images) if (epoch, step) == self.where else images), labels
