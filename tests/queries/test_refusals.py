"""What can not be asked is refused in one clear line, before anything is charged."""

from __future__ import annotations

import re

import numpy as np
import pytest

from synthward.engine.errors import SynthwardError
from synthward.engine.queries import (
    Units,
    count_marginals,
    count_rows,
    count_units,
    discover_categories,
    find_bounds,
    find_quantiles,
)
from tests.queries.asking import ListLedger, mechanism

UNITS = Units.of_rows(3)
CODES = np.array([0, 1, 2])
NUMBERS = np.array([0.5, 1.5, 2.5])


def marginals(asked, codes=CODES, levels=3, attributes=(("x",),), **settings):
    settings = {"noise_multiplier": 1.0} | settings
    return count_marginals(
        asked, UNITS, {"x": codes, "y": CODES}, {"x": levels, "y": 3}, attributes, **settings
    )


def quantiles(asked, values=NUMBERS, probabilities=(0.5,), edges=(0.0, 1.0, 2.0), noise_multiplier=1.0):
    return find_quantiles(asked, UNITS, values, probabilities, edges=edges, noise_multiplier=noise_multiplier)


def bounds(asked, values=NUMBERS, noise_multiplier=1.0, **settings):
    return find_bounds(asked, UNITS, values, noise_multiplier=noise_multiplier, **settings)


def categories(asked, values=CODES, noise_multiplier=1.0, delta=1e-6, **settings):
    return discover_categories(
        asked, UNITS, values, noise_multiplier=noise_multiplier, delta=delta, **settings
    )


def units(asked, **settings):
    return count_units(asked, UNITS, **({"noise_multiplier": 1.0} | settings))


def capped(asked, most, **settings):
    return count_rows(asked, UNITS, max_rows_per_unit=most, **({"noise_multiplier": 1.0} | settings))


