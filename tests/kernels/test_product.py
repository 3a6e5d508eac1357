"""The compiled product: any shape, every instruction set, no row of another's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthward.kernels import available_isas, force_isa, product

SIDES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 127, 129, 255, 257, 300])


def operands(n: int, k: int, q: int, is_transposed: bool, with_bias: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    weight = torch.randn((q, k) if is_transposed else (k, q), generator=generator)
    return x, weight, torch.randn(q, generator=generator) if with_bias else None


def expected(x, weight, bias, is_transposed):
    found = x.double() @ (weight.double().mT if is_transposed else weight.double())
    return found if bias is None else found + bias.double()


@pytest.mark.parametrize("isa", available_isas())
@settings(max_examples=40, deadline=None)
@given(
    n=SIDES, k=SIDES, q=SIDES, is_transposed=st.booleans(), with_bias=st.booleans(), seed=st.integers(0, 9)
)
def test_any_shape(isa, n, k, q, is_transposed, with_bias, seed):
    x, weight, bias = operands(n, k, q, is_transposed, with_bias, seed)
    force_isa(isa)
    try:
        found = product(x, weight, bias, is_transposed=is_transposed, backend="cpp")
    finally:
        force_isa(None)
    assert found.dtype == torch.float32
    # Rounding of a sum of k products, at most 128 in a chain.
    bound = (
        (min(k, 128) + 4)
        * 2.0**-24
        * (x.double().abs() @ (weight.abs().mT if is_transposed else weight.abs()).double())
    )
    off = (found.double() - expected(x, weight, bias, is_transposed)).abs()
    assert bool((off <= bound + 2.0**-22 * (1 + found.abs())).all())


def test_every_entry_counts():
    """Whole numbers: exact, so that a missing or doubled term shows."""
    for n, k, q in ((1, 1, 1), (5, 129, 33), (257, 16, 300), (300, 300, 17)):
        for is_transposed in (False, True):
            x, weight, bias = operands(n, k, q, is_transposed, True)
            x, weight, bias = (8 * x).round(), (8 * weight).round(), bias.round()
            found = product(x, weight, bias, is_transposed=is_transposed, backend="cpp")
            assert torch.equal(found.double(), expected(x, weight, bias, is_transposed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_alone(value):
    x, weight, bias = operands(40, 30, 20, True, True)
    sound = product(x, weight, bias, is_transposed=True, backend="cpp")
    x[17, 3] = value
    found = product(x, weight, bias, is_transposed=True, backend="cpp")
    assert not bool(torch.isfinite(found[17]).any())
    others = torch.arange(40) != 17
    assert torch.equal(found[others], sound[others])


def test_threads_change_no_bit():
    x, weight, _ = operands(700, 130, 600, False, False)
    torch.set_num_threads(1)
    one = product(x, weight, backend="cpp")
    torch.set_num_threads(3)
    assert torch.equal(product(x, weight, backend="cpp"), one)


def test_a_row_does_not_depend_on_how_many_others_there_are():
    x, weight, _ = operands(600, 200, 100, True, False)
    whole = product(x, weight, is_transposed=True, backend="cpp")
    assert torch.equal(product(x[37:338], weight, is_transposed=True, backend="cpp"), whole[37:338])


def test_arguments_that_do_not_fit():
    x, weight, _ = operands(3, 4, 5, False, False)
    with pytest.raises(ValueError, match="weight: takes rows of 5"):
        product(x, weight, is_transposed=True)
    with pytest.raises(ValueError, match="bias"):
        product(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match="two dimensions"):
        product(x[0], weight)
    with pytest.raises(ValueError, match="cpp"):
        product(x, weight.mT.contiguous().mT, backend="cpp")
    with pytest.raises(ValueError, match="Triton"):
        product(x, weight, backend="triton")
    assert torch.equal(product(x, weight, backend="reference"), x @ weight)
