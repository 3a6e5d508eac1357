"""Whole private passes by the Triton kernels, in Triton's interpreter: what the engine hands them fits, and the sums
are those of the compiled kernels on the same operands. On a GPU the same launches run; no such thing is tested here.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from synthward.engine import PerfSpec
from synthward.engine.rules import conv, group_norm, layer_norm, linear, uses
from synthward.kernels._select import force_triton
from tests.engine.nets import row_losses
from tests.engine.recorded import CLIPS, NETS, module_of, take, trainer_of

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="the package triton cannot be imported here"
    ),
    # RMS norm of bf16 with a weight of fp32, as autocast has it.
    pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning"),
]


@pytest.fixture
def on_gpu(monkeypatch):
    """Choices as where the tensors lie on a GPU; `auto` is Triton, interpreted."""
    from synthward.kernels._triton import INTERPRETED

    assert INTERPRETED
    monkeypatch.setattr(uses, "place_of", lambda tensor: "cuda")
    monkeypatch.setattr(layer_norm, "uses_triton", lambda *tensors: True)
    for rule in (linear, conv):
        if hasattr(rule, "measured_type"):
            monkeypatch.setattr(rule, "measured_type", lambda grad: grad.dtype)
    launched: list[str] = []
    for module in (uses, conv, layer_norm, group_norm):
        for name in dir(module):
            if name in OPERATIONS:
                monkeypatch.setattr(module, name, noted(getattr(module, name), launched))
    force_triton(True)
    yield launched
    force_triton(False)


OPERATIONS = {
    *("outer_norms", "outer_sq_norms", "rank1_norms", "outer_sum", "outer_unit_grads"),
    *("diagonal_sq_norms", "diagonal_weighted_sum", "scatter_sq_norms", "scatter_weighted_sum"),
    *("conv_norms", "conv_sum", "conv_unit_grads", "layer_norm_backward", "group_norm_backward"),
}


def noted(function: Callable[..., object], launched: list[str]) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> object:
        launched.append(function.__name__)
        return function(*args, **kwargs)

    return run


def sums(module: nn.Module, x: Tensor, clip: str, *, is_half: bool, method: str = "auto") -> Tensor:
    perf = PerfSpec(method=method, half_sums="exact", products="library")
    trainer = trainer_of(copy.deepcopy(module), CLIPS[clip], perf=perf)
    with torch.autocast("cpu", torch.bfloat16) if is_half else nullcontext():
        take(trainer, x)
    return trainer._step.sums.flat.clone()


@pytest.mark.parametrize(("clip", "is_half"), [("flat", False), ("per-layer", False), ("flat", True)])
@pytest.mark.parametrize("name", NETS)
def test_sums_are_those_of_the_compiled_kernels(request, name, clip, is_half):
    torch.manual_seed(0)
    make, batch = NETS[name]
    module, x = make(), batch(0)
    expected = sums(module, x, clip, is_half=is_half)
    launched = request.getfixturevalue("on_gpu")
    found = sums(module, x, clip, is_half=is_half)
    assert launched
    # Norms are inflated by bounds of their own on either side. Input gradients of normalisations are rounded to bf16,
    # by the interpreter towards zero: 2^-8 in what lies before them.
    assert (found - expected).norm() <= (1e-2 if is_half else 2e-4) * expected.norm()


@pytest.mark.parametrize("method", ["gram", "tile", "materialise"])
@pytest.mark.parametrize("name", ["many rows", "images"])
def test_each_way_to_a_norm(request, name, method):
    torch.manual_seed(0)
    make, batch = NETS[name]
    module, x = make(), batch(0)
    expected = sums(module, x, "flat", is_half=False)
    request.getfixturevalue("on_gpu")
    found = sums(module, x, "flat", is_half=False, method=method)
    assert (found - expected).norm() <= 2e-4 * expected.norm()


def test_a_unit_that_is_not_finite_goes_alone(on_gpu):
    torch.manual_seed(0)
    make, batch = NETS["attention"]
    module, x = make(), batch(0)
    x[1, 2] = float("nan")
    others = torch.tensor([True, False, True, True, True])
    trainer, without = trainer_of(copy.deepcopy(module)), trainer_of(copy.deepcopy(module))
    take(trainer, x)
    x[1] = 0.0
    take(without, x, others)
    assert torch.equal(trainer._step.sums.flat, without._step.sums.flat)
    assert without._step.sums.flat.any()


def test_a_step_is_taken(on_gpu):
    torch.manual_seed(0)
    make, batch = NETS["mixed"]
    trainer = trainer_of(make())
    before = [p.detach().clone() for p in module_of(trainer).parameters()]
    run = trainer.compile(lambda x: row_losses(module_of(trainer), x))
    for round_ in range(3):
        run(batch(round_))
        trainer.apply()
    assert all(not torch.equal(p, q) for p, q in zip(module_of(trainer).parameters(), before, strict=True))
