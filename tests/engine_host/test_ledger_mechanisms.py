"""Leases of every event of steps: what is one mechanism is charged as one, and never over a change of key."""

from __future__ import annotations

import pytest

from synthward.engine import Ledger
from synthward.engine.accounting import (
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    FixedSizeGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    epsilon_of,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.errors import (
    BudgetExceededError,
    ConfigError,
    LedgerError,
    UnsupportedOperationError,
)

DELTA = 1e-5
TRUNCATED = TruncatedPoissonGaussianEvent(0.05, 1.5, 1, max_batch_size=900, max_units=10_000)
CYCLIC = CyclicPoissonGaussianEvent(0.2, 1.2, period=4, steps=1)
BANDED = CorrelatedGaussianEvent(6.0, Strategy("banded", (1.0, 0.5, 0.25)), period=5, steps=1)
BLT = CorrelatedGaussianEvent(6.0, Strategy("blt", (0.3, 0.1), (0.9, 0.5)), period=5, steps=1)
ONE_MECHANISM = pytest.mark.parametrize("event", [CYCLIC, BANDED, BLT], ids=["cyclic", "banded", "blt"])
ANY = pytest.mark.parametrize(
    "event", [TRUNCATED, CYCLIC, BANDED, BLT], ids=["truncated", "cyclic", "banded", "blt"]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def create(path, **changes):
    options = {"run_id": "r", "unit": "patient", "delta": DELTA, "key_id": "00" * 16, "private": True}
    return Ledger.create(path, **(options | {"accountant": "rdp"} | changes))


def fresh(path, key="11"):
    """Opened again, by a process with another key."""
    ledger = Ledger.open(path)
    ledger.add_key(key * 16)
    return ledger


def reread(path):
    with Ledger.open(path, readonly=True) as ledger:
        return ledger.events()


@ANY
def test_a_lease_of_any_steps_is_charged_covered_and_closed(path, event):
    with create(path) as ledger:
        ledger.lease(event, 0, 10)
        assert ledger.events() == [event.with_steps(10)]
        assert ledger.covers(0, event) and ledger.covers(1, event) and not ledger.covers(1, event)
        assert not ledger.covers(2, event.with_steps(2)), "another event"
        ledger.close_lease(7)
        assert ledger.epsilon() == epsilon_of([event.with_steps(7)], DELTA, "rdp")
    assert reread(path) == [event.with_steps(7)]


@ONE_MECHANISM
def test_leases_in_a_row_are_one_mechanism(path, event):
    with create(path) as ledger:
        for first in (0, 10, 20):
            ledger.lease(event, first, 10)
            assert ledger.events() == [event.with_steps(first + 10)]
            ledger.close_lease(10)
        ledger.lease(event, 30, 10)
        ledger.close_lease(3)
        ledger.lease(event, 33, 10)
    assert reread(path) == [event.with_steps(43)]


@ONE_MECHANISM
def test_a_new_key_begins_another_mechanism(path, event):
    """The noise of the old key hides nothing of the new one's steps: the two add up."""
    with create(path) as ledger:
        ledger.lease(event, 0, 10)
        ledger.close_lease(10)
    with fresh(path) as ledger:
        ledger.lease(event, 10, 10)
        ledger.close_lease(10)
        ledger.lease(event, 20, 5)
        ledger.close_lease(5)
        both = [event.with_steps(10), event.with_steps(15)]
        assert ledger.events() == both
        assert ledger.epsilon() == epsilon_of(both, DELTA, "rdp")


@ONE_MECHANISM
@pytest.mark.parametrize("first_step", [0, 9, 11])
def test_steps_that_do_not_follow_need_a_fresh_key(path, event, first_step):
    """A stretch of correlated noise is no mechanism of its own while the noise before it is the same key's."""
    with create(path) as ledger:
        ledger.lease(event, 0, 10)
        ledger.close_lease(10)
        content = path.read_bytes()
        with pytest.raises(LedgerError, match="fresh key"):
            ledger.lease(event, first_step, 10)
        assert path.read_bytes() == content
        ledger.add_key("11" * 16)
        ledger.lease(event, first_step, 10)
        assert ledger.events() == [event.with_steps(10)] * 2


@ONE_MECHANISM
def test_another_process_needs_a_key_of_its_own(path, event):
    """That it opens the ledger without a word does not make its noise the old one's."""
    with create(path) as ledger:
        ledger.lease(event, 0, 10)
        ledger.close_lease(10)
    with Ledger.open(path) as ledger:
        with pytest.raises(LedgerError, match="fresh key"):
            ledger.lease(event, 10, 10)
        ledger.lease(TRUNCATED, 10, 10, part="2")  # independent noise in each step: nothing to tear apart


@ONE_MECHANISM
def test_parts_are_mechanisms_of_their_own(path, event):
    with create(path) as ledger:
        ledger.lease(event, 0, 10)
        ledger.lease(event, 0, 20, part="2")
        ledger.close_lease(10)
        ledger.lease(event, 10, 10)
        ledger.close_lease(20, part="2")
        with pytest.raises(LedgerError, match="close the lease"):
            ledger.add_key("11" * 16, part="")
        ledger.add_key("22" * 16, part="2")
        ledger.lease(event, 20, 5, part="2")
        assert sorted(e.steps for e in ledger.events()) == [5, 20, 20]
    assert sorted(e.steps for e in reread(path)) == [5, 20, 20]


@ONE_MECHANISM
@pytest.mark.parametrize("readonly", [True, False])
def test_a_torn_lease_lengthens_the_mechanism_that_it_went_on_with(path, event, readonly):
    """It has lost the name of its part, so all that it may have been of are charged."""
    with create(path) as ledger:
        ledger.lease(event, 0, 30)
        ledger.close_lease(10)
        ledger.lease(event, 0, 4, part="2")
        ledger.close_lease(4, part="2")
        ledger.lease(event, 10, 20)
    content = path.read_bytes()
    known = content.rindex(b'"steps":20,') + len(b'"steps":20,')
    for cut, more in ((len(content) - 1, 20), (known, 20), (known - 1, 30)):
        path.write_bytes(content[:cut])
        with Ledger.open(path, readonly=readonly) as ledger:
            assert sorted(e.steps for e in ledger.events()) == [4 + more, 10 + more]
            if not readonly:
                with pytest.raises(LedgerError, match="fresh key"):
                    ledger.lease(event, 10, 5)
                ledger.add_key("11" * 16)
                ledger.lease(event, 10, 5)
                assert sorted(e.steps for e in ledger.events()) == [5, 4 + more, 10 + more]
        assert readonly or sorted(e.steps for e in reread(path)) == [5, 4 + more, 10 + more]


@pytest.mark.parametrize("where", ["whole", "digest", "event"])
def test_a_line_for_a_torn_one_may_be_torn_too(path, where):
    """Killed while it was put in the other's place: still charged."""
    with create(path) as ledger:
        ledger.lease(TRUNCATED, 0, 30)
        ledger.close_lease(10)
        ledger.lease(TRUNCATED, 10, 20)
    path.write_bytes(path.read_bytes()[:-5])
    Ledger.open(path).close()
    content = path.read_bytes()
    last = content.rindex(b'\n{"bytes"') + 1
    cut = {
        "whole": len(content) - 1,
        "digest": last + 40,
        "event": content.index(b',"hash"', last),
    }[where]
    path.write_bytes(content[:cut])
    expected = 10 if where == "digest" else 30 if where == "whole" else 40
    assert [e.steps for e in reread(path)] == [expected]
    with Ledger.open(path) as ledger:
        assert [e.steps for e in ledger.events()] == [expected]


def test_a_torn_query_of_many_steps_is_charged_with_all_of_them(path):
    """Events of steps can be charged without a lease; cut off behind the event, it can not be told from one."""
    event = TRUNCATED.with_steps(100)
    with create(path) as ledger:
        ledger.lease(TRUNCATED, 0, 3)
        ledger.close_lease(3)
        ledger.append_event(event, note="")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b',"hash"')])
    assert reread(path) == [TRUNCATED.with_steps(103)]


