"""Events: a closed set, what adds up and what does not, and what each accountant refuses by name."""

from __future__ import annotations

import json
import math

import pytest

from synthward.engine.accounting import (
    Accountant,
    ApproximateEvent,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    FixedSizeGaussianEvent,
    GaussianEvent,
    LaplaceEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    StepsEvent,
    TruncatedPoissonGaussianEvent,
    epsilon_curve,
    epsilon_of,
    event_from_dict,
)
from synthward.engine.accounting.accountant import merge_events
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import ConfigError, SynthwardError

BANDED = Strategy("banded", (1.0, 0.5, 0.25))
EVENTS = [
    PoissonGaussianEvent(0.1, 2.0, 3),
    TruncatedPoissonGaussianEvent(0.1, 2.0, 3, 40, 200),
    CyclicPoissonGaussianEvent(0.1, 2.0, 4, 9),
    CorrelatedGaussianEvent(2.0, BANDED, 4, 9),
    FixedSizeGaussianEvent(100, 10, 2.0, 3),
    GaussianEvent(2.0, 3),
    LaplaceEvent(2.0, 3),
    ApproximateEvent(0.5, 1e-7, 2),
    SelectionEvent((PoissonGaussianEvent(0.1, 2.0, 3), GaussianEvent(3.0)), 10.0, 0.0),
    SelectionEvent((GaussianEvent(3.0),), 10.0, math.inf),
]
STEPS = [event for event in EVENTS if isinstance(event, StepsEvent)]


def kind_of(event):
    return event.kind


@pytest.mark.parametrize("event", EVENTS, ids=kind_of)
def test_an_event_survives_json(event):
    text = json.dumps(event.to_dict(), allow_nan=False)
    assert event_from_dict(json.loads(text)) == event
    assert hash(event_from_dict(json.loads(text))) == hash(event)


@pytest.mark.parametrize("event", EVENTS, ids=kind_of)
def test_one_field_more_less_or_other_is_refused(event):
    data = event.to_dict()
    for name in data:
        with pytest.raises(ConfigError):
            event_from_dict({k: v for k, v in data.items() if k != name})
        for bad in (None, "1", True, [], {}, math.nan, -1.0, 10**400):
            with pytest.raises(ConfigError):
                event_from_dict(data | {name: bad})
    with pytest.raises(ConfigError):
        event_from_dict(data | {"module_name": "os"})


@pytest.mark.parametrize("data", [None, [], "gaussian", {}, {"kind": ["gaussian"]}, {"kind": "os.system"}])
def test_what_is_no_event_is_refused(data):
    with pytest.raises(ConfigError, match="known kind"):
        event_from_dict(data)


def test_a_selection_holds_no_selection_however_deep():
    inner = SelectionEvent((GaussianEvent(3.0),), 10.0, 0.0)
    with pytest.raises(ConfigError, match="selection"):
        SelectionEvent((inner,), 2.0, 0.0)
    data = inner.to_dict()
    for _ in range(3000):
        data = {"kind": "selection", "inner": [data], "mean_trials": 2.0, "shape": 0.0}
    with pytest.raises(ConfigError, match="selection"):
        event_from_dict(data)


@pytest.mark.parametrize("event", STEPS, ids=kind_of)
def test_steps_can_be_changed(event):
    longer = event.with_steps(40)
    assert type(longer) is type(event) and longer.steps == 40
    assert longer.with_steps(event.steps) == event
    with pytest.raises(ConfigError, match="steps"):
        event.with_steps(-1)


def test_which_events_are_one_mechanism():
    one = {event.kind for event in EVENTS if event.is_one_mechanism}
    assert one == {"cyclic_poisson_gaussian", "correlated_gaussian"}


def test_merging_adds_what_adds_up_and_nothing_else():
    cyclic, correlated = EVENTS[2], EVENTS[3]
    given = [*EVENTS, *EVENTS, GaussianEvent(2.0, 0), cyclic.with_steps(0)]
    merged = merge_events(given)
    assert merged.count(cyclic) == merged.count(correlated) == 2
    assert merged.count(EVENTS[8]) == merged.count(EVENTS[9]) == 2
    for event in (EVENTS[0], EVENTS[1], EVENTS[4]):
        assert event.with_steps(2 * event.steps) in merged
    assert {GaussianEvent(2.0, 6), LaplaceEvent(2.0, 6), ApproximateEvent(0.5, 1e-7, 4)} <= set(merged)
    assert len(merged) == 6 + 8
    assert merge_events(merged) == merged


@pytest.mark.parametrize("event", [*STEPS[:4], *EVENTS[5:8]], ids=kind_of)
def test_composing_k_times_is_composing_k(event):
    """Whichever way it is asked for; mechanisms that are one each do not add up their steps."""
    at_once, one_by_one = Accountant(), Accountant()
    at_once.compose(event, 3)
    for _ in range(3):
        one_by_one.compose(event)
    assert at_once.events == one_by_one.events
    assert at_once.epsilon(1e-5) == one_by_one.epsilon(1e-5) == epsilon_of([event] * 3, 1e-5)
    assert at_once.epsilon(1e-5) > epsilon_of([event], 1e-5) > 0.0


