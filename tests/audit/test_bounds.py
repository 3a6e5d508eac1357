"""Lower bounds on epsilon: values of others' implementations, closed forms, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from synthward.audit import bounds
from synthward.engine.accounting import GaussianEvent, epsilon_of
from synthward.engine.errors import ConfigError
from tests.privacy.stats import FALSE_ALARM

DELTA, SIGNIFICANCE = 1e-5, 0.05


@pytest.mark.parametrize(
    ("numbers", "one_run", "f_dp"),
    [
        ((1000, 1000, 600), 0.2972, 0.5835),
        ((1000, 200, 180), 1.7963, 2.9012),
        ((5000, 200, 190), 2.3760, 3.2514),
        ((5000, 5000, 3000), 0.3574, 0.6183),
    ],
)
def test_one_run_bounds_are_those_of_jax_privacy(numbers, one_run, f_dp):
    """`CanaryScoreAuditor` of jax-privacy 2.0.0 at the same counts, to the digits noted from it."""
    assert bounds.one_run_epsilon(*numbers, DELTA, SIGNIFICANCE) == pytest.approx(one_run, abs=5.1e-5)
    assert bounds.f_dp_epsilon(*numbers, DELTA, SIGNIFICANCE) == pytest.approx(f_dp, abs=5.1e-5)


def test_the_p_value_is_the_binomial_tail_and_the_price_of_delta():
    exact = sum(stats.binom.pmf(k, 50, 1 / (1 + math.exp(-1.0))) for k in range(44, 51))
    assert bounds.one_run_p_value(1.0, 100, 50, 44, 0.0) == pytest.approx(exact, rel=1e-12)
    accuracy = 1 / (1 + math.exp(-1.0))
    alpha = max(sum(stats.binom.pmf(k, 50, accuracy) for k in range(44 - i, 44)) / i for i in range(1, 45))
    paid = bounds.one_run_p_value(1.0, 100, 50, 44, 1e-3)
    assert paid == pytest.approx(exact + 2 * 100 * 1e-3 * alpha, rel=1e-9)
    assert bounds.one_run_p_value(0.0, 10, 10, 0, 1e-5) == 1.0


def test_chance_and_impossible_counts():
    assert bounds.one_run_epsilon(1000, 100, 50, DELTA, SIGNIFICANCE) == 0.0
    assert bounds.f_dp_epsilon(1000, 100, 50, DELTA, SIGNIFICANCE) == 0.0
    assert bounds.one_run_epsilon(1000, 0, 0, DELTA, SIGNIFICANCE) == 0.0
    for numbers in ((10, 11, 5), (10, 5, 6), (10, 5, -1)):
        with pytest.raises(ConfigError):
            bounds.one_run_epsilon(*numbers, DELTA, SIGNIFICANCE)


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 3.0, 9.0])
def test_epsilon_of_mu_is_that_of_the_gaussian_mechanism(mu):
    epsilon = bounds.epsilon_of_mu(mu, DELTA)
    assert epsilon == pytest.approx(epsilon_of([GaussianEvent(1.0 / mu, 1)], DELTA, "pld"), rel=1e-5)
    assert bounds.mu_of_epsilon(epsilon, DELTA) == pytest.approx(mu, rel=1e-8)


def test_little_mu_costs_nothing_at_this_delta():
    assert bounds.epsilon_of_mu(0.0, DELTA) == 0.0
    assert bounds.epsilon_of_mu(1e-5, DELTA) == 0.0


def scores(mu: float, canaries: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    included = rng.random(canaries) < 0.5
    return included, rng.normal(size=canaries) + mu * included


@pytest.mark.parametrize("mu", [0.0, 0.7, 2.5])
@pytest.mark.parametrize("significance", [0.05, 0.5])
def test_the_gaussian_bound_is_wrong_as_often_as_it_says(mu, significance):
    """4,000 audits of 400 canaries: the share of bounds above the truth is the significance, no more and no less."""
    rng, audits = np.random.default_rng(8), 4000
    wrong = sum(bounds.mu_bound(*scores(mu, 400, rng), significance) > mu for _ in range(audits))
    assert stats.binomtest(wrong, audits, significance).pvalue > FALSE_ALARM


def test_at_one_in_a_million_the_gaussian_bound_has_the_right_quantile():
    """Against the noncentral t law itself, which has no closed inverse."""
    rng = np.random.default_rng(0)
    included, drawn = scores(1.0, 600, rng)
    width = math.sqrt(1 / included.sum() + 1 / (~included).sum())
    found = bounds.mu_bound(included, drawn, 1e-6)
    inside, outside = drawn[included], drawn[~included]
    pooled = math.sqrt((inside.var() * len(inside) + outside.var() * len(outside)) / (len(drawn) - 2))
    t = (inside.mean() - outside.mean()) / (pooled * width)
    assert stats.nct.sf(t, len(drawn) - 2, found / width) == pytest.approx(1e-6, rel=0.1)


def test_what_is_recovered_of_a_claim_of_three():
    """At 5,000 canaries at least 82 % of the claim in half of the audits; others' bounds lie below."""
    rng, mu = np.random.default_rng(3), bounds.mu_of_epsilon(3.0, DELTA)
    found = []
    for _ in range(25):
        included, drawn = scores(mu, 5000, rng)
        found.append(
            [
                bounds.gaussian_epsilon(included, drawn, DELTA, SIGNIFICANCE),
                bounds.best_one_run(included, drawn, DELTA, SIGNIFICANCE),
                bounds.clopper_pearson_epsilon(included, drawn, DELTA, SIGNIFICANCE, rng),
            ]
        )
    gaussian, one_run, rates = np.median(found, axis=0)
    assert 0.82 * 3.0 <= gaussian <= 3.0
    assert 0.5 <= one_run <= gaussian and 0.5 <= rates <= gaussian


