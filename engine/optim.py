"""The optimizer update on flat buffers: noise and Adam, AdamW or SGD in one pass, or any torch optimizer
after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from synthward.engine.errors import CheckpointError
from synthward.engine.flat import FlatParameters
from synthward.engine.optimizers import DPAdamBC
from synthward.kernels import Correlation, add_gaussian_noise_, noisy_adam_, noisy_sgd_


@dataclass(frozen=True)
class Noise:
    """The noise of one logical step, never used twice: stream coordinates, standard deviation of the white noise, its
    correlation with that of other steps, and the variance of what is added (None: that of the white noise)."""

    key: bytes
    stream: int
    step: int
    std: float
    correlation: Correlation | None = None
    variance: float | None = None

    def correlation_of(self, start: int, end: int) -> Correlation | None:
        """The correlation of a range of coordinates: the same, with their part of the state."""
        correlation = self.correlation
        if correlation is None or correlation.state is None:
            return correlation
        return replace(correlation, state=correlation.state[:, start:end])

    def __repr__(self) -> str:
        return f"Noise(stream={self.stream}, step={self.step}, std={self.std})"


class Updater(Protocol):
    """Applies ``(summed_grad + noise) * grad_scale`` and leaves `summed_grad` at zero."""

    def update(self, noise: Noise, grad_scale: float) -> None: ...

    def export_state(self) -> None:
        """Write the moments into the torch optimizer's own state."""

    def import_state(self) -> None:
        """Read the moments from the torch optimizer's own state."""


def make_updater(flat: FlatParameters, optimizer: torch.optim.Optimizer) -> Updater:
    """The fused update for plain Adam, AdamW and SGD, else the optimizer's own step on the noised mean."""
    updater: Updater
    kind = type(optimizer)
    if kind in (torch.optim.Adam, torch.optim.AdamW, DPAdamBC) and _plain(optimizer, ("amsgrad",)):
        updater = FusedAdam(flat, optimizer)
    elif kind is torch.optim.SGD and _plain(optimizer, ()):
        updater = FusedSgd(flat, optimizer)
    else:
        return TorchUpdate(flat, optimizer)
    updater.import_state()
    return updater


def _plain(optimizer: torch.optim.Optimizer, flags: tuple[str, ...]) -> bool:
    never = (*flags, "maximize", "capturable", "differentiable")
    return not any(group.get(flag) for group in optimizer.param_groups for flag in never)


