"""FLOPs of EfficientNet counted by hand from the paper's Table 1, in whole numbers and without torch."""

import math

TABLE_1 = (  # expansion, kernel, stride, channels, layers
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def flops_by_hand(
    depth: float = 1.0, width: float = 1.0, pixels: int = 224, classes: int = 1000, stem_stride: int = 2
) -> int:
    """Return the multiply-adds of B0 with these coefficients, for one image of pixels x pixels."""

    def channels(c: int) -> int:  # the nearest multiple of 8, if it is not below 90 %
        nearest = max(8, 8 * math.floor(c * width / 8 + 0.5))
        return nearest + 8 if nearest < 0.9 * c * width else nearest

    side, c_in = math.ceil(pixels / stem_stride), channels(32)
    total = 3 * 3 * 3 * c_in * side**2
    for expansion, kernel, stride, c_stage, layers in TABLE_1:
        for layer in range(math.ceil(layers * depth - 1e-9)):
            hidden, c_out = expansion * c_in, channels(c_stage)
            if expansion > 1:
                total += c_in * hidden * side**2
            if layer == 0:
                side = math.ceil(side / stride)
            total += kernel**2 * hidden * side**2
            total += 2 * hidden * max(1, c_in // 4)  # squeeze-and-excitation, on one pixel
            total += hidden * c_out * side**2
            c_in = c_out
    return total + c_in * channels(1280) * side**2 + channels(1280) * classes
