"""Same inputs, same bits, whatever the threads; physical batches split anyhow give the same sum to its last bits."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthward.engine import PerfSpec
from synthward.engine.rates import Rates
from tests.engine.measure import distance, read_pass
from tests.engine.nets import make_trainer, unit_losses

COUNTS = [3, 0, 5, 1, 2, 4, 1, 6]
ROWS = sum(COUNTS)


class Lookup(nn.Module):
    """Many rows into few entries of a table, mixed and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(11, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.flatten(1) * 7).long().abs() % 11
        return torch.tanh(self.mix(self.table(ids)))


class Tied(Lookup):
    """The table is also the weight of the output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.table.weight)


class Last(nn.Module):
    """What a recurrent layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 10, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, 0])[0]


# Networks of rows [3, 8, 8], wide enough that work is divided between threads.
NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 130), nn.GELU(), nn.Linear(130, 70), nn.Tanh()),
    "vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 300), nn.SiLU(), nn.Linear(300, 90)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 16, 3, stride=2, bias=False)
    ),
    "transposed conv": lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.Tanh(), nn.ConvTranspose2d(8, 12, 3)),
    "embedding": Lookup,
    "tied embedding": Tied,
    "norms": lambda: nn.Sequential(nn.LayerNorm(8), nn.Conv2d(3, 12, 1), nn.GroupNorm(3, 12)),
    "lstm": Last,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def records() -> Tensor:
    return torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "perf", [PerfSpec(), PerfSpec(keep="bf16"), PerfSpec(keep="recompute")], ids=lambda p: p.keep
)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_twice(name, perf):
    net, x = build(name), records()
    first, second = (read_pass(net, x.clone(), COUNTS, 0.3, perf=perf) for _ in range(2))
    assert np.array_equal(first.sums, second.sums)
    assert np.array_equal(first.sq_norms, second.sq_norms)
    assert np.array_equal(first.factors, second.factors)


# Ways to a norm and to a product are chosen by measured rates; here one is the faster by far, whatever the threads.
RATES = {
    "compiled": Rates(gram=1e11, tile=1e12, bytes=1e9, product=1e12, library=1e9),
    "library": Rates(gram=1e12, tile=1e9, bytes=1e12, product=0.0, library=1e12),
}


@pytest.fixture(params=RATES)
def _fixed_rates(request, monkeypatch):
    for module in ("planner", "products"):
        monkeypatch.setattr(f"synthward.engine.{module}.measured_rates", lambda device: RATES[request.param])


@pytest.mark.usefixtures("_fixed_rates")
@pytest.mark.parametrize("uniform", [False, True], ids=["ragged", "uniform"])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_for_one_thread_and_two(name, clipping, uniform):
    net, x, found = build(name), records(), []
    counts = [2] * (ROWS // 2) if uniform else COUNTS
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(read_pass(net, x, counts, 0.3, clipping=clipping, uniform=uniform))
    assert np.array_equal(found[0].sums, found[1].sums)
    assert np.array_equal(found[0].factors, found[1].factors)


def summed(net: nn.Module, x: Tensor, counts: list[int], sizes: list[int], bound: float) -> np.ndarray:
    """The sum [P] of a step of physical batches of so many units each."""
    net = copy.deepcopy(net)
    trainer = make_trainer(net, max_grad_norm=bound, perf=PerfSpec(method="tile"))
    ends = np.cumsum([0, *counts])
    for first, last in itertools.pairwise([0, *itertools.accumulate(sizes)]):
        part = counts[first:last]
        with trainer.capture():
            losses = unit_losses(net, x[ends[first] : ends[last]], part)
        trainer.backward(losses, offsets=torch.tensor([0, *part]).cumsum(0))
    return torch.cat([total.flatten() for total in trainer._step.flat.sums]).double().numpy()


@pytest.mark.usefixtures("_fixed_rates")
@pytest.mark.parametrize(("counts", "bound"), [(COUNTS, 1e6), ([2] * 8, 0.3)], ids=["ragged", "clipped"])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_split_is_the_same_sum_to_the_order_of_its_terms(name, counts, bound):
    """Eight units in one batch, each on its own, and in between, with one way to the norms for all: several ways
    differ by the bound on their rounding."""
    net, x = build(name), records()[: sum(counts)]
    whole = summed(net, x, counts, [8], bound)
    assert np.linalg.norm(whole) > 0.1
    for sizes in ([1] * 8, [3, 4, 1]):
        split = summed(net, x, counts, sizes, bound)
        assert distance(split, whole) <= 2e-6
    assert np.array_equal(split, summed(net, x, counts, sizes, bound))