def _ranges(
    flat: FlatParameters, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(start, end, group) of each optimizer group that has coordinates; groups are read anew in each step."""
    for (start, end), group in zip(flat.group_ranges, optimizer.param_groups, strict=True):
        if end > start:
            yield start, end, group


def _correction(group: dict[str, Any], noise: Noise, grad_scale: float) -> dict[str, Any]:
    """What `DPAdamBC` takes off the second moment: the variance of the noise in the mean."""
    if "min_second_moment" not in group:
        return {}
    variance = noise.std**2 if noise.variance is None else noise.variance
    return {
        "bias_variance": variance * grad_scale**2,
        "min_second_moment": float(group["min_second_moment"]),
    }


class FusedAdam:
    """`torch.optim.Adam`, `AdamW` and `DPAdamBC` with the noise made in registers (Kingma and Ba 2015; Loshchilov and
    Hutter 2019)."""

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer
        self._exp_avg = torch.zeros_like(flat.data)
        self._exp_avg_sq = torch.zeros_like(flat.data)
        self._updates = 0

    def update(self, noise: Noise, grad_scale: float) -> None:
        self._updates += 1
        flat = self._flat
        for start, end, group in _ranges(flat, self._optimizer):
            decoupled = isinstance(self._optimizer, torch.optim.AdamW) or bool(
                group.get("decoupled_weight_decay")
            )
            beta1, beta2 = group["betas"]
            noisy_adam_(
                flat.data[start:end],
                flat.summed_grad[start:end],
                self._exp_avg[start:end],
                self._exp_avg_sq[start:end],
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                start=start,
                noise_std=noise.std,
                correlation=noise.correlation_of(start, end),
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=decoupled,
                adam_step=self._updates,
                **_correction(group, noise, grad_scale),
            )

    def export_state(self) -> None:
        if self._updates == 0:
            return
        for span in self._flat:
            state = self._optimizer.state[span.parameter]
            state["step"] = torch.tensor(float(self._updates))
            state["exp_avg"] = span.view(self._exp_avg).clone()
            state["exp_avg_sq"] = span.view(self._exp_avg_sq).clone()

    def import_state(self) -> None:
        self._exp_avg.zero_()
        self._exp_avg_sq.zero_()
        self._updates = 0
        for span in self._flat:
            state = self._optimizer.state.get(span.parameter)
            if state:
                span.view(self._exp_avg).copy_(state["exp_avg"])
                span.view(self._exp_avg_sq).copy_(state["exp_avg_sq"])
                self._updates = max(self._updates, int(state["step"]))


class FusedSgd:
    """`torch.optim.SGD` with the noise made in registers."""

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer
        self._momentum: Tensor | None = None
        self._is_first = True

    def update(self, noise: Noise, grad_scale: float) -> None:
        flat = self._flat
        for start, end, group in _ranges(flat, self._optimizer):
            momentum = float(group["momentum"])
            buffer = self._buffer()[start:end] if momentum else None
            noisy_sgd_(
                flat.data[start:end],
                flat.summed_grad[start:end],
                buffer,
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                start=start,
                noise_std=noise.std,
                correlation=noise.correlation_of(start, end),
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                weight_decay=float(group["weight_decay"]),
                first_step=self._is_first,
            )
        self._is_first = False

    def _buffer(self) -> Tensor:
        if self._momentum is None:
            self._momentum = torch.zeros_like(self._flat.data)
        return self._momentum

    def export_state(self) -> None:
        if self._momentum is not None and not self._is_first:
            for span in self._flat:
                self._optimizer.state[span.parameter]["momentum_buffer"] = span.view(self._momentum).clone()

    def import_state(self) -> None:
        self._momentum, self._is_first = None, True
        for span in self._flat:
            state = self._optimizer.state.get(span.parameter)
            if state and state.get("momentum_buffer") is not None:
                span.view(self._buffer()).copy_(state["momentum_buffer"])
                self._is_first = False


class TorchUpdate:
    """Any other torch optimizer: it is given the noised mean as ``.grad`` and takes its own step."""

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer

    def update(self, noise: Noise, grad_scale: float) -> None:
        flat = self._flat
        if noise.std:
            add_gaussian_noise_(
                flat.summed_grad,
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                noise_std=noise.std,
                correlation=noise.correlation,
            )
        flat.summed_grad.mul_(grad_scale)
        for span, total in zip(flat, flat.sums, strict=True):
            span.parameter.grad = total
        try:
            self._optimizer.step()
        finally:
            for span in flat:
                span.parameter.grad = None
            flat.summed_grad.zero_()

    def export_state(self) -> None:
        """The state is the optimizer's own already."""

    def import_state(self) -> None:
        """The state is the optimizer's own already."""


def optimizer_tensors(
    flat: FlatParameters, optimizer: torch.optim.Optimizer, updater: Updater
) -> dict[str, Tensor]:
    """Copies of the optimizer's state as ``"<entry>.<parameter name>"``; numbers become 0-dim tensors.

    Raises:
        CheckpointError: an entry that is neither tensor nor number.
    """
    updater.export_state()
    tensors: dict[str, Tensor] = {}
    for span in flat:
        for entry, value in optimizer.state.get(span.parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor | int | float):
                raise CheckpointError(
                    f"optimizer {type(optimizer).__name__} keeps {entry!r} as {type(value).__name__}; "
                    "only tensors and numbers can be saved"
                )
            tensors[f"{entry}.{span.name}"] = torch.as_tensor(value).detach().clone().contiguous()
    return tensors


def load_optimizer_tensors(
    flat: FlatParameters, optimizer: torch.optim.Optimizer, updater: Updater, tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`."""
    names = {span.name: span for span in flat}
    optimizer.state.clear()
    for key, value in tensors.items():
        entry, _, name = key.partition(".")
        if name not in names:
            raise CheckpointError(
                f"the checkpoint has optimizer state for {name!r}, which is no parameter of the module"
            )
        optimizer.state[names[name].parameter][entry] = value.detach().clone()
    updater.import_state()
