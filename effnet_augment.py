"""Augmentation in batches, on the device, every sample with its own draws.

What is done to a batch follows from its draws alone (`draw`, a dict of tensors with a row per sample), which are made
on the CPU from a generator, so that they are the same on every device, and a part of a batch gets its part of them.
In this order: translation, random resized crop with flip, rotation, colour jitter, RandAugment, mixup and CutMix,
normalisation, random erasing.

Crop, flip and resizing are ours, as two products with interpolation matrices: antialiased, each sample with its own
box, which no library does for a batch. Rotation and colour are kornia's, whose functions take a number per sample; the
operations of RandAugment are torchvision's, called once for all the samples that drew them, but for its geometry.
"""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What a batch can be augmented by, and what switches each off; fields of TrainConfig, where they are explained
OFF = {
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
LAYERS = 2  # of RandAugment: operations that each sample undergoes


# ---- 1. Draws ------------------------------------------------------------------------------------------------------


def draw(n: int, generator: torch.Generator, **settings: float) -> dict[str, Tensor]:
    """The draws of n samples, by name; settings as in OFF, those left out are off.

    columns, rows: (n, 2) edges of each crop in [0, 1], from left to right or, where it is mirrored, from right to left.
    `generator` lives on the CPU.
    """
    for name in settings:
        if name not in OFF:
            raise ValueError(f"unknown augmentation {name!r}. Valid: {', '.join(OFF)}.")
    on = OFF | settings
    area, ratio, left, top, mirrored = torch.rand(5, n, generator=generator)
    draws, mirrored = {}, mirrored < 0.5
    if on["crop_area"] < 1:
        # Share of the area and aspect ratio as in torchvision's RandomResizedCrop
        area = on["crop_area"] + (1 - on["crop_area"]) * area
        ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))
        boxes = _box((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1), left, top)
        draws["columns"], draws["rows"] = boxes.split(2, 1)
        if on["flip"]:
            draws["columns"] = torch.where(mirrored[:, None], draws["columns"].flip(1), draws["columns"])
    elif on["flip"]:
        draws["mirrored"] = mirrored

    def uniform(*shape: int) -> Tensor:
        """In [-1, 1)."""
        return 2 * torch.rand(n, *shape, generator=generator) - 1

    if on["translate"]:
        draws["shift"] = torch.rand(n, 2, generator=generator)  # to the right and down, from least to most
        draws["most"] = torch.full((n, 1), on["translate"])  # of the sides
    if on["rotate"]:
        draws["angle"] = on["rotate"] * uniform()  # degrees
    if on["color_jitter"]:
        draws["factors"] = 1 + on["color_jitter"] * uniform(3)  # of brightness, contrast, saturation
    if on["hue"]:
        draws["hue"] = on["hue"] * 2 * math.pi * uniform()
    if on["randaugment"]:
        draws["operations"] = torch.randint(len(OPERATIONS), (n, LAYERS), generator=generator)
        draws["signs"] = 1 - 2 * torch.randint(2, (n, LAYERS), generator=generator)
        draws["magnitude"] = torch.full((n,), on["randaugment"])
    if on["erasing"]:
        # Area and aspect ratio as in torchvision's RandomErasing
        u = torch.rand(5, n, generator=generator)
        area, ratio = 0.02 + 0.31 * u[1], torch.exp(math.log(0.3) + math.log(3.3 / 0.3) * u[2])
        area = torch.where(u[0] < on["erasing"], area, 0.0)
        draws["erased"] = _box((area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1), u[3], u[4])
    if on["mixup"] or on["cutmix"]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        cut = torch.rand(n, generator=generator) < (0.5 if on["mixup"] and on["cutmix"] else on["cutmix"] > 0)
        own = [torch.from_numpy(rng.beta(on[kind] or 1, on[kind] or 1, n)).float() for kind in ("mixup", "cutmix")]
        side = torch.where(cut, (1 - own[1]).sqrt(), 0.0)
        x, y = torch.rand(2, n, generator=generator)
        draws["pasted"] = _box(side, side, x, y)
        draws["own"] = torch.where(cut, 1.0, own[0])  # mixup's weight of the image itself
    return draws


