"""Random numbers of numbered rows: the same for every split, different for everything else, and of their law."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synthward.engine.draws import Draws, sampling_key
from synthward.kernels import chacha20_words, gaussian_noise

KEY = bytes(range(32))
KINDS = ("uniform", "normal")


def calls(first: int, rows: int, widths: list[tuple[str, int]], **place) -> list[torch.Tensor]:
    draws = Draws(place.get("key", KEY), place.get("stream", 5), place.get("step", 7), first)
    return [getattr(draws, kind)(rows, k) for kind, k in widths]


@given(
    first=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    widths=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 50)), min_size=1, max_size=4),
)
def test_any_split_of_the_rows_gives_the_same_numbers(first, cuts, widths):
    whole = calls(first, sum(cuts), widths)
    at, parts = first, []
    for rows in cuts:
        parts.append(calls(at, rows, widths))
        at += rows
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[number] for part in parts]), expected)


def test_an_element_has_the_place_that_is_promised():
    uniform, normal = calls(11, 6, [("uniform", 3), ("normal", 4)])
    words = chacha20_words(KEY, stream=5, step=7, start=33, count=18)
    assert uniform.flatten().tolist() == [(int(word) >> 8) / 2**24 for word in words]
    assert torch.equal(normal.flatten(), gaussian_noise(24, key=KEY, stream=6, step=7, start=44))
    assert uniform.dtype == normal.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_calls_steps_streams_and_keys_differ(kind):
    once, again = calls(0, 64, [(kind, 4)] * 2)
    others = [
        calls(0, 64, [(kind, 4)], **place)[0] for place in ({"step": 8}, {"stream": 4}, {"key": bytes(32)})
    ]
    for other in [again, *others]:
        # Equal uniforms are 24 bits apart: 256 of them meet with probability 2^-16 in one place.
        assert (once == other).sum() <= 1


def test_law():
    rows, k = 200_000, 5
    uniform, normal = calls(3, rows, [("uniform", k), ("normal", k)])
    assert uniform.min() >= 0 and uniform.max() < 1
    # Kolmogorov-Smirnov: the distance passes 3.5 / sqrt(n) with a probability below 5e-11 (2 exp(-2 * 3.5^2)).
    for values, cdf in ((uniform, lambda x: x), (normal, torch.special.ndtr)):
        for column in values.double().unbind(1):
            order = cdf(column.sort().values)
            grid = torch.arange(1, rows + 1, dtype=torch.float64) / rows
            assert float((order - grid).abs().max()) < 3.5 / math.sqrt(rows) + 1 / rows


def test_a_seed_has_a_key_of_its_own():
    keys = {sampling_key(seed) for seed in (-1, 0, 1, 10, 2**70)}
    assert len(keys) == 5 and {len(key) for key in keys} == {32}


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        ("key", lambda: Draws(b"short")),
        ("stream", lambda: Draws(KEY, stream=2**15)),
        ("step", lambda: Draws(KEY, step=2**48)),
        ("start", lambda: Draws(KEY, first=-1)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_named(name, draws, kind):
    with pytest.raises(ValueError, match=name):
        getattr(draws(), kind)(2, 3)
