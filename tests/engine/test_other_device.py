"""The pass of a network that does not lie in CPU memory: no tensor of the engine's own is left behind there, nothing
waits for a number, and what is multiplied is the network's and the kernels' alone.

Without such a device: on torch's "meta" device, which has shapes and no numbers, and where operations refuse tensors of
another device; traced, so that the kernels are not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from synthward.engine import ClipSpec
from synthward.engine.rates import Rates
from synthward.engine.rules import layer_norm
from synthward.engine.tracing import TracedPass, trace_pass
from synthward.run.decoder import Decoder, DecoderShape
from synthward.run.decoder import row_losses as decoder_losses
from tests.engine.nets import row_losses
from tests.engine.recorded import CLIPS, NETS, trainer_of

META = torch.device("meta")
# Of a GPU, about.
RATES = Rates(gram=4e14, tile=5e14, bytes=4e12, product=0.0, library=6e14)
# What reads a number, or makes a shape of numbers.
READS = tuple(
    f"aten.{name}"
    for name in ("_local_scalar", "nonzero", "item", "_unique", "unique", "masked_", "is_nonzero", "equal.")
)


def traced(
    module: nn.Module, batch: tuple[Tensor, ...], losses_of: Callable[..., Tensor], clip: ClipSpec, units: int
) -> TracedPass:
    trainer = trainer_of(module.to(META), clip)
    trainer._step.planner._rates = RATES
    mask = torch.ones(units, dtype=torch.bool, device=META)
    return trace_pass(trainer._step, losses_of, units, 1, batch, mask, 1.0)


def check(found: TracedPass) -> Counter[str]:
    calls = Counter(str(node.target) for node in found.graph.graph.nodes if node.op == "call_function")
    assert not [name for name in calls if name.startswith(READS)]
    places = {
        node.meta["val"].device
        for node in found.graph.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    assert places == {META}
    # Numbers of the module's own that are no tensors on its device (1.0 as a tensor, say) come with the launch.
    assert all(constant.device == META or constant.dim() == 0 for constant in found.constants)
    return calls


@pytest.fixture(autouse=True)
def with_triton(monkeypatch):
    """Choices are made as where Triton is there; torch knows no autocast of this device."""
    asked, usual = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(layer_norm, "uses_triton", lambda *tensors: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != META.type and asked(kind))
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, **options: nullcontext() if kind == META.type else usual(kind, **options),
    )


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", NETS)
def test_a_pass_stays_on_the_device_of_its_network(name, clip):
    make, batch = NETS[name]
    module = make()
    x = batch(0).to(META)
    calls = check(traced(module, (x,), lambda x: row_losses(module, x), CLIPS[clip], len(x)))
    assert any(name.startswith("synthward.") for name in calls)


@pytest.mark.parametrize("clip", ["flat", "per-layer"])
def test_a_decoder_s_pass_is_the_network_s_operations_and_the_kernels(clip):
    module = Decoder(DecoderShape(vocab=50, width=64, layers=3, heads=2, times=40))
    ids = torch.zeros(6, 40, dtype=torch.int64, device=META)

    def losses_of(ids: Tensor, targets: Tensor) -> Tensor:
        return decoder_losses(module(ids), targets)

    calls = check(traced(module, (ids, ids), losses_of, CLIPS[clip], 6))
    layers, norms = 3 * 4 + 1, 2 * 3 + 1
    assert calls["synthward.outer_norms.default"] + calls["synthward.outer_unit_grads.default"] == layers
    assert calls["synthward.outer_sum.default"] + calls["synthward.outer_unit_grads.default"] == layers
    assert calls["synthward.layer_norm_backward.default"] == norms
    assert calls["synthward.scatter_sq_norms.default"] == calls["synthward.scatter_weighted_sum.default"] == 2
    # Forward products and input gradients, and nothing else of that kind (sums of a unit's rows are products, too).
    assert calls["aten.mm.default"] + calls["aten.addmm.default"] == 2 * layers
