"""Reading a ledger or a budget file is reading data: whatever stands in it, it is refused or it is counted."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synthward.engine import Ledger
from synthward.engine.accounting import (
    ApproximateEvent,
    CorrelatedGaussianEvent,
    CyclicPoissonGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    SelectionEvent,
    TruncatedPoissonGaussianEvent,
)
from synthward.engine.accounting.matrix import Strategy
from synthward.engine.budget import _FORMAT as BUDGET
from synthward.engine.budget import DatasetBudget
from synthward.engine.chain import Chain, canonical
from synthward.engine.errors import SynthwardError
from synthward.engine.ledger import _FORMAT as LEDGER

EVENTS = [
    GaussianEvent(9.0, 1),
    ApproximateEvent(0.1, 1e-9),
    SelectionEvent((GaussianEvent(40.0, 1),), 4.0, math.inf),
]
STEPS = [
    PoissonGaussianEvent(0.05, 2.0, 1),
    TruncatedPoissonGaussianEvent(0.05, 2.0, 1, max_batch_size=900, max_units=9000),
    CyclicPoissonGaussianEvent(0.2, 2.0, period=4, steps=1),
    CorrelatedGaussianEvent(9.0, Strategy("blt", (0.3,), (0.5,)), period=4, steps=1),
]
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**12, 10**30, 0.0, 1.0, 0.5, 1e-300, 1e300, -0.5]),
    st.sampled_from(["", "poisson", "os.system", "__import__('os')", "gaussian", "a" * 64, "\x00", "é"]),
    st.sampled_from([[], {}, [[]], {"kind": "gaussian"}, {"__class__": "x"}, [1e300] * 9]),
    st.recursive(
        st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=6,
    ),
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A ledger with every kind of line but `recovered`, and most kinds of events."""
    path = tmp_path_factory.mktemp("fuzz") / "ledger.jsonl"
    ledger = Ledger.create(
        path,
        run_id="r",
        unit="p",
        delta=1e-5,
        key_id="0",
        private=True,
        accountant="rdp",
        target_epsilon=90.0,
    )
    with ledger:
        for event in EVENTS:
            ledger.append_event(event, note="a query")
        for number, event in enumerate(STEPS):
            part = ledger.new_part()
            ledger.lease(event, 0, 10, part=part)
            ledger.close_lease(4 + number, part=part)
            ledger.lease(event, 4 + number, 10, part=part)
            ledger.close_lease(10, part=part)
        ledger.add_key("1")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def budget_lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "budget.jsonl"
    budget = DatasetBudget.create(path, epsilon=9.0, delta=1e-5, unit="p")
    budget.reserve("a", EVENTS[:1], unit="p")
    budget.start("a")
    budget.settle("a", EVENTS[:1], ledger_head="ab" * 32)
    budget.reserve("b", EVENTS[:1], unit="p")
    budget.cancel("b")
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def places(value, path=()):
    """Paths of all values inside a line, hashes and links apart."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if path or key not in ("seq", "prev", "hash"):
            yield from places(inner, (*path, key))


def changed(data, lines):
    """The lines with one value replaced, removed or added."""
    copy = json.loads(json.dumps(lines))
    line = copy[data.draw(st.integers(0, len(copy) - 1), label="line")]
    *way, last = data.draw(st.sampled_from(list(places(line))), label="place")
    for key in way:
        line = line[key]
    what = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if what == "replace":
        line[last] = data.draw(JUNK)
    elif what == "remove":
        del line[last]
    elif isinstance(line, dict):
        line[data.draw(st.text(max_size=9))] = data.draw(JUNK)
    return copy


def rehashed(form, lines):
    """A file whose hashes are right, as somebody who knows the format can write it."""
    chain, prev, written = Chain.__new__(Chain), "0" * 64, []
    chain.form = form
    for line in lines:
        body = {k: v for k, v in line.items() if k != "hash"} | {"prev": prev}
        prev = chain._digest(body)
        written.append(canonical(body | {"hash": prev}))
    return b"".join(line + b"\n" for line in written)


def is_number(value):
    return isinstance(value, float) and value >= 0.0


@FUZZ
@given(data=st.data())
def test_a_ledger_is_refused_or_counted(data, lines, tmp_path):
    path = tmp_path / "ledger.jsonl"
    try:
        path.write_bytes(rehashed(LEDGER, changed(data, lines)))
    except UnicodeEncodeError:
        return
    try:
        with Ledger.open(path, readonly=True) as ledger:
            assert is_number(ledger.epsilon())
    except SynthwardError as error:
        assert "\n" not in str(error)


@FUZZ
@given(data=st.data())
def test_a_budget_file_is_refused_or_counted(data, budget_lines, tmp_path):
    path = tmp_path / "budget.jsonl"
    try:
        path.write_bytes(rehashed(BUDGET, changed(data, budget_lines)))
    except UnicodeEncodeError:
        return
    try:
        assert is_number(DatasetBudget(path).spent())
    except SynthwardError as error:
        assert "\n" not in str(error)


@FUZZ
@given(
    content=st.binary(max_size=300),
    keep=st.integers(0, 12),
    opens=st.sampled_from([Ledger.open, DatasetBudget]),
)
def test_any_bytes_are_refused_or_counted(content, keep, opens, lines, tmp_path):
    """Behind the first lines of a good file, or of none."""
    path = tmp_path / "file.jsonl"
    path.write_bytes(b"".join(canonical(line) + b"\n" for line in lines[:keep]) + content)
    try:
        opened = opens(path)
    except SynthwardError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(opened, Ledger) and is_number(opened.epsilon())
    opened.close()


@pytest.mark.parametrize(
    "text",
    [
        b'{"kind":' * 30_000,
        b"[" * 100_000,
        b'{"kind":"event","seq":' + b"9" * 5000 + b"}",
        b'{"kind":NaN}',
        b'{"kind":"header","kind":"event"}',
        b'{"kind":{}}',
        b'"\\ud800"',
    ],
    ids=["deep", "deeper", "long", "nan", "twice", "unhashable", "half a character"],
)
def test_what_json_readers_trip_over_is_refused(tmp_path, text):
    for ending in (b"\n", b""):
        path = tmp_path / "ledger.jsonl"
        path.write_bytes(text + ending)
        for opens in (Ledger.open, DatasetBudget):
            with pytest.raises(SynthwardError):
                opens(path)


def test_the_files_of_these_tests_are_good(lines, budget_lines, tmp_path):
    """Unchanged, they are read: what is refused above is refused for its change."""
    for form, content, opens in ((LEDGER, lines, Ledger.open), (BUDGET, budget_lines, DatasetBudget)):
        path = tmp_path / "file.jsonl"
        path.write_bytes(rehashed(form, content))
        opens(path)