def _box(width: Tensor, height: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(n, 4) left, right, upper and lower edges of a box wholly inside the image, placed by x and y in [0, 1)."""
    left, upper = x * (1 - width), y * (1 - height)
    return torch.stack([left, left + width, upper, upper + height], 1)


# ---- 2. What is done to images -------------------------------------------------------------------------------------


def resize(images: Tensor, resolution: int) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, R, R) in [0, 255]: bilinear, antialiased where it shrinks."""
    if images.shape[1:3] == (resolution, resolution):
        return images.permute(0, 3, 1, 2).float()
    whole = torch.tensor([[0.0, 1.0]])
    return _resample(images, whole, whole, resolution)


def augment(images: Tensor, resolution: int, draws: Mapping[str, Tensor]) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, R, R) in [0, 255], by the draws of N samples: all that is done to an image
    before it is mixed with another."""
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
    """Mixup and CutMix of each image with another: images (N, 3, R, R), labels (N, classes) that sum to one."""
    pasted = _inside(draws["pasted"].to(images.device, non_blocking=True), images.shape[-1])
    own = draws["own"].to(images.device, non_blocking=True)
    images = torch.where(pasted, others, torch.lerp(others, images, own.view(-1, 1, 1, 1)))
    # Of the box, what its pixels cover
    own = (own * (1 - pasted.float().mean((1, 2, 3))))[:, None]
    return images, own * F.one_hot(labels, classes) + (1 - own) * F.one_hot(their_labels, classes)


def erase(images: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Random erasing: a box of each normalised image set to zero, the mean colour; in place."""
    return images.masked_fill_(_inside(draws["erased"].to(images.device, non_blocking=True), images.shape[-1]), 0.0)


def _inside(boxes: Tensor, side: int) -> Tensor:
    """(N, 1, side, side): which pixels have their centre in the box (N, 4)."""
    centre = (torch.arange(side, device=boxes.device) + 0.5) / side
    left, right, upper, lower = (edge[:, None] for edge in boxes.unbind(1))
    columns, rows = (left <= centre) & (centre < right), (upper <= centre) & (centre < lower)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _move(images: Tensor, shift: Tensor | None, most: Tensor | None, mirrored: Tensor | None) -> Tensor:
    """uint8 (N, H, W, 3) shifted by whole pixels, each number equally likely, continued beyond its edges by its mirror
    image as in the crop of a reflect-padded one, then mirrored where `mirrored`. A look-up of pixels, faster than the
    products of `_resample`."""
    n, height, width, _ = images.shape
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)[None]
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if shift is not None:
        pads = [(most * side).round() for side in (width, height)]
        across, down = ((shift[:, i : i + 1] * (2 * pad + 1)).floor().sub(pad).long() for i, pad in enumerate(pads))
        columns, rows = _reflected(columns - across, width), _reflected(rows - down, height)
    first = torch.arange(0, n * height * width, height * width, device=images.device)  # pixel of each image
    pixels = first[:, None, None] + (rows * width)[..., None] + columns[:, None, :]
    return images.reshape(-1, 3).index_select(0, pixels.flatten()).view(images.shape)


def _reflected(index: Tensor, side: int) -> Tensor:
    """Whole numbers beyond [0, side) mirrored at its first and its last."""
    index = index.abs()
    return torch.where(index < side, index, 2 * (side - 1) - index)


def _resample(images: Tensor, columns: Tensor, rows: Tensor, resolution: int) -> Tensor:
    """Cut the box columns x rows out of each image and resize it: two products with interpolation matrices.

    columns, rows: (N or 1, 2) edges in [0, 1]; a right edge before the left mirrors. One code for crop, resize and
    flip, per sample and antialiased: torch's own interpolate does one box for the whole batch, grid_sample aliases.
    """
    n, height, width, _ = images.shape
    down = _interpolation(rows.to(images.device), height, resolution)  # (N or 1, R, H)
    across = _interpolation(columns.to(images.device), width, resolution)  # (N or 1, R, W)
    x = down @ images.reshape(n, height, width * 3).float()  # (N, R, 3 W)
    x = x.view(n, resolution, width, 3).transpose(2, 3).reshape(n, resolution * 3, width)
    return (x @ across.mT).view(n, resolution, 3, resolution).transpose(1, 2)


