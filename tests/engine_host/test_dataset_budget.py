"""The budget of a data set: what would pass the total is refused before it starts; what never settled counts whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from synthward.engine.accounting import (
    ApproximateEvent,
    CorrelatedGaussianEvent,
    FixedSizeGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    RdpFilter,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import BudgetExceededError, ConfigError, LedgerError

DELTA, TOTAL = 1e-5, 4.0
QUERY = GaussianEvent(8.0, 1)
RUN = [QUERY, PoissonGaussianEvent(0.05, 2.0, 500)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "budget.jsonl"


@pytest.fixture
def budget(path):
    return DatasetBudget.create(
        path, epsilon=TOTAL, delta=DELTA, unit="patient", dataset="icu", planned=[*RUN, *RUN]
    )


def cost(*events):
    return RdpFilter.planned([*RUN, *RUN], DELTA).epsilon(events)


def test_a_run_counts_whole_until_it_settles(budget, path):
    assert budget.spent() == 0.0
    budget.reserve("a", RUN, unit="patient")
    assert budget.spent() == cost(*RUN)
    budget.start("a")
    assert budget.spent() == cost(*RUN)
    charged = [QUERY, PoissonGaussianEvent(0.05, 2.0, 120)]
    budget.settle("a", charged, ledger_head="ab" * 32)
    assert budget.spent() == cost(*charged) < cost(*RUN)
    again = DatasetBudget(path)
    [entry] = again.entries()
    assert (entry.run_id, entry.state, entry.ledger_head) == ("a", "settled", "ab" * 32)
    assert again.spent() == budget.spent() and again.header["dataset"] == "icu"


def test_releases_are_composed_not_added(budget):
    budget.reserve("a", RUN, unit="patient")
    budget.reserve("b", [QUERY], unit="patient")
    assert budget.spent() == cost(*RUN, QUERY) < cost(*RUN) + cost(QUERY)


def test_a_run_that_would_pass_the_total_is_refused_and_nothing_written(budget, path):
    content = path.read_bytes()
    with pytest.raises(BudgetExceededError, match="nothing was read or spent"):
        budget.reserve("a", [PoissonGaussianEvent(0.05, 1.0, 5000)], unit="patient")
    assert path.read_bytes() == content
    number = 0
    with pytest.raises(BudgetExceededError):
        while number < 100:
            budget.reserve(str(number), RUN, unit="patient")
            number += 1
    assert 1 <= number < 100
    assert cost(*RUN * number) <= TOTAL < cost(*RUN * (number + 1))


def test_what_was_never_started_can_be_given_back_and_nothing_else(budget):
    budget.reserve("a", RUN, unit="patient")
    budget.cancel("a")
    assert budget.spent() == 0.0
    with pytest.raises(LedgerError, match="cancelled"):
        budget.start("a")
    budget.reserve("a", [QUERY], unit="patient")
    assert budget.spent() == cost(QUERY) and budget.entries()[0].state == "reserved"
    budget.cancel("a")
    for state in ("started", "settled"):
        budget.reserve(state, [QUERY], unit="patient")
        budget.start(state)
        if state == "settled":
            budget.settle(state, [QUERY])
        with pytest.raises(LedgerError, match=state):
            budget.cancel(state)
    assert budget.spent() == cost(QUERY, QUERY)


@pytest.mark.parametrize("step", ["start", "settle", "cancel"])
def test_a_run_that_reserved_nothing_does_nothing(budget, path, step):
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="not in it"):
        getattr(budget, step)("a", *([[QUERY]] if step == "settle" else []))
    assert path.read_bytes() == content


def test_a_settled_run_stays_settled(budget):
    budget.reserve("a", RUN, unit="patient")
    with pytest.raises(LedgerError, match="reserved"):
        budget.settle("a", [])  # it never started, so nothing is known of what it did
    budget.start("a")
    budget.settle("a", RUN)
    for step in (lambda: budget.settle("a", []), lambda: budget.reserve("a", [QUERY], unit="patient")):
        with pytest.raises(LedgerError, match="settled"):
            step()
    assert budget.spent() == cost(*RUN)


def test_a_settled_run_counts_at_what_it_charged_even_beyond_its_reservation(budget):
    """The odometer tells the truth; what comes after is refused."""
    budget.reserve("a", [QUERY], unit="patient")
    budget.start("a")
    dear = [GaussianEvent(0.5, 1)]
    budget.settle("a", dear)
    assert budget.spent() == cost(*dear) > TOTAL
    with pytest.raises(BudgetExceededError):
        budget.reserve("b", [QUERY], unit="patient")


def test_a_new_plan_takes_the_place_of_the_old(budget):
    budget.reserve("a", RUN, unit="patient")
    budget.start("a")
    budget.reserve("a", [QUERY, *RUN], unit="patient")
    assert budget.spent() == cost(QUERY, *RUN)
    assert budget.entries()[0].state == "started"
    with pytest.raises(BudgetExceededError):
        budget.reserve("a", [GaussianEvent(0.5, 1)], unit="patient")
    assert budget.spent() == cost(QUERY, *RUN)


def test_runs_of_another_unit_or_relation_are_refused(budget, path):
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="unit"):
        budget.reserve("a", RUN, unit="row")
    with pytest.raises(ConfigError, match="relation"):
        budget.reserve("a", RUN, unit="patient", relation="replace_one")
    assert path.read_bytes() == content


def test_events_that_the_filter_does_not_answer_for_are_refused_by_name(budget):
    with pytest.raises(ConfigError, match="fixed-size"):
        budget.reserve("a", [FixedSizeGaussianEvent(100, 10, 2.0, 5)], unit="patient")
    with pytest.raises(TypeError):
        budget.reserve("a", ["a query"], unit="patient")
    strategy = Strategy("banded", (1.0, 0.5))
    budget.reserve("b", [CorrelatedGaussianEvent(20.0, strategy, 4, 30)], unit="patient")
    budget.reserve("c", [ApproximateEvent(0.1, DELTA / 100)], unit="patient")
    with pytest.raises(BudgetExceededError):
        budget.reserve("d", [ApproximateEvent(0.1, DELTA)], unit="patient")


def test_an_existing_budget_is_never_begun_again(budget, path):
    budget.reserve("a", RUN, unit="patient")
    content = path.read_bytes()
    with pytest.raises(LedgerError, match="exists"):
        DatasetBudget.create(path, epsilon=100.0, delta=DELTA, unit="patient")
    assert path.read_bytes() == content


def test_each_changed_byte_is_noticed(budget, path, tmp_path):
    budget.reserve("a", RUN, unit="patient")
    budget.start("a")
    budget.settle("a", [QUERY])
    original, other = path.read_bytes(), tmp_path / "other.jsonl"
    for position in range(0, len(original) - 1, 11):
        changed = bytearray(original)
        changed[position] ^= 1
        other.write_bytes(bytes(changed))
        with pytest.raises(LedgerError):
            DatasetBudget(other).entries()
    lines = original.splitlines(keepends=True)
    for damaged in (
        [*lines[:2], lines[3]],
        [lines[0], lines[2], lines[1], lines[3]],
        [*lines, lines[3]],
        lines[1:],
    ):
        other.write_bytes(b"".join(damaged))
        with pytest.raises(LedgerError):
            DatasetBudget(other)


def test_a_torn_line_gives_nothing_back(budget, path):
    budget.reserve("a", RUN, unit="patient")
    whole = path.read_bytes()
    budget.cancel("a")
    for cut in range(len(whole) + 1, len(path.read_bytes()), 17):
        content = path.read_bytes()
        path.write_bytes(content[:cut])
        torn = DatasetBudget(path)
        assert torn.spent() == cost(*RUN)
        # The torn line may have been the start of the run.
        with pytest.raises(LedgerError, match="started"):
            torn.cancel("a")
        torn.settle("a", [QUERY])
        assert DatasetBudget(path).spent() == cost(QUERY)
        path.write_bytes(content)


def test_lines_that_can_not_follow_each_other_are_refused(tmp_path, path):
    """Whoever writes a file with good hashes can still not cancel what has started."""
    from synthward.engine.budget import _FORMAT
    from synthward.engine.chain import Chain

    DatasetBudget.create(path, epsilon=TOTAL, delta=DELTA, unit="patient")
    for number, kinds in enumerate((["start"], ["reserve", "start", "cancel"], ["reserve", "settle"])):
        other = tmp_path / f"{number}.jsonl"
        other.write_bytes(path.read_bytes())
        chain = Chain.open(other, _FORMAT, lambda before, line: None)
        for kind in kinds:
            more = {"reserve": {"events": []}, "settle": {"events": [], "ledger_head": None}}.get(kind, {})
            chain.append(kind, run_id="a", **more)
        chain.close()
        with pytest.raises(LedgerError, match=f"line {len(kinds) + 1}"):
            DatasetBudget(other)


# Forks twelve processes that reserve at once; prints how each one ended.
AT_ONCE = """
import os, signal, sys
from synthward.engine.accounting import GaussianEvent
from synthward.engine.budget import DatasetBudget
from synthward.engine.errors import BudgetExceededError

