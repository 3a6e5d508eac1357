"""Charged queries: vectors of statistics released with Gaussian noise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from synthward.engine.accounting import GaussianEvent
from synthward.engine.errors import PrivacyError
from synthward.engine.keys import KeySchedule
from synthward.engine.ledger import Ledger
from synthward.engine.replay import tap
from synthward.kernels import gaussian_noise

_STREAM = 2


class QueryMechanism:
    """Gaussian mechanism over vectors; every answer is in the ledger before it exists.

    Guarantees: noise of standard deviation ``noise_multiplier * l2_sensitivity`` per coordinate, from a key
    of its own and a fresh step for every query, also where several mechanisms share one key schedule. The
    caller vouches for ``l2_sensitivity``: how far one unit,
    added or removed, can move ``values``.
    """

    def __init__(self, ledger: Ledger, keys: KeySchedule) -> None:
        self._ledger = ledger
        self._keys = keys

    def gaussian_vector(
        self, values: NDArray[np.float64], *, l2_sensitivity: float, noise_multiplier: float, note: str
    ) -> NDArray[np.float64]:
        """Noised ``values``, float64 [n].

        Raises:
            PrivacyError: a sensitivity that is not positive, or values that are not finite.
            BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
        """
        values = np.asarray(values, dtype=np.float64)
        if not (math.isfinite(l2_sensitivity) and l2_sensitivity > 0.0):
            raise PrivacyError(
                f"l2_sensitivity: got {l2_sensitivity!r}; a query needs a positive finite bound"
            )
        if not np.isfinite(values).all():
            raise PrivacyError(f"query {note!r}: its values are not finite, so no sensitivity can hold")
        self._ledger.append_event(GaussianEvent(float(noise_multiplier), 1), note=note)
        values = tap(
            "gaussian_vector",
            values,
            sensitivity=l2_sensitivity,
            is_private=self._keys.is_private,
            noise_multiplier=noise_multiplier,
            note=note,
        )
        key, step = self._keys.key("queries"), self._keys.next_query()
        noise = gaussian_noise(values.size, key=key, stream=_STREAM, step=step)
        scaled = noise.numpy().astype(np.float64) * (noise_multiplier * l2_sensitivity)
        return np.asarray(values + scaled.reshape(values.shape))
