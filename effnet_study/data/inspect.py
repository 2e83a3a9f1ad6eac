"""What a data set is like: counts, sizes, repeated images, the state of its cache, and a grid of samples."""

import hashlib
from collections import Counter, defaultdict

import numpy as np

from effnet_study.data.dataset import ImageData
from effnet_study.files import drawn


def inspect_data(data: ImageData) -> dict:
    """Return what `describe_data` puts in words, as JSON's types. This reads every pixel.

    Counts of each class and split, sizes and modes of the files, mean and deviation, groups of images that are equal,
    and which blocks of the cache differ from the files, which are decoded again."""
    labels, indices, decoded = data.labels.numpy(), data.indices, data.decoded
    counts = {split: np.bincount(labels[index], minlength=len(data.classes)) for split, index in indices.items()}
    equal = defaultdict(list)  # digest of the pixels to images
    for i, split in sorted((i, split) for split, index in indices.items() for i in index.tolist()):
        image = {"image": data.files[i] if data.files else i, "split": split, "class": data.classes[labels[i]]}
        equal[hashlib.blake2b(data.images[i].numpy(), digest_size=16).digest()].append(image)
    cache = None
    if decoded.path:
        cache = {"path": str(decoded.path), "bytes": data.images.nbytes, "damaged_blocks": decoded.stale_blocks()}
    return {
        **data.describe(),
        "images_per_class": [
            {"class": name, **{split: int(count[c]) for split, count in counts.items()}}
            for c, name in enumerate(data.classes)
        ],
        **{name: dict(Counter(decoded.notes[name]).most_common()) for name in ("sizes", "modes")},
        "duplicates": [group for group in equal.values() if len(group) > 1],
        "cache": cache,
    }


def describe_data(facts: dict) -> str:
    """Put what `inspect_data` found in words."""
    groups, cache = facts["duplicates"], facts["cache"]
    lines = [f"{facts['title']}: {facts['classes']} classes, stored at {facts['stored_pixels'][0]} px"]
    for split, count in facts["counts"].items():
        per_class = [row[split] for row in facts["images_per_class"]]
        lines.append(f"  {split:<8} {count:>9,} images, {min(per_class)} to {max(per_class)} of each class")
    for name in ("sizes", "modes"):
        common = [f"{value} ({count:,})" for value, count in facts[name].items()]
        lines.append(f"  {name:<8} {', '.join(common[:5])}{', ...' * (len(common) > 5)}")
    for name in ("mean", "std"):
        lines.append(f"  {name:<8} {', '.join(f'{value:.2f}' for value in facts[name])} (of 255; RGB, training images)")
    leaks = [group for group in groups if len({image["split"] == "test" for image in group}) == 2]
    torn = [group for group in groups if len({image["class"] for image in group}) > 1]
    lines.append(
        f"  repeated {len(groups)} images occur more than once, {len(leaks)} of them both in test and outside, "
        f"{len(torn)} under different classes"
    )
    for group in (leaks + [group for group in torn if group not in leaks])[:5]:
        lines.append(f"           {' = '.join('{image} ({class}, {split})'.format(**image) for image in group)}")
    if cache:
        damaged = len(cache["damaged_blocks"])
        state = f"DIFFERS from the files in {damaged} blocks: delete it" if damaged else "equal to the files"
        lines.append(f"  cache    {cache['path']} ({cache['bytes'] / 1e9:.2f} GB, {state})")
    lines.append(f"  images, labels and splits have the fingerprint {facts['fingerprint']}")
    return "\n".join(lines)


def sample_grid(data: ImageData, classes: int = 12, columns: int = 10):
    """Return a matplotlib figure of stored training images, a row for each of `classes` classes spread over all."""
    from matplotlib.figure import Figure

    chosen = np.unique(np.linspace(0, len(data.classes) - 1, min(classes, len(data.classes))).round().astype(int))
    figure = Figure(figsize=(columns * 0.8 + 1.6, len(chosen) * 0.8), layout="constrained")
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(len(chosen), columns, squeeze=False, subplot_kw=bare)
    train = data.indices["train"]
    for row, c in zip(axes, chosen, strict=True):
        images = train[data.labels[train] == c]
        for ax, i in zip(row, images[:: max(1, len(images) // columns)].tolist(), strict=False):
            ax.imshow(data.images[i].numpy())
        row[0].set_ylabel(drawn(data.classes[c], 18), rotation=0, ha="right", va="center", fontsize=8)
    return figure
