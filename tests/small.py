"""A network and a recipe whose training takes half a second, for tests of what happens around training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_lib import TrainConfig


class SmallNet(nn.Module):
    """Convolution, batch norm, dropout, one matrix: all that a checkpoint has to keep. It learns the digits."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8, momentum=0.1)
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = F.relu(self.norm(self.conv(x)))
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)  # (N, 128)
        return self.classifier(self.dropout(x))


def small_net(seed: int = 0, **options) -> SmallNet:
    torch.manual_seed(seed)
    return SmallNet(**options)


def small_config(**changes) -> TrainConfig:
    """A recipe by which the small network learns the digits: three epochs of ten steps."""
    values = {"resolution": 16, "epochs": 3, "batch_size": 24, "optimizer": "sgd", "lr": 0.05, "ema_decay": 0.9}
    return TrainConfig(**values | {"crop_area": 0.8, "flip": False} | changes)
