"""Samplers: the plain algorithm's law, step by step and in samples, and rows that depend on their number alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from synthward.encoding import Layout
from synthward.engine.draws import Draws
from synthward.generators import DiffusionGenerator, DiffusionSettings, GanGenerator, GanSettings
from synthward.generators.base import Generator
from synthward.generators.diffusion import _ancestral_step
from synthward.generators.sampler import Sampler

LAYOUT = Layout((3, 4, 2, 5, 7, 2), 2, 3, 2, (-1, 5))
KEY = bytes(range(32))


def diffusion(layout: Layout = LAYOUT, **settings) -> DiffusionGenerator:
    made = DiffusionGenerator(layout, mass(layout), DiffusionSettings(hidden=24, **settings))
    return strengthened(made, made.averaged)


def gan(layout: Layout = LAYOUT) -> GanGenerator:
    made = GanGenerator(layout, mass(layout), GanSettings(hidden=24, latent=5))
    return strengthened(made, made.averaged)


def mass(layout: Layout) -> np.ndarray:
    return np.concatenate([np.zeros(0), *[np.full(size, 1 / size) for size in layout.token_sizes]])


def strengthened(generator, network: torch.nn.Module):
    """With random weights large enough that columns depend on each other, on the context and on the time."""
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            drawn = torch.randn(parameter.shape, generator=rng)
            scale = 2.0 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            parameter.copy_(scale * drawn + (1.0 if "norm" in name and "weight" in name else 0.0))
        generator.logit_shift.copy_(0.3 * torch.randn(generator.logit_shift.shape, generator=rng))
    return generator


def plain_sample(
    generator: DiffusionGenerator, context: torch.Tensor, rng: torch.Generator, allowed=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The algorithm as the paper has it: the whole network on the whole input at each step."""
    layout, rows = generator.layout, len(context)
    tokens = torch.zeros(rows, layout.tokens, dtype=torch.int64)
    hidden = torch.ones(rows, layout.tokens, dtype=torch.bool)
    scores = torch.randn(rows, layout.continuous, generator=rng)
    rank = torch.rand(rows, layout.tokens, generator=rng)
    rank[:, layout.label] += 1.0
    for column in allowed or {}:
        rank[:, column] -= 2.0
    order, steps = rank.argsort(1), generator.settings.sampling_steps
    bounds = np.linspace(0, layout.tokens, steps + 1).round().astype(int)
    for index in range(steps):
        now, then = 1.0 - index / steps, 1.0 - (index + 1) / steps
        inputs = generator._inputs(tokens, hidden, scores, torch.full((rows, 1), now), context)
        logits, velocity = generator.averaged(inputs).split([layout.vocabulary, layout.continuous], dim=1)
        parts = (logits + generator.logit_shift).split(list(layout.token_sizes), dim=1)
        for place in range(bounds[index], bounds[index + 1]):
            for column, part in enumerate(parts):
                drawn_now = order[:, place] == column
                if allowed and column in allowed:
                    part = part.masked_fill(~allowed[column], -torch.inf)
                drawn = torch.multinomial(torch.softmax(part, 1), 1, generator=rng).squeeze(1)
                tokens[:, column] = torch.where(drawn_now, drawn, tokens[:, column])
            hidden.scatter_(1, order[:, place : place + 1], False)
        scores = _ancestral_step(
            scores, velocity, now, then, torch.randn(rows, layout.continuous, generator=rng)
        )
    return tokens, scores


