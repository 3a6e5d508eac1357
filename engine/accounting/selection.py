"""Privacy of releasing the best of a random number of trials (Liu & Talwar 2019; Papernot & Steinke 2022).

The number of trials K is drawn from a law that does not depend on the records; the trials are independent runs of one
mechanism, and only the best one's output is released. A fixed number of trials would cost as much as composing them
all, or more; a random one costs little more than one trial.

K is truncated negative binomial, with shape eta >= 0 and parameter gamma in (0, 1):
P(K = k) = (1 - gamma)^k / (gamma^-eta - 1) prod_{l < k} (l + eta) / (l + 1) for k >= 1; eta = 1 is the geometric law
and the limit eta = 0 the logarithmic one. Or Poisson (eta = infinity), where K may be 0 and nothing is released then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq


def selection_curve(
    orders: Sequence[float], trial: NDArray[np.float64], mean_trials: float, shape: float
) -> NDArray[np.float64]:
    """RDP of the best of a random number of trials, from one trial's.

    Truncated negative binomial (Papernot & Steinke 2022, theorem 2), for all orders a, b > 1:
    rdp'(a) = rdp(a) + (1 + eta) ((1 - 1/b) rdp(b) + log(1 / gamma) / b) + log(mean) / (a - 1).
    Poisson (theorem 6), with delta of one trial at epsilon = log(1 + 1 / (a - 1)):
    rdp'(a) = rdp(a) + mean delta + log(mean) / (a - 1).

    Args:
        orders: above 1.
        trial: float64 [orders], RDP of one trial; infinite where it is not known.
        mean_trials: at least 1.
        shape: eta; infinity for Poisson.

    Returns:
        float64 [orders]
    """
    at = np.asarray(orders, dtype=np.float64)
    if shape == math.inf:
        from dp_accounting.rdp import rdp_privacy_accountant

        deltas = [
            rdp_privacy_accountant.compute_delta(at, trial, math.log1p(1.0 / (order - 1.0)))[0]
            for order in at
        ]
        return np.asarray(trial + mean_trials * np.asarray(deltas) + math.log(mean_trials) / (at - 1.0))
    gamma = gamma_of(mean_trials, shape)
    constant = (1.0 + shape) * np.min((1.0 - 1.0 / at) * trial - math.log(gamma) / at)
    found = trial + math.log(mean_trials) / (at - 1.0) + constant
    # RDP grows with the order: what holds at a higher order holds at a lower one.
    return np.array([np.min(found[at >= order]) for order in at])


def gamma_of(mean_trials: float, shape: float) -> float:
    """gamma of the truncated negative binomial law of this mean, rounded to the side of more trials."""
    if mean_trials == 1.0:
        return 1.0
    if shape == 1.0:
        return 1.0 / mean_trials
    low, high = -math.log(mean_trials) - 50.0, -1e-12
    if _mean_of(math.exp(high), shape) >= mean_trials:
        return math.exp(high)
    root = float(brentq(lambda x: math.log(_mean_of(math.exp(x), shape) / mean_trials), low, high))
    return math.exp(root - 1e-10)


def _mean_of(gamma: float, shape: float) -> float:
    """Mean number of trials (Papernot & Steinke 2022, definition 1)."""
    log_gamma = math.log(gamma)
    if shape == 0.0:
        return (1.0 / gamma - 1.0) / -log_gamma
    return shape * (1.0 / gamma - 1.0) / -math.expm1(shape * log_gamma)


def probabilities(mean_trials: float, shape: float) -> Iterator[tuple[int, float]]:
    """(k, P(K = k)), from the least k on, without end."""
    if shape == math.inf:
        k, probability = 0, math.exp(-mean_trials)
        while True:
            yield k, probability
            k += 1
            probability *= mean_trials / k
    gamma = gamma_of(mean_trials, shape)
    if shape == 0.0:
        probability = 1.0 if gamma == 1.0 else (1.0 - gamma) / -math.log(gamma)
    else:
        # (1 - gamma) eta / (gamma^-eta - 1), whose limit at gamma = 1 is 1.
        whole = math.expm1(-shape * math.log(gamma))
        probability = 1.0 if gamma == 1.0 else (1.0 - gamma) * shape / whole
    k = 1
    while True:
        yield k, probability
        probability *= (1.0 - gamma) * (k + shape) / (k + 1)
        k += 1
