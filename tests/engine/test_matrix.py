"""Every layer in every precision and every layout of units: norms and clipped sums against a loop over units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.layers import LAYERS, PLACES, Net, make_inputs
from tests.engine.measure import (
    clipped_by_group,
    group_norms,
    plain_gradients,
    read_pass,
    unit_gradients,
)

LAYOUTS = {
    "one row a unit": st.integers(1, 6).map(lambda units: [1] * units),
    "equal units": st.tuples(st.integers(1, 5), st.integers(2, 4)).map(lambda n: [n[1]] * n[0]),
    "ragged": st.lists(st.integers(0, 4), min_size=1, max_size=4).flatmap(
        lambda counts: st.permutations([*counts, 0])
    ),
}
LAYOUTS["called twice"] = st.one_of(*LAYOUTS.values())
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding=.same."),  # torch, of its own copy
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]


def draw_network(draw, layer, layout):
    """A network, its rows, how many each unit owns, and the settings of a pass over them."""
    counts = list(draw(LAYOUTS[layout]))
    places = draw(st.sampled_from(PLACES)), draw(st.sampled_from(PLACES))
    is_equal = counts[0] > 0 and len(set(counts)) == 1
    options = {
        "clipping": draw(st.sampled_from(["flat", "per-layer"])),
        "uniform": is_equal and draw(st.booleans()),
    }
    torch.manual_seed(draw(st.integers(0, 999)))
    drawn = LAYERS[layer](draw)
    net = Net(drawn, twice=layout == "called twice", places=places)
    return net, make_inputs(drawn, sum(counts)), counts, options


def draw_bound(draw, gradients):
    """A bound that clips most units, some of them, or none."""
    middle = float(np.median(np.linalg.norm(gradients, axis=1)))
    return max(draw(st.sampled_from([0.3, 1.0, 1e3])) * middle, 1e-3)


def assert_norms(found, gradients, plain, tolerance):
    """To the tolerance, a last bit of the norm over all groups, or twice the worst relative error of `plain`. Where
    the rows of a unit cancel so far that the bound on rounding is much, the norm is within that bound."""
    norms, off = (group_norms(g, found.group_of) for g in (gradients, plain - gradients))
    worst = np.divide(off, norms, where=norms > 0, out=np.zeros_like(norms)).max(
        1, keepdims=True, initial=0.0
    )
    measured = np.sqrt(found.sq_norms)
    last_bit = 2.0**-23 * np.linalg.norm(gradients, axis=1)
    allowed = np.maximum(np.maximum(tolerance, 2 * worst) * norms, last_bit) + 1e-9
    cancels = found.upper > (1 + 1e-4) * norms + 1e-9
    allowed = np.where(cancels, np.maximum(allowed, found.upper - measured), allowed)
    assert (np.abs(measured - norms) <= allowed).all()


def assert_close(total, contributions, plain, tolerance, slack=0.0):
    """A sum over units against `contributions` [U, P], relative to its norm, or to the root of their squares' sum
    where they cancel."""
    expected = contributions.sum(0)
    scale = max(np.linalg.norm(expected), np.linalg.norm(contributions))
    allowed = max(tolerance * scale, 2 * np.linalg.norm(plain.sum(0) - expected)) + slack
    assert np.linalg.norm(total - expected) <= allowed + 1e-9


def assert_sum(found, gradients, plain, tolerance):
    """Of gradients that were clipped. The engine's factors are less than the loop's by the bound on the rounding of
    the norms, which is added for each unit that is clipped."""
    norms = group_norms(gradients, found.group_of)
    excess = np.divide(found.upper - norms, norms, where=norms > 0, out=np.zeros_like(norms))
    clipped, rounded = (clipped_by_group(g, found.group_of, found.bounds) for g in (gradients, plain))
    covered = np.where(found.factors < 1, np.maximum(excess, 0.0), 0.0) * group_norms(clipped, found.group_of)
    assert_close(found.sums, clipped, rounded, tolerance, slack=covered.sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_fp32(layer, layout):
    """To 1e-5 of the float64 loop, or twice the error of the same loop by plain autograd in fp32 where gradients
    cancel. The factors are those of the norms with the bound on their rounding added, and of nothing else."""
    excess = [0.0]

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        net, x, counts, options = draw_network(data.draw, layer, layout)
        gradients, plain = unit_gradients(net, x, counts), plain_gradients(net, x, counts)
        found = read_pass(net, x, counts, draw_bound(data.draw, gradients), **options)
        assert_norms(found, gradients, plain, 1e-5)
        has_rows = np.array(counts) > 0
        expected = np.minimum(1.0, np.array(found.bounds)[:, None] / found.upper[:, has_rows])
        np.testing.assert_allclose(found.factors[:, has_rows], expected, rtol=1e-6)
        own, rounded = (found.factors[found.group_of].T * g for g in (gradients, plain))
        assert_close(found.sums, own, rounded, 1e-5)
        assert_sum(found, gradients, plain, 1e-5)
        norms = np.sqrt(found.sq_norms)
        excess.extend(found.upper[norms > 0] / norms[norms > 0] - 1)

    check()
    assert np.median(excess) <= 1e-2, "what covers rounding should cost little"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_bf16(layer, layout):
    """To 1e-2 of the float64 loop. Where activations rounded to bf16 do not allow that (gradients that cancel), to
    twice the error of plain autograd under the same autocast, one unit at a time."""

    @settings(max_examples=2, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        net, x, counts, options = draw_network(data.draw, layer, layout)
        with torch.no_grad():
            for value in (x, *net.parameters()):
                value.copy_(value.bfloat16())
        gradients, plain = unit_gradients(net, x, counts), plain_gradients(net, x, counts, torch.bfloat16)
        bound = draw_bound(data.draw, gradients)
        found = read_pass(net, x, counts, bound, autocast=torch.bfloat16, **options)
        assert_norms(found, gradients, plain, 1e-2)
        assert_sum(found, gradients, plain, 1e-2)

    check()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_no_unit_exceeds_its_bound(layer, autocast):
    """One unit alone (the others are masked): what it adds stays within the bound of each group, and its norm within
    the one that the factor rests on, in the float64 norm of the very gradient that was summed."""

    @settings(max_examples=2, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        net, x, counts, options = draw_network(
            data.draw, layer, data.draw(st.sampled_from([name for name in LAYOUTS]))
        )
        unit = data.draw(st.integers(0, len(counts) - 1))
        mask = torch.arange(len(counts)) == unit
        bound = draw_bound(data.draw, unit_gradients(net, x, counts))
        for limit in (bound, 1e9):
            found = read_pass(net, x, counts, limit, autocast=autocast, unit_mask=mask, **options)
            norms = group_norms(found.sums[None], found.group_of)[:, 0]
            assert (norms <= found.upper[:, unit]).all()
            assert (norms <= np.array(found.bounds) * (1 + 2e-7)).all()
            assert (found.factors[:, ~mask.numpy()] == 0).all()

    check()
