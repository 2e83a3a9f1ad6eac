"""A trained network put to use: predictions for image files, export to ONNX or torch.export, and the check of
pretrained weights against torchvision's published accuracy on ImageNet."""

import io
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from effnet_augment import resize
from effnet_data import data_root
from effnet_images import read_image, reason
from effnet_lib import (
    NEIGHBOURS,
    VARIANTS,
    EfficientNet,
    Scaling,
    TrainConfig,
    choose_device,
    create_model,
    load_trained,
    published_weights,
    read_record,
    set_torchvision_eps,
    unknown_name,
)
from effnet_records import replace_file
from effnet_runs import network


@dataclass(frozen=True)
class Classifier:
    """A network, its classes, and how a file becomes its input."""

    model: nn.Module  # of images (N, 3, R, R) in [0, 255], RGB, which it normalises itself
    classes: tuple[str, ...]
    resolution: int  # R
    prepare: Callable[[Path], Tensor]  # a file to (3, R, R) in [0, 255]
    about: dict  # where it comes from


class _Normalised(nn.Module):
    """A network that takes pixels in [0, 255]."""

    def __init__(self, network: nn.Module, mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, R, R)
        return self.network((images - self.mean) / self.std)  # (N, classes)


def load_run(source: str | Path) -> tuple[nn.Module, dict]:
    """The network of a finished run (its folder, or its run.json) with its final EMA weights, and its record.

    ValueError if the record does not say enough; FileNotFoundError if there is no run, or no weights.
    """
    folder = Path(source).parent if Path(source).name == "run.json" else Path(source)
    record = read_record(folder)
    if record is None:
        raise FileNotFoundError(f"{folder}: expected the folder of a finished run, with a run.json")
    if record["status"] != "finished":
        raise ValueError(f"{folder}: expected a finished run, this one is {record['status']}")
    for part in ("coefficients", "stem_stride"):
        if part not in record:
            raise ValueError(f"{folder}/run.json does not say its {part}: it is of an older version; train it again")
    config = replace(TrainConfig.from_dict(record["config"]), pretrained=False, freeze=False)
    scaling, classes = Scaling(**record["coefficients"]), record["dataset"]["classes"]
    model = network(scaling, classes, record["stem_stride"], config, record.get("model"))
    if record["config"].get("pretrained") and isinstance(model, EfficientNet):
        set_torchvision_eps(model)  # as its training began
    return load_trained(folder, model), record


def load_classifier(source: str | Path) -> Classifier:
    """A finished run, or a pretrained network by its name: b0 to b7, resnet50, resnet152, densenet201."""
    if str(source) in (*VARIANTS, *NEIGHBOURS):
        return _pretrained(str(source))
    if not Path(source).exists():
        raise unknown_name("network", str(source), [*VARIANTS, *NEIGHBOURS, "the folder of a finished run"])
    model, record = load_run(source)
    dataset, resolution = record["dataset"], record["config"]["resolution"]
    if "class_names" not in dataset:
        raise ValueError(f"{source}: its record does not name its classes: it is of an older version; train it again")
    stored = dataset["stored_pixels"][0]

    def prepare(file: Path) -> Tensor:  # as the data set was read, so that what was learnt holds
        pixels, *_ = read_image(file, stored)
        return resize(torch.from_numpy(pixels.copy())[None], resolution)[0]

    about = {key: record.get(key) for key in ("profile", "method", "seed")} | {"data": dataset["title"]}
    model = _Normalised(model, dataset["mean"], dataset["std"]).eval()
    return Classifier(model, tuple(dataset["class_names"]), resolution, prepare, about)


def _pretrained(name: str) -> Classifier:
    weights = published_weights(name)
    transform = weights.transforms()
    model = create_model(name, pretrained=True)
    mean, std = ([255 * value for value in values] for values in (transform.mean, transform.std))
    undone = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def prepare(file: Path) -> Tensor:  # torchvision's own, but for the normalisation
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            return transform(image.convert("RGB")) * undone[1] + undone[0]

    about = {"method": name, "data": f"ImageNet, {weights}"}
    classes = tuple(weights.meta["categories"])
    return Classifier(_Normalised(model, mean, std).eval(), classes, transform.crop_size[0], prepare, about)


