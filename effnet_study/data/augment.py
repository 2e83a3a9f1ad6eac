"""Augmentation of batches: crop, flip, translation, rotation, colours, RandAugment, erasing, mixup, CutMix.

`draw` draws all random numbers of a batch on the CPU, for each sample its own. The other functions follow these draws
on the device of the images, so a batch is the same on every device. Nothing here waits for the device.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The augmentations, and the value that switches each of them off. TrainConfig explains them.
AUGMENTATION_DEFAULTS = {
    "crop_area": 1.0,
    "flip": False,
    "translate": 0.0,
    "rotate": 0.0,
    "color_jitter": 0.0,
    "hue": 0.0,
    "randaugment": 0,
    "erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
LAYERS = 2  # of RandAugment: operations on each sample

# ---- 1. Draws ------------------------------------------------------------------------------------------------------


def draw(n: int, generator: torch.Generator, **settings: float) -> dict[str, Tensor]:
    """Draw what happens to each of n samples. Return tensors of n rows by name, only those that `settings` need.

    The order of the draws must never change, because it decides the result of every run.
    columns, rows: (n, 2) edges of the crop in [0, 1], from left to right, or from right to left if mirrored.
    erased, pasted: (n, 4) left, right, upper and lower edges of a box in [0, 1]."""
    on = AUGMENTATION_DEFAULTS | settings
    area, ratio, left, top, mirrored = torch.rand(5, n, generator=generator)
    draws, mirrored = {}, mirrored < 0.5
    if on["crop_area"] < 1:
        # Fraction of the area and aspect ratio as in torchvision's RandomResizedCrop, which draws again where a side
        # exceeds the image's; here the side is shortened
        area = on["crop_area"] + (1 - on["crop_area"]) * area
        box = _box(area, torch.exp(math.log(4 / 3) * (2 * ratio - 1)), left, top)
        draws["columns"], draws["rows"] = box[:, :2], box[:, 2:]
        if on["flip"]:
            draws["columns"] = torch.where(mirrored[:, None], draws["columns"].flip(1), draws["columns"])
    elif on["flip"]:
        draws["mirrored"] = mirrored

    def uniform(*shape: int) -> Tensor:  # in [-1, 1)
        return 2 * torch.rand(n, *shape, generator=generator) - 1

    if on["translate"]:
        draws["shift"] = torch.rand(n, 2, generator=generator)  # right and down; 0 is the least, 1 the most
        draws["most"] = torch.full((n, 1), on["translate"])  # fraction of a side
    if on["rotate"]:
        draws["angle"] = on["rotate"] * uniform()  # degrees
    if on["color_jitter"]:
        draws["factors"] = 1 + on["color_jitter"] * uniform(3)  # of brightness, contrast, saturation
    if on["hue"]:
        draws["hue"] = on["hue"] * 2 * math.pi * uniform()  # radians
    if on["randaugment"]:
        draws["operations"] = torch.randint(len(OPERATIONS), (n, LAYERS), generator=generator)
        draws["signs"] = 1 - 2 * torch.randint(2, (n, LAYERS), generator=generator)
        draws["magnitude"] = torch.full((n,), on["randaugment"])
    if on["erasing"]:
        # Area and aspect ratio as in torchvision's RandomErasing
        u = torch.rand(5, n, generator=generator)
        area = torch.where(u[0] < on["erasing"], 0.02 + 0.31 * u[1], 0.0)
        draws["erased"] = _box(area, torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * u[2]), u[3], u[4])
    if on["mixup"] or on["cutmix"]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        cut = torch.rand(n, generator=generator) < (0.5 if on["mixup"] and on["cutmix"] else on["cutmix"] > 0)
        own = [torch.from_numpy(rng.beta(on[kind] or 1, on[kind] or 1, n)).float() for kind in ("mixup", "cutmix")]
        draws["pasted"] = _box(torch.where(cut, 1 - own[1], 0.0), 1, *torch.rand(2, n, generator=generator))
        draws["own"] = torch.where(cut, 1.0, own[0])  # mixup's weight of the image itself
    return draws


def _box(area: Tensor, ratio: Tensor | float, x: Tensor, y: Tensor) -> Tensor:
    """Return (n, 4) left, right, upper and lower edges of boxes inside the image, placed by x and y in [0, 1)."""
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, upper = x * (1 - width), y * (1 - height)
    return torch.stack([left, left + width, upper, upper + height], 1)


# ---- 2. Images -----------------------------------------------------------------------------------------------------


def resize(images: Tensor, resolution: int) -> Tensor:
    """Resize uint8 (N, H, W, 3) to float (N, 3, R, R) in [0, 255]: bilinear, antialiased where it shrinks."""
    if images.shape[1:3] == (resolution, resolution):
        return images.permute(0, 3, 1, 2).float()
    whole = torch.arange(2.0, device=images.device)[None]  # made there, because a copy from the host waits
    return _resample(images, whole, whole, resolution)


def augment(images: Tensor, resolution: int, draws: Mapping[str, Tensor]) -> Tensor:
    """Augment each image as drawn, except mixing and erasing: uint8 (N, H, W, 3) to float (N, 3, R, R) in [0, 255]."""
    here = {name: values.to(images.device, non_blocking=True) for name, values in draws.items()}
    if "shift" in draws or "mirrored" in draws:
        images = _move(images, here.get("shift"), here.get("most"), here.get("mirrored"))
    crop = "columns" in draws
    x = _resample(images, here["columns"], here["rows"], resolution) if crop else resize(images, resolution)
    if draws.keys() & {"angle", "factors", "hue"}:
        import kornia  # takes as long as importing torch

    if "angle" in draws:
        x = kornia.geometry.rotate(x, here["angle"], padding_mode="reflection", align_corners=False)
    if "factors" in draws or "hue" in draws:
        x = x.clamp(0, 255) / 255
        if "factors" in draws:
            brightness, contrast, saturation = here["factors"].unbind(1)
            x = kornia.enhance.adjust_brightness_accumulative(x, brightness)
            x = kornia.enhance.adjust_contrast_with_mean_subtraction(x, contrast)
            x = kornia.enhance.adjust_saturation_with_gray_subtraction(x, saturation)
        if "hue" in draws:
            x = kornia.enhance.adjust_hue(x, here["hue"])
        x = x * 255
    if "operations" in draws:
        x = x.round().clamp(0, 255).to(torch.uint8)
        x = randaugment(x, draws["operations"], draws["signs"], draws["magnitude"][0].item()).float()
    return x


def mix(
    images: Tensor, labels: Tensor, others: Tensor, their_labels: Tensor, draws: Mapping[str, Tensor], classes: int
) -> tuple[Tensor, Tensor]:
    """Mix each image with another, by mixup or CutMix. Return images (N, 3, R, R), labels (N, classes) of sum one."""
    pasted = _inside(draws["pasted"].to(images.device, non_blocking=True), images.shape[-1])
    own = draws["own"].to(images.device, non_blocking=True)
    images = torch.where(pasted, others, torch.lerp(others, images, own.view(-1, 1, 1, 1)))
    # A box counts by the pixels that it covers
    own = (own * (1 - pasted.float().mean((1, 2, 3))))[:, None]
    return images, own * F.one_hot(labels, classes) + (1 - own) * F.one_hot(their_labels, classes)


def erase(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Set a box of each normalised image to zero, which is the mean colour. This changes `images` in place."""
    return images.masked_fill_(_inside(draws["erased"].to(images.device, non_blocking=True), images.shape[-1]), 0.0)