@ONE_MECHANISM
def test_the_budget_is_checked_on_the_whole_mechanism(path, event):
    """Not on the leases one by one: of buffered noise, two stretches of ten cost less than twenty steps do."""
    whole = epsilon_of([event.with_steps(20)], DELTA, "rdp")
    with create(path, target_epsilon=whole * 0.9999) as ledger:
        ledger.lease(event, 0, 10)
        ledger.close_lease(10)
        content = path.read_bytes()
        with pytest.raises(BudgetExceededError):
            ledger.lease(event, 10, 10)
        assert path.read_bytes() == content
    path.unlink()
    with create(path, target_epsilon=whole * 1.0001) as ledger:
        ledger.lease(event, 0, 10)
        ledger.close_lease(10)
        ledger.lease(event, 10, 10)
        assert ledger.epsilon() == whole


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (PoissonGaussianEvent(0.1, 1.0, 1), PoissonGaussianEvent(0.1, 2.0, 1)),
        (PoissonGaussianEvent(0.1, 1.0, 1), PoissonGaussianEvent(0.05, 1.0, 1)),
        (PoissonGaussianEvent(0.1, 1.0, 1), TRUNCATED),
        (CYCLIC, CyclicPoissonGaussianEvent(0.2, 1.2, period=5, steps=1)),
        (BANDED, BLT),
    ],
    ids=["noise", "rate", "kind", "period", "strategy"],
)
def test_parameters_that_change_during_a_run_are_refused_by_name(path, first, second):
    """They may have been chosen from what was released; the sum of privacy losses does not hold for those."""
    with create(path) as ledger:
        ledger.lease(first, 0, 5)
        ledger.close_lease(5)
        content = path.read_bytes()
        with pytest.raises(UnsupportedOperationError, match="adaptive filter"):
            ledger.lease(second, 5, 5)
        ledger.lease(second, 0, 5, part="2")  # another network's are its own
    with fresh(path) as ledger, pytest.raises(UnsupportedOperationError, match="adaptive filter"):
        ledger.lease(second, 5, 5)
    assert path.read_bytes().startswith(content)


