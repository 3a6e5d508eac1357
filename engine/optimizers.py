"""Optimizers that know of the noise; for use under the engine alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from synthward.engine.errors import ConfigError, PrivacyError


class DPAdamBC(torch.optim.Adam):
    """Adam whose second moment is corrected for the noise (Tang, Shpilevskiy and Lecuyer 2023, algorithm 1).

    The variance of the noise, ``(sigma C / expected batch)^2``, is known and dominates Adam's second moment in private
    training, where it makes Adam a momentum SGD. It is taken off: the update is
    ``lr m_hat / sqrt(max(v_hat - variance, min_second_moment))``.

    Args:
        params, lr, betas, weight_decay: as of `torch.optim.Adam`.
        min_second_moment: floor of the corrected second moment (the paper's gamma'), above 0. The larger, the closer
            to momentum SGD; of the order of squared entries of the mean gradient.
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
        if not 1e-30 <= min_second_moment < float("inf"):
            raise ConfigError(
                f"min_second_moment: got {min_second_moment!r}; give a finite number of at least 1e-30"
            )
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        for group in self.param_groups:
            group.setdefault("min_second_moment", min_second_moment)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Refused: only the engine knows how much noise there is."""
        raise PrivacyError(
            "DPAdamBC: its step needs the noise of a private update; give the optimizer to make_private or "
            "PrivateTrainer, or use torch.optim.Adam"
        )