@torch.no_grad()
def predict(
    classifier: Classifier, files: Iterable[str | Path], top: int = 5, device: str | torch.device = "cpu"
) -> Iterator[tuple[Path, list[tuple[str, float]] | Exception]]:
    """For each file the `top` classes with their probabilities, highest first; or what was wrong with it."""
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    model, top = classifier.model.to(device), min(top, len(classifier.classes))
    for file in map(Path, files):
        try:
            image = classifier.prepare(file)
        except Exception as error:  # a decoder fed with garbage may raise anything
            yield file, ValueError(reason(file, error))
            continue
        probabilities = model(image[None].to(device)).float().softmax(1)[0]
        best = probabilities.topk(top)
        yield (
            file,
            [(classifier.classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)],
        )


def export(source: str | Path, output: str | Path) -> float:
    """Write a trained network as ONNX (output ends in .onnx) or as a torch.export program (.pt2).

    Its input "images" is (N, 3, R, R), float32 RGB in [0, 255], for any N; its output "logits" (N, classes). Classes
    and resolution are in the file's metadata. What was written is read back and compared with the network: returns the
    greatest difference of a logit relative to the greatest logit. ValueError for another kind of file, RuntimeError if
    they differ by more than 1e-3 (or, for .onnx, a package is missing)."""
    output, classifier = Path(output), load_classifier(source)
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output: expected a file that ends in .onnx or .pt2, got {str(output)!r}")
    model, r = classifier.model, classifier.resolution
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.rand(n, 3, r, r, generator=generator) * 255 for n in (2, 3))
    metadata = {"classes": json.dumps(classifier.classes), "resolution": str(r), "about": json.dumps(classifier.about)}
    shapes = {"images": {0: torch.export.Dim("batch")}}
    output.parent.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    if output.suffix == ".pt2":
        body = io.BytesIO()
        torch.export.save(program, body, extra_files=metadata)
        replace_file(output, lambda file: file.write_bytes(body.getbuffer()))
        got = torch.export.load(output).module()(others)
    else:
        got = _to_onnx(program, output, metadata, others)
    with torch.no_grad():
        expected = model(others)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-3:
        output.unlink()
        raise RuntimeError(f"{output}: its logits differ from the network's by {difference:.2g} of the greatest")
    return difference


def _to_onnx(program: torch.export.ExportedProgram, output: Path, metadata: dict, images: Tensor) -> Tensor:
    """Write ONNX, and what onnxruntime makes of `images` with it."""
    try:
        import onnxruntime  # only ONNX needs them
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"ONNX needs onnx, onnxscript and onnxruntime ({error}): pip install -e '.[export]'"
        ) from None
    options = {"input_names": ["images"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    made = torch.onnx.export(program, **options)
    made.model.metadata_props.update(metadata)
    replace_file(output, lambda file: made.save(file))
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def check_on_imagenet(
    name: str,
    root: str | Path | None = None,
    *,
    images: int | None = None,
    batch_size: int = 64,
    workers: int = 4,
    device: str | None = None,
) -> dict:
    """Score pretrained weights in our network on ImageNet's validation images, prepared as torchvision does.

    root/imagenet/val/WNID/ holds them (root: as in load_data). images: only so many, drawn by a fixed seed. Returns
    top1 and top5 in percent, torchvision's published ones, and the number of images.
    """
    from torchvision.datasets import ImageFolder

    weights = published_weights(name)
    if images is not None and images < 1:
        raise ValueError(f"images: expected a whole number of at least 1, got {images!r}")
    folder = data_root(root) / "imagenet" / "val"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder.absolute()} is not there: put ImageNet's validation images there, sorted into their 1,000 "
            "class folders (n01440764, ...)"
        )
    data, model = ImageFolder(folder, weights.transforms()), create_model(name, pretrained=True)
    if len(data.classes) != len(weights.meta["categories"]):
        raise ValueError(f"{folder} has {len(data.classes)} class folders, expected {len(weights.meta['categories'])}")
    count = min(images or len(data), len(data))
    chosen = np.random.default_rng(0).permutation(len(data))[:count].tolist()
    device = choose_device(device)
    model, right = model.eval().to(device, memory_format=torch.channels_last), np.zeros(2)
    workers = min(workers, os.cpu_count() or 1) if platform.system() == "Linux" else 0
    with torch.no_grad():
        for x, y in DataLoader(Subset(data, chosen), batch_size, num_workers=workers):
            ranked = model(x.to(device)).topk(5).indices.cpu() == y[:, None]
            right += [ranked[:, 0].sum(), ranked.sum()]
    top1, top5 = (100 * right / count).tolist()
    published = weights.meta["_metrics"]["ImageNet-1K"]
    return {"top1": top1, "top5": top5, "published_top1": published["acc@1"], "published_top5": published["acc@5"]} | {
        "images": count
    }
