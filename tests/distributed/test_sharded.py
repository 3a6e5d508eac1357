"""What `fully_shard` is asked for beside sharding changes memory, and not what is released."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from synthward.engine import KeySchedule, PrivacyPlan, PrivateTrainer
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import PrivacyError, UnsupportedOperationError
from synthward.engine.sampling import physical_batches
from tests.distributed.cases import whole
from tests.distributed.together import Outcomes, on_ranks

STEPS, UNITS = 6, 60
PLAN = {"sample_rate": 0.3, "noise_multiplier": 0.5, "max_grad_norm": 0.3, "expected_batch_size": 18.0}


class Net(nn.Module):
    """Three layers, the middle one of which may be recomputed."""

    def __init__(self, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(7, 13), nn.LayerNorm(13)
        self.middle = nn.Sequential(nn.Linear(13, 11), nn.GELU(), nn.Linear(11, 13))
        self.last = nn.Linear(13, 3)
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        y = checkpoint(self.middle, x, use_reentrant=False) if self.is_checkpointed else self.middle(x)
        return self.last(x + y)


def weights(module: nn.Module) -> None:
    """The same first weights on all ranks."""
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if hasattr(parameter, "placements"):
                from torch.distributed.tensor import distribute_tensor

                drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
            parameter.copy_(drawn)


def build(how: str) -> nn.Module:
    if how == "meta":
        with torch.device("meta"):
            net: nn.Module = Net()
    else:
        net = Net(is_checkpointed=how == "checkpointed")
    options: dict[str, Any] = {}
    if how == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "offloaded":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if how == "kept":
        options["reshard_after_forward"] = False
    if how != "whole":
        for layer in (net.first, net.middle, net.last):
            fully_shard(layer, **options)
        fully_shard(net, **options)
    if how == "meta":
        net.to_empty(device="cpu")
    weights(net)
    return net


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(UNITS, 7, generator=generator), torch.randn(UNITS, 3, generator=generator)


def train(how: str, size: int, noise: float = 0.5) -> dict[str, np.ndarray]:
    """Parameters, whole, after some steps."""
    ranks, net, (x, y) = Ranks.current(), build(how), data()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    plan = PrivacyPlan(**(PLAN | {"noise_multiplier": noise, "steps": STEPS}))
    keys = KeySchedule.reproducible(3)
    trainer = PrivateTrainer(net, optimizer, plan, keys=keys)
    sampler = plan.sampler(UNITS, keys.key("sampler"))
    for step in range(STEPS):
        for units in physical_batches(sampler.draw(step), size, rank=ranks.rank, world_size=ranks.world_size):
            index = torch.from_numpy(units)
            mask, index = index >= 0, index.clamp(min=0)
            with trainer.capture():
                losses = (net(x[index]).float() - y[index]).square().mean(1)
            trainer.backward(losses, rows_per_unit=1, unit_mask=mask)
        trainer.apply()
    return {name: whole(parameter) for name, parameter in net.named_parameters()}


CLIPPINGS = ("flat", "per-layer")
HOW = ("plain", "kept", "offloaded", "checkpointed", "meta", "bf16")


@pytest.fixture(scope="module", params=[2, 3])
def runs(request) -> Outcomes:
    here = "tests.distributed.test_sharded"
    work = {how: (f"{here}:train", (how, 4)) for how in HOW}
    work |= {
        **{f"no rows, {clipping}": (f"{here}:without_rows", (clipping,)) for clipping in CLIPPINGS},
        "past the hooks": (f"{here}:past_the_hooks", ()),
        "mixing": (f"{here}:mixing", ()),
        "elsewhere": (f"{here}:placed_elsewhere", ()),
    }
    return on_ranks(request.param, work)


@pytest.mark.parametrize("how", [how for how in HOW if how != "bf16"])
def test_the_release_is_that_of_one_process(runs, how):
    expected = train("whole", 64)
    for found in runs[how]:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            off = np.linalg.norm(found[name] - value)
            assert off <= 1e-5 * np.linalg.norm(value), name


def test_half_precision_is_near_and_has_the_same_noise(runs):
    """Operands have 8 bits; sums, noise and parameters stay fp32."""
    expected, start = train("whole", 64), build("whole")
    for found in runs["bf16"]:
        for name, parameter in start.named_parameters():
            moved = expected[name] - parameter.detach().numpy()
            assert found[name].dtype == np.float32
            assert np.linalg.norm(found[name] - expected[name]) <= 0.2 * np.linalg.norm(moved), name


def past_the_hooks() -> str:
    """A layer's weights that are used without its forward pass are not known to the capture."""
    net = build("plain")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plan = PrivacyPlan(**(PLAN | {"steps": 1}))
    trainer = PrivateTrainer(net, optimizer, plan, keys=KeySchedule.reproducible(3))
    x, _ = data()
    for layer in (net, net.first, net.middle, net.last):
        layer.unshard()
    try:
        with trainer.capture():
            hidden = torch.nn.functional.linear(x[:4], net.first.weight, net.first.bias)
            losses = hidden.square().mean(1)
        trainer.backward(losses, rows_per_unit=1)
        trainer.apply()
    except (PrivacyError, UnsupportedOperationError) as error:
        return str(error)
    return ""


def test_weights_used_past_their_layer_are_refused(runs):
    assert all(runs["past the hooks"]), "it was released"


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x - x.mean(0))


def mixing() -> str:
    net = Mixing()
    fully_shard(net.first)
    fully_shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = PrivateTrainer(
        net, optimizer, PrivacyPlan(**(PLAN | {"steps": 1})), keys=KeySchedule.reproducible(3)
    )
    x, _ = data()
    try:
        with trainer.capture():
            losses = net(x[:6]).square().mean(1)
        trainer.backward(losses, rows_per_unit=1)
    except UnsupportedOperationError as error:
        return str(error)
    return ""


def test_units_that_mix_are_seen_in_a_sharded_network(runs):
    assert all("units mix" in message for message in runs["mixing"])


def placed_elsewhere() -> str:
    """Sharded by columns."""
    from torch.distributed.tensor import Shard

    net = nn.Linear(12, 12)
    fully_shard(net, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    try:
        PrivateTrainer(
            net,
            torch.optim.SGD(net.parameters(), lr=0.1),
            PrivacyPlan(**(PLAN | {"steps": 1})),
            keys=KeySchedule.reproducible(3),
        )
    except UnsupportedOperationError as error:
        return str(error)
    return ""


def test_another_placement_is_refused_by_name(runs):
    assert all("'weight' is placed as" in message for message in runs["elsewhere"])


def without_rows(clipping: str) -> float:
    """One rank after the other has no rows, and no padding; the norm of what is released in the end."""
    torch.manual_seed(0)
    ranks, net = Ranks.current(), nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    plan = PrivacyPlan(**(PLAN | {"steps": STEPS, "clipping": clipping}))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    trainer = PrivateTrainer(net, optimizer, plan, keys=KeySchedule.reproducible(3))
    for step in range(STEPS):
        x = torch.randn(0 if step % ranks.world_size == ranks.rank else 4, 8)
        with trainer.capture():
            losses = net(x).square().sum(1)
        trainer.backward(losses, rows_per_unit=1)
        trainer.apply()
    return sum(float(np.linalg.norm(whole(p))) for p in net.parameters())


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_rank_without_rows_keeps_step(runs, clipping):
    """Under per-layer clipping sums are reduced inside the backward pass, between what FSDP gathers."""
    norms = runs[f"no rows, {clipping}"]
    assert all(norm == norms[0] > 0 for norm in norms)
