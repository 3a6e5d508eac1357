"""The accountant against independent values: the reference file, the library itself, and closed forms."""

import itertools
import json
import math

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from synthward.engine.accounting import (
    Accountant,
    CyclicPoissonGaussianEvent,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    calibrate_noise,
    calibrate_sample_rate,
    calibrate_steps,
    epsilon_curve,
    epsilon_of,
    event_from_dict,
)
from synthward.engine.errors import ConfigError


@pytest.fixture(scope="module")
def reference(shared_data):
    file = shared_data.parent / "reference" / "accounting.json"
    if not file.is_file():
        pytest.skip(f"no reference values: {file} is not there")
    return json.loads(file.read_text())


def event_of(case):
    return PoissonGaussianEvent(case["sample_rate"], case["noise_multiplier"], case["steps"])


@pytest.mark.realdata
@pytest.mark.slow
def test_reference_cases(reference):
    assert len(reference["cases"]) == 12
    for case in reference["cases"]:
        event, delta = event_of(case), case["delta"]
        assert epsilon_of([event], delta, "pld") == pytest.approx(case["epsilon_pld"], rel=1e-6)
        assert epsilon_of([event], delta, "rdp") == pytest.approx(case["epsilon_rdp"], rel=1e-6)
        low, _, high = case["epsilon_prv_low_est_high"]
        assert low <= epsilon_of([event], delta, "pld") <= high


@pytest.mark.realdata
@pytest.mark.slow
def test_reference_calibrations(reference):
    for case in reference["calibrations"]:
        for kind in ("pld", "rdp"):
            noise = calibrate_noise(
                case["target_epsilon"], case["delta"], case["sample_rate"], case["steps"], kind
            )
            expected = case[f"noise_multiplier_{kind}"]
            assert noise == pytest.approx(expected, abs=3e-5)
            event = PoissonGaussianEvent(case["sample_rate"], noise, case["steps"])
            assert epsilon_of([event], case["delta"], kind) <= case["target_epsilon"]


@pytest.mark.realdata
@pytest.mark.slow
def test_reference_rows_of_other_kinds(reference):
    """Replace-one, truncated, cyclic, fixed-size, mixed and published rows."""
    close = {"rel": 1e-6}
    for case in reference["replace_one"]:
        found = epsilon_of([event_of(case)], case["delta"], "pld", "replace_one")
        assert found == pytest.approx(case["epsilon_pld"], **close)
    for case in reference["truncated_poisson"]:
        cut = TruncatedPoissonGaussianEvent(
            case["sample_rate"],
            case["noise_multiplier"],
            case["steps"],
            case["truncated_batch_size"],
            case["dataset_size"],
        )
        assert epsilon_of([cut], case["delta"]) == pytest.approx(case["epsilon_pld"], **close)
    [case] = reference["banded_mf_cyclic_poisson"]
    banded = CyclicPoissonGaussianEvent(
        case["sample_rate_within_group"], case["noise_multiplier"], case["bands"], case["steps"]
    )
    assert banded.rounds == case["rounds"]
    assert epsilon_of([banded], case["delta"]) == pytest.approx(case["epsilon_pld"], **close)
    [case] = reference["fixed_size_without_replacement"]
    fixed = FixedSizeGaussianEvent(
        case["dataset_size"], case["batch_size"], case["noise_multiplier"], case["steps"]
    )
    found = epsilon_of([fixed], case["delta"], "rdp", "replace_one")
    assert found == pytest.approx(case["epsilon_rdp_correct"], **close)
    assert found >= case["epsilon_true_at_least"] > case["epsilon_rdp_library_as_is_WRONG"]
    for case in reference["heterogeneous"]:
        events = [part_of(*part) for part in case["parts"]]
        assert epsilon_of(events, case["delta"]) == pytest.approx(case["epsilon_pld"], **close)
        assert epsilon_of(events, case["delta"], "rdp") >= case["epsilon_pld"]
    for case in reference["published"]:
        for kind in ("pld", "rdp"):
            found = epsilon_of([event_of(case)], case["delta"], kind)
            assert found == pytest.approx(case[f"epsilon_{kind}"], **close)


def part_of(kind, noise, *rest):
    if kind == "sgd":
        return PoissonGaussianEvent(rest[0], noise, rest[1])
    return {"gauss": GaussianEvent, "laplace": LaplaceEvent}[kind](noise, *rest)


@pytest.mark.realdata
@pytest.mark.slow
def test_reference_rows_where_the_grid_shows(reference):
    for case in reference["delicate"]["cases"]:
        most = 1.0001 * max(case["epsilon_pld"], case["epsilon_pld_grid_1e-5"])
        found = epsilon_of([event_of(case)], case["delta"])
        assert case["epsilon_prv_low_est_high"][0] <= found <= most


def gaussian_epsilon(mu, delta):
    """Closed form of the Gaussian mechanism (Balle & Wang 2018, theorem 8)."""
    return brentq(
        lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta,
        1e-9,
        200,
        xtol=1e-12,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("noise", "steps", "delta"),
    [(10.0, 100, 1e-6), (5.0, 1, 1e-6), (2.0, 3, 1e-6), (1.0, 1, 1e-5), (30.0, 40, 1e-8), (4.0, 100, 1e-9)],
)
def test_full_participation_is_the_closed_form(noise, steps, delta):
    expected = gaussian_epsilon(math.sqrt(steps) / noise, delta)
    for event in (GaussianEvent(noise, steps), PoissonGaussianEvent(1.0, noise, steps)):
        assert epsilon_of([event], delta) == pytest.approx(expected, rel=1e-6)
        assert epsilon_of([event], delta) >= expected * (1 - 1e-9)
    replaced = gaussian_epsilon(2.0 * math.sqrt(steps) / noise, delta)
    found = epsilon_of([GaussianEvent(noise, steps)], delta, "pld", "replace_one")
    assert found == pytest.approx(replaced, rel=1e-6)