def test_cyclic_steps_cost_their_rounds():
    rounds = [CyclicPoissonGaussianEvent(0.1, 2.0, 4, steps).rounds for steps in (0, 1, 4, 5, 8, 9)]
    assert rounds == [0, 1, 1, 2, 2, 3]
    for kind in ("pld", "rdp"):
        found = epsilon_of([CyclicPoissonGaussianEvent(0.1, 2.0, 4, 9)], 1e-5, kind)
        assert found == epsilon_of([PoissonGaussianEvent(0.1, 2.0, 3)], 1e-5, kind)
    apart = [CyclicPoissonGaussianEvent(0.1, 2.0, 4, 1)] * 2
    assert epsilon_of(apart, 1e-5) == epsilon_of([PoissonGaussianEvent(0.1, 2.0, 2)], 1e-5)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("kind", ["pld", "rdp"])
def test_correlated_noise_is_one_gaussian_of_its_sensitivity(kind, relation):
    """Three columns of norm^2 1 + 1/4 + 1/16 whole, apart by the period; the last one cut to one entry."""
    event = CorrelatedGaussianEvent(2.0, BANDED, 4, 9)
    sensitivity = math.sqrt(2 * (1 + 1 / 4 + 1 / 16) + 1)
    expected = epsilon_of([GaussianEvent(2.0 / sensitivity)], 1e-5, kind, relation)
    assert epsilon_of([event], 1e-5, kind, relation) == pytest.approx(expected, rel=1e-7)
    # One step at a time would claim more, or less: columns that overlap add up before they are squared.
    close = CorrelatedGaussianEvent(2.0, BANDED, 1, 9)
    one_by_one = epsilon_of([close.with_steps(1)] * 9, 1e-5, kind, relation)
    assert epsilon_of([close], 1e-5, kind, relation) > 1.2 * one_by_one


def test_no_steps_cost_nothing_and_no_noise_is_infinite():
    for event in STEPS:
        assert epsilon_of([event.with_steps(0)], 1e-5) == 0.0
    for event in (
        PoissonGaussianEvent(0.1, 0.0, 3),
        CyclicPoissonGaussianEvent(0.1, 0.0, 4, 9),
        CorrelatedGaussianEvent(0.0, BANDED, 4, 9),
        LaplaceEvent(0.0),
        SelectionEvent((GaussianEvent(0.0),), 10.0, 0.0),
    ):
        for kind in ("pld", "rdp", "prv"):
            assert epsilon_of([event, GaussianEvent(3.0)], 1e-5, kind) == math.inf


@pytest.mark.parametrize("delta", [None, 0.0, 1.0, -1e-6, math.nan, math.inf, "1e-6", True])
def test_there_is_no_epsilon_without_a_delta(delta):
    accountant = Accountant()
    accountant.compose(GaussianEvent(3.0))
    for ask in (accountant.epsilon, lambda d: epsilon_of([], d), lambda d: epsilon_curve(EVENTS[:1], d)):
        with pytest.raises(ConfigError, match="delta"):
            ask(delta)
    with pytest.raises(TypeError):
        accountant.epsilon()


REFUSED = [
    ("pld", "add_or_remove_one", EVENTS[4], "fixed_size_gaussian.*rdp"),
    ("pld", "replace_one", EVENTS[4], "fixed_size_gaussian.*rdp"),
    ("rdp", "add_or_remove_one", EVENTS[4], "replace_one"),
    ("pld", "add_or_remove_one", EVENTS[8], "selection.*rdp"),
    ("rdp", "replace_one", EVENTS[0], "poisson_gaussian.*sensitivity"),
    ("rdp", "replace_one", EVENTS[1], "truncated_poisson_gaussian.*sensitivity"),
    ("rdp", "replace_one", EVENTS[2], "poisson_gaussian.*sensitivity"),
    ("rdp", "replace_one", EVENTS[8], "poisson_gaussian.*sensitivity"),
    ("rdp", "add_or_remove_one", SelectionEvent((EVENTS[7],), 2.0, 0.0), "approximate.*selection"),
    ("rdp", "replace_one", ApproximateEvent(1.0, 0.5), "replace a unit"),
    ("pld", "add_or_remove_one", ApproximateEvent(600.0, 0.0), "too much"),
]


@pytest.mark.parametrize(("kind", "relation", "event", "mention"), REFUSED)
def test_what_an_accountant_can_not_answer_is_refused_in_a_line(kind, relation, event, mention):
    with pytest.raises(ConfigError, match=mention) as caught:
        epsilon_of([event], 1e-5, kind, relation)
    assert "\n" not in str(caught.value)


def test_accountants_never_answer_with_less_than_nothing(monkeypatch):
    from synthward.engine.accounting import accountant

    for bad in (math.nan, -1e-3):
        monkeypatch.setitem(accountant._ANSWERS, "pld", lambda *_, value=bad: value)
        with pytest.raises(SynthwardError, match="pld"):
            epsilon_of([GaussianEvent(3.0 + abs(bad if bad == bad else 1.0))], 1e-5)


def test_only_events_are_composed():
    with pytest.raises(TypeError, match="expected a privacy event"):
        Accountant().compose({"kind": "gaussian"})
    with pytest.raises(ConfigError, match="count"):
        Accountant().compose(GaussianEvent(1.0), -1)


def test_the_curve_takes_any_steps():
    events = [LaplaceEvent(8.0), EVENTS[3], EVENTS[2]]
    curve = epsilon_curve(events, 1e-5, 5)
    assert curve[0] == (0, epsilon_of(events[:1], 1e-5))
    assert curve[-1] == (18, epsilon_of(events, 1e-5))
    assert [step for step, _ in curve] == sorted(step for step, _ in curve)
