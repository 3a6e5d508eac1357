"""The charged mechanism of all queries: Gaussian noise on vectors, in the ledger before it exists."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from synthward.engine.accounting import ApproximateEvent, Event, GaussianEvent
from synthward.engine.accounting.events import check_noise_multiplier
from synthward.engine.errors import ConfigError, PrivacyError
from synthward.engine.keys import KeySchedule
from synthward.engine.ledger import Ledger
from synthward.engine.queries.noise import integer_noise
from synthward.engine.replay import tap
from synthward.kernels import gaussian_noise

_STREAM = 2
# Sums and noise stay below this, so that their sum does not leave int64.
_MOST = 1 << 61


class QueryMechanism:
    """Gaussian mechanism over vectors; every answer is in the ledger before it exists.

    Guarantees: noise of standard deviation ``noise_multiplier * l2_sensitivity`` per coordinate, from a key
    of its own and a fresh step for every query, also where several mechanisms share one key schedule. The
    caller vouches for ``l2_sensitivity``: how far one unit, added or removed, can move ``values``. The queries of this
    package compute it themselves.
    """

    def __init__(self, ledger: Ledger, keys: KeySchedule) -> None:
        self._ledger = ledger
        self._keys = keys

    def gaussian_vector(
        self,
        values: NDArray[np.float64],
        *,
        l2_sensitivity: float,
        noise_multiplier: float,
        note: str,
        arithmetic: Literal["float", "discrete"] = "discrete",
    ) -> NDArray[np.float64]:
        """Noised ``values``, float64 [n].

        Args:
            arithmetic: "discrete" rounds the values to a grid, which is charged as more sensitivity (2.5e-4 of it at
                the most), and adds integers to it, so that no bit of the answer tells how a value was represented
                (`integer_noise`); values beyond 2^61 steps of the grid are cut off there. "float" adds float32
                noise in float64, without that defence.

        Raises:
            PrivacyError: a sensitivity that is not positive, or values that are not finite.
            BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
        """
        values = np.asarray(values, dtype=np.float64)
        _check_sensitivity(l2_sensitivity)
        if arithmetic not in ("float", "discrete"):
            raise ConfigError(f"arithmetic: got {arithmetic!r}; choose 'discrete' or 'float'")
        if not np.isfinite(values).all():
            raise PrivacyError(f"query {note!r}: its values are not finite, so no sensitivity can hold")
        check_noise_multiplier(noise_multiplier)
        grid = _grid(l2_sensitivity, values.size)
        # Rounding two vectors moves each by at most half a step in every coordinate.
        reach = _above(l2_sensitivity / grid + math.sqrt(values.size))
        _check_noise_std(noise_multiplier * reach)
        self._charge((GaussianEvent(float(noise_multiplier), 1),), note)
        values = self._tap("gaussian_vector", values, l2_sensitivity, noise_multiplier, note)
        if arithmetic == "discrete":
            # The grid is a power of two: nothing is lost but the rounding, and what lies beyond the range.
            steps = np.clip(np.rint(values / grid), -_MOST, _MOST)
            return self._noised(steps, noise_multiplier * reach) * grid
        key, step = self._keys.key("queries"), self._keys.next_query()
        noise = gaussian_noise(values.size, key=key, stream=_STREAM, step=step)
        scaled = noise.numpy().astype(np.float64) * (noise_multiplier * l2_sensitivity)
        return np.asarray(values + scaled.reshape(values.shape))

    def integer_vector(
        self, values: NDArray[np.int64], *, l2_sensitivity: float, noise_multiplier: float, note: str
    ) -> NDArray[np.float64]:
        """Noised whole numbers: float64 [n], each a whole number again.

        For sums that are exact in int64 and whose sensitivity is therefore exact too; nothing is rounded before the
        noise. The noise is ``rint(noise_multiplier * l2_sensitivity * z)``.

        Raises:
            PrivacyError: a sensitivity that is not positive, or values that are no int64 array.
            BudgetExceededError: the ledger's target does not pay for it; nothing is answered.
        """
        _check_sensitivity(l2_sensitivity)
        check_noise_multiplier(noise_multiplier)
        _check_integers(values)
        reach = _above(l2_sensitivity)
        _check_noise_std(noise_multiplier * reach)
        self._charge((GaussianEvent(float(noise_multiplier), 1),), note)
        steps = np.clip(values, -_MOST, _MOST).astype(np.float64)
        steps = self._tap("integer_vector", steps, reach, noise_multiplier, note)
        return self._noised(steps, noise_multiplier * reach)

    def counts_above(
        self,
        counts: dict[str, int],
        *,
        threshold: int,
        delta: float,
        l2_sensitivity: float,
        noise_multiplier: float,
        note: str,
    ) -> dict[str, float]:
        """Noised counts by name, of the names whose noised count is at least ``threshold``; in order of their names.

        Which names there are may depend on the records. The caller vouches for ``l2_sensitivity`` on the names that
        two neighbours share, and for ``delta``: the probability that any name held by only one of them is answered.
        Charged as the Gaussian mechanism and a (0, delta) mechanism beside it, in two lines, both before the answer.

        Raises:
            PrivacyError: a sensitivity that is not positive.
            ConfigError: no noise, or a delta that is not between 0 and 1.
            BudgetExceededError: the ledger's target does not pay for it; nothing is answered. The (0, delta) part may
                have been charged.
        """
        _check_sensitivity(l2_sensitivity)
        check_noise_multiplier(noise_multiplier)
        reach = _above(l2_sensitivity)
        _check_noise_std(noise_multiplier * reach)
        events = (ApproximateEvent(0.0, float(delta), 1), GaussianEvent(float(noise_multiplier), 1))
        self._charge(events, note)
        exact = tap(
            "counts_above",
            {name: float(counts[name]) for name in sorted(counts)},
            sensitivity=reach,
            is_private=self._keys.is_private,
            noise_multiplier=noise_multiplier,
            threshold=threshold,
            delta=delta,
            note=note,
        )
        noisy = self._noised(np.array(list(exact.values()), dtype=np.float64), noise_multiplier * reach)
        return {name: float(count) for name, count in zip(exact, noisy, strict=True) if count >= threshold}

    def _charge(self, events: tuple[Event, ...], note: str) -> None:
        for event in events:
            self._ledger.append_event(event, note=note)

    def _tap(
        self, kind: str, values: NDArray[np.float64], sensitivity: float, noise_multiplier: float, note: str
    ) -> NDArray[np.float64]:
        return tap(
            kind,
            values,
            sensitivity=sensitivity,
            is_private=self._keys.is_private,
            noise_multiplier=noise_multiplier,
            note=note,
        )

    def _noised(self, steps: NDArray[np.float64], noise_std: float) -> NDArray[np.float64]:
        """``steps`` (whole numbers) with integer noise of a fresh step of the key; summed in int64."""
        key, step = self._keys.key("queries"), self._keys.next_query()
        noise = integer_noise(steps.size, noise_std, key=key, stream=_STREAM, step=step)
        return np.asarray((steps.astype(np.int64) + noise.reshape(steps.shape)).astype(np.float64))


def check_some_noise(noise_multiplier: float) -> None:
    """For answers that are held against a threshold."""
    check_noise_multiplier(noise_multiplier)
    if noise_multiplier == 0.0:
        raise ConfigError("noise multiplier: got 0; a threshold stands above some noise, give more than 0")


def _grid(l2_sensitivity: float, size: int) -> float:
    """A power of two at which rounding n coordinates costs at most 2^-12 of the sensitivity."""
    grid = 2.0 ** math.floor(math.log2(l2_sensitivity) - 12 - math.log2(max(size, 1)) / 2)
    if grid < 1e-300:
        raise PrivacyError(f"l2_sensitivity: got {l2_sensitivity!r}, too small a number; scale the values up")
    return grid


def _above(value: float) -> float:
    """A little more than was computed: square roots and sums of floats may fall short by their last bit."""
    return math.nextafter(value, math.inf)


def _check_sensitivity(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
        raise PrivacyError(f"l2_sensitivity: got {value!r}; a query needs a positive finite bound")


def _check_integers(values: NDArray[np.int64]) -> None:
    if not isinstance(values, np.ndarray) or values.dtype != np.int64:
        raise PrivacyError("values: an int64 array is needed; for others there is gaussian_vector")


def _check_noise_std(value: float) -> None:
    if not value < _MOST / 16:
        raise ConfigError(f"noise: a standard deviation of {value:g} steps does not fit; give less noise")