def _inside(boxes: Tensor, side: int) -> Tensor:
    """Return (N, 1, side, side): whether the centre of each pixel is in the box (N, 4)."""
    centre = (torch.arange(side, device=boxes.device) + 0.5) / side
    left, right, upper, lower = (edge[:, None] for edge in boxes.unbind(1))
    columns, rows = (left <= centre) & (centre < right), (upper <= centre) & (centre < lower)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _move(images: Tensor, shift: Tensor | None, most: Tensor | None, mirrored: Tensor | None) -> Tensor:
    """Shift uint8 (N, H, W, 3) by whole pixels, each number equally likely, then mirror it where `mirrored`.

    Beyond its edges an image continues as its mirror image, as in a crop of a reflect-padded one. This looks pixels up,
    which is faster than the products of `_resample`."""
    n, height, width, _ = images.shape
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)[None]
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if shift is not None:
        pads = [(most * side).round() for side in (width, height)]
        across, down = ((shift[:, i : i + 1] * (2 * pad + 1)).floor().sub(pad).long() for i, pad in enumerate(pads))
        columns, rows = _reflected(columns - across, width), _reflected(rows - down, height)
    first = torch.arange(0, n * height * width, height * width, device=images.device)  # first pixel of each image
    pixels = first[:, None, None] + (rows * width)[..., None] + columns[:, None, :]
    return images.reshape(-1, 3).index_select(0, pixels.flatten()).view(images.shape)


def _reflected(index: Tensor, side: int) -> Tensor:
    """Mirror whole numbers beyond [0, side) at its first and its last number."""
    index = index.abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