def test_queries_and_steps_compose_as_in_the_library():
    built = pld.PLDAccountant()
    built.compose(dp_accounting.GaussianDpEvent(6.0), 2)
    built.compose(dp_accounting.PoissonSampledDpEvent(0.03, dp_accounting.GaussianDpEvent(1.4)), 200)
    events = [
        PoissonGaussianEvent(0.03, 1.4, 120),
        GaussianEvent(6.0, 2),
        PoissonGaussianEvent(0.03, 1.4, 80),
    ]
    assert epsilon_of(events, 1e-6) == pytest.approx(built.get_epsilon(1e-6), rel=1e-9)


@pytest.mark.slow
@given(
    rate=st.floats(0.001, 0.3),
    noise=st.floats(0.8, 6.0),
    steps=st.integers(1, 300),
    delta=st.sampled_from([1e-5, 1e-7]),
)
@settings(max_examples=12, deadline=None)
def test_order_of_accountants_and_monotony(rate, noise, steps, delta):
    event = PoissonGaussianEvent(rate, noise, steps)
    epsilon = epsilon_of([event], delta)
    assert 0 <= epsilon <= epsilon_of([event], delta, "rdp") * (1 + 1e-6) + 1e-3
    assert epsilon_of([PoissonGaussianEvent(rate, noise * 1.1, steps)], delta) <= epsilon + 1e-6
    assert epsilon_of([PoissonGaussianEvent(rate, noise, steps + 20)], delta) >= epsilon - 1e-6
    assert epsilon_of([PoissonGaussianEvent(min(1.0, rate * 1.3), noise, steps)], delta) >= epsilon - 1e-6


def test_composing_one_by_one_is_composing_at_once():
    accountant = Accountant("pld")
    for _ in range(50):
        accountant.compose(PoissonGaussianEvent(0.05, 1.5, 1))
    assert accountant.epsilon(1e-5) == epsilon_of([PoissonGaussianEvent(0.05, 1.5, 50)], 1e-5)
    assert accountant.events == (PoissonGaussianEvent(0.05, 1.5, 50),)


def test_the_curve_ends_at_the_whole_and_starts_at_the_queries():
    events = [GaussianEvent(8.0, 1), PoissonGaussianEvent(0.05, 1.5, 100)]
    curve = epsilon_curve(events, 1e-5, 5)
    assert curve[0] == (0, epsilon_of(events[:1], 1e-5))
    assert curve[-1] == (100, epsilon_of(events, 1e-5))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(curve))


@pytest.mark.slow
def test_steps_and_rate_are_solved_on_the_safe_side():
    steps = calibrate_steps(2.0, 1e-5, 0.02, 1.2)
    assert epsilon_of([PoissonGaussianEvent(0.02, 1.2, steps)], 1e-5) <= 2.0
    assert epsilon_of([PoissonGaussianEvent(0.02, 1.2, steps + 1)], 1e-5) > 2.0
    rate = calibrate_sample_rate(2.0, 1e-5, 1.2, 500)
    assert epsilon_of([PoissonGaussianEvent(rate, 1.2, 500)], 1e-5) <= 2.0
    assert epsilon_of([PoissonGaussianEvent(rate * 1.001, 1.2, 500)], 1e-5) > 2.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_epsilon_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="epsilon"):
        calibrate_noise(bad, 1e-5, 0.1, 10)


@pytest.mark.parametrize("bad", [0.0, 1.0, 2.0, -0.1, math.nan])
def test_a_delta_that_is_none_is_refused(bad):
    with pytest.raises(ConfigError, match="delta"):
        epsilon_of([GaussianEvent(1.0, 1)], bad)


def test_other_relations_and_unknown_accountants_are_refused_by_name():
    with pytest.raises(ConfigError, match="swap_two"):
        Accountant("rdp", relation="swap_two")
    with pytest.raises(ConfigError, match="moments"):
        Accountant("moments")


def test_prv_agrees_or_says_what_is_missing():
    event = PoissonGaussianEvent(0.01, 1.0, 1000)
    try:
        import prv_accountant  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="prv-accountant"):
            epsilon_of([event], 1e-5, "prv")
    else:
        assert 1.8282 <= epsilon_of([event], 1e-5, "prv") <= 1.8482


def test_events_are_a_closed_set():
    for event in (GaussianEvent(2.0, 3), PoissonGaussianEvent(0.1, 2.0, 3)):
        assert event_from_dict(event.to_dict()) == event
    for data in (
        {"kind": "os.system", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": "1", "count": 1},
        {"kind": "gaussian", "noise_multiplier": 1.0, "count": True},
        {"kind": "gaussian", "noise_multiplier": 1.0, "count": 1, "module": "os"},
        [],
    ):
        with pytest.raises(ConfigError):
            event_from_dict(data)
