"""Invariant 7: the ledger is written before what it covers, cannot be edited unseen, and never under-
reports."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest

from tests.oracles import flat_parameters
from tests.privacy.harness import accumulate, make_trainer, step
from tests.privacy.nets import CASES

DELTA = 1e-5
RATE, SIGMA = 0.1, 1.3


def create(path, target_epsilon=None):
    from synthward.engine import Ledger

    return Ledger.create(
        path,
        run_id="run-1",
        unit="patient_id",
        delta=DELTA,
        key_id="ab" * 8,
        private=True,
        target_epsilon=target_epsilon,
    )


def one_step():
    from synthward.engine.accounting import PoissonGaussianEvent

    return PoissonGaussianEvent(RATE, SIGMA, 1)


def cost(steps, queries=0, sigma_query=5.0):
    """Epsilon of so many training steps and queries, by the accountant."""
    from synthward.engine.accounting import GaussianEvent, PoissonGaussianEvent, epsilon_of

    events = [PoissonGaussianEvent(RATE, SIGMA, steps)] if steps else []
    if queries:
        events.append(GaussianEvent(sigma_query, queries))
    return epsilon_of(events, DELTA)


@pytest.fixture
def written(tmp_path):
    """A ledger file with one query, one closed lease and one lease that nobody closed (a crash)."""
    from synthward.engine.accounting import GaussianEvent

    path = tmp_path / "ledger.jsonl"
    ledger = create(path)
    ledger.append_event(GaussianEvent(5.0, 1), note="row count")
    ledger.lease(one_step(), 0, 50)
    ledger.close_lease(30)
    ledger.lease(one_step(), 30, 20)
    close(ledger)
    return path


def close(ledger):
    """Gives up the ledger as an ended process would."""
    if hasattr(ledger, "close"):
        ledger.close()


def reopened(path):
    from synthward.engine import Ledger

    ledger = Ledger.open(path)
    close(ledger)
    return ledger


def test_an_open_lease_is_charged_whole_after_a_crash(written):
    """30 used of the closed one, all 20 of the one that was cut off."""
    assert reopened(written).epsilon(DELTA, "pld") == pytest.approx(cost(50, queries=1), rel=1e-9)


def test_a_lease_is_on_disk_before_the_call_returns(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = create(path)
    ledger.lease(one_step(), 0, 40)
    copied = shutil.copy(path, tmp_path / "crashed.jsonl")
    assert reopened(copied).epsilon(DELTA, "pld") == pytest.approx(cost(40), rel=1e-9)


def test_only_the_used_part_of_a_closed_lease_is_charged(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = create(path)
    ledger.lease(one_step(), 0, 40)
    ledger.close_lease(7)
    assert ledger.epsilon(DELTA, "pld") == pytest.approx(cost(7), rel=1e-9)


@pytest.mark.parametrize("used", [-1, 41])
def test_a_lease_cannot_be_closed_at_a_count_that_it_does_not_cover(tmp_path, used):
    from synthward.engine.errors import SynthwardError

    ledger = create(tmp_path / "ledger.jsonl")
    ledger.lease(one_step(), 0, 40)
    with pytest.raises((SynthwardError, ValueError)):
        ledger.close_lease(used)


def test_every_line_is_chained_json_without_counts(written):
    """No batch sizes, no row counts; one JSON object a line, every line bound to the one before."""
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(lines) >= 4
    forbidden = {"rows", "records", "num_rows", "num_units", "batch_size", "batch_sizes", "drawn", "sizes"}
    for line in lines:
        assert not forbidden & set(map(str.lower, all_keys(line)))


def all_keys(value):
    """Keys of nested JSON objects."""
    if isinstance(value, dict):
        return set(value) | {k for v in value.values() for k in all_keys(v)}
    if isinstance(value, list):
        return {k for v in value for k in all_keys(v)}
    return set()


@functools.cache
def cost_of(events):
    """Epsilon of a tuple of events; remembered, because most damaged files read alike."""
    from synthward.engine.accounting import epsilon_of

    return epsilon_of(events, DELTA)


def epsilon_or_refusal(path):
    """What the file's events cost, or None when it is refused as a damaged ledger."""
    from synthward.engine.errors import LedgerError

    try:
        return cost_of(tuple(reopened(path).events()))
    except LedgerError:
        return None