def spend(name, killed):
    budget = DatasetBudget(sys.argv[1])
    try:
        budget.reserve(name, [GaussianEvent(8.0, 1)], unit="patient")
    except BudgetExceededError:
        return 3
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    budget.start(name)
    budget.settle(name, [GaussianEvent(8.0, 1)])
    return 0

children = []
for number in range(12):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = spend(str(number), number % 2 == 0)
        finally:
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_processes_share_one_budget(path):
    """Twelve at once, some killed after they reserved: never beyond the total, and every reservation is kept."""
    total = cost(*[QUERY] * 8) * 1.0001
    DatasetBudget.create(path, epsilon=total, delta=DELTA, unit="patient", planned=[*RUN, *RUN])
    done = subprocess.run(
        [sys.executable, "-P", "-c", AT_ONCE, str(path)], capture_output=True, text=True, check=True
    )
    codes = json.loads(done.stdout)
    assert codes.count(0) + codes.count(-signal.SIGKILL) == 8 and codes.count(3) == 4
    assert codes.count(-signal.SIGKILL) > 0
    budget = DatasetBudget(path)
    assert 0.99 * total < budget.spent() <= total
    states = [entry.state for entry in budget.entries()]
    assert states.count("reserved") == codes.count(-signal.SIGKILL)
    assert states.count("settled") == codes.count(0)


def test_the_file_holds_no_counts_of_records(budget, path):
    budget.reserve("a", RUN, unit="patient")
    for line in path.read_text().splitlines():
        assert not {"rows", "records", "num_units", "batch_size"} & set(json.loads(line))
