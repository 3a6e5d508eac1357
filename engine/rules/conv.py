"""Convolutions and their transposes: the outer family with patches as rows, the diagonal family for the bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState, Kept
from synthward.engine.layout import Layout, Length
from synthward.engine.provenance import Target
from synthward.engine.rules.row_values import measured_type
from synthward.engine.rules.uses import (
    DiagonalRows,
    DiagonalUse,
    Norms,
    Use,
    Way,
    Weights,
    diagonal_use,
    is_compiled,
)
from synthward.kernels import (
    SUM_BLOCK,
    ConvShape,
    conv_norms,
    conv_sum,
    conv_unit_grads,
    diagonal_weighted_sum,
    sum_chain,
)
from synthward.kernels.conv import half_chain, prefers_channels_last

# Places of a kernel, and pixels of an image, up to which products of pairs of places are considered.
_MOST_TAPS, _MOST_PIXELS = 1024, 1 << 14


@dataclass(frozen=True)
class ConvUse:
    """Weight gradient of a convolution: images [N, image_numel], output_grads [N, output_numel] (`ConvShape`).

    `is_transposed`: a transposed one, whose output gradients are the images and whose inputs the output_grads.
    `is_shared`: its inputs may be memory that the caller goes on using (a batch of records).
    """

    images: Tensor
    output_grads: Tensor
    shape: ConvShape
    is_transposed: bool = False
    is_shared: bool = True
    method: str = "tile"

    @property
    def rows(self) -> int:
        return len(self.images)

    @property
    def is_formed(self) -> bool:
        # Products of pairs are known to the compiled kernels alone; all others form the gradient.
        return self.method == "tile" or not is_compiled(self.images, self.output_grads)

    @property
    def evidence(self) -> Tensor:
        return self.images if self.is_transposed else self.output_grads

    def chain(self, layout: Layout) -> Length:
        if self.is_formed:
            return self.released_chain(layout)
        widest = sum_chain(max(self.shape.channels, self.shape.outputs), compiled=True)
        return widest + self.shape.taps + self.shape.out[2]

    def released_chain(self, layout: Layout) -> Length:
        if not is_compiled(self.images, self.output_grads):
            if self.images.dtype == self.output_grads.dtype != torch.float32:
                return half_chain(self.shape, layout.lengths)
            # Triton's: one sum over all places of the unit's images. The reference, in double, is well within it.
            return sum_chain(self.shape.places * layout.lengths, compiled=True)
        within = min(self.shape.places, SUM_BLOCK)
        return within + -(-self.shape.places // SUM_BLOCK) * layout.lengths

    def add_norms(self, sq_norms: Tensor, row_sums: Tensor, layout: Layout, norms: Norms) -> None:
        conv_norms(
            self.shape,
            self.images,
            self.output_grads,
            layout.offsets_on(self.images.device),
            sq_norms,
            row_sums,
            order=layout.order,
            method="gram" if self.method == "gram" else "tile",
        )

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        total = torch.zeros(self.shape.numel, dtype=out.dtype, device=out.device)
        conv_sum(self.shape, self.images, self.output_grads, weights.rows, out=total)
        _add_channels_last(self.shape, total, out)

    def unit_grads(self, layout: Layout, first: int, last: int) -> Tensor:
        offsets = layout.offsets_on(self.images.device)
        begin, end = int(offsets[first]), int(offsets[last])
        index = layout.order[begin:end] if layout.order is not None else slice(begin, end)
        bounds = offsets[first : last + 1] - offsets[first]
        grads = conv_unit_grads(self.shape, self.images[index], self.output_grads[index], bounds)
        v = self.shape
        return grads.view(len(grads), -1, v.taps, v.channels).mT.reshape(len(grads), -1)

    def ways(self, layout: Layout) -> list[Way]:
        """What each way to the norm costs over the weighted sum."""
        v, rows, units = self.shape, float(self.rows), layout.num_units
        ways = [Way("tile", 2.0 * rows * v.places * v.numel, 0.0)]
        pixels = v.reach[0] * v.reach[1] * v.reach[2]
        if (
            layout.is_single
            and v.stride == (1, 1, 1)
            and v.taps <= _MOST_TAPS
            and pixels <= _MOST_PIXELS
            and is_compiled(self.images, self.output_grads)
        ):
            pairs = pixels**2 * v.channels + v.places**2 * (v.outputs + _PAIR_COST * v.taps)
            ways.append(Way("gram", rows * v.groups * pairs, 0.0))
        formed = 4.0 * units * v.numel
        # Once the gradients are there, neither operand is needed any more.
        kept, own = self.output_grads, self.images
        if self.is_transposed:
            kept, own = own, kept
        freed = float(kept.nbytes) + (0.0 if self.is_shared else float(own.nbytes))
        return [*ways, Way("materialise", 0.0, 2.0 * formed, formed - freed)]

    def by(self, method: str) -> ConvUse:
        return replace(self, method=method)

    def materialise(self, layout: Layout) -> DiagonalUse:
        """The units' gradients as rows."""
        offsets = layout.offsets_on(self.images.device)
        grads = conv_unit_grads(self.shape, self.images, self.output_grads, offsets, order=layout.order)
        return ChannelsLastUse(grads, self.shape)


