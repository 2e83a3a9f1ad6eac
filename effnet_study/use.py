"""A trained network put to use: load it, predict classes of files, export it, check pretrained weights on ImageNet."""

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from effnet_lib import VARIANTS, EfficientNet, TrainConfig, evaluate, unknown_name
from effnet_study.data.augment import resize
from effnet_study.data.image_files import open_image, read_image, reason
from effnet_study.data.load import data_root
from effnet_study.files import HALF_WEIGHTS, WEIGHTS, replace_file
from effnet_study.machine import choose_device
from effnet_study.pretrained import (
    TORCHVISION_MODELS,
    create_model,
    load_weights,
    published_weights,
    read_weights,
    set_torchvision_eps,
)
from effnet_study.record import read_record, recorded_scaling
from effnet_study.run import build_network


def has_weights(run_dir: Path) -> bool:
    """Tell whether `load_run` finds the weights of a finished run, full or in half precision."""
    return any((run_dir / name).exists() for name in (WEIGHTS, HALF_WEIGHTS))


def load_trained(run_dir: str | Path, model: nn.Module) -> nn.Module:
    """Load the final EMA weights of a finished run into `model`, and return it in evaluation mode. Where they are
    missing, load those in half precision."""
    path, half, record = Path(run_dir) / WEIGHTS, Path(run_dir) / HALF_WEIGHTS, read_record(run_dir)
    if record is not None and not path.exists() and half.exists():
        with safetensors.safe_open(half, "pt") as found:
            if found.metadata()["record"] != record["sha256"]:
                raise ValueError(f"{half} has the weights of another run; restore it")
        load_weights(model, read_weights(half))
        return model.eval()
    if not path.exists() or record is None:
        raise FileNotFoundError(f"{path} of a finished run is not there (weights are not committed): run it first")
    load_weights(model, read_weights(path, record.get("weights_sha256")))
    return model.eval()


def write_half(run_dir: str | Path, output: str | Path) -> None:
    """Write the weights of a finished run in half precision, small enough for the repository. Under the name
    HALF_WEIGHTS in the run's folder `load_run` reads them where the full ones are missing."""
    run_dir, record = Path(run_dir), read_record(run_dir)
    if Path(output).resolve() == (run_dir / WEIGHTS).resolve():
        raise ValueError(f"{output} has the full weights, which would be lost; write {HALF_WEIGHTS} instead")
    if record is None or not (run_dir / WEIGHTS).exists():
        raise FileNotFoundError(f"{run_dir}: expected the folder of a finished run that has its {WEIGHTS}")
    weights = read_weights(run_dir / WEIGHTS, record.get("weights_sha256"))
    half = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
    replace_file(Path(output), safetensors.torch.save(half, {"record": record["sha256"]}))


def load_run(source: str | Path) -> tuple[nn.Module, dict]:
    """Load the network of a finished run (its folder, or its run.json) with its final EMA weights, and its record.

    ValueError if the record does not say enough; FileNotFoundError if there is no run, or no weights."""
    run_dir = Path(source).parent if Path(source).name == "run.json" else Path(source)
    record = read_record(run_dir)
    if record is None:
        reads = "create_model(NAME, CLASSES, pretrained=FILE) reads weights that have no record"
        raise FileNotFoundError(f"{run_dir}: expected the folder of a finished run, or its run.json; {reads}")
    if record["status"] != "finished":
        raise ValueError(f"{run_dir}: expected a finished run, this one is {record['status']}")
    for part in ("coefficients", "stem_stride"):
        if part not in record:
            raise ValueError(f"{run_dir}/run.json does not say its {part}: it is of an older version; train it again")
    config = TrainConfig(**{**record["config"], "pretrained": False, "freeze": False})
    scaling, classes = recorded_scaling(record), record["dataset"]["classes"]
    model = build_network(scaling, classes, record["stem_stride"], config, record.get("model"))
    if record["config"].get("pretrained") and isinstance(model, EfficientNet):
        set_torchvision_eps(model)  # as at the start of its training
    return load_trained(run_dir, model), record


