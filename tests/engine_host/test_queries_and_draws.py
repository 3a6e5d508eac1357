"""Query noise is never drawn twice; the sampler's threshold is exact."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from synthward.engine import KeySchedule, Ledger, PoissonSampler, QueryMechanism
from synthward.engine.accounting import GaussianEvent
from synthward.engine.errors import ConfigError, PrivacyError
from synthward.engine.sampling import threshold_of
from synthward.kernels import chacha20_words

KEY = bytes(range(32))


@pytest.fixture
def ledger(tmp_path):
    with Ledger.create(
        tmp_path / "ledger.jsonl", run_id="r", unit="patient", delta=1e-5, key_id="ab" * 16, private=True
    ) as made:
        yield made


def ask(mechanism, size=50, **changes):
    options = {"l2_sensitivity": 1.0, "noise_multiplier": 2.0, "note": "a query"} | changes
    return mechanism.gaussian_vector(np.zeros(size), **options)


def test_two_mechanisms_of_one_key_schedule_share_no_noise(ledger):
    """With equal noise the difference of two answers would hold none."""
    keys = KeySchedule.from_os()
    first, second = QueryMechanism(ledger, keys), QueryMechanism(ledger, keys)
    answers = [ask(m) for m in (first, second, first, second)]
    # Answers lie on a grid: single entries may be equal by chance, 20 of 50 are not.
    for one, other in itertools.combinations(answers, 2):
        assert (one == other).sum() < 20
    assert ledger.events() == [GaussianEvent(2.0, 4)]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_query_without_a_bound_is_neither_answered_nor_charged(ledger, bad):
    with pytest.raises(PrivacyError, match="l2_sensitivity"):
        ask(QueryMechanism(ledger, KeySchedule.from_os()), l2_sensitivity=bad)
    with pytest.raises(ConfigError, match="noise multiplier"):
        ask(QueryMechanism(ledger, KeySchedule.from_os()), noise_multiplier=float("nan"))
    assert ledger.events() == []


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 1 / 3, 1e-6, 1e-7, 2.0**-64, 2.0**-65, 5e-324])
def test_the_threshold_is_floor_of_q_times_2_to_the_64(rate):
    exact = Fraction(rate) * 2**64
    assert threshold_of(rate) == exact.numerator // exact.denominator


@pytest.mark.parametrize("eighths", range(1, 9))
def test_enumerated_words_below_the_threshold_are_the_rate_exactly(eighths):
    """2^12 words spread evenly over the 64-bit range: q of them are below, to the last one."""
    words = np.arange(2**12, dtype=np.uint64) << np.uint64(52)
    threshold = threshold_of(eighths / 8)
    assert sum(int(word) < threshold for word in words) == 2**12 * eighths // 8


def test_a_draw_compares_two_cipher_words_per_unit():
    """Unit u of step s is (words 2u, 2u + 1 of key and step) < q 2^64, and nothing else."""
    words = chacha20_words(KEY, stream=1, step=7, start=0, count=2 * 1000)
    coins = [int(words[2 * u]) + (int(words[2 * u + 1]) << 32) for u in range(1000)]
    expected = [u for u in range(1000) if Fraction(coins[u], 2**64) < Fraction(0.3)]
    drawn = PoissonSampler(1000, 0.3, KEY).draw(7)
    assert drawn.tolist() == expected
    later = chacha20_words(KEY, stream=1, step=7, start=2 * 600, count=2)
    assert (int(later[0]) + (int(later[1]) << 32)) == coins[600], "a rank may compute its units alone"
