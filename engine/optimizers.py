"""Optimizers for private training alone, in torch's form: settings and state; the engine takes their steps."""

from __future__ import annotations

import math
from typing import Any

import torch

from synthward.engine.errors import ConfigError


class DPAdamBC(torch.optim.Adam):
    """Adam whose second moment is rid of what the privacy noise adds to it.

    Noise of variance s^2 in the mean gradient raises the second moment by s^2, under which the update becomes that of
    SGD. With the noise's part taken off, a step is ``lr m_hat / sqrt(max(v_hat - s^2, min_second_moment))``. The
    variance is the engine's own and public, so nothing is spent on it.

    Args:
        params, lr, betas: as in `torch.optim.Adam`; groups may have their own.
        min_second_moment: floor of what is left of the second moment, which sets the longest step; in units of the
            squared mean gradient, and so to be tuned. A group may have its own.
        weight_decay: added to the gradient, as in `torch.optim.Adam`.

    Raises:
        ConfigError: a `min_second_moment` that is not a positive number.
    Reference: Tang, Shpilevskiy and Lecuyer 2023, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias
    Correction)", algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        min_second_moment: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=0.0, weight_decay=weight_decay)
        self.defaults["min_second_moment"] = min_second_moment
        for group in self.param_groups:
            group.setdefault("min_second_moment", min_second_moment)
            _check_floor(group["min_second_moment"])

    def step(self, closure: Any = None) -> Any:
        """Refused: without the engine there is no noise whose variance could be taken off.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "DPAdamBC takes steps inside the engine alone, which knows the noise: give it to make_private or to "
            "PrivateTrainer (or use torch.optim.Adam)"
        )


def _check_floor(value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # What float32 holds with all its digits.
    if not (is_number and math.isfinite(value) and value >= 2.0**-126):
        raise ConfigError(f"min_second_moment: got {value!r}; give a positive number, such as 1e-8")