class Normalised(nn.Module):
    """A network that takes pixels in [0, 255] and normalises them itself."""

    def __init__(self, network: nn.Module, mean: Iterable[float], std: Iterable[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, R, R)
        return self.network((images - self.mean) / self.std)  # (N, classes)


@dataclass(frozen=True)
class Classifier:
    """A network, its classes, and how a file becomes its input."""

    model: Normalised  # of RGB images (N, 3, R, R) in [0, 255]
    classes: tuple[str, ...]
    resolution: int  # R
    prepare: Callable[[Path], Tensor]  # a file to (3, R, R) in [0, 255]
    about: dict  # where the network comes from


def load_classifier(source: str | Path) -> Classifier:
    """Load a finished run, or a pretrained network by its name: b0 to b7, or one of TORCHVISION_MODELS."""
    names = [*VARIANTS, *TORCHVISION_MODELS]
    if str(source) in names:
        return _load_pretrained(str(source))
    if not Path(source).exists():
        raise unknown_name("network", str(source), [*names, "the folder of a finished run"])
    model, record = load_run(source)
    dataset, resolution = record["dataset"], record["config"]["resolution"]
    for part in ("class_names", "stored_pixels", "mean", "std"):
        if part not in dataset:
            raise ValueError(f"{source}: its record has no {part}: it is of an older version; train it again")

    def prepare(file: Path) -> Tensor:  # exactly as its training images were prepared
        pixels, *_ = read_image(file, dataset["stored_pixels"][0])
        return resize(torch.from_numpy(pixels.copy())[None], resolution)[0]

    about = {key: record.get(key) for key in ("profile", "method", "seed")} | {"data": dataset["title"]}
    model = Normalised(model, dataset["mean"], dataset["std"]).eval()
    return Classifier(model, tuple(dataset["class_names"]), resolution, prepare, about)


def _load_pretrained(name: str) -> Classifier:
    weights = published_weights(name)
    transform, classes = weights.transforms(), tuple(weights.meta["categories"])
    mean, std = ([255 * value for value in values] for values in (transform.mean, transform.std))
    model = Normalised(create_model(name, pretrained=True), mean, std).eval()

    def prepare(file: Path) -> Tensor:  # torchvision's own preparation, with its normalisation undone
        image, *_ = open_image(file)
        return transform(image) * model.std.cpu() + model.mean.cpu()

    return Classifier(model, classes, transform.crop_size[0], prepare, {"method": name, "data": f"ImageNet, {weights}"})


@torch.no_grad()
def predict(
    classifier: Classifier, files: Iterable[str | Path], top: int = 5, device: str | torch.device = "cpu"
) -> Iterator[tuple[Path, list[tuple[str, float]] | Exception]]:
    """Yield for each file its `top` classes with their probabilities, highest first, or why it could not be read."""
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    model, top = classifier.model.to(device), min(top, len(classifier.classes))
    for file in map(Path, files):
        try:
            image = classifier.prepare(file)
        except Exception as error:  # a decoder that reads garbage may raise anything
            yield file, ValueError(reason(error))
            continue
        probabilities, classes = model(image[None].to(device)).float().softmax(1)[0].topk(top)
        names = [classifier.classes[i] for i in classes.tolist()]
        yield file, list(zip(names, probabilities.tolist(), strict=True))


@torch.no_grad()
def class_activation_map(model: EfficientNet, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return where the network looks (Zhou et al. 2016; Figure 7 of the paper): (N, 3, H, W) to (N, H, W) in [0, 1].

    classes: (N,), for which class to look (default: the predicted one)."""
    features = model.eval().features(images)  # (N, C, h, w)
    if classes is None:
        classes = model.classifier(features.mean((2, 3))).argmax(1)
    maps = torch.einsum("nc,nchw->nhw", model.classifier.weight[classes], features)
    maps = F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    rounding = 1e-5 * torch.maximum(low.abs(), high.abs())  # keeps the map of a single pixel from showing only noise
    return (maps - low) / torch.maximum(high - low, rounding).clamp_min(1e-12)


@torch.no_grad()
def export(source: str | Path, output: str | Path) -> float:
    """Write a trained network as ONNX (`output` ends in .onnx) or as a torch.export program (.pt2).

    Its input "images" is (N, 3, R, R), float32 RGB in [0, 255], for any N; its output "logits" is (N, classes). Classes
    and resolution are in the file's metadata. Returns how much the logits of the written file differ from the
    network's, relative to the greatest. RuntimeError if by more than 1e-3, or if ONNX's packages are missing."""
    output = Path(output)
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output: expected a file that ends in .onnx or .pt2, got {str(output)!r}")
    classifier = load_classifier(source)
    model, r = classifier.model, classifier.resolution
    generator = torch.Generator().manual_seed(0)
    images, others = (torch.rand(n, 3, r, r, generator=generator) * 255 for n in (2, 3))
    metadata = {"classes": json.dumps(classifier.classes), "resolution": str(r), "about": json.dumps(classifier.about)}
    output.parent.mkdir(parents=True, exist_ok=True)
    program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    if output.suffix == ".onnx":
        got = _to_onnx(program, output, metadata, others)
    else:
        body = io.BytesIO()
        torch.export.save(program, body, extra_files=metadata)
        replace_file(output, body.getvalue())
        got = torch.export.load(output).module()(others)
    expected = model(others)
    difference = ((got - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-3:
        output.unlink()
        raise RuntimeError(f"{output}: its logits differ from the network's by {difference:.2g} of the greatest")
    return difference


def _to_onnx(program: torch.export.ExportedProgram, output: Path, metadata: dict, images: Tensor) -> Tensor:
    """Write ONNX. Return what onnxruntime computes from `images` with the file."""
    try:
        import onnxruntime  # only ONNX needs these packages
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"ONNX needs more packages ({error}): pip install -r requirements.txt") from None
    made = torch.onnx.export(program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False)
    made.model.metadata_props.update(metadata)
    replace_file(output, made.save)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _read_rgb(path: str) -> Image.Image:
    """Read an image as torchvision does."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # a decoder that reads garbage may raise anything
        raise ValueError(f"{path} cannot be read as an image: {reason(error)}") from None


def check_on_imagenet(
    name: str, root: str | Path | None = None, images: int | None = None, device: str | None = None
) -> dict:
    """Score pretrained weights in our network on ImageNet's validation images, prepared as torchvision does.

    root/imagenet/val/WNID/ has the images (root: as in load_data). images: take only so many, drawn by a fixed seed.
    Returns top1 and top5 in percent, those that torchvision publishes, and the number of images."""
    from torchvision.datasets import ImageFolder

    weights = published_weights(name)
    if images is not None and images < 1:
        raise ValueError(f"images: expected a whole number of at least 1, got {images!r}")
    folder = data_root(root) / "imagenet" / "val"
    if (count := len(list(folder.glob("*/")))) != 1000:
        cure = "put ImageNet's validation images there, sorted into class folders (n01440764, ...)"
        raise ValueError(f"{folder.absolute()} has {count} class folders, expected 1000: {cure}")
    data = ImageFolder(folder, weights.transforms(), loader=_read_rgb)
    chosen = np.random.default_rng(0).permutation(len(data))[:images].tolist()
    batches = DataLoader(Subset(data, chosen), batch_size=64, num_workers=min(4, os.cpu_count() or 1))
    model = create_model(name, pretrained=True).to(choose_device(device), memory_format=torch.channels_last)
    data = SimpleNamespace(eval_batches=lambda split, resolution, batch_size: batches)
    try:
        scores = evaluate(model, data, "val", weights.transforms().crop_size[0], precision="fp32")
    except ValueError as error:  # from a worker it comes with the worker's traceback
        raise ValueError(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    published = weights.meta["_metrics"]["ImageNet-1K"]
    scores = {"top1": scores["top1"], "top5": scores["top5"], "images": len(chosen)}
    return scores | {"published_top1": published["acc@1"], "published_top5": published["acc@5"]}
