"""Sizes of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

Axes = tuple[int, int, int]
# Places that the kernels for half precision add up in one chain.
HALF_TERMS = 64
# Of a shape without its order of channels: `ConvShape.numbers`.
_NUMBERS = 21


@dataclass(frozen=True)
class ConvShape:
    """A convolution of images [groups * channels, *size] to [groups * outputs, *out]; or, `channels_last`, of images
    [*size, groups * channels] to [*out, groups * outputs].

    `channels` and `outputs` are those of one group. There are always three axes (depth, height, width); the first ones
    have length 1 where a convolution has fewer. `padding` is that before the first place; what is behind the last
    place that the kernel reaches is not read.
    """

    groups: int
    channels: int
    outputs: int
    size: Axes
    kernel: Axes
    stride: Axes
    padding: Axes
    dilation: Axes
    out: Axes
    channels_last: bool = False

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return math.prod(self.kernel)

    @property
    def places(self) -> int:
        """Places of the output."""
        return math.prod(self.out)

    @property
    def reach(self) -> Axes:
        """Size of the padded image as far as the kernel reaches."""
        x, y, z = (
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(self.out, self.stride, self.kernel, self.dilation, strict=True)
        )
        return x, y, z

    @property
    def image_numel(self) -> int:
        return self.groups * self.channels * math.prod(self.size)

    @property
    def output_numel(self) -> int:
        return self.groups * self.outputs * self.places

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.groups * self.outputs * self.taps * self.channels

    def numbers(self) -> list[int]:
        """As the compiled kernels take it."""
        axes = (self.size, self.kernel, self.stride, self.padding, self.dilation, self.out)
        numbers = [self.groups, self.channels, self.outputs, *(n for axis in axes for n in axis)]
        return [*numbers, 1] if self.channels_last else numbers

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConvShape:
        """Inverse of `numbers`."""
        groups, channels, outputs = numbers[:3]
        a, b, c, d, e, f = ((numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(3, _NUMBERS, 3))
        return cls(groups, channels, outputs, a, b, c, d, e, f, len(numbers) > _NUMBERS)

    def channels_first(self, images: Tensor, output_grads: Tensor) -> tuple[ConvShape, Tensor, Tensor]:
        """The same with images [N, groups * channels * size...] and output_grads [N, groups * outputs * out...]."""
        if not self.channels_last:
            return self, images, output_grads
        x = images.reshape(-1, math.prod(self.size), self.groups * self.channels).mT
        g = output_grads.reshape(-1, self.places, self.groups * self.outputs).mT
        return replace(self, channels_last=False), x.reshape(images.shape), g.reshape(output_grads.shape)
