"""The library alone. test_library_alone.py copies this file and effnet_lib.py into a folder and runs it there."""

import sys

import torch

import effnet_lib
from effnet_lib import EfficientNet, Scaling, TrainConfig, Trainer, count_cost, fit

torch.manual_seed(0)


class RandomImages:
    images, labels, counts = torch.randn(64, 3, 16, 16), torch.randint(10, (64,)), {"train": 64}

    def train_batches(self, config, epoch, start):
        yield from zip(self.images.split(16)[start:], self.labels.split(16)[start:], strict=True)


network = EfficientNet(Scaling(depth=0.3, width=0.25), num_classes=10, stem_stride=1)
cost = count_cost(network, resolution=16)
config = TrainConfig(resolution=16, epochs=8, batch_size=16, optimizer="sgd", lr=0.1, norm_momentum=0.1)
events = list(fit(Trainer(network, config, torch.device("cpu")), RandomImages()))
losses = [event.loss.item() for event in events if event.loss is not None]
print(effnet_lib.__file__)
print(cost.flops, len(losses), sum(losses[:4]) / 4, sum(losses[-4:]) / 4)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
