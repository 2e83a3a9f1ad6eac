"""Train as one of several processes, for test_training.py: python tests/shared_run.py FOLDER LIMIT

LIMIT: the second process alone runs out of memory at more images than this, after ten of its training batches.
"""

import sys

import torch

from effnet_lib import EfficientNet, Scaling, TrainConfig
from effnet_study.data.load import load_data
from effnet_study.training import train


class Limited(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, limit: int):
        super().__init__()
        self.inner, self.limit, self.calls = inner, limit, 0

    def forward(self, x):
        self.calls += x.device.type == "cpu" and self.training
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if self.training and self.calls > 10 and rank == 1 and len(x) > self.limit:
            raise torch.OutOfMemoryError("simulated")
        return self.inner(x)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = TrainConfig(resolution=16, epochs=4, batch_size=24, accumulation=2, optimizer="sgd", lr=0.02)
    inner = EfficientNet(Scaling(depth=0.3, width=0.25), 10, stem_stride=1, **config.model_options())
    data = load_data("digits", size=16, train_per_class=12)
    train(Limited(inner, int(sys.argv[2])), data, config, sys.argv[1], device="cpu")
