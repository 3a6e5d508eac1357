"""Strategy matrices of correlated noise and their exact sensitivity.

A strategy is a lower-triangular Toeplitz matrix C. The noise of step t is row t of C^-1 z with z white, so that all
steps together are one Gaussian mechanism on C times the steps' sums (Denisov et al. 2022, whose theorem 2.1 lets later
sums depend on earlier releases). Where the first column of C is non-negative and non-increasing, a unit that takes
part at most once in any ``period`` steps in a row moves C times the sums most by taking part at steps 0, ``period``,
2 ``period``, ... with one and the same vector (Kalinin & Lampert 2024, theorem 2): two columns' inner product falls
with their distance and with how late they begin, and is never negative. Other columns are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from synthward.engine.errors import ConfigError

Kind = Literal["banded", "blt", "banded_inverse"]
KINDS: tuple[str, ...] = get_args(Kind)
# What one array of a column may hold, and what a ledger's line may ask for.
MAX_STEPS = 10_000_000
MAX_COEFFICIENTS = 4096
_UNIT_ROUNDOFF = 2.0**-53

Column = NDArray[np.float64]


@dataclass(frozen=True)
class Strategy:
    """A lower-triangular Toeplitz strategy matrix C, for any number of steps.

    Kinds, with c the first column of C and d that of its inverse:

    - ``banded``: c_0 to c_(b-1) are the coefficients, the rest is 0 (BandMF, Choquette-Choo et al. 2023).
    - ``blt``: c_0 = 1 and c_i = sum_k coefficients[k] * decays[k]^(i-1), a buffered linear Toeplitz matrix
      (Dvijotham et al. 2024; McMahan et al. 2024).
    - ``banded_inverse``: d_0 to d_(b-1) are the coefficients, the rest is 0 (BISR, Kalinin et al. 2025).

    Raises `ConfigError` for numbers that are not finite and for columns that are not positive at first, non-negative
    and non-increasing, for which no exact sensitivity is known.
    """

    kind: Kind
    coefficients: tuple[float, ...]
    decays: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"strategy: kind {str(self.kind)[:80]!r} is not one of {', '.join(KINDS)}")
        for name in ("coefficients", "decays"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if not self.coefficients:
            raise ConfigError("strategy: coefficients: give at least one number")
        if self.kind != "blt" and self.decays:
            raise ConfigError(f"strategy: decays: only a blt strategy has them, not a {self.kind} one")
        check = {"banded": _check_banded, "blt": _check_blt, "banded_inverse": _check_banded_inverse}
        check[self.kind](self)

    @property
    def bands(self) -> int | None:
        """Non-zero entries of a column of C; None where they are as many as there are steps."""
        return len(self.coefficients) if self.kind == "banded" else None

    @property
    def column_norm(self) -> float:
        """The L2 norm of a whole column of a banded C, rounded up; what cyclic sampling wants to be at most 1."""
        if self.bands is None:
            raise ConfigError(
                f"strategy: the columns of a {self.kind} strategy have no end; ask for its sensitivity"
            )
        return self.sensitivity(self.bands, self.bands)

    def column(self, n: int) -> Column:
        """The first ``n`` entries of the first column of C, float64 ``[n]``, read-only."""
        return _column(self, _count("steps", n, MAX_STEPS))

    def inverse_column(self, n: int) -> Column:
        """The first ``n`` entries of the first column of C^-1, float64 ``[n]``, read-only."""
        return _inverse_column(self, _count("steps", n, MAX_STEPS))

    def sensitivity(self, steps: int, period: int) -> float:
        """The L2 norm by which a unit can move C times the steps' sums, per bound C of one step's contribution.

        A unit takes part at most once in any ``period`` steps in a row, and as often as ``steps`` allow. The result
        is the exact maximum, rounded up by a bound of its own rounding errors (below 1e-8 up to 100,000 steps). It
        never falls as ``steps`` grow; 0 for no steps.
        """
        return _sensitivity(self, _count("steps", steps), _period(period))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists; `Strategy.from_dict` gives an equal strategy back."""
        return {"kind": self.kind, "coefficients": list(self.coefficients), "decays": list(self.decays)}

    @classmethod
    def from_dict(cls, data: object) -> Strategy:
        """A strategy from its dictionary; anything but the known kinds and fields is a `ConfigError`."""
        if not isinstance(data, dict) or set(data) != {"kind", "coefficients", "decays"}:
            raise ConfigError(f"strategy: {str(data)[:80]!r} is not of a known form")
        kind, coefficients, decays = data["kind"], data["coefficients"], data["decays"]
        if not (isinstance(kind, str) and isinstance(coefficients, list) and isinstance(decays, list)):
            raise ConfigError(f"strategy: {str(data)[:80]!r} is not of a known form")
        return cls(cast(Kind, kind), tuple(coefficients), tuple(decays))


