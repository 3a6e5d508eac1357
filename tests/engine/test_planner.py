"""The planner: the cheapest way by its own rates, within its memory, explained; never another release."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from synthward.engine import KeySchedule, PerfSpec, PrivacyPlan, PrivateTrainer
from synthward.engine import rates as rates_module
from synthward.engine.errors import ConfigError
from synthward.engine.layout import Layout
from synthward.engine.planner import Planner
from synthward.engine.rates import Rates, measured_rates
from synthward.engine.rules.uses import DiagonalUse, OuterUse
from tests.engine.nets import accumulate
from tests.oracles import flat_parameters


def outer(units: int, rows: int, d: int, p: int) -> tuple[OuterUse, Layout]:
    use = OuterUse(torch.randn(units * rows, d), torch.randn(units * rows, p))
    return use, Layout.uniform(units, rows)


def planned(use, layout, perf: PerfSpec | None = None, kept: int = 1 << 30) -> tuple[str, object]:
    planner = Planner(perf or PerfSpec(), ["w"])
    planner.begin(kept)
    found, _ = planner.prepare(use, layout, 0)
    return planner.explain()[0].method, found


@pytest.fixture
def even(monkeypatch):
    """A machine of round numbers."""
    monkeypatch.setattr(
        "synthward.engine.planner.measured_rates", lambda device: Rates(1e11, 1e11, 1e10, 1e11, 1e11)
    )


def test_the_cheapest_way_is_chosen(even):
    assert planned(*outer(8, 1, 30, 20))[0] == "rank-1"
    assert planned(*outer(4, 32, 512, 512))[0] == "gram", "short units under a large weight"
    assert planned(*outer(2, 2048, 64, 64))[0] == "materialise", "long units under a small weight"
    method, _ = planned(*outer(2, 2048, 64, 64), kept=0, perf=PerfSpec(materialise_bytes=0))
    assert method in ("tile", "materialise"), "without memory for it: no more than is freed"


def test_what_is_materialised_stays_within_the_budget(even):
    # 8 units x 256 x 16 floats are 131 kB; the output gradients they replace are 8 x 100 x 16 floats, 51 kB.
    use, layout = outer(8, 100, 256, 16)
    method, found = planned(use, layout, PerfSpec(method="materialise", materialise_bytes=1 << 20))
    assert method == "materialise" and isinstance(found, DiagonalUse)
    planner = Planner(PerfSpec(materialise_bytes=100_000), ["a", "b"])
    planner.begin(0)
    ways = {way.method: way for way in use.ways(layout)}
    assert planner._choose([ways["materialise"], ways["tile"]], torch.zeros(1)).method == "materialise"
    planner._used = 50_000.0
    assert planner._choose([ways["materialise"], ways["tile"]], torch.zeros(1)).method == "tile"


@pytest.mark.parametrize("method", ["auto", "gram", "tile", "materialise"])
def test_every_method_releases_the_same(method):
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 9), nn.Linear(9, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    net, x = Net(), torch.randn(6, 40, 7)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    start = flat_parameters(net)
    perf = PerfSpec(method=method, materialise_bytes=1 << 20)
    trainer = PrivateTrainer(
        net, optimizer, PrivacyPlan(0.1, 0.0, 0.3, 9, 1.0), keys=KeySchedule.from_os(), perf=perf
    )
    accumulate(trainer, net, x, [2, 1, 3])
    trainer.apply()
    from tests.engine.nets import oracle

    fresh = Net()
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(torch.tensor(start).float(), fresh.parameters())
    expected = oracle(fresh, x, [2, 1, 3], 0.3)
    found = start - flat_parameters(net)
    assert np.linalg.norm(found - expected) <= 2e-4 * np.linalg.norm(expected)
    table = trainer.explain()
    assert [choice.parameter for choice in table] == ["a.weight", "a.bias", "b.weight", "b.bias"]
    if method != "auto":
        assert table[0].method == table[2].method == method
    assert str(table).splitlines()[0].split()[:2] == ["parameter", "method"]
    assert len(str(table).splitlines()) == 5


def test_kept_in_bf16_stays_within_c():
    """Norms are those of the rounded rows: what is released of one unit is at most C, and near what fp32 gives."""
    torch.manual_seed(5)
    net, x = nn.Linear(30, 20), torch.randn(4, 30)
    start = flat_parameters(net)
    plan = PrivacyPlan(0.1, 0.0, 0.25, 9, 1.0)
    trainer = PrivateTrainer(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        plan,
        keys=KeySchedule.from_os(),
        perf=PerfSpec(keep="bf16"),
    )
    for row in range(4):
        before = flat_parameters(net)
        accumulate(trainer, net, x[row : row + 1], [1])
        trainer.apply()
        norm = np.linalg.norm(before - flat_parameters(net))
        assert 0.24 < norm <= 0.25 * (1 + 1e-6)
    assert not np.array_equal(start, flat_parameters(net))


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates_module, "_known", {})
    found = measured_rates(torch.device("cpu"))
    assert min(found.gram, found.tile, found.bytes, found.product, found.library) > 1e6
    monkeypatch.setattr(rates_module, "_known", {})
    monkeypatch.setattr(rates_module, "_measure", lambda device, dtype: pytest.fail("measured again"))
    assert measured_rates(torch.device("cpu")) == found
    path = tmp_path / "synthward" / "rates.json"
    path.write_text(json.dumps({name: {"gram": -1} for name in json.loads(path.read_text())}))
    monkeypatch.setattr(rates_module, "_known", {})
    monkeypatch.setattr(rates_module, "_measure", lambda device, dtype: found)
    assert measured_rates(torch.device("cpu")) == found, "a cache that makes no sense is measured anew"


def test_settings_that_are_none():
    for settings in ({"method": "fast"}, {"keep": "half"}, {"materialise_bytes": -1}, {"products": "mine"}):
        with pytest.raises(ConfigError):
            PerfSpec(**settings)


@pytest.mark.parametrize(("rows", "d", "p"), [(1, 30, 20), (32, 512, 512), (2048, 64, 64), (128, 384, 1536)])
def test_the_choice_does_not_depend_on_how_many_units_there_are(even, rows, d, p):
    """Nor on the parameters' number: the number of units is private, and each way inflates by its own bound."""
    chosen = {planned(*outer(units, rows, d, p), kept=units * rows * 4 * (d + p))[0] for units in (1, 3, 64)}
    assert len(chosen) == 1


def test_units_of_unequal_lengths_are_measured_in_one_way(even):
    for lengths in ([1, 2], [40, 3, 0], [2000, 1]):
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        use = OuterUse(torch.randn(sum(lengths), 6), torch.randn(sum(lengths), 5))
        assert planned(use, Layout.ragged(offsets))[0] == "tile"
        assert planned(use, Layout.ragged(offsets), PerfSpec(method="gram"))[0] == "gram"