def test_bounds_of_canaries_that_do_not_show():
    """No canary in, all in, too few, or scores that are all the same."""
    rng = np.random.default_rng(1)
    for included in (np.zeros(500, dtype=bool), np.ones(500, dtype=bool)):
        drawn = rng.normal(size=500)
        assert bounds.mu_bound(included, drawn, SIGNIFICANCE) == 0.0
        assert bounds.clopper_pearson_epsilon(included, drawn, DELTA, SIGNIFICANCE, rng) == 0.0
    included = rng.random(500) < 0.5
    assert bounds.gaussian_epsilon(included, np.ones(500), DELTA, SIGNIFICANCE) == 0.0
    assert bounds.gaussian_epsilon(included, included.astype(float), DELTA, SIGNIFICANCE) == math.inf
    assert bounds.mu_bound(included[:60], included[:60].astype(float), SIGNIFICANCE) == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rates_see_a_signal_on_either_side(sign):
    """A fifth of the included canaries far above all others, or a fifth of the others far below."""
    rng = np.random.default_rng(5)
    included = rng.random(5000) < 0.5
    drawn = rng.normal(size=5000)
    shown = included if sign > 0 else ~included
    drawn[shown & (rng.random(5000) < 0.2)] += sign * 20.0
    found = bounds.clopper_pearson_epsilon(included, drawn, DELTA, SIGNIFICANCE, rng)
    assert 3.0 < found < 6.0


def test_guesses_abstain_in_the_middle():
    included = np.array([True, False, True, False, True, False])
    drawn = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert bounds.guess(included, drawn, 2) == (2, 2)
    assert bounds.guess(included, drawn, 4) == (4, 2)
    assert bounds.guess(included, drawn, 3) == (3, 2)
    assert bounds.guess(included, drawn, 6) == (6, 4)


def test_the_private_bound_holds_on_randomised_response():
    """Pure epsilon = 1 on 2,000 bits, guessed from what was answered: at most 5 % of audits say more than 1."""
    rng, truth = np.random.default_rng(11), 1 / (1 + math.exp(-1.0))
    wrong = 0
    for _ in range(200):
        included = rng.random(2000) < 0.5
        answered = np.where(rng.random(2000) < truth, included, ~included)
        tied = answered + 1e-3 * rng.random(2000)
        wrong += bounds.best_one_run(included, tied, 1e-9, SIGNIFICANCE) > 1.0
    assert stats.binom.sf(wrong - 1, 200, SIGNIFICANCE) > FALSE_ALARM