def _interpolation(edges: Tensor, length: int, resolution: int) -> Tensor:
    """Weights (N, resolution, length) of bilinear interpolation over the box `edges`, its triangle as wide as an
    output pixel where that is wider than an input pixel (antialiasing), as in Pillow and torch's interpolate."""
    first, last = edges[:, :1] * length, edges[:, 1:] * length  # (N, 1) in input pixels
    scale = (last - first) / resolution
    centre = first + scale * (torch.arange(resolution, device=edges.device) + 0.5)  # (N, R)
    pixel = torch.arange(length, device=edges.device) + 0.5  # (length,)
    reach = scale.abs().clamp_min(1)[..., None]
    weights = (1 - (pixel - centre[..., None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(2, keepdim=True)


# ---- 3. RandAugment ------------------------------------------------------------------------------------------------

# Names, ranges and order of torchvision.transforms.v2.RandAugment; m in [-1, 1] is the share of the range. Those of
# geometry are one look-up for all samples, each by its own matrix; the others are called for all that drew them, with
# torchvision's functions as `tv`.
GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
SIGNED = {
    "Brightness": lambda tv, x, m: tv.adjust_brightness(x, 1 + 0.9 * m),
    "Color": lambda tv, x, m: tv.adjust_saturation(x, 1 + 0.9 * m),
    "Contrast": lambda tv, x, m: tv.adjust_contrast(x, 1 + 0.9 * m),
    "Sharpness": lambda tv, x, m: tv.adjust_sharpness(x, 1 + 0.9 * m),
}
UNSIGNED = {
    "Posterize": lambda tv, x, m: tv.posterize(x, 8 - round(4 * m)),
    "Solarize": lambda tv, x, m: tv.solarize(x, 255 * (1 - m)),
    "AutoContrast": lambda tv, x, m: tv.autocontrast(x),
    "Equalize": lambda tv, x, m: tv.equalize(x),
}
OPERATIONS = ("Identity", *GEOMETRY, *SIGNED, *UNSIGNED)


def randaugment(images: Tensor, operations: Tensor, signs: Tensor, magnitude: int) -> Tensor:
    """Each of N images' own operations, one layer after the other, at a magnitude of 30.

    images: uint8 (N, 3, R, R), on any device; operations: (N, layers), numbers in OPERATIONS; signs: (N, layers), of
    -1 and 1, both on the CPU, so that nothing waits for the device.
    """
    for numbers, sign in zip(operations.unbind(1), signs.unbind(1), strict=True):
        images = _layer(images, numbers, sign, magnitude / 30)
    return images


def _layer(images: Tensor, numbers: Tensor, signs: Tensor, m: float) -> Tensor:
    """One operation for each image."""
    import torchvision.transforms.v2.functional as tv  # here, for that takes as long as importing torch

    moved = (numbers > 0) & (numbers <= len(GEOMETRY))
    groups = [(moved, partial(_geometry, numbers=numbers[moved], m=m * signs[moved]))]
    for name, change in SIGNED.items():
        this = numbers == OPERATIONS.index(name)
        groups += [(this & (signs == sign), partial(change, tv, m=m * sign)) for sign in (1, -1)]
    groups += [(numbers == OPERATIONS.index(name), partial(change, tv, m=m)) for name, change in UNSIGNED.items()]
    result = images.clone()
    for group, change in groups:
        if group.any():
            rows = group.nonzero()[:, 0].to(images.device, non_blocking=True)
            result[rows] = change(images[rows])
    return result


def _geometry(images: Tensor, numbers: Tensor, m: Tensor) -> Tensor:
    """uint8 (N, 3, R, R) sheared, moved or turned, each by its own m of [-1, 1]; black comes in from outside."""
    side = images.shape[-1]
    number = {name: numbers == OPERATIONS.index(name) for name in GEOMETRY}
    matrices = torch.eye(2, 3).repeat(len(numbers), 1, 1)  # from output to input, both sides from -1 to 1
    for axis, name in enumerate(("ShearX", "ShearY")):  # the first row, or column, stays where it is
        matrices[number[name], axis, 1 - axis] = matrices[number[name], axis, 2] = 0.3 * m[number[name]]
    for axis, name in enumerate(("TranslateX", "TranslateY")):  # by whole pixels
        matrices[number[name], axis, 2] = -2 / side * (150 / 331 * side * m[number[name]]).trunc()
    angle = torch.deg2rad(30 * m[number["Rotate"]])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    matrices[number["Rotate"], :, :2] = turn
    grid = F.affine_grid(matrices.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)
