"""A data set in memory: one uint8 tensor of images, labels, three splits, and the batches that training takes from it.

Batches come out on one device as normalised floats (N, 3, R, R) in channels-last memory, at the resolution R that the
network is trained and scored at.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from effnet_study.data.augment import AUGMENTATION_DEFAULTS, augment, draw, erase, mix, resize
from effnet_study.data.decode import Decoded


@dataclass(frozen=True)
class ImageData:
    """A data set. Its splits are "train", "minival" (held out from train, to choose a recipe by) and "test"."""

    name: str  # as given to load_data
    title: str  # as shown to people
    classes: tuple[str, ...]
    images: Tensor  # (N, H, W, 3) uint8; in memory, in a memory map, or on the device
    labels: Tensor  # (N,) int64
    indices: dict[str, Tensor]  # split to (n,) int64
    fingerprint: str  # of images, labels and splits
    mean: Tensor  # (3,) over the training images, in [0, 255]; its device is where batches come out
    std: Tensor  # (3,)
    decoded: Decoded  # the images as they were read, with notes of their files
    files: Sequence[str] = ()  # the file of each image; empty if there are no such files
    streamed: bool = False  # images, labels and indices stay in memory (or a memory map), and are read ahead

    @property
    def counts(self) -> dict[str, int]:
        """The number of images of each split."""
        return {split: len(index) for split, index in self.indices.items()}

    @property
    def device(self) -> torch.device:
        """The device on which batches are made."""
        return self.mean.device

    def without_test(self) -> "ImageData":
        """Return the same images with minival in the place of test."""
        return replace(self, indices=self.indices | {"test": self.indices["minival"]})

    def describe(self) -> dict:
        """Return what a run's record says of its data."""
        size = list(self.images.shape[1:3])
        facts = {"name": self.name, "title": self.title, "classes": len(self.classes), "stored_pixels": size}
        facts |= {"counts": self.counts, "fingerprint": self.fingerprint, "class_names": list(self.classes)}
        return facts | {"mean": self.mean.tolist(), "std": self.std.tolist()}  # a prediction needs them

    def to(self, device: torch.device | str) -> "ImageData":
        """Return this data set with its batches on a GPU, or itself if they are on `device` already.

        The images go there as a whole if they take at most half of its free memory. Otherwise they stay where they are,
        and threads read them ahead."""
        device = torch.empty(0, device=device).device
        if self.device == device:
            return self
        if device.type != "cuda":
            raise ValueError(
                f"device: expected a GPU for images that are on {self.device}, got {device}; load them again"
            )
        torch.cuda.empty_cache()  # what torch keeps for later would count as taken
        whole = self.images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
        names = ("mean", "std", "images", "labels") if whole else ("mean", "std")
        moved = {name: getattr(self, name).to(device) for name in names}
        if whole:
            moved["indices"] = {split: index.to(device) for split, index in self.indices.items()}
        return replace(self, **moved, streamed=not whole)

    def train_batches(
        self, config, epoch: int, start: int = 0, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's augmented batches from step `start` on: images (N, 3, R, R); labels (N,), or (N, classes) of
        mixed images.

        config: its resolution, batch_size, seed and augmentations are read. Order and draws depend on seed, epoch and
        step alone, whatever the device. The last, partial batch is left out; it holds other
        images in each epoch. shard: (i, n) yields the ith of n equal parts of every batch."""
        n, augmentations = config.batch_size, {name: getattr(config, name) for name in AUGMENTATION_DEFAULTS}
        order = torch.randperm(self.counts["train"], generator=_generator(config.seed, epoch))
        order = self.indices["train"][order.to(self.labels.device)]
        mixed = config.mixup > 0 or config.cutmix > 0
        # This process's rows of a batch; each is mixed with the next row, which may belong to another process
        part = torch.arange(n).view(shard[1], -1)[shard[0]]
        rows = torch.cat([part, (part + 1) % n]) if mixed and shard[1] > 1 else part
        steps, there = range(start, len(order) // n), rows.to(order.device)
        batches = self._read(order[step * n : (step + 1) * n][there] for step in steps)
        for step, (images, labels) in zip(steps, batches, strict=True):
            draws = draw(n, _generator(config.seed, epoch, step), **augmentations)
            # In parts of 512 images, because the intermediate results are many times as large as the images
            parts = [
                augment(some, config.resolution, {name: values[of] for name, values in draws.items()})
                for some, of in zip(images.split(512), rows.split(512), strict=True)
            ]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
            del parts  # frees their memory before the step is taken
            draws = {name: values[part] for name, values in draws.items()}
            if mixed:
                if len(rows) > len(part):
                    (images, others), (labels, their_labels) = images.chunk(2), labels.chunk(2)
                else:
                    others, their_labels = images.roll(-1, 0), labels.roll(-1, 0)
                images, labels = mix(images, labels, others, their_labels, draws, len(self.classes))
            images = self.normalise(images)
            yield (erase(images, draws) if config.erasing else images), labels

    def eval_batches(self, split: str, resolution: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images of a split in order, resized but not augmented: images (N, 3, R, R), labels (N,)."""
        for images, labels in self._read(self.indices[split].split(batch_size)):
            yield self.normalise(resize(images, resolution)), labels

    def _read(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield stored images and labels of each of `batches` (indices), on the device. If they are streamed, threads
        read some batches ahead into pinned memory, and a GPU copies the next batch beside its work on this one."""
        if not self.streamed:
            yield from ((self.images.index_select(0, index), self.labels.index_select(0, index)) for index in batches)
            return
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

        def read(index: Tensor) -> list[Tensor]:
            batch = self.images.index_select(0, index), self.labels.index_select(0, index)
            return [part.pin_memory() if stream else part for part in batch]

        def copy(batch: Future) -> tuple[list[Tensor], torch.cuda.Event | None]:
            with torch.cuda.stream(stream):
                parts = [part.to(self.device, non_blocking=True) for part in batch.result()]
                return parts, stream and stream.record_event()

        def copies() -> Iterator[tuple[list[Tensor], torch.cuda.Event | None]]:
            waiting = deque()
            with ThreadPoolExecutor(4) as pool:
                try:
                    for index in batches:
                        waiting.append(pool.submit(read, index))
                        if len(waiting) > min(8, 2**31 // (len(index) * self.images[0].nbytes)):  # or 2 GiB
                            yield copy(waiting.popleft())
                    yield from map(copy, waiting)
                finally:
                    pool.shutdown(cancel_futures=True)

        copied = copies()
        following = next(copied, None)
        while following:
            (images, labels), done = following
            following = next(copied, None)
            if done:  # the copy is waited for by the device, and not by the host
                current = torch.cuda.current_stream(self.device)
                current.wait_event(done)
                images.record_stream(current)
                labels.record_stream(current)
            yield images, labels

    def normalise(self, images: Tensor) -> Tensor:
        """Scale (N, 3, R, R) in [0, 255] to zero mean and unit variance per channel, in channels-last memory."""
        normal = torch.empty_like(images, memory_format=torch.channels_last)
        return torch.addcmul((-self.mean / self.std).view(3, 1, 1), images, (1 / self.std).view(3, 1, 1), out=normal)


def _generator(seed: int, epoch: int, step: int | None = None) -> torch.Generator:
    """Return the random numbers of an epoch's order (without a step) or of one step's augmentation."""
    words = np.random.SeedSequence([seed, epoch, *([] if step is None else [step + 1])])
    return torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0] >> 1))
