"""Sizes of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Axes = tuple[int, int, int]


@dataclass(frozen=True)
class ConvShape:
    """A convolution of images [groups * channels, *size] to [groups * outputs, *out].

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
        return [self.groups, self.channels, self.outputs, *(n for axis in axes for n in axis)]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> ConvShape:
        """Inverse of `numbers`."""
        groups, channels, outputs = numbers[:3]
        axes = [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(3, len(numbers), 3)]
        return cls(groups, channels, outputs, *axes)