def test_a_ledger_shorter_than_the_checkpoint_s_head_is_refused(written):
    """Cutting whole lines off the end leaves a valid chain; the head that the checkpoint keeps shows it."""
    from synthward.engine import Ledger
    from synthward.engine.errors import LedgerError

    head = reopened(written).head
    close(Ledger.open(written, expected_head=head))
    written.write_bytes(b"".join(written.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError):
        Ledger.open(written, expected_head=head)


def test_no_edited_byte_goes_unseen(written, tmp_path):
    """Every 7th byte changed in turn: refused, or at least no cheaper than what was spent."""
    original, truth = written.read_bytes(), cost(50, queries=1)
    seen = 0
    for position in range(0, len(original) - 1, 7):
        changed = bytearray(original)
        changed[position] = changed[position] ^ 1
        damaged = tmp_path / "damaged.jsonl"
        damaged.write_bytes(bytes(changed))
        reported = epsilon_or_refusal(damaged)
        assert reported is None or reported >= truth * (1 - 1e-9), f"byte {position}"
        seen += reported is None
    assert seen > 0.9 * (len(original) // 7)


@pytest.mark.parametrize("damage", ["delete", "swap", "duplicate", "reorder", "drop_first"])
def test_lines_cannot_be_removed_or_moved(written, tmp_path, damage):
    lines = written.read_bytes().splitlines(keepends=True)
    damaged = {
        "delete": [*lines[:1], *lines[2:]],
        "swap": [lines[0], lines[2], lines[1], *lines[3:]],
        "duplicate": [*lines[:2], lines[1], *lines[2:]],
        "reorder": [lines[0], *reversed(lines[1:])],
        "drop_first": lines[1:],
    }[damage]
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"".join(damaged))
    assert epsilon_or_refusal(path) is None


def test_a_torn_last_line_is_never_cheaper_than_what_came_before(written, tmp_path):
    """A crash in the middle of writing: cut at every byte of the last line."""
    lines = written.read_bytes().splitlines(keepends=True)
    whole, last, truth = b"".join(lines[:-1]), lines[-1], cost(30, queries=1)
    for cut in range(1, len(last)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(whole + last[:cut])
        reported = epsilon_or_refusal(path)
        assert reported is None or reported >= truth * (1 - 1e-9), f"cut at {cut}"


def test_a_torn_ledger_can_be_continued(written):
    """A crash must not lose the run: the torn file opens, and a new lease goes on top of what was charged."""
    from synthward.engine import Ledger

    content = written.read_bytes()
    written.write_bytes(content[:-9])
    ledger = Ledger.open(written)
    before = ledger.epsilon(DELTA, "pld")
    assert before >= cost(30, queries=1) * (1 - 1e-9)
    ledger.lease(one_step(), 50, 10)
    ledger.close_lease(10)
    after = ledger.epsilon(DELTA, "pld")
    close(ledger)
    assert after > before
    assert reopened(written).epsilon(DELTA, "pld") == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b'{"kind":"os.system"}\n', b"\x80\x04K\x01.", b"\xff" * 99]
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path, content):
    from synthward.engine.errors import LedgerError

    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        reopened(path)


def test_creating_over_an_existing_ledger_is_refused(written):
    """The spend of a run cannot be reset by starting it again at the same place."""
    from synthward.engine.errors import SynthwardError

    content = written.read_bytes()
    with pytest.raises((SynthwardError, FileExistsError)):
        create(written)
    assert written.read_bytes() == content


def test_two_writers_are_refused(tmp_path):
    from synthward.engine import Ledger
    from synthward.engine.errors import LedgerError

    path = tmp_path / "ledger.jsonl"
    first = create(path)
    first.lease(one_step(), 0, 5)
    with pytest.raises(LedgerError):
        second = Ledger.open(path)
        second.lease(one_step(), 5, 5)
    first.close_lease(5)
    assert first.epsilon(DELTA, "pld") == pytest.approx(cost(5), rel=1e-9)


def test_a_lease_beyond_the_target_is_refused_and_not_written(tmp_path):
    from synthward.engine.errors import BudgetExceededError

    path = tmp_path / "ledger.jsonl"
    ledger = create(path, target_epsilon=cost(100) * 1.001)
    ledger.lease(one_step(), 0, 60)
    ledger.close_lease(60)
    content = path.read_bytes()
    with pytest.raises(BudgetExceededError):
        ledger.lease(one_step(), 60, 60)
    assert path.read_bytes() == content
    ledger.lease(one_step(), 60, 40)
    assert ledger.epsilon(DELTA, "pld") <= cost(100) * 1.001


