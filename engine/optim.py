"""The optimizer update on flat buffers: noise and Adam, AdamW or SGD in one pass, or any torch optimizer
after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from synthward.engine.errors import CheckpointError, ConfigError
from synthward.engine.flat import Parameters, Piece
from synthward.engine.optimizers import DPAdamBC
from synthward.kernels import Correlation, add_gaussian_noise_, noisy_adam_, noisy_sgd_


@dataclass(frozen=True)
class Noise:
    """The noise of one logical step: stream coordinates and standard deviation; never used twice.

    With a `correlation`, whose state is over the coordinates that this process owns, `std` is that of the white noise,
    and `variance` that of what is added to one coordinate in this step (without: ``std**2``).
    """

    key: bytes
    stream: int
    step: int
    std: float
    correlation: Correlation | None = None
    variance: float | None = None

    def part(self, piece: Piece) -> Correlation | None:
        """The correlation of a stretch of coordinates."""
        if self.correlation is None:
            return None
        return self.correlation.part(piece.at, piece.at + len(piece.param))

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
    """Applies ``(sum + noise) * grad_scale`` to the coordinates that this process owns, and leaves sums at zero."""

    def update(self, noise: Noise, grad_scale: float) -> None: ...

    def export_state(self) -> None:
        """Write the moments into the torch optimizer's own state. All ranks take part."""

    def import_state(self) -> None:
        """Read the moments from the torch optimizer's own state."""


def make_updater(flat: Parameters, optimizer: torch.optim.Optimizer) -> Updater:
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


def _pieces(flat: Parameters, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Piece, dict[str, Any]]]:
    """What this process updates, and the group of each; groups are read anew in each step."""
    for piece in flat.pieces:
        yield piece, optimizer.param_groups[piece.group]


class FusedAdam:
    """`torch.optim.Adam` and `AdamW` with the noise made in registers (Kingma and Ba 2015; Loshchilov and
    Hutter 2019)."""

    def __init__(self, flat: Parameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer
        self._exp_avg = torch.zeros(flat.own_size, device=flat.device)
        self._exp_avg_sq = torch.zeros(flat.own_size, device=flat.device)
        self._updates = 0

    def update(self, noise: Noise, grad_scale: float) -> None:
        self._updates += 1
        flat = self._flat
        biases = self._bias_variances(noise, grad_scale)
        for piece, group in _pieces(flat, self._optimizer):
            decoupled = isinstance(self._optimizer, torch.optim.AdamW) or bool(
                group.get("decoupled_weight_decay")
            )
            beta1, beta2 = group["betas"]
            bias = biases.get(piece.group)
            noisy_adam_(
                piece.param,
                flat.sums.own(piece.at, len(piece.param)),
                piece.of(self._exp_avg),
                piece.of(self._exp_avg_sq),
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                start=piece.start,
                noise_std=noise.std,
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=decoupled,
                adam_step=self._updates,
                correlation=noise.part(piece),
                bias_variance=bias,
                min_second_moment=None if bias is None else float(group["min_second_moment"]),
            )
        flat.share()
        flat.sums.release()

    def _bias_variances(self, noise: Noise, grad_scale: float) -> dict[int, float]:
        """What is taken off the second moment, by index of the optimizer's group; not there where nothing is."""
        return {}

    def export_state(self) -> None:
        if self._updates == 0:
            return
        moments = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}
        for span in self._flat:
            self._optimizer.state[span.parameter]["step"] = torch.tensor(float(self._updates))
        for entry, own in moments.items():
            for span, value in zip(self._flat, self._flat.spread(own), strict=True):
                self._optimizer.state[span.parameter][entry] = value

    def import_state(self) -> None:
        states = _states(self._flat, self._optimizer)
        self._exp_avg.zero_()
        self._exp_avg_sq.zero_()
        self._updates = max((int(state["step"]) for state in states if state), default=0)
        for entry, own in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq)):
            self._flat.collect([state[entry] if state else None for state in states], own)


