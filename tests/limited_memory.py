"""Train B0 in a process whose memory is limited, for test_training.py: python tests/limited_memory.py FOLDER"""

import re
import resource
import sys
from pathlib import Path

import torch

from effnet_lib import EfficientNet, TrainConfig
from effnet_study.training import train


class RandomImages:
    """Random images on a device: one batch to train on, four images to score."""

    def __init__(self, count: int, pixels: int, device: str = "cpu"):
        self.counts = {"train": count, "minival": 4, "test": 4}
        self.images = torch.randn(count, 3, pixels, pixels, device=device)
        self.labels = torch.arange(count, device=device) % 10

    def to(self, device):
        return self

    def describe(self):
        return {"title": "random", "classes": 10, "counts": self.counts, "fingerprint": "random"}

    def train_batches(self, config, epoch, start=0):
        if start == 0:
            yield self.images, self.labels

    def eval_batches(self, split, resolution, batch_size):
        yield self.images[:4], self.labels[:4]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    settings = {"resolution": 64, "epochs": 1}
    small = TrainConfig(batch_size=4, **settings)
    train(EfficientNet(num_classes=10), RandomImages(4, 64), small, folder / "small")  # what torch takes once
    data, model = RandomImages(128, 64), EfficientNet(num_classes=10)
    size = 1024 * int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    half = 400 * 2**20  # of what a batch of 128 needs: enough for small ones everywhere, for the whole one nowhere
    resource.setrlimit(resource.RLIMIT_AS, (size + half, resource.RLIM_INFINITY))
    train(model, data, TrainConfig(batch_size=128, **settings), folder / "limited")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