# Operations of a product of patches beyond those of the pixels, per pair of places and place of the kernel.
_PAIR_COST = 2


@dataclass(frozen=True)
class ChannelsLastUse(DiagonalUse):
    """Gradients of units [U, numel] in the order in which the kernels form them."""

    shape: ConvShape

    def add_weighted_sum(self, weights: Weights, out: Tensor) -> None:
        total = torch.zeros(self.shape.numel, dtype=out.dtype, device=out.device)
        diagonal_weighted_sum(self.unit_rows, weights.rows, out=total)
        _add_channels_last(self.shape, total, out)


def _add_channels_last(shape: ConvShape, total: Tensor, out: Tensor) -> None:
    """Add a gradient with its channels last to `out`, the weight's sum."""
    out.view(-1, shape.channels, shape.taps).add_(total.view(-1, shape.taps, shape.channels).mT)


@dataclass(frozen=True)
class _Setting:
    """Arguments of one call, a number per axis each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    def shape(self, x: Tensor, weight: Tensor, out: Tensor) -> ConvShape:
        """Sizes of the convolution behind the weight gradient. That of a transposed convolution is the one of a
        convolution from its output to its input."""
        inputs, outputs = (out, x) if self.transposed else (x, out)
        groups = self.groups

        def three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
            a, b, c = (*[fill] * (3 - len(values)), *values)
            return a, b, c

        return ConvShape(
            groups=groups,
            channels=inputs.shape[1] // groups,
            outputs=outputs.shape[1] // groups,
            size=three(inputs.shape[2:], 1),
            kernel=three(weight.shape[2:], 1),
            stride=three(self.stride, 1),
            padding=three(self.padding, 0),
            dilation=three(self.dilation, 1),
            out=three(outputs.shape[2:], 1),
        )


class _Conv(torch.autograd.Function):
    """A convolution whose backward gives the input gradient alone and keeps what weights need."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable[..., Tensor],
        setting: _Setting,
        anchor: Tensor,
        state: CaptureState,
        call: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.setting, ctx.state, ctx.call = setting, state, call
        s = setting
        if s.transposed:
            return function(x, weight, bias, s.stride, s.padding, s.output_padding, s.groups, s.dilation)
        return function(x, weight, bias, s.stride, s.padding, s.dilation, s.groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.state.refuse_double("conv")
        x, weight = ctx.saved_tensors
        weight_at, bias_at, leading, forward = ctx.call
        setting: _Setting = ctx.setting
        dtype = measured_type(grad)
        g = grad.to(dtype)
        uses: list[tuple[Target, Use | DiagonalRows]] = []
        if weight_at is not None:
            shape = setting.shape(x, weight, grad)
            # As autocast takes it.
            a = x.detach().to(dtype)
            images, grads = (g, a) if setting.transposed else (a, g)
            if prefers_channels_last(shape, images, grads):
                shape = replace(shape, channels_last=True)
                images, grads = images.movedim(1, -1), grads.movedim(1, -1)
            is_shared = x.grad_fn is None or x._is_view()
            rows = (images.contiguous().flatten(1), grads.contiguous().flatten(1))
            uses.append((weight_at, ConvUse(*rows, shape, setting.transposed, is_shared)))
        if bias_at is not None:
            places = tuple(range(2, grad.dim()))
            sums = g.contiguous().sum(places, dtype=torch.float32)
            uses.append((bias_at, diagonal_use(ctx.state, sums, leading, forward)))
        ctx.state.keep(Kept("conv", leading, forward, uses))
        grad_x = None
        if ctx.needs_input_grad[0]:
            s = setting
            grad_x = torch.ops.aten.convolution_backward(
                grad,
                x.to(grad.dtype),
                weight.to(grad.dtype),
                None,
                s.stride,
                s.padding,
                s.dilation,
                s.transposed,
                s.output_padding,
                s.groups,
                [True, False, False],
            )[0].to(x.dtype)
        return grad_x, None, None, None, None, ctx.state.anchor_grad, None, None


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def _run(
    state: CaptureState,
    function: Callable[..., Tensor],
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    setting: _Setting,
) -> Tensor:
    operation = getattr(function, "__name__", "conv")
    state.refuse_tracked(input, operation)
    weight_at, bias_at = state.target(weight), state.target(bias)
    state.refuse_computed(weight, weight_at, bias, operation)
    state.refuse_computed(bias, bias_at, weight, operation)
    if input.dim() != axes + 2:
        state.refuse(weight if weight_at is not None else bias, operation, "its input has no batch axis")
    call = state.call(operation, (weight_at, bias_at), input.shape[0])
    apply: Callable[..., Tensor] = _Conv.apply
    return apply(input, weight, bias, function, setting, state.anchor, state, call)


def _conv(function: Callable[..., Tensor], axes: int) -> Callable[..., Tensor]:
    """Handler of ``torch.nn.functional.conv{axes}d``; input [rows, channels, ...]."""

    def handler(
        state: CaptureState,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if state.target(weight) is None and state.target(bias) is None:
            return function(input, weight, bias, stride, padding, dilation, groups)
        spread = _each(dilation, axes)
        if padding == "same":
            # More behind than before where the kernel is even: the rest is put there first.
            totals = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
            extra = [total % 2 for total in totals]
            if any(extra):
                input = F.pad(input, [n for e in reversed(extra) for n in (0, e)])
            padding = [total // 2 for total in totals]
        elif padding == "valid":
            padding = 0
        assert not isinstance(padding, str)
        setting = _Setting(
            _each(stride, axes), _each(padding, axes), spread, (0,) * axes, groups, transposed=False
        )
        return _run(state, function, axes, input, weight, bias, setting)

    return handler


def _conv_transpose(function: Callable[..., Tensor], axes: int) -> Callable[..., Tensor]:
    """Handler of ``torch.nn.functional.conv_transpose{axes}d``; input [rows, channels, ...]."""

    def handler(
        state: CaptureState,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Tensor:
        if state.target(weight) is None and state.target(bias) is None:
            return function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        setting = _Setting(
            _each(stride, axes),
            _each(padding, axes),
            _each(dilation, axes),
            _each(output_padding, axes),
            groups,
            transposed=True,
        )
        return _run(state, function, axes, input, weight, bias, setting)

    return handler


HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.conv1d: _conv(F.conv1d, 1),
    F.conv2d: _conv(F.conv2d, 2),
    F.conv3d: _conv(F.conv3d, 3),
    F.conv_transpose1d: _conv_transpose(F.conv_transpose1d, 1),
    F.conv_transpose2d: _conv_transpose(F.conv_transpose2d, 2),
    F.conv_transpose3d: _conv_transpose(F.conv_transpose3d, 3),
}
