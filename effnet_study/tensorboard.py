"""Event files for TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def event_writer(run_dir: Path) -> Iterator[Callable[[Mapping], None]]:
    """Yield a function that writes a row of the history to new event files in run_dir/tensorboard. Old ones go."""
    from torch.utils.tensorboard import SummaryWriter

    for old in run_dir.glob("tensorboard/events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(run_dir / "tensorboard") as writer:

        def write(row: Mapping) -> None:
            for name, value in row.items():
                if name != "epoch":
                    split, _, kind = name.partition("_")
                    tag = f"{kind}/{split}" if split in ("train", "minival") else name
                    writer.add_scalar(tag, value, row["epoch"])
            writer.flush()

        yield write