def _numbers(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_COEFFICIENTS:
        raise ConfigError(f"strategy: {name}: give a tuple of at most {MAX_COEFFICIENTS} numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"strategy: {name}: {str(value)[:80]!r} is not a number")
    try:
        numbers = tuple(float(value) for value in values)
    except OverflowError:
        raise ConfigError(f"strategy: {name}: too large a number") from None
    # Far from where squares overflow or vanish, so that the bounds of rounding below hold.
    if not all(value == 0.0 or 1e-100 <= abs(value) <= 1e100 for value in numbers):
        raise ConfigError(f"strategy: {name}: give finite numbers, zero or between 1e-100 and 1e100 in size")
    return numbers


def _count(name: str, value: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name}: got {value!r}; give a whole number of at least 0")
    if most is not None and value > most:
        raise ConfigError(f"{name}: got {value}, more than the {most} that correlated noise is accounted for")
    return value


def _period(value: int) -> int:
    if _count("period", value) < 1:
        raise ConfigError("period: got 0; give a whole number of at least 1")
    return value


def _check_banded(strategy: Strategy) -> None:
    column = strategy.coefficients
    if not column[0] > 0.0:
        raise ConfigError(f"strategy: coefficient 0 is {column[0]}; the diagonal must be positive")
    for i, (before, value) in enumerate(pairwise(column), 1):
        if not 0.0 <= value <= before:
            raise ConfigError(
                f"strategy: coefficient {i} is {value} after {before}; no exact sensitivity is known unless the "
                "column is non-negative and non-increasing"
            )


def _check_blt(strategy: Strategy) -> None:
    scales, decays = strategy.coefficients, strategy.decays
    if len(scales) != len(decays):
        raise ConfigError(
            f"strategy: {len(scales)} coefficients but {len(decays)} decays; give one for each buffer"
        )
    for k, (scale, decay) in enumerate(zip(scales, decays, strict=True)):
        if scale < 0.0:
            raise ConfigError(
                f"strategy: coefficient {k} is {scale}; no exact sensitivity is known unless all are non-negative"
            )
        if not 0.0 < decay < 1.0:
            raise ConfigError(f"strategy: decay {k} is {decay}; give a number above 0 and below 1")
    if math.fsum(scales) > 1.0:
        raise ConfigError(
            f"strategy: the coefficients add up to {math.fsum(scales)}, more than the diagonal's 1; no exact "
            "sensitivity is known unless the column is non-increasing"
        )


def _check_banded_inverse(strategy: Strategy) -> None:
    inverse = strategy.coefficients
    if not inverse[0] > 0.0:
        raise ConfigError(f"strategy: coefficient 0 is {inverse[0]}; the diagonal must be positive")
    for i, value in enumerate(inverse[1:], 1):
        if value > 0.0:
            raise ConfigError(
                f"strategy: coefficient {i} of the inverse is {value}; no exact sensitivity is known unless all after "
                "the first are at most 0"
            )
    # c_t = sum_i (-d_i / d_0) c_(t-i) with weights that are not negative: where the first b entries do not increase,
    # none after them does.
    column = strategy.column(len(inverse))
    slack = 1.0 + _column_roundings(strategy, len(inverse)) * _UNIT_ROUNDOFF
    for i in range(1, len(inverse)):
        if column[i] > column[i - 1] * slack:
            raise ConfigError(
                f"strategy: entry {i} of the column is {column[i]} after {column[i - 1]}; no exact sensitivity is "
                "known unless the column is non-increasing"
            )


@lru_cache(maxsize=16)
def _column(strategy: Strategy, n: int) -> Column:
    if strategy.kind == "banded":
        column = _padded(strategy.coefficients, n)
    elif strategy.kind == "blt":
        column = np.ones(n)
        if n > 1:
            powers = np.tile(np.array(strategy.decays)[:, None], n - 1)
            powers[:, 0] = strategy.coefficients
            column[1:] = np.multiply.accumulate(powers, axis=1).sum(axis=0)
    else:
        column = reciprocal(np.array(strategy.coefficients), n)
    column.flags.writeable = False
    return column


@lru_cache(maxsize=16)
def _inverse_column(strategy: Strategy, n: int) -> Column:
    if strategy.kind == "banded":
        column = reciprocal(np.array(strategy.coefficients), n)
    elif strategy.kind == "banded_inverse":
        column = _padded(strategy.coefficients, n)
    else:
        column = blt_reciprocal(np.array(strategy.coefficients), np.array(strategy.decays), n)
    column.flags.writeable = False
    return column


def _padded(coefficients: tuple[float, ...], n: int) -> Column:
    column = np.zeros(n)
    column[: len(coefficients)] = coefficients[:n]
    return column


def reciprocal(coefficients: Column, n: int) -> Column:
    """The first ``n`` coefficients of the power series 1 / (sum_i coefficients[i] x^i), by their recurrence."""
    # scipy.signal takes long to import, and most runs have no correlated noise.
    from scipy.signal import lfilter

    impulse = np.zeros(max(n, 1))
    impulse[0] = 1.0
    return cast(Column, lfilter([1.0], coefficients, impulse)[:n])


def blt_reciprocal(scales: Column, decays: Column, n: int) -> Column:
    """The first ``n`` entries of the inverse of a blt strategy's column.

    d_0 = 1 and d_i = -scales . M^(i-1) 1 with M = diag(decays) - 1 scales', the recursion of the buffers.
    """
    column = np.ones(n)
    power = np.diag(decays) - np.outer(np.ones(len(decays)), scales)
    states = np.ones((len(decays), 1))
    # M^i 1 for i below m gives those below 2 m: a logarithm of products rather than n of them.
    while states.shape[1] < n - 1:
        states = np.concatenate([states, power @ states], axis=1)
        power = power @ power
    column[1:] = -(scales @ states)[: max(0, n - 1)]
    return column


def _column_roundings(strategy: Strategy, n: int) -> int:
    """How many roundings, at most, an entry of `Strategy.column` has behind it; its terms are all non-negative."""
    if strategy.kind == "banded":
        return 0
    if strategy.kind == "blt":
        return n + len(strategy.coefficients)
    return n * (len(strategy.coefficients) + 2)


@lru_cache(maxsize=256)
def _sensitivity(strategy: Strategy, steps: int, period: int) -> float:
    if steps == 0:
        return 0.0
    participations = -(-steps // period)
    if strategy.bands is not None and strategy.bands <= period:
        # The columns do not overlap; all are whole but, perhaps, the last.
        whole = math.fsum(value * value for value in strategy.coefficients)
        tail = strategy.coefficients[: steps - (participations - 1) * period]
        square = (participations - 1) * whole + math.fsum(value * value for value in tail)
        roundings = 8
    else:
        # The least non-increasing column above this one: an entry that rounding raised above the one before it
        # must not let the sum fall below the maximum.
        column = np.maximum.accumulate(strategy.column(steps)[::-1])[::-1]
        grid = np.zeros((participations, min(period, steps)))
        grid.flat[:steps] = column
        moved = np.cumsum(grid, axis=0, out=grid).ravel()[:steps]
        square = float(np.dot(moved, moved))
        roundings = 2 * (_column_roundings(strategy, steps) + participations) + steps + 8
    # Relative errors of sums of non-negative terms add up, here to first order; the factor 2 covers the rest.
    return math.sqrt(square) * (1.0 + 2 * roundings * _UNIT_ROUNDOFF)