REFUSED = {
    "ids of objects": (lambda _: Units.from_ids(np.array([None, 1, "a"], dtype=object)), "unit ids"),
    "ids in two axes": (lambda _: Units.from_ids(np.zeros((2, 2), dtype=int)), "unit ids"),
    "ids of floats": (lambda _: Units.from_ids([1.0, np.nan]), "unit ids"),
    "offsets that go down": (lambda _: Units.from_offsets([0, 3, 2]), "unit offsets"),
    "offsets from 1": (lambda _: Units.from_offsets([1, 3]), "unit offsets"),
    "no offsets": (lambda _: Units.from_offsets([]), "unit offsets"),
    "offsets of floats": (lambda _: Units.from_offsets([0.0, 3.0]), "unit offsets"),
    "rows below 0": (lambda _: Units.of_rows(-1), "rows"),
    "noise below 0": (lambda m: units(m, noise_multiplier=-1.0), "noise multiplier"),
    "noise of NaN": (lambda m: units(m, noise_multiplier=float("nan")), "noise multiplier"),
    "endless noise": (lambda m: units(m, noise_multiplier=float("inf")), "noise multiplier"),
    "noise of text": (lambda m: units(m, noise_multiplier="1"), "noise multiplier"),
    "noise beyond int64": (lambda m: units(m, noise_multiplier=1e18), "noise"),
    "a mask of numbers": (lambda m: units(m, where=[0, 1, 1]), "where"),
    "a short mask": (lambda m: units(m, where=[True]), "where"),
    "no rows at all": (lambda m: capped(m, 0), "max_rows_per_unit"),
    "a cap of 1.5": (lambda m: capped(m, 1.5), "max_rows_per_unit"),
    "an endless cap": (lambda m: capped(m, 10**9), "max_rows_per_unit"),
    "codes of floats": (lambda m: marginals(m, codes=NUMBERS), "column 'x'"),
    "codes of text": (lambda m: marginals(m, codes=np.array(["a", "b", "c"])), "column 'x'"),
    "too few codes": (lambda m: marginals(m, codes=CODES[:2]), "column 'x'"),
    "codes in two axes": (lambda m: marginals(m, codes=CODES[:, None]), "column 'x'"),
    "no levels": (lambda m: marginals(m, levels=0), "levels of 'x'"),
    "levels of a float": (lambda m: marginals(m, levels=3.0), "levels of 'x'"),
    "no tables": (lambda m: marginals(m, attributes=()), "attributes"),
    "a table twice": (lambda m: marginals(m, attributes=(("x",), ("x",))), "attributes"),
    "a name for a table": (lambda m: marginals(m, attributes=("x",)), "attributes"),
    "a column with itself": (lambda m: marginals(m, attributes=(("x", "x"),)), "attributes"),
    "three columns": (lambda m: marginals(m, attributes=(("x", "y", "z"),)), "attributes"),
    "an unknown column": (lambda m: marginals(m, attributes=(("z",),)), "attributes"),
    "too many cells": (lambda m: marginals(m, levels=10**9), "attributes"),
    "a probability of 2": (lambda m: quantiles(m, probabilities=(2.0,)), "probabilities"),
    "a probability of NaN": (lambda m: quantiles(m, probabilities=(float("nan"),)), "probabilities"),
    "one edge": (lambda m: quantiles(m, edges=(1.0,)), "edges"),
    "edges that fall": (lambda m: quantiles(m, edges=(1.0, 0.0)), "edges"),
    "an edge of NaN": (lambda m: quantiles(m, edges=(0.0, float("nan"))), "edges"),
    "too many edges": (lambda m: quantiles(m, edges=np.arange(5000)), "edges"),
    "text for numbers": (lambda m: quantiles(m, values=np.array(["1", "2", "3"])), "values"),
    "complex numbers": (lambda m: bounds(m, values=NUMBERS + 1j), "values"),
    "exponents that fall": (lambda m: bounds(m, smallest_exponent=5, largest_exponent=5), "exponents"),
    "an exponent of a float": (lambda m: bounds(m, smallest_exponent=0.5), "exponents"),
    "an exponent beyond float64": (lambda m: bounds(m, largest_exponent=2000), "exponents"),
    "false alarms never": (lambda m: bounds(m, false_alarm=0.0), "false_alarm"),
    "bounds without noise": (lambda m: bounds(m, noise_multiplier=0.0), "noise multiplier"),
    "categories without noise": (lambda m: categories(m, noise_multiplier=0.0), "noise multiplier"),
    "no delta": (lambda m: categories(m, delta=0.0), "delta"),
    "a delta of 1": (lambda m: categories(m, delta=1.0), "delta"),
    "no categories": (lambda m: categories(m, max_categories_per_unit=0), "max_categories_per_unit"),
    "categories of floats": (lambda m: categories(m, values=NUMBERS), "values"),
    "categories of objects": (lambda m: categories(m, values=np.array([None, 1, 2])), "values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_asked_is_refused_in_one_line(case):
    ask, named = REFUSED[case]
    ledger = ListLedger()
    with pytest.raises(SynthwardError, match=re.escape(named)) as caught:
        ask(mechanism(ledger=ledger))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    assert ledger.charged == []


def test_a_refusal_does_not_tell_how_many_rows_there_are():
    """It may be printed where records may not be shown."""
    with pytest.raises(SynthwardError) as caught:
        count_units(mechanism(), Units.of_rows(7919), noise_multiplier=1.0, where=np.ones(7907, dtype=bool))
    assert not re.search("79[0-9]{2}", str(caught.value))


@pytest.mark.parametrize("bad", [0, -1.0, float("inf"), True, "1"])
def test_a_vector_without_a_bound_is_refused(bad):
    ledger = ListLedger()
    with pytest.raises(SynthwardError, match="l2_sensitivity"):
        mechanism(ledger=ledger).integer_vector(
            np.zeros(1, dtype=np.int64), l2_sensitivity=bad, noise_multiplier=1.0, note=""
        )
    with pytest.raises(SynthwardError, match="int64"):
        mechanism(ledger=ledger).integer_vector(
            np.zeros(1), l2_sensitivity=1.0, noise_multiplier=1.0, note=""
        )
    with pytest.raises(SynthwardError, match="arithmetic"):
        mechanism(ledger=ledger).gaussian_vector(
            np.zeros(1), l2_sensitivity=1.0, noise_multiplier=1.0, note="", arithmetic="exact"
        )
    with pytest.raises(SynthwardError, match="too small"):
        mechanism(ledger=ledger).gaussian_vector(
            np.zeros(1), l2_sensitivity=5e-324, noise_multiplier=1.0, note=""
        )
    assert ledger.charged == []