def test_what_could_not_be_accounted_is_refused_before_it_is_spent(path, tmp_path):
    fixed = FixedSizeGaussianEvent(1000, 50, 2.0, 1)
    with create(path) as ledger:
        content = path.read_bytes()
        with pytest.raises(ConfigError, match="replace_one"):
            ledger.lease(fixed, 0, 5)
        assert path.read_bytes() == content
    with create(tmp_path / "other.jsonl", relation="replace_one") as ledger:
        assert ledger.header["relation"] == "replace_one"
        ledger.lease(fixed, 0, 5)
        ledger.append_event(GaussianEvent(4.0, 1), note="")
        expected = epsilon_of([fixed.with_steps(5), GaussianEvent(4.0, 1)], DELTA, "rdp", "replace_one")
        assert ledger.epsilon() == expected > epsilon_of([GaussianEvent(4.0, 1)], DELTA, "rdp")
        with pytest.raises(ConfigError):
            ledger.lease(PoissonGaussianEvent(0.1, 1.0, 1), 0, 5, part="2")
    with pytest.raises(ConfigError, match="relation"):
        create(tmp_path / "third.jsonl", relation="friends")


def test_names_of_parts_are_not_given_out_twice(path):
    """A later process's network is another one, whatever its noise."""
    with create(path) as ledger:
        assert [ledger.new_part(), ledger.new_part()] == ["", "2"]
        ledger.lease(CYCLIC, 0, 5)
        ledger.lease(TRUNCATED, 0, 5, part="2")
    with Ledger.open(path) as ledger:
        assert ledger.new_part() == "3"
