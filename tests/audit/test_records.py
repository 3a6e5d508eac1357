"""Attacks on records: they find what there is to find, nothing where there is nothing, and keep units whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from synthward.audit import membership, onerun
from synthward.audit.membership import (
    NEIGHBOURS,
    Distances,
    measure_attack,
    membership_attacks,
    unit_distances,
)
from synthward.audit.onerun import OneRun, joined, random_records
from synthward.data import Records
from synthward.generators import DiffusionGenerator, GanGenerator
from synthward.schema import load_schema
from tests.privacy.stats import FALSE_ALARM
from tests.tinydata import SCHEMA


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "schema.toml"
    path.write_text(SCHEMA)
    return load_schema(path)


def some(schema, count: int, seed: int) -> Records:
    return random_records(schema, count, np.random.default_rng(seed))


def grouped(records: Records, sizes: list[int]) -> Records:
    """The same rows, in units of these sizes."""
    offsets = np.r_[0, np.cumsum(sizes)].astype(np.int64)
    return Records(
        records.schema, records.columns, offsets, np.arange(len(sizes)).astype(np.str_), records.report
    )


def test_random_records_are_what_the_schema_declares(schema):
    records = some(schema, 500, 0)
    assert records.num_units == records.num_rows == 500 and len(set(records.unit_keys.tolist())) == 500
    for column in schema.modelled:
        values = records.columns[column.name]
        if column.is_discrete:
            assert values.dtype == np.int32
            assert set(np.unique(values)) == set(range(len(column.levels)))
        else:
            assert values.min() >= column.min and values.max() <= column.max
            assert values.max() - values.min() > 0.9 * (column.max - column.min)
            assert not column.is_integral or (values == np.rint(values)).all()


def test_joining_keeps_units_whole_and_in_their_order(schema):
    first, second = grouped(some(schema, 6, 1), [1, 3, 2]), some(schema, 2, 2)
    both = joined(first, second)
    assert both.unit_offsets.tolist() == [0, 1, 4, 6, 7, 8]
    assert both.unit_keys.tolist() == ["0", "1", "2", "canary-000000", "canary-000001"]
    for name, values in both.columns.items():
        assert np.array_equal(values, np.r_[first.columns[name], second.columns[name]], equal_nan=True)


def test_distances_are_those_of_a_loop(schema):
    records, cohort = grouped(some(schema, 40, 3), [1, 2, 5] * 5), some(schema, 70, 4)
    distances = Distances(schema, cohort)
    found = unit_distances(distances, records, np.arange(15))
    encoded = [distances._features.one_hot(r, np.arange(r.num_rows)).toarray() for r in (records, cohort)]
    for unit in range(15):
        rows = encoded[0][records.unit_offsets[unit] : records.unit_offsets[unit + 1]]
        each = np.sort(np.linalg.norm(rows[:, None] - encoded[1][None], axis=2), axis=1)
        assert found[unit] == pytest.approx(each[:, np.array(NEIGHBOURS) - 1].min(axis=0), abs=1e-2)


def test_a_cohort_of_fewer_rows_than_neighbours(schema):
    found = Distances(schema, some(schema, 3, 5)).nearest(some(schema, 4, 6), np.arange(4))
    assert found.shape == (4, len(NEIGHBOURS)) and np.isfinite(found).all()


def test_a_generator_that_copies_its_records_is_found_out(schema):
    train, others = some(schema, 300, 7), some(schema, 250, 8)
    copies = some(schema, 300, 7)
    for attack in membership_attacks(train, others, copies, np.random.default_rng(0)):
        assert attack.auroc.low > 0.99 and attack.tpr.low > 0.9
        assert (attack.train_units, attack.other_units) == (300, 250)


def test_a_generator_that_knows_nothing_is_not_accused(schema):
    """Train, others and cohort are three draws of one law. The seed is fixed; intervals are of 95 %."""
    train, others, cohort = (some(schema, 500, seed) for seed in (9, 10, 11))
    for attack in membership_attacks(train, others, cohort, np.random.default_rng(1)):
        assert attack.auroc.low < 0.5 < attack.auroc.high
        assert attack.tpr.low < 0.03


def test_figures_of_an_attack_with_known_scores():
    member = np.arange(2000) % 2 == 0
    rng = np.random.default_rng(2)
    shifted = measure_attack("shift", rng.normal(size=2000) + 1.0 * member, member, rng)
    assert shifted.auroc.low < stats.norm.cdf(1 / np.sqrt(2)) < shifted.auroc.high
    assert shifted.tpr.low < stats.norm.sf(stats.norm.isf(0.01) - 1.0) < shifted.tpr.high
    ties = measure_attack("ties", np.zeros(2000), member, rng)
    assert ties.auroc.value == 0.5 and ties.tpr.value == 0.0


def test_large_tables_are_compared_in_part(schema, monkeypatch):
    monkeypatch.setattr(membership, "MOST_UNITS", 50)
    records = [some(schema, 120, seed) for seed in (12, 13, 14)]
    for attack in membership_attacks(*records, np.random.default_rng(3)):
        assert (attack.train_units, attack.other_units) == (50, 50)


# One run


class Run:
    """What `audit_split` asks of a finished run."""

    path = "run"

    def __init__(self, share: float) -> None:
        self.info = {"holdout": {"fraction": share}}

    def load_encoder(self) -> None:
        return None

    def load_generator(self, encoder: None) -> object:
        return object()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_the_coin_of_a_finished_run_is_made_fair(schema, share):
    """Both sides are kept at rates that make inclusion as likely as not: binomial at 1e-9."""
    rng = np.random.default_rng(4)
    held = int(stats.binom.rvs(4000, share, random_state=5))
    train, others = some(schema, 4000 - held, 15), some(schema, held, 16)
    found = onerun.audit_split(Run(share), train, others, some(schema, 20, 17), rng)
    assert stats.binomtest(int(found.included.sum()), len(found.included), 0.5).pvalue > FALSE_ALARM
    assert len(found.included) == pytest.approx(2 * min(share, 1 - share) * 4000, rel=0.1)


def test_a_run_that_held_nothing_out_has_no_coin(schema):
    from synthward.engine.errors import ConfigError

    records = some(schema, 10, 18)
    with pytest.raises(ConfigError, match="held no units out"):
        onerun.audit_split(Run(0.0), records, records, records, np.random.default_rng(0))


def test_a_generator_that_repeats_its_canaries_shows_more_than_any_claim(schema):
    """Distances to samples that hold every included canary: nearly all guesses are right."""
    rng, canaries = np.random.default_rng(6), some(schema, 1000, 19)
    included = rng.random(1000) < 0.5
    scores = onerun.score_units(object(), None, canaries, canaries.select_units(included), rng)
    shown = OneRun(included, scores).bounds(1e-5, 0.05)
    assert shown["one_run"] > 3.0 and shown["one_run_f_dp"] >= shown["one_run"]
    blind = OneRun(included, rng.permutation(scores)).bounds(1e-5, 0.05)
    assert blind["one_run"] < 0.5
    assert OneRun(included[:5], scores[:5]).bounds(1e-5, 0.05) == {"one_run": 0.0, "one_run_f_dp": 0.0}


def trained(schema, kind):
    """An untrained generator over an encoder of noisy histograms that need no ledger."""
    from synthward.encoding import TableEncoder
    from synthward.generators import build_generator
    from synthward.generators.registry import make_settings

    class Exact:
        def gaussian_vector(self, values, **_):
            return values

    encoder = TableEncoder.fit(some(schema, 400, 20), Exact(), 0.1)
    name = "diffusion" if kind is DiffusionGenerator else "gan"
    torch.manual_seed(0)
    generator = build_generator(name, encoder.layout, encoder.token_mass, make_settings(name, {"hidden": 8}))
    return generator, encoder


def test_losses_of_units_are_their_own(schema):
    """The same draws for each unit: its loss does not depend on who else is scored; the network is put back."""
    generator, encoder = trained(schema, DiffusionGenerator)
    records = grouped(some(schema, 30, 21), [1, 2] * 10)
    network = generator.network
    whole = onerun.diffusion_losses(generator, encoder, records, np.random.default_rng(7))
    mask = np.arange(20) % 3 == 0
    part = onerun.diffusion_losses(generator, encoder, records.select_units(mask), np.random.default_rng(7))
    # The encoder's own jitter of whole numbers goes by row, so only the first rows are encoded alike.
    assert part[0] == whole[0] and part.shape == (mask.sum(),)
    assert np.isfinite(whole).all() and len(set(whole.tolist())) == 20
    assert generator.network is network


def test_scores_are_losses_for_diffusion_and_distances_for_others(schema):
    records, cohort = some(schema, 12, 22), some(schema, 50, 23)
    diffusion, encoder = trained(schema, DiffusionGenerator)
    rng = np.random.default_rng
    losses = onerun.diffusion_losses(diffusion, encoder, records, rng(8))
    assert np.array_equal(onerun.score_units(diffusion, encoder, records, cohort, rng(8)), -losses)
    gan, encoder = trained(schema, GanGenerator)
    nearest = unit_distances(Distances(schema, cohort), records, np.arange(12))[:, 0]
    assert np.array_equal(onerun.score_units(gan, encoder, records, cohort, rng(8)), -nearest)