def _resample(images: Tensor, columns: Tensor, rows: Tensor, resolution: int) -> Tensor:
    """Cut the box columns x rows, (N or 1, 2) edges, out of each image and resize it, by two products with
    interpolation matrices. So crop, resize and flip are one antialiased operation, with a box for each sample. torch's
    interpolate takes one box for the whole batch, and its grid_sample is not antialiased."""
    n, height, width, _ = images.shape
    down = _interpolation(rows, height, resolution)  # (N or 1, R, H)
    across = _interpolation(columns, width, resolution)  # (N or 1, R, W)
    x = down @ images.reshape(n, height, width * 3).float()  # (N, R, 3 W)
    x = x.view(n, resolution, width, 3).transpose(2, 3).reshape(n, resolution * 3, width)
    return (x @ across.mT).view(n, resolution, 3, resolution).transpose(1, 2)


def _interpolation(edges: Tensor, length: int, resolution: int) -> Tensor:
    """Return the weights (N, resolution, length) of bilinear interpolation over the box `edges`, antialiased as in
    Pillow and torch's interpolate: the triangle filter is as wide as an output pixel where that is wider than an
    input pixel."""
    first, last = edges[:, :1] * length, edges[:, 1:] * length  # (N, 1) in input pixels
    scale = (last - first) / resolution
    centre = first + scale * (torch.arange(resolution, device=edges.device) + 0.5)  # (N, R)
    pixel = torch.arange(length, device=edges.device) + 0.5  # (length,)
    reach = scale.abs().clamp_min(1)[..., None]
    weights = (1 - (pixel - centre[..., None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(2, keepdim=True)


# ---- 3. RandAugment ------------------------------------------------------------------------------------------------


class _NoWaits(TorchFunctionMode):
    """Let torch.tensor(numbers, device=...) copy without waiting for the device. torchvision makes its matrices so."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and "device" in kwargs:
            here = {name: value for name, value in kwargs.items() if name != "device"}
            return torch.tensor(*args, **here).to(kwargs["device"], non_blocking=True)
        return function(*args, **kwargs)


def _affine(tv, x: Tensor, **change: object) -> Tensor:
    """Shear or move. What comes in from outside is black."""
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "center": [0.0, 0.0]}
    return tv.affine(x, **still | change, interpolation=tv.InterpolationMode.BILINEAR)


# Names, order and ranges of torchvision.transforms.v2.RandAugment. An operation takes torchvision's functions, images,
# and m in [-1, 1], the fraction of its range. The last four operations have no sign.
OPERATIONS = {
    "Identity": lambda tv, x, m: x,
    "ShearX": lambda tv, x, m: _affine(tv, x, shear=[math.degrees(math.atan(0.3 * m)), 0.0]),
    "ShearY": lambda tv, x, m: _affine(tv, x, shear=[0.0, math.degrees(math.atan(0.3 * m))]),
    "TranslateX": lambda tv, x, m: _affine(tv, x, translate=[int(150 / 331 * x.shape[-1] * m), 0]),
    "TranslateY": lambda tv, x, m: _affine(tv, x, translate=[0, int(150 / 331 * x.shape[-2] * m)]),
    "Rotate": lambda tv, x, m: tv.rotate(x, 30 * m, interpolation=tv.InterpolationMode.BILINEAR),
    "Brightness": lambda tv, x, m: tv.adjust_brightness(x, 1 + 0.9 * m),
    "Color": lambda tv, x, m: tv.adjust_saturation(x, 1 + 0.9 * m),
    "Contrast": lambda tv, x, m: tv.adjust_contrast(x, 1 + 0.9 * m),
    "Sharpness": lambda tv, x, m: tv.adjust_sharpness(x, 1 + 0.9 * m),
    "Posterize": lambda tv, x, m: tv.posterize(x, 8 - round(4 * abs(m))),
    "Solarize": lambda tv, x, m: tv.solarize(x, 255 * (1 - abs(m))),
    "AutoContrast": lambda tv, x, m: tv.autocontrast(x),
    "Equalize": lambda tv, x, m: tv.equalize(x),
}


def randaugment(images: Tensor, operations: Tensor, signs: Tensor, magnitude: int) -> Tensor:
    """Apply to each image its own operations, one after the other, at a magnitude of 0 to 30.

    images: uint8 (N, 3, R, R). operations: (N, layers), positions in OPERATIONS; signs: (N, layers), -1 or 1; both on
    the CPU. Images with the same operation and sign are one call."""
    import torchvision.transforms.v2.functional as tv  # takes as long as importing torch

    for numbers, sign in zip(operations.unbind(1), signs.unbind(1), strict=True):
        before, images = images, images.clone()
        for number, change in enumerate(OPERATIONS.values()):
            for one in (1, -1):
                rows = ((numbers == number) & (sign == one)).nonzero()[:, 0]
                if len(rows):
                    rows = rows.to(images.device, non_blocking=True)
                    with _NoWaits():
                        images[rows] = change(tv, before[rows], one * magnitude / 30)
    return images
