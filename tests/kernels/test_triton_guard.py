"""No Triton kernel reads or writes outside of its tensors, nor what the order of its programs decides (`guarded`)."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the package triton cannot be imported here")

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import triton

from synthward import kernels
from synthward.kernels._triton import INTERPRETED
from tests.kernels.guard_cases import OPERATIONS
from tests.kernels.guarded import watched

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