def shares(tokens: torch.Tensor, scores: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Shares of all cells of all one- and two-way tables, scores in five classes."""
    classes = [*tokens.unbind(1), *((scores / 0.7).round().clamp(-2, 2).long() + 2).unbind(1)]
    sizes = [*layout.token_sizes, *[5] * layout.continuous]
    counts = [torch.bincount(c, minlength=size) for c, size in zip(classes, sizes, strict=True)]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        counts.append(torch.bincount(classes[i] * sizes[j] + classes[j], minlength=sizes[i] * sizes[j]))
    return torch.cat(counts).double() / len(tokens)


@pytest.mark.parametrize("allowed", [None, {3: torch.tensor([True, False, True, False, False])}])
def test_samples_follow_the_plain_algorithm(allowed):
    generator, rows = diffusion(sampling_steps=5), 60_000
    context = torch.arange(rows) % LAYOUT.contexts
    with torch.no_grad():
        expected = shares(
            *plain_sample(generator, context, torch.Generator().manual_seed(2), allowed), LAYOUT
        )
    found = shares(*generator.sample(context, Draws(KEY), allowed), LAYOUT)
    # Some 500 cells: a false alarm in 1e9 runs.
    assert farthest(found, expected, rows) < 7
    # Columns are not independent, and the samples of a slightly different network are told apart.
    pair = (expected[:3, None] * expected[3:7]).flatten()
    first_pair = sum(LAYOUT.token_sizes) + 5 * LAYOUT.continuous
    assert float((expected[first_pair : first_pair + 12] - pair).abs().max()) > 0.01
    generator.logit_shift[0] += 0.7
    other = shares(*generator.sample(context, Draws(KEY), allowed), LAYOUT)
    assert farthest(other, expected, rows) > 7


def farthest(found: torch.Tensor, expected: torch.Tensor, rows: int) -> float:
    """The largest difference of two samples' shares in standard deviations; rare cells have heavier tails: four rows
    are taken off each difference."""
    deviation = (0.5 * (found + expected) * 2 / rows).sqrt().clamp(min=1 / rows)
    return float((((found - expected).abs() - 4 / rows) / deviation).max())


def test_a_step_is_the_whole_network():
    """Sums over what is known against the product with all ones and zeros, for any set of known tokens."""
    generator, rng = diffusion(), torch.Generator().manual_seed(5)
    rows, layout = 64, LAYOUT
    tokens = torch.stack([torch.randint(size, (rows,), generator=rng) for size in layout.token_sizes], 1)
    hidden = torch.rand(rows, layout.tokens, generator=rng) < 0.5
    hidden[:] = hidden[:1]
    scores = torch.randn(rows, layout.continuous, generator=rng)
    context = torch.randint(layout.contexts, (rows,), generator=rng)
    with torch.no_grad():
        whole = generator.averaged(
            generator._inputs(tokens, hidden, scores, torch.full((rows, 1), 0.4), context)
        )
        sampler = Sampler(generator.averaged, layout, torch.zeros(layout.vocabulary))
        sums = sampler.inputs(layout.vocabulary + 3, layout.contexts)[context] + sampler.bias
        known = torch.where(hidden, -1, tokens + generator.offsets[:-1])
        for column in known.unbind(1):
            if column[0] >= 0:
                sums += sampler.inputs(0, layout.vocabulary)[column]
        share, time = sampler.inputs(layout.vocabulary + 3 + layout.contexts, 2)
        common = float(hidden[0].float().mean()) * share + 0.4 * time
        features = sampler.features(sums, common, scores, sampler.inputs(layout.vocabulary + 1, 2))
        logits = torch.nn.functional.linear(features, generator.averaged.head.weight)
        assert torch.allclose(logits + generator.averaged.head.bias, whole, atol=1e-4)
        assert torch.allclose(sampler.further(features), whole[:, layout.vocabulary :], atol=1e-4)


@pytest.mark.parametrize("make", [diffusion, gan])
def test_a_row_is_a_function_of_its_number(make):
    generator, rows = make(), 500
    context = torch.arange(rows) % LAYOUT.contexts
    tokens, scores = generator.sample(context, Draws(KEY, first=1000))
    torch.set_num_threads(1)
    for first, end in ((0, 1), (1, 130), (130, 500), (499, 500)):
        part = generator.sample(context[first:end], Draws(KEY, first=1000 + first))
        assert torch.equal(part[0], tokens[first:end]) and torch.equal(part[1], scores[first:end])
    other = generator.sample(context, Draws(KEY, first=1001))
    assert not torch.equal(other[0], tokens)
    assert bool(((tokens >= 0) & (tokens < torch.tensor(LAYOUT.token_sizes))).all())


@pytest.mark.parametrize(
    "layout",
    [
        Layout((3, 2), 0, 1, None, ()),
        Layout((), 2, 1, None, (-1, -1)),
        Layout((2,), 1, 2, 0, (-1,)),
        Layout((40,) * 30, 0, 1, 3, ()),
    ],
)
@pytest.mark.parametrize("make", [diffusion, gan])
def test_tables_of_one_kind_of_column(make, layout):
    generator: Generator = make(layout)
    tokens, scores = generator.sample(torch.zeros(50, dtype=torch.int64), Draws(KEY))
    assert tokens.shape == (50, layout.tokens) and scores.shape == (50, layout.continuous)
    assert bool((tokens >= 0).all()) and bool(torch.isfinite(scores).all())
    for column, size in enumerate(layout.token_sizes):
        assert int(tokens[:, column].max()) < size
    if layout.continuous:
        assert 0.05 < float(scores.std()) < math.inf