class FusedAdamBC(FusedAdam):
    """`DPAdamBC`: the variance of the noise is averaged as the second moment is, and taken off it.

    So what is taken off is what the moment holds of it, where the noise is not the same in all steps, too.
    """

    def __init__(self, flat: Parameters, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(flat, optimizer)
        # By index of the optimizer's group.
        self._averages: dict[int, float] = {}

    def _bias_variances(self, noise: Noise, grad_scale: float) -> dict[int, float]:
        variance = noise.added_variance() * grad_scale**2
        biases = {}
        # Of all groups, those that this process owns nothing of, too: who owns what may change at a checkpoint.
        for index, group in enumerate(self._optimizer.param_groups):
            beta2 = float(group["betas"][1])
            average = beta2 * self._averages.get(index, 0.0) + (1.0 - beta2) * variance
            self._averages[index] = average
            biases[index] = average / (1.0 - beta2**self._updates)
        return biases

    def export_state(self) -> None:
        super().export_state()
        for span in self._flat if self._updates else ():
            average = torch.tensor(self._averages[span.group], dtype=torch.float64)
            self._optimizer.state[span.parameter]["noise_variance"] = average

    def import_state(self) -> None:
        self._averages = {}
        for span in self._flat:
            state = self._optimizer.state.get(span.parameter)
            if state:
                if "noise_variance" not in state:
                    raise CheckpointError(
                        f"optimizer state of {span.name!r}: has no 'noise_variance', so it is not DPAdamBC's"
                    )
                self._averages[span.group] = float(state["noise_variance"])
        super().import_state()


class FusedSgd:
    """`torch.optim.SGD` with the noise made in registers."""

    def __init__(self, flat: Parameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer
        self._momentum: Tensor | None = None
        self._is_first = True

    def update(self, noise: Noise, grad_scale: float) -> None:
        flat = self._flat
        for piece, group in _pieces(flat, self._optimizer):
            momentum = float(group["momentum"])
            noisy_sgd_(
                piece.param,
                flat.sums.own(piece.at, len(piece.param)),
                piece.of(self._buffer()) if momentum else None,
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                start=piece.start,
                noise_std=noise.std,
                grad_scale=grad_scale,
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                weight_decay=float(group["weight_decay"]),
                first_step=self._is_first,
                correlation=noise.part(piece),
            )
        self._is_first = False
        flat.share()
        flat.sums.release()

    def _buffer(self) -> Tensor:
        if self._momentum is None:
            self._momentum = torch.zeros(self._flat.own_size, device=self._flat.device)
        return self._momentum

    def _has_momentum(self, group: int) -> bool:
        return float(self._optimizer.param_groups[group]["momentum"]) != 0.0

    def export_state(self) -> None:
        # Asked of the groups, which are the same on all ranks, and not of what this one owns.
        if self._is_first or not any(self._has_momentum(span.group) for span in self._flat):
            return
        for span, value in zip(self._flat, self._flat.spread(self._buffer()), strict=True):
            if self._has_momentum(span.group):
                self._optimizer.state[span.parameter]["momentum_buffer"] = value

    def import_state(self) -> None:
        found = [state.get("momentum_buffer") for state in _states(self._flat, self._optimizer)]
        self._momentum, self._is_first = None, all(value is None for value in found)
        if not self._is_first:
            self._flat.collect(found, self._buffer())


class TorchUpdate:
    """Any other torch optimizer: it is given the noised mean as ``.grad`` and takes its own step."""

    def __init__(self, flat: Parameters, optimizer: torch.optim.Optimizer) -> None:
        self._flat, self._optimizer = flat, optimizer

    def update(self, noise: Noise, grad_scale: float) -> None:
        flat = self._flat
        for piece in flat.pieces:
            total = flat.sums.own(piece.at, len(piece.param))
            if noise.std:
                add_gaussian_noise_(
                    total,
                    key=noise.key,
                    stream=noise.stream,
                    step=noise.step,
                    start=piece.start,
                    noise_std=noise.std,
                    correlation=noise.part(piece),
                )
            total.mul_(grad_scale)
        for span, total in zip(flat, flat.released(), strict=True):
            span.parameter.grad = total
        try:
            self._optimizer.step()
        finally:
            for span in flat:
                span.parameter.grad = None
            flat.sums.release()
            flat.sums.drop()

    def export_state(self) -> None:
        """The state is the optimizer's own already."""

    def import_state(self) -> None:
        """The state is the optimizer's own already."""


def _states(flat: Parameters, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The torch optimizer's state of each parameter; empty where there is none."""
    return [optimizer.state.get(span.parameter, {}) for span in flat]


def optimizer_tensors(
    flat: Parameters, optimizer: torch.optim.Optimizer, updater: Updater
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
    flat: Parameters, optimizer: torch.optim.Optimizer, updater: Updater, tensors: dict[str, Tensor]
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
        parameter = names[name].parameter
        # Torch keeps counters in CPU memory, and all else beside the parameter.
        place = parameter.device if value.dim() else value.device
        optimizer.state[parameter][entry] = value.detach().clone().to(place)
    updater.import_state()
