"""The optimizer update on flat buffers: noise and Adam, AdamW or SGD in one pass, or any torch optimizer
after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from synthward.engine.errors import CheckpointError, ConfigError
from synthward.engine.flat import FlatParameters
from synthward.engine.optimizers import DPAdamBC
from synthward.kernels import Correlation, add_gaussian_noise_, noisy_adam_, noisy_sgd_


@dataclass(frozen=True)
class Noise:
    """The noise of one logical step: stream coordinates and standard deviation; never used twice.

    With a `correlation`, whose state is over the whole flat buffer, `std` is that of the white noise, and `variance`
    that of what is added to one coordinate in this step (without: ``std**2``).
    """

    key: bytes
    stream: int
    step: int
    std: float
    correlation: Correlation | None = None
    variance: float | None = None

    def part(self, start: int, end: int) -> Correlation | None:
        """The correlation of a part of the flat buffer."""
        return None if self.correlation is None else self.correlation.part(start, end)

    def added_variance(self) -> float:
        """Variance of the noise in one coordinate of the sum.

        Raises:
            ValueError: the noise is correlated and nobody said.
        """
        if self.variance is not None:
            return self.variance
        if self.correlation is not None:
            raise ValueError("variance: correlated noise does not tell its own; give it")
        return self.std**2

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
    """The fused update for plain Adam, AdamW, DPAdamBC and SGD, else the optimizer's own step on the noised mean.

    Raises:
        ConfigError: a DPAdamBC with options that its update does not have.
    """
    updater: Updater
    kind = type(optimizer)
    if isinstance(optimizer, DPAdamBC):
        if kind is not DPAdamBC or not _plain(optimizer, ("amsgrad",)):
            raise ConfigError(
                "DPAdamBC has no subclasses and no amsgrad, maximize, capturable or differentiable"
            )
        updater = FusedAdamBC(flat, optimizer)
    elif kind in (torch.optim.Adam, torch.optim.AdamW) and _plain(optimizer, ("amsgrad",)):
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


class FusedAdam:
    """`torch.optim.Adam` and `AdamW` with the noise made in registers (Kingma and Ba 2015; Loshchilov and
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
            bias = self._bias_variance(start, group, noise, grad_scale)
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
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=decoupled,
                adam_step=self._updates,
                correlation=noise.part(start, end),
                bias_variance=bias,
                min_second_moment=None if bias is None else float(group["min_second_moment"]),
            )

    def _bias_variance(
        self, start: int, group: dict[str, Any], noise: Noise, grad_scale: float
    ) -> float | None:
        """What is taken off the second moment of the group that begins at `start`, if anything is."""
        return None

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


class FusedAdamBC(FusedAdam):
    """`DPAdamBC`: the variance of the noise is averaged as the second moment is, and taken off it.

    So what is taken off is what the moment holds of it, where the noise is not the same in all steps, too.
    """

    def __init__(self, flat: FlatParameters, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(flat, optimizer)
        # By begin of the optimizer's group.
        self._averages: dict[int, float] = {}

    def _bias_variance(self, start: int, group: dict[str, Any], noise: Noise, grad_scale: float) -> float:
        beta2 = float(group["betas"][1])
        variance = noise.added_variance() * grad_scale**2
        average = beta2 * self._averages.get(start, 0.0) + (1.0 - beta2) * variance
        self._averages[start] = average
        return average / (1.0 - beta2**self._updates)

    def export_state(self) -> None:
        super().export_state()
        for span in self._flat if self._updates else ():
            average = self._averages[self._flat.group_ranges[span.group][0]]
            self._optimizer.state[span.parameter]["noise_variance"] = torch.tensor(
                average, dtype=torch.float64
            )

    def import_state(self) -> None:
        self._averages = {}
        for span in self._flat:
            state = self._optimizer.state.get(span.parameter)
            if state:
                if "noise_variance" not in state:
                    raise CheckpointError(
                        f"optimizer state of {span.name!r}: has no 'noise_variance', so it is not DPAdamBC's"
                    )
                start = self._flat.group_ranges[span.group][0]
                self._averages[start] = float(state["noise_variance"])
        super().import_state()


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
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                weight_decay=float(group["weight_decay"]),
                first_step=self._is_first,
                correlation=noise.part(start, end),
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
