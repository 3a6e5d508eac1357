"""Norms of a clipping group that are added up at its end: each with the bound of its own chains of additions."""

from __future__ import annotations

import torch
from torch import Tensor

from synthward.engine.clipping import formed_error, product_error
from synthward.engine.group_norms import GroupNorms
from synthward.engine.layout import Length

UNITS = 4
# Lengths as ints are alike for all units; of tensors each unit has its own, also where two are equal.
CHAINS: list[tuple[Length | None, Length]] = [
    (None, 5),
    (None, 4000),
    (7, 5),
    (7, 4000),
    (900, 5),
    (torch.tensor([1, 2000, 3, 4]), 9),
    (torch.tensor([4000, 2, 3, 4]), 9),
    (None, torch.tensor([1, 2, 3, 4000])),
    (None, torch.tensor([4000, 2, 3, 1])),
    (7, 5),
]


def filled(norms: GroupNorms, place: int) -> Tensor:
    pair = norms.new()
    pair.copy_(torch.rand(2, UNITS, generator=torch.Generator().manual_seed(place)) + 0.1)
    return pair


def test_each_norm_has_the_bound_of_its_own_chains():
    norms, squares, errors = GroupNorms(UNITS, torch.device("cpu")), torch.zeros(UNITS), torch.zeros(UNITS)
    for place, (product, formed) in enumerate(CHAINS):
        pair = filled(norms, place)
        norms.add(pair, product=product, formed=formed, uses=place + 1)
        error = torch.zeros(UNITS) if product is None else product_error(product, pair[1])
        errors += error + formed_error(formed, pair[0] + error, pair[1])
        squares += pair[0]
    found, bound = norms.complete()
    torch.testing.assert_close(found, squares, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(bound, errors, rtol=1e-5, atol=0.0)
    assert norms.count == sum(range(1, len(CHAINS) + 1))


def test_norms_are_looked_at_when_all_are_there():
    """What is filled in after it was noted counts."""
    norms = GroupNorms(UNITS, torch.device("cpu"))
    pair = norms.new()
    norms.add(pair, product=3, formed=3, uses=1)
    pair[0] += 2.0
    assert torch.equal(norms.complete()[0], torch.full((UNITS,), 2.0))


def test_a_norm_that_is_not_finite_stays_one():
    for value in (torch.nan, torch.inf):
        norms = GroupNorms(UNITS, torch.device("cpu"))
        for place in range(3):
            pair = filled(norms, place)
            pair[0, 1] = value if place == 1 else pair[0, 1]
            norms.add(pair, product=place, formed=1, uses=1)
        assert norms.complete()[0].isfinite().tolist() == [True, False, True, True]


def test_a_group_without_norms_is_zero():
    squares, error = GroupNorms(UNITS, torch.device("cpu")).complete()
    assert not squares.any() and not error.any()
