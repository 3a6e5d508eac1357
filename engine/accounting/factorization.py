"""Strategies whose noise adds up to the least error of what an optimizer sums.

With noise C^-1 z, the sums x_t = sum_(i<=t) g_i that SGD follows carry the error A C^-1 z, where A is the matrix of
ones on and below the diagonal (with momentum, of the momentum's sums). At a given privacy z grows with the
sensitivity of C, so that what is minimised is sensitivity^2 times the mean (or largest) squared row norm of A C^-1.
For Toeplitz matrices both are sums over the first columns c and d = 1 / c (as power series); gradients are analytic.

Coefficients are rounded to what float32 holds, so that the noise that runs is that of the very strategy that is
accounted for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from scipy.optimize import minimize
from scipy.signal import fftconvolve, lfilter

from synthward.engine.accounting.matrix import (
    MAX_COEFFICIENTS,
    MAX_STEPS,
    Column,
    Strategy,
    blt_reciprocal,
    reciprocal,
)
from synthward.engine.errors import ConfigError

ErrorKind = Literal["mean", "max"]
MAX_BUFFERS = 8
# (parameters) -> (loss, its gradient)
_Loss = Callable[[Column], tuple[float, Column]]


def expected_error(
    strategy: Strategy, steps: int, period: int, *, momentum: float = 0.0, error: ErrorKind = "mean"
) -> float:
    """The root of the mean (or largest) squared error of the ``steps`` prefix sums, at equal privacy.

    The noise is such that all steps together are one Gaussian mechanism of multiplier 1 for units that take part at
    most once in any ``period`` steps in a row. Independent noise is ``Strategy("banded", (1.0,))``; the quotient of
    two strategies' errors holds for every epsilon, but for what sampling would amplify.
    """
    workload = _Workload(steps, steps, momentum, error)
    square, _ = workload.squared_error(strategy.inverse_column(steps))
    return strategy.sensitivity(steps, period) * math.sqrt(square)


def banded_strategy(steps: int, bands: int, *, momentum: float = 0.0, error: ErrorKind = "mean") -> Strategy:
    """The best banded Toeplitz strategy for ``steps`` (BandMF, Choquette-Choo et al. 2023), columns of norm 1.

    Made for periods of at least ``bands``: a unit's columns are then orthogonal, and one strategy is the best for any
    number of participations. Noise keeps the last ``bands`` - 1 releases' noise.

    Raises `ConfigError` for more bands than steps.
    """
    workload = _Workload(steps, steps, momentum, error)
    _check_bands(bands, steps)
    ratios = np.log1p(-0.5 / np.arange(1, bands))

    def loss(ratios: Column) -> tuple[float, Column]:
        column = np.zeros(steps)
        column[:bands] = np.exp(np.concatenate([[0.0], np.cumsum(ratios)]))
        value, gradient = workload.loss_of_column(column, reciprocal(column[:bands], steps))
        return value, _suffix_sums(gradient[:bands] * column[:bands])[1:]

    ratios = _minimum(loss, [ratios], [(-20.0, 0.0)] * len(ratios))
    column = np.exp(np.concatenate([[0.0], np.cumsum(ratios)]))
    column = np.where(column < 1e-30, 0.0, column).astype(np.float32).astype(np.float64)
    # A little below 1, so that the norm, rounded up, is at most 1.
    scale = (1.0 - 1e-14) / math.sqrt(math.fsum(column**2))
    return Strategy("banded", tuple(float(value) for value in scale * column))


def blt_strategy(
    steps: int, buffers: int, period: int, *, momentum: float = 0.0, error: ErrorKind = "mean"
) -> Strategy:
    """The best buffered linear Toeplitz strategy of ``buffers`` buffers for ``steps`` and ``period``.

    Dvijotham et al. 2024, for units that take part every ``period`` steps McMahan et al. 2024. Scales are not
    negative and add up to at most 1, and decays lie between 0 and 1: the column falls, and the eigenvalues of the
    noise's recursion, which interlace with the decays, lie between -1 and 1.

    Raises `ConfigError` for more than 8 buffers, of which a few already come close to the best Toeplitz strategy.
    """
    workload = _Workload(steps, period, momentum, error)
    if not 1 <= _whole("buffers", buffers) <= MAX_BUFFERS:
        raise ConfigError(f"buffers: got {buffers}; give from 1 to {MAX_BUFFERS}")
    powers = np.arange(max(steps - 1, 0))

    def parts(parameters: Column) -> tuple[Column, Column]:
        return _below_one(parameters[:buffers]), 1.0 / (1.0 + np.exp(-parameters[buffers:]))

    def loss(parameters: Column) -> tuple[float, Column]:
        scales, decays = parts(parameters)
        terms = np.exp(np.log(decays)[:, None] * powers)
        column = np.concatenate([[1.0], scales @ terms])
        value, gradient = workload.loss_of_column(column, blt_reciprocal(scales, decays, steps))
        by_scale = terms @ gradient[1:]
        by_decay = scales / decays * (terms @ (powers * gradient[1:]))
        return value, np.concatenate(
            [scales * (by_scale - scales @ by_scale), by_decay * decays * (1.0 - decays)]
        )

    # The slowest buffer forgets over the whole run or over a period, the fastest within a few steps.
    starts = []
    for horizon in {max(steps, 4), max(min(period, steps), 4)}:
        gaps = 0.5 * (2.0 / horizon) ** (np.arange(buffers, 0, -1) / buffers)
        scales = 0.5 * np.sqrt(gaps) / np.sqrt(gaps).sum()
        starts.append(np.concatenate([_inverse_below_one(scales), np.log1p(-gaps) - np.log(gaps)]))
    best = _minimum(loss, starts, [(-16.0, 16.0)] * (2 * buffers))
    scales, decays = (part.astype(np.float32).astype(np.float64) for part in parts(best))
    order = np.argsort(-decays)
    return Strategy("blt", tuple(map(float, scales[order])), tuple(map(float, decays[order])))


def banded_inverse_strategy(
    steps: int,
    bands: int,
    period: int | None = None,
    *,
    optimized: bool = True,
    momentum: float = 0.0,
    error: ErrorKind = "mean",
) -> Strategy:
    """A strategy whose inverse has ``bands`` bands: noise of a few steps, each regenerated, with nothing stored.

    With ``optimized=False`` the inverse's coefficients are the first of sqrt(1 - x) (BISR, Kalinin, McMahan & Lampert
    2025); else they are improved from there for ``steps`` and ``period`` (single participation where None).

    Raises `ConfigError` for more bands than steps.
    """
    workload = _Workload(steps, steps if period is None else period, momentum, error)
    _check_bands(bands, steps)
    root = np.concatenate([[1.0], np.cumprod((np.arange(1, bands) - 1.5) / np.arange(1, bands))])
    if bands == 1 or not optimized:
        return _banded_inverse(root)

    def parts(gaps: Column) -> tuple[Column, Column, Column]:
        """Ratios of neighbours in the column, the column, and its inverse, all of the first ``bands`` entries."""
        ratios = -np.expm1(-np.cumsum(gaps))
        column = np.concatenate([[1.0], np.cumprod(ratios)])
        return ratios, column, reciprocal(column, bands)

    def loss(gaps: Column) -> tuple[float, Column]:
        ratios, column, inverse = parts(gaps)
        padded = np.concatenate([inverse, np.zeros(steps - bands)])
        value, gradient = workload.loss_of_inverse(reciprocal(inverse, steps), padded)
        by_ratio = _suffix_sums(-_through(inverse, gradient[:bands]) * column)[1:] / ratios
        return value, _suffix_sums(by_ratio * (1.0 - ratios))

    # Where neighbours' ratios never fall, the inverse has no positive coefficient after the first (Kaluza 1928), and
    # the column then falls for good.
    square_root = np.diff(np.log(2.0 * np.arange(1, bands)), prepend=0.0)
    geometric = np.zeros(bands - 1)
    geometric[0] = 1.0
    bounds = [(1e-4, 12.0)] + [(0.0, 12.0)] * (bands - 2)
    found = parts(_minimum(loss, [square_root, geometric], bounds))[2]
    # Rounding can make a column rise that hardly falls; on the way back to the square root it does not.
    for share in (0.0, 1e-6, 1e-4, 1e-2):
        try:
            return _banded_inverse((1.0 - share) * found + share * root)
        except ConfigError:
            continue
    return _banded_inverse(root)


def _banded_inverse(column: Column) -> Strategy:
    rest = np.where(column[1:] > -1e-30, 0.0, column[1:]).astype(np.float32)
    return Strategy("banded_inverse", (1.0, *map(float, rest)))


@dataclass(frozen=True)
class _Workload:
    """What is to be estimated, and how often a unit takes part."""

    steps: int
    period: int
    momentum: float
    error: ErrorKind

    def __post_init__(self) -> None:
        if not 1 <= _whole("steps", self.steps) <= MAX_STEPS:
            raise ConfigError(f"steps: got {self.steps}; give from 1 to {MAX_STEPS}")
        if _whole("period", self.period) < 1:
            raise ConfigError(f"period: got {self.period}; give a whole number of at least 1")
        if not (isinstance(self.momentum, int | float) and 0.0 <= self.momentum < 1.0):
            raise ConfigError(f"momentum: got {self.momentum!r}; give a number of at least 0 and below 1")
        if self.error not in get_args(ErrorKind):
            raise ConfigError(
                f"error: {str(self.error)[:80]!r} is not one of {', '.join(get_args(ErrorKind))}"
            )

    def squared_error(self, inverse: Column) -> tuple[float, Column]:
        """Squared error of the sums under white noise of variance 1, and its gradient by ``inverse``, both ``[n]``."""
        rows = self._sums(inverse)
        weights = np.arange(self.steps, 0, -1) / self.steps if self.error == "mean" else 1.0
        weighted = weights * rows
        return float(weighted @ rows), 2.0 * self._sums(weighted[::-1])[::-1]

    def squared_sensitivity(self, column: Column) -> tuple[float, Column]:
        """As `Strategy.sensitivity`, squared and without the rounding, with its gradient by ``column``."""
        participations = -(-self.steps // self.period)
        grid = np.zeros((participations, min(self.period, self.steps)))
        grid.flat[: self.steps] = column
        moved = np.cumsum(grid, axis=0)
        moved.flat[self.steps :] = 0.0
        gradient = np.cumsum(moved[::-1], axis=0)[::-1]
        return float(np.vdot(moved, moved)), 2.0 * gradient.ravel()[: self.steps]

    def loss_of_column(self, column: Column, inverse: Column) -> tuple[float, Column]:
        """Logarithm of sensitivity^2 times error, and its gradient by ``column``, whose inverse follows from it."""
        error, by_inverse = self.squared_error(inverse)
        square, by_column = self.squared_sensitivity(column)
        return math.log(error * square), by_column / square - _through(inverse, by_inverse) / error

    def loss_of_inverse(self, column: Column, inverse: Column) -> tuple[float, Column]:
        """The same with its gradient by ``inverse``, from which ``column`` follows."""
        error, by_inverse = self.squared_error(inverse)
        square, by_column = self.squared_sensitivity(column)
        return math.log(error * square), by_inverse / error - _through(column, by_column) / square

    def _sums(self, values: Column) -> Column:
        if self.momentum:
            values = lfilter([1.0], [1.0, -self.momentum], values)
        return np.cumsum(values)


def _through(inverse: Column, gradient: Column) -> Column:
    """From d loss / d (1 / c) to minus d loss / d c: transposed twice through the matrix of 1 / c."""
    size = len(inverse)
    for _ in range(2):
        gradient = fftconvolve(inverse, gradient[::-1])[:size][::-1]
    return gradient


def _suffix_sums(values: Column) -> Column:
    return np.cumsum(values[::-1])[::-1]


def _below_one(parameters: Column) -> Column:
    """Positive numbers with a sum below 1."""
    top = max(0.0, float(parameters.max()))
    powers = np.exp(parameters - top)
    return cast(Column, powers / (math.exp(-top) + powers.sum()))


def _inverse_below_one(values: Column) -> Column:
    return np.log(values) - math.log1p(-math.fsum(values))


def _minimum(loss: _Loss, starts: list[Column], bounds: list[tuple[float, float]]) -> Column:
    """The best of where L-BFGS-B ends from these starts; never worse than a start."""
    if not bounds:
        return starts[0]
    options = {"maxiter": 500, "maxcor": 30, "ftol": 1e-12, "gtol": 1e-8}
    ends = [
        minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        for start in starts
    ]
    return min([*ends, *starts], key=lambda parameters: loss(parameters)[0])


def _check_bands(bands: int, steps: int) -> None:
    if not 1 <= _whole("bands", bands) <= min(steps, MAX_COEFFICIENTS):
        raise ConfigError(
            f"bands: got {bands}; give from 1 to the number of steps, at most {MAX_COEFFICIENTS}"
        )


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: got {value!r}; give a whole number")
    return value
