"""Noise and update: the fused kernels for SGD, Adam and AdamW, one in-place kernel for any other optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from synthward.engine.buffers import FlatBuffers
from synthward.engine.errors import ConfigError
from synthward.kernels import add_gaussian_noise_, noisy_adam_, noisy_sgd_

NOISE_STREAM = 0
_NEVER_FUSED = ("maximize", "amsgrad", "differentiable")


class Updater:
    """Applies one logical step: noise on the flat sum, division by the public batch size, optimizer update."""

    def __init__(self, optimizer: Optimizer, buffers: FlatBuffers) -> None:
        self.optimizer, self.buffers = optimizer, buffers
        self.updates = 0
        self.moments: dict[str, Tensor] = {}
        self.is_fused = type(optimizer) in (SGD, Adam, AdamW) and not any(
            group.get(flag) for group in optimizer.param_groups for flag in _NEVER_FUSED
        )
        if self.is_fused and optimizer.state:
            raise ConfigError("optimizer: was stepped before it was made private; give a fresh one")
        if self.is_fused and type(optimizer) is not SGD:
            self._share_moments("exp_avg", "exp_avg_sq")

    def apply(self, *, key: bytes, step: int, noise_std: float, grad_scale: float) -> None:
        """Noise of logical ``step`` and the update; the sum is zero afterwards."""
        self.updates += 1
        if not self.is_fused:
            self._apply_other(key, step, noise_std, grad_scale)
            return
        for group in self.optimizer.param_groups:
            part = self._group_slice(group)
            common = {
                "key": key,
                "stream": NOISE_STREAM,
                "step": step,
                "start": part.start,
                "noise_std": noise_std,
                "grad_scale": grad_scale,
                "lr": float(group["lr"]),
                "weight_decay": float(group["weight_decay"]),
            }
            if isinstance(self.optimizer, SGD):
                self._apply_sgd(group, part, common)
            else:
                self._apply_adam(group, part, common)

    def state(self) -> dict[str, Tensor]:
        """Tensors of the update's state: parameters, moments, number of updates."""
        tensors = {"parameters": self.buffers.parameters.clone(), "updates": torch.tensor(self.updates)}
        tensors |= {name: value.clone() for name, value in self.moments.items()}
        if not self.is_fused:
            for index, state in self.optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).clone()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` gave."""
        with torch.no_grad():
            self.buffers.parameters.copy_(tensors["parameters"])
        self.updates = int(tensors["updates"])
        if self.is_fused:
            for name in tensors:
                if name in ("momentum_buffer",) and name not in self.moments:
                    self._share_moments(name)
            for name, value in self.moments.items():
                value.copy_(tensors[name])
            return
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _group_slice(self, group: dict[str, Any]) -> slice:
        """The group's contiguous part of the flat buffers (which are laid out group by group)."""
        parts = [self.buffers.slices[id(p)] for p in group["params"] if id(p) in self.buffers.slices]
        return slice(parts[0].start, parts[-1].stop) if parts else slice(0, 0)

    def _share_moments(self, *names: str) -> None:
        """Moments as flat buffers whose views stand in the optimizer's own state."""
        for name in names:
            self.moments[name] = torch.zeros_like(self.buffers.parameters)
            for (_, parameter), view in zip(
                self.buffers.named, self.buffers.views(self.moments[name]).values(), strict=True
            ):
                self.optimizer.state[parameter][name] = view

    def _apply_adam(self, group: dict[str, Any], part: slice, common: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        noisy_adam_(
            self.buffers.parameters[part],
            self.buffers.summed[part],
            self.moments["exp_avg"][part],
            self.moments["exp_avg_sq"][part],
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            decoupled=isinstance(self.optimizer, AdamW) or bool(group.get("decoupled_weight_decay")),
            adam_step=self.updates,
            **common,
        )

    def _apply_sgd(self, group: dict[str, Any], part: slice, common: dict[str, Any]) -> None:
        momentum = float(group["momentum"])
        if momentum and "momentum_buffer" not in self.moments:
            self._share_moments("momentum_buffer")
        noisy_sgd_(
            self.buffers.parameters[part],
            self.buffers.summed[part],
            self.moments["momentum_buffer"][part] if momentum else None,
            momentum=momentum,
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            first_step=self.updates == 1,
            **common,
        )

    def _apply_other(self, key: bytes, step: int, noise_std: float, grad_scale: float) -> None:
        if noise_std:
            add_gaussian_noise_(self.buffers.summed, key=key, stream=NOISE_STREAM, step=step, noise_std=noise_std)
        self.buffers.summed.mul_(grad_scale)
        for _, parameter in self.buffers.named:
            parameter.grad = self.buffers.sums[id(parameter)]
        try:
            self.optimizer.step()
        finally:
            for _, parameter in self.buffers.named:
                parameter.grad = None
            self.buffers.summed.zero_()
