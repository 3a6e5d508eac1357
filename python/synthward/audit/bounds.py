"""Lower bounds on epsilon from an attack's scores: what an attacker achieved, no mechanism of less epsilon allows.

Each bound is one-sided: it exceeds the true epsilon with a probability of at most the significance. A bound of zero
says nothing. Scores are larger for canaries that took part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats

from synthward.engine.errors import ConfigError

#: Shares of the canaries on which the one-run bounds try to guess; each is paid for by a share of the significance.
GUESSED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_MOST_EPSILON = 200.0
# Below this many scores on either side the quantile of the standardised difference is not that of a Gaussian.
_FEWEST = 50


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Least epsilon of a mu-Gaussian-DP mechanism at `delta` (Dong, Roth and Su 2022, corollary 2.13)."""
    _check_delta(delta)
    if mu <= 0.0 or _delta_of(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while _delta_of(high, mu) > delta:
        high *= 2.0
    return float(optimize.brentq(lambda epsilon: _delta_of(epsilon, mu) - delta, 0.0, high, xtol=1e-10))


@lru_cache(maxsize=4096)
def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """The mu whose least epsilon at `delta` is `epsilon`: inverse of `epsilon_of_mu`."""
    _check_delta(delta)
    high = 1.0
    while _delta_of(epsilon, high) < delta:
        high *= 2.0
    return float(optimize.brentq(lambda mu: _delta_of(epsilon, mu) - delta, 0.0, high, xtol=1e-12))


def _delta_of(epsilon: float, mu: float) -> float:
    if mu == 0.0:
        return 0.0
    first = special.log_ndtr(mu / 2.0 - epsilon / mu)
    second = epsilon + special.log_ndtr(-mu / 2.0 - epsilon / mu)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def mu_bound(included: np.ndarray, scores: np.ndarray, significance: float) -> float:
    """Lower bound on mu where both samples of scores are Gaussian with one variance.

    The standardised difference of means has a noncentral t law; its noncentrality is mu over
    ``sqrt(1/n + 1/n')``. Inverted by the normal law of ``Z - t S`` (relative error of order 1 / n).

    Args:
        included: bool [m]. scores: float64 [m].
    """
    inside, outside = _split(included, scores)
    if min(len(inside), len(outside)) < _FEWEST:
        return 0.0
    degrees = len(inside) + len(outside) - 2
    squares = ((inside - inside.mean()) ** 2).sum() + ((outside - outside.mean()) ** 2).sum()
    scale = math.sqrt(squares / degrees)
    width = math.sqrt(1.0 / len(inside) + 1.0 / len(outside))
    difference = float(inside.mean() - outside.mean())
    if scale == 0.0:
        return math.inf if difference > 0.0 else 0.0
    t = difference / (scale * width)
    quantile = -float(special.ndtri(significance))
    least = t * (1.0 - 0.25 / degrees) - quantile * math.sqrt(1.0 + t * t / (2.0 * degrees))
    return max(0.0, least * width)


def gaussian_epsilon(included: np.ndarray, scores: np.ndarray, delta: float, significance: float) -> float:
    """Lower bound on epsilon by `mu_bound`: exact for Gaussian scores (white box), heuristic for others."""
    mu = mu_bound(included, scores, significance)
    return math.inf if math.isinf(mu) else epsilon_of_mu(mu, delta)


def one_run_p_value(epsilon: float, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Probability of so many correct guesses if the mechanism is (epsilon, delta)-private.

    Steinke, Nasr and Jagielski 2023, theorem 5.2: ``beta + 2 m delta alpha`` with beta the tail of
    Binomial(guesses, e^eps / (1 + e^eps)) and alpha the largest ``P[correct - i <= W < correct] / i``.
    """
    accuracy = float(special.expit(epsilon))
    beta = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if delta == 0.0 or correct == 0:
        return min(beta, 1.0)
    steps = np.arange(1, correct + 1)
    alpha = float(np.max((stats.binom.sf(correct - steps - 1, guesses, accuracy) - beta) / steps))
    return min(beta + 2.0 * canaries * delta * max(alpha, 0.0), 1.0)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """Largest epsilon that so many correct guesses rule out, of canaries included by fair coins in one run."""
    _check_guesses(canaries, guesses, correct)
    return _largest(
        lambda epsilon: significance - one_run_p_value(epsilon, canaries, guesses, correct, delta)
    )


def f_dp_epsilon(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """As `one_run_epsilon` for mechanisms that are Gaussian-DP; tighter, and no claim about others.

    Mahloujifar, Melis and Chaudhuri 2024, algorithm 3, with the trade-off curve of the Gaussian whose epsilon at
    `delta` is tried.
    """
    _check_guesses(canaries, guesses, correct)

    def excess(epsilon: float) -> float:
        mu = mu_of_epsilon(epsilon, delta)
        right = significance * correct / canaries
        wrong = significance * (guesses - correct) / canaries
        for index in range(correct - 1, -1, -1):
            moved = max(wrong, float(special.ndtr(special.ndtri(right) - mu)))
            if moved == wrong:
                break
            right = min(right + index / (guesses - index) * (moved - wrong), 1.0)
            wrong = moved
        return right + wrong - guesses / canaries

    return _largest(excess)


def _largest(ruled_out: Callable[[float], float]) -> float:
    """The largest epsilon at which a function that falls in epsilon is positive; 0 if it is nowhere."""
    if ruled_out(0.0) <= 0.0:
        return 0.0
    low, high = 0.0, 1.0
    while ruled_out(high) > 0.0:
        low, high = high, 2.0 * high
        if high > _MOST_EPSILON:
            return low
    return float(optimize.brentq(ruled_out, low, high, xtol=1e-6))


def guess(included: np.ndarray, scores: np.ndarray, count: int) -> tuple[int, int]:
    """(guesses, correct): "in" for the largest half of `count` scores, "out" for the smallest, else no guess."""
    order = np.argsort(scores, kind="stable")
    least, most = order[: count // 2], order[len(order) - (count - count // 2) :]
    return count, int((~included[least]).sum() + included[most].sum())


def best_one_run(
    included: np.ndarray,
    scores: np.ndarray,
    delta: float,
    significance: float,
    *,
    bound: Callable[[int, int, int, float, float], float] = one_run_epsilon,
) -> float:
    """The best of a one-run bound over the numbers of guesses in `GUESSED`, each at its share of the significance."""
    canaries, share = len(scores), significance / len(GUESSED)
    counts = {max(1, round(part * canaries)) for part in GUESSED}
    return max(bound(canaries, *guess(included, scores, count), delta, share) for count in counts)


def clopper_pearson_epsilon(
    included: np.ndarray, scores: np.ndarray, delta: float, significance: float, rng: np.random.Generator
) -> float:
    """Lower bound from true and false positive rates (Jagielski et al. 2020; Nasr et al. 2021).

    One half of the canaries, drawn by `rng`, chooses the threshold and its direction; the other half measures.
    """
    first = np.zeros(len(scores), dtype=bool)
    first[rng.permutation(len(scores))[: len(scores) // 2]] = True
    inside, outside = _split(included[first], scores[first])
    if min(len(inside), len(outside)) == 0 or included[~first].all() or not included[~first].any():
        return 0.0
    thresholds = np.quantile(scores[first], np.linspace(0.005, 0.995, 199))
    rates = [_rates_epsilon(inside, outside, thresholds, sign, delta, significance) for sign in (1.0, -1.0)]
    sign = 1.0 if rates[0].max() >= rates[1].max() else -1.0
    chosen = thresholds[[int(rates[0 if sign > 0 else 1].argmax())]]
    measured = _rates_epsilon(*_split(included[~first], scores[~first]), chosen, sign, delta, significance)
    return max(0.0, float(measured[0]))


def _rates_epsilon(
    inside: np.ndarray,
    outside: np.ndarray,
    thresholds: np.ndarray,
    sign: float,
    delta: float,
    significance: float,
) -> np.ndarray:
    """Bound at each threshold: of guessing "in" above it (sign 1), or "out" below it (sign -1)."""
    hit, miss = (inside, outside) if sign > 0 else (-outside, -inside)
    hits = len(hit) - np.searchsorted(np.sort(hit), sign * thresholds, side="right")
    misses = len(miss) - np.searchsorted(np.sort(miss), sign * thresholds, side="right")
    low = np.where(hits > 0, stats.beta.ppf(significance / 2.0, hits, len(hit) - hits + 1), 0.0)
    high = np.where(
        misses < len(miss), stats.beta.ppf(1.0 - significance / 2.0, misses + 1, len(miss) - misses), 1.0
    )
    return np.log(np.maximum(low - delta, 1e-300)) - np.log(high)


def _split(included: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores, dtype=np.float64)
    return scores[included], scores[~included]


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"delta: got {delta!r}; give a number between 0 and 1")


def _check_guesses(canaries: int, guesses: int, correct: int) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(
            f"one-run audit: {correct} correct of {guesses} guesses on {canaries} canaries do not fit each other"
        )
