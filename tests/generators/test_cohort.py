"""Rows of a cohort: the same for any split over calls, processes and threads, with and without a condition."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch

from synthward.encoding import TableEncoder
from synthward.engine.draws import Draws
from synthward.engine.errors import ConfigError
from synthward.generators import DiffusionGenerator, DiffusionSettings, GanGenerator, GanSettings
from synthward.run import cohort
from synthward.run.cohort import CHUNK_ROWS, CohortSampler
from synthward.run.where import parse_where
from synthward.schema import load_schema

SCHEMA = """
version = 1
name = "small"
unit = "pid"
label = "outcome"
[columns.pid]
kind = "id"
[columns.stage]
kind = "ordinal"
categories = ["I", "II", "III", "IV"]
missing = true
[columns.visits]
kind = "integer"
min = 0
max = 20
[columns.creatinine]
kind = "continuous"
min = 0.0
max = 12.0
decimals = 2
missing = true
[columns.outcome]
kind = "boolean"
"""


class Histograms:
    """Stands for the charged mechanism, and answers with invented counts."""

    def gaussian_vector(self, values, *, l2_sensitivity, noise_multiplier, note):
        return np.random.default_rng(0).uniform(50, 1000, len(values))


@pytest.fixture(params=["diffusion", "gan"])
def make_sampler(request, tmp_path):
    """A function from a condition to a sampler of an untrained generator."""
    file = tmp_path / "schema.toml"
    file.write_text(SCHEMA)
    schema = load_schema(file)
    names = [column.name for column in schema.modelled]
    counts = [5, 22, 65, 3]
    sizes = np.cumsum([*counts, 33, 1])
    answer = Histograms().gaussian_vector(np.zeros(sizes[-1]), l2_sensitivity=1, noise_multiplier=1, note="")
    encoder = TableEncoder._from_histograms(schema, np.split(answer, sizes[:-1]), 1.0)
    torch.manual_seed(4)
    if request.param == "diffusion":
        settings = DiffusionSettings(hidden=16, blocks=1, sampling_steps=3)
        generator = DiffusionGenerator(encoder.layout, encoder.token_mass, settings)
    else:
        generator = GanGenerator(encoder.layout, encoder.token_mass, GanSettings(hidden=16, latent=4))
    torch.nn.init.normal_(generator.averaged.head.weight, std=0.3)
    assert names == ["stage", "visits", "creatinine", "outcome"]

    def make(where: str | None = None) -> CohortSampler:
        return CohortSampler(schema, encoder, generator, parse_where(where, schema) if where else None)

    return make


def table(sampler: CohortSampler, seed: int, first: int, end: int) -> pa.Table:
    return pa.Table.from_batches(list(sampler.batches(seed, first, end)))


@pytest.mark.parametrize("where", [None, "outcome='true' and creatinine>4"])
def test_any_split_gives_the_same_rows(make_sampler, where):
    sampler, rows = make_sampler(where), 2 * CHUNK_ROWS + 777
    whole = table(sampler, 5, 0, rows)
    assert whole.num_rows == rows
    for threads, cuts in ((1, [0, rows]), (3, [0, 1, 100, CHUNK_ROWS, CHUNK_ROWS + 1, rows - 1, rows])):
        torch.set_num_threads(threads)
        parts = [table(sampler, 5, first, end) for first, end in itertools.pairwise(cuts)]
        assert pa.concat_tables(parts).equals(whole)
        assert torch.get_num_threads() == threads
    assert not table(sampler, 6, 0, 1000).equals(whole.slice(0, 1000))
    assert not whole.slice(0, CHUNK_ROWS).equals(whole.slice(CHUNK_ROWS, CHUNK_ROWS))
    if where:
        creatinine = whole["creatinine"].to_numpy(zero_copy_only=False)
        assert whole["outcome"].to_numpy(zero_copy_only=False).all() and (creatinine > 4).all()


def test_chunks_are_rows_of_the_cohort(make_sampler):
    sampler = make_sampler()
    whole = table(sampler, 5, 0, 2 * CHUNK_ROWS)
    for index in range(2):
        chunk = sampler.chunk(5, index)
        part = whole.slice(index * CHUNK_ROWS, CHUNK_ROWS)
        np.testing.assert_array_equal(chunk["visits"], part["visits"].to_numpy())
    several = sampler.chunk(5, 0, 2 * CHUNK_ROWS)
    np.testing.assert_array_equal(several["visits"], whole["visits"].to_numpy())


def test_rows_are_drawn_where_the_generator_is_and_decoded_here(make_sampler, monkeypatch):
    """Contexts and random numbers go there, in the same calls; those of the decoder are made here again."""
    sampler, places = make_sampler("stage='II'"), []
    here = sampler.chunk(5, 0, 100)

    class Elsewhere:
        """The same generator, said to be on another device."""

        device, generator = torch.device("meta"), sampler.generator

        def __getattr__(self, name):
            return getattr(self.generator, name)

    monkeypatch.setattr(cohort, "copy_to", lambda tensor, device: places.append(device) or tensor)
    monkeypatch.setattr(Draws, "to", lambda self, device: places.append(device) or self)
    sampler.generator = Elsewhere()
    there = sampler.chunk(5, 0, 100)
    assert places[:3] == [Elsewhere.device, Elsewhere.device, torch.device("cpu")]
    for name, values in here.items():
        np.testing.assert_array_equal(there[name], values)


def test_an_error_ends_the_work_and_is_told(make_sampler):
    sampler = make_sampler("creatinine>11.99 and creatinine<11.995")
    threads = torch.get_num_threads()
    with pytest.raises(ConfigError, match="the condition is too rare"):
        list(sampler.batches(5, 0, 10 * CHUNK_ROWS))
    assert torch.get_num_threads() == threads


def test_what_is_not_taken_is_not_made(make_sampler, monkeypatch):
    sampler = make_sampler()
    made: list[int] = []
    monkeypatch.setattr(
        sampler,
        "_batch",
        lambda seed, start, first, end: made.append(start) or pa.record_batch({"x": [start]}),
    )
    batches = sampler.batches(5, 0, 100 * CHUNK_ROWS)
    for _ in range(4):
        next(batches)
    batches.close()
    assert 4 <= len(made) <= 5 + torch.get_num_threads()