def ledger_trainer(tmp_path, steps):
    module = CASES[0].module()
    ledger = create(tmp_path / "ledger.jsonl")
    trainer = make_trainer(module, ledger=ledger, sample_rate=RATE, noise_multiplier=SIGMA, steps=steps)
    return module, ledger, trainer


def test_a_step_that_no_lease_covers_is_refused_and_moves_nothing(tmp_path):
    from synthward.engine.errors import PrivacyError

    module, _, trainer = ledger_trainer(tmp_path, 10)
    before = flat_parameters(module)
    accumulate(trainer, module, CASES[0].units([1] * 3))
    with pytest.raises(PrivacyError):
        trainer.apply()
    assert np.array_equal(before, flat_parameters(module))


def test_a_lease_covers_as_many_steps_as_it_says(tmp_path):
    from synthward.engine.errors import PrivacyError

    module, ledger, trainer = ledger_trainer(tmp_path, 10)
    units = CASES[0].units([1] * 3)
    ledger.lease(one_step(), 0, 2)
    for _ in range(2):
        assert np.abs(step(trainer, module, [units])).max() > 0
    before = flat_parameters(module)
    with pytest.raises(PrivacyError):
        step(trainer, module, [units])
    assert np.array_equal(before, flat_parameters(module))


@pytest.mark.parametrize("lease", [(0.01, SIGMA), (RATE, 10 * SIGMA)], ids=["smaller_rate", "more_noise"])
def test_a_lease_of_another_mechanism_does_not_cover_the_step(tmp_path, lease):
    """What is accounted is what is run: a cheaper event in the ledger pays for nothing here."""
    from synthward.engine.accounting import PoissonGaussianEvent
    from synthward.engine.errors import PrivacyError

    module, ledger, trainer = ledger_trainer(tmp_path, 10)
    before = flat_parameters(module)
    ledger.lease(PoissonGaussianEvent(*lease, 1), 0, 5)
    with pytest.raises(PrivacyError):
        step(trainer, module, [CASES[0].units([1] * 3)])
    assert np.array_equal(before, flat_parameters(module))


def test_a_query_is_charged_before_its_answer_is_known(tmp_path):
    """The noised answer has the declared scale; the event is in the file when the call returns."""
    from synthward.engine import KeySchedule, QueryMechanism

    path = tmp_path / "ledger.jsonl"
    ledger = create(path)
    queries = QueryMechanism(ledger, KeySchedule.from_os())
    answers = queries.gaussian_vector(
        np.zeros(200_000), l2_sensitivity=3.0, noise_multiplier=5.0, note="marginal of x"
    )
    again = queries.gaussian_vector(
        np.zeros(200_000), l2_sensitivity=3.0, noise_multiplier=5.0, note="marginal of x"
    )
    copied = shutil.copy(path, tmp_path / "crashed.jsonl")
    assert reopened(copied).epsilon(DELTA, "pld") == pytest.approx(cost(0, queries=2), rel=1e-9)
    assert abs((answers / 15.0).var() - 1) < 6.2 * (2 / 200_000) ** 0.5
    assert abs(np.corrcoef(answers, again)[0, 1]) < 6.2 / 200_000**0.5


def test_a_query_beyond_the_budget_is_refused_without_an_answer(tmp_path):
    from synthward.engine import KeySchedule, QueryMechanism
    from synthward.engine.errors import BudgetExceededError

    ledger = create(tmp_path / "ledger.jsonl", target_epsilon=0.1)
    queries = QueryMechanism(ledger, KeySchedule.from_os())
    with pytest.raises(BudgetExceededError):
        queries.gaussian_vector(np.zeros(3), l2_sensitivity=1.0, noise_multiplier=1.0, note="too dear")
    assert ledger.epsilon(DELTA, "pld") == 0.0


def test_events_are_read_by_a_closed_map():
    """A ledger is data: a kind that is not ours is refused, never imported."""
    from synthward.engine.accounting import PoissonGaussianEvent
    from synthward.engine.accounting.events import event_from_dict
    from synthward.engine.errors import SynthwardError

    event = PoissonGaussianEvent(RATE, SIGMA, 3)
    assert event_from_dict(event.to_dict()) == event
    for kind in ("os.system", "dp_accounting.dp_event.GaussianDpEvent", "", None):
        with pytest.raises((SynthwardError, ValueError)):
            event_from_dict({**event.to_dict(), "kind": kind})
