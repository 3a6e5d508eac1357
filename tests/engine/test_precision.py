"""A user's permission to round operands is for the network, never for norms and sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from synthward.engine import PerfSpec
from synthward.engine.precision import _PLACES, exact_products
from synthward.engine.rules import row_values, uses
from tests.engine.nets import Mixed, accumulate, make_trainer, mixed_inputs


@pytest.fixture
def settings() -> Iterator[None]:
    before = [place.fp32_precision for place in _PLACES]
    yield
    torch.set_float32_matmul_precision("highest")
    for place, value in zip(_PLACES, before, strict=True):
        place.fp32_precision = value


def seen() -> list[str]:
    return [place.fp32_precision for place in _PLACES]


@pytest.mark.parametrize("keep", ["full", "bf16", "recompute"])
def test_norms_and_sums_are_exact_and_the_network_is_not(settings, monkeypatch, keep):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    before, found = seen(), []
    assert "bf16" in before and "tf32" in before
    names = [(row_values, "diagonal_sq_norms")]
    names += [(uses, name) for name in ("outer_sq_norms", "outer_norms", "outer_sum", "scatter_weighted_sum")]
    for place, name in names:
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, real=real, **k: (found.append(seen()), real(*a, **k))[1])
    module = Mixed()
    module.register_forward_hook(lambda *_: network.append(seen()))
    network: list[list[str]] = []
    trainer = make_trainer(module, perf=PerfSpec(keep=keep))
    accumulate(trainer, module, mixed_inputs(6, 3), [2, 1, 3])
    assert len(found) > 8
    assert all(set(places) <= {"none", "ieee"} for places in found)
    assert network == [before]
    assert seen() == before


def test_settings_come_back_after_an_error(settings):
    torch.set_float32_matmul_precision("medium")
    before = seen()
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert seen() == before
    assert torch.get_float32_matmul_precision() == "medium"
