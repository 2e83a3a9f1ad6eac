"""Kernels that compute the same sums faster on a CPU where feature maps are small, as they are at 32 and 64 px.

06_throughput measures what they bring. They are used in fp32 on a CPU only: a GPU, autocast and a compiler have better
ones. The gradients' formulas are written out, and tests compare them with autograd's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_lib import SqueezeExcitation


def accelerate_on_cpu(model: nn.Module) -> nn.Module:
    """Let a network's convolutions and channel gates use the kernels of this file, where they apply. In place."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = CpuConv2d
        elif type(module) is SqueezeExcitation:
            module.__class__ = CpuSqueezeExcitation
    return model


def _applies(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class CpuConv2d(nn.Conv2d):
    """nn.Conv2d with three changes where maps are small.

    A 1x1 convolution of maps of at most 2x2 is one matrix product over their channels-last memory. Depthwise taps that
    only ever meet padding are left out. A depthwise weight gradient is summed tap by tap where oneDNN has no kernel
    for it and pads each channel to 16: 5x5, and on maps of at most 2x2.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        plain = self.bias is None and self.dilation == (1, 1) and self.padding_mode == "zeros"
        plain = plain and self.padding not in ("same", "valid")
        depthwise = plain and self.groups == self.in_channels == self.out_channels > 1
        pointwise = (self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)
        if not _applies(x) or not (depthwise or (pointwise and x.shape[2] * x.shape[3] <= 4)):
            return super().forward(x)
        if pointwise:
            y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)  # (N, H, W, C_out)
            return y.permute(0, 3, 1, 2)
        weight, padding, out = self.weight, [], []
        for axis, size in ((2, x.shape[2]), (3, x.shape[3])):
            k, s, p = self.kernel_size[axis - 2], self.stride[axis - 2], self.padding[axis - 2]
            out.append((size + 2 * p - k) // s + 1)
            first, last = max(0, p - (out[-1] - 1) * s), min(k, size + p)  # the taps that meet the map
            weight = weight.narrow(axis, first, last - first)
            padding.append(p - first)
        if weight[0].numel() == x[0, 0].numel() == 1:
            return x * weight.view(1, -1, 1, 1)
        slow = self.kernel_size == (5, 5) or x.shape[2] * x.shape[3] <= 4
        if slow and out[0] * out[1] <= 16 and torch.is_grad_enabled():
            return _SmallDepthwise.apply(x, weight, self.stride, padding)
        return F.conv2d(x, weight, None, self.stride, padding, groups=self.groups)


class _SmallDepthwise(torch.autograd.Function):
    """Depthwise convolution whose weight gradient is summed tap by tap."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, weight), dw = ctx.saved_tensors, []
        options = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), x.shape[1], (True, False, False))
        dx = torch.ops.aten.convolution_backward(dy, x, weight, *options)[0]

        def meeting(tap: int, axis: int) -> tuple[slice, slice]:
            """Return the outputs that this tap adds to, and the inputs that it reads for them."""
            s, offset = ctx.stride[axis - 2], tap - ctx.padding[axis - 2]
            first, last = max(0, -(offset // s)), min(dy.shape[axis], (x.shape[axis] - 1 - offset) // s + 1)
            return slice(first, last), slice(first * s + offset, (last - 1) * s + offset + 1, s)

        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                (outs, ins), (out_columns, in_columns) = meeting(i, 2), meeting(j, 3)
                dw.append((dy[:, :, outs, out_columns] * x[:, :, ins, in_columns]).sum((0, 2, 3)))
        return dx, torch.stack(dw, 1).view_as(weight), None, None


class CpuSqueezeExcitation(SqueezeExcitation):
    """The channel gate with its backward pass written out, which reads the whole map three times instead of five."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if not _applies(x) or not torch.is_grad_enabled():
            return super().forward(x)
        weights = (p for conv in (self.reduce, self.expand) for p in (conv.weight.flatten(1), conv.bias))
        return _Gate.apply(x, *weights)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2):
        mean = x.mean((2, 3))  # (N, C)
        before = F.linear(mean, w1, b1)  # (N, hidden)
        hidden = F.silu(before)
        gate = torch.sigmoid(F.linear(hidden, w2, b2))  # (N, C)
        ctx.save_for_backward(x, mean, before, hidden, gate, w1, w2)
        return x * gate[:, :, None, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, mean, before, hidden, gate, w1, w2 = ctx.saved_tensors
        product = dy * x
        d_gate = torch.ops.aten.sigmoid_backward(product.sum((2, 3)), gate)  # with respect to the sigmoid's input
        d_before = torch.ops.aten.silu_backward(d_gate @ w2, before)
        d_mean = (d_before @ w1).div_(x[0, 0].numel())
        dx = torch.addcmul(d_mean[:, :, None, None], dy, gate[:, :, None, None], out=product)
        return dx, d_before.T @ mean, d_before.sum(0), d_gate.T @ hidden, d_gate.sum(0)
