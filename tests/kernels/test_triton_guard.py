"""No Triton kernel reads or writes outside of its tensors, nor what the order of its programs decides (`guarded`)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the package triton cannot be imported here")

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import torch
import triton

from synthward import kernels
from synthward.kernels._triton import INTERPRETED
from synthward.kernels.conv import triton_impl as conv_impl
from synthward.kernels.decode import triton_impl as decode_impl
from synthward.kernels.diagonal import triton_impl as diagonal_impl
from synthward.kernels.normalize import triton_impl as normalize_impl
from synthward.kernels.outer import triton_impl as outer_impl
from synthward.kernels.scatter import triton_impl as scatter_impl
from tests.kernels.cases import generator
from tests.kernels.guard_cases import OPERATIONS, POINT, names, ones, operands
from tests.kernels.guarded import NANS, watched, watching

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="memory is watched in Triton's interpreter alone"),
    # NumPy, which the interpreter computes with, warns of what the kernels are meant to survive.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


def run_all(name: str, cases: Sequence[tuple[Any, ...]]) -> set[str]:
    launched: set[str] = set()
    for case in cases:
        try:
            launched |= watched(OPERATIONS[name].run, case)
        except Exception as error:
            error.add_note(f"{name} of {case}")
            raise
    return launched


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_stay_within_their_tensors(name):
    assert run_all(name, OPERATIONS[name].fast) == OPERATIONS[name].kernels


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_stay_within_their_tensors_of_more_shapes(name):
    assert run_all(name, OPERATIONS[name].slow) <= OPERATIONS[name].kernels


def test_every_kernel_has_a_case():
    found = set()
    for module in pkgutil.walk_packages(kernels.__path__, "synthward.kernels."):
        if "triton" in module.name.rpartition(".")[2]:
            loaded = importlib.import_module(module.name)
            functions = {
                k: v for k, v in vars(loaded).items() if isinstance(v, triton.runtime.KernelInterface)
            }
            found |= {name for name in functions if name.endswith("_kernel")}
    assert found == set().union(*(operation.kernels for operation in OPERATIONS.values()))


LIES = {"beyond": [-5, 2, 2**40, 7], "decreasing": [30, 11, 40, 3], "all of it": [0, 99, 0, 99]}


@pytest.mark.parametrize("lie", LIES)
def test_offsets_and_orders_that_lie_lead_nowhere_else(lie):
    """On a device nobody looks at them before. (The tables of scatter are sorted, not looked up.)"""
    a, g = operands(40, 3, 5)
    offsets, order = torch.tensor(LIES[lie]), torch.tensor([-1, 2**40, 7, 2**62] * 10)
    norms, sums = torch.zeros(2, 3)
    columns, head = torch.tensor([[0, 1, -1], [2, 2**40, 3]]), torch.randn(9, 3, generator=generator(7))
    dx, (scale, bias) = torch.zeros(40, 5), torch.zeros(2, 3, 5)
    rows = (g, g, g.mean(1), torch.ones(40), None, offsets, order, 3)
    with watching(NANS, is_ordered=True) as watch:
        outer_impl.gram_norms(a, g, offsets, norms, sums)
        outer_impl.tile_norms(a, g, offsets, norms, sums, torch.zeros(3, 15))
        diagonal_impl.diagonal_sq_norms(g, offsets, None, norms)
        normalize_impl.layer_norm_backward(*rows, (dx, scale, bias))
        conv_impl.unit_grads(POINT, a[:, :1], g[:, :1], offsets, order, torch.zeros(3, 1))
        decode_impl.draw_tokens(
            a[:2], head, ones(9), offsets, columns, ones(2, 3) / 2, ones(9, 2), ones(2, 2)
        )
        scatter_impl.scatter_sq_norms(torch.arange(40) % 3, g, offsets, norms)
    norms_of = names("slots", "gram", "tile", "units", "totals", "conv_tile")
    assert watch.launched >= norms_of | names("layer_norm", "layer_norm_units", "draw", "add")
