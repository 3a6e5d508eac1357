"""Bags of embeddings: values against torch's own, clipped sums against the float64 loop over units."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from synthward import PrivacyEngine
from synthward.engine import PerfSpec
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.rules.embedding_bag import BagUse, MaxBagUse
from synthward.engine.rules.uses import Norms, ScatterUse, Weights
from tests.engine.nets import accumulate, make_trainer, oracle, row_losses
from tests.oracles import flat_parameters

WORDS, WIDTH, LONGEST = 6, 4, 5
MODES = ("sum", "mean", "max")


def flat_bags(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Records [B, 1 + LONGEST + ...] as ids [M] and offsets [B]; the first number of each is the bag's length."""
    lengths, ids = x[:, 0].long(), x[:, 1 : 1 + LONGEST].long()
    chosen = torch.arange(LONGEST) < lengths[:, None]
    return ids[chosen], lengths.cumsum(0) - lengths


# The bags of records by (net, x): arguments of the layer.
INPUTS = {
    "bags of one length": lambda x: (x[:, 1 : 1 + LONGEST].long(),),
    "offsets": flat_bags,
    "offsets with the end": lambda x: (flat_bags(x)[0], F.pad(x[:, 0].long().cumsum(0), (1, 0))),
    "short integers": lambda x: tuple(value.int() for value in flat_bags(x)),
}


class Net(nn.Module):
    """Bags between records and a head; `bag(net, x)` may do otherwise."""

    def __init__(self, mode="sum", inputs="offsets", bag=None, **options) -> None:
        super().__init__()
        end = inputs == "offsets with the end"
        self.table = nn.EmbeddingBag(WORDS, WIDTH, mode=mode, include_last_offset=end, **options)
        self.weigh, self.head = nn.Linear(LONGEST, LONGEST), nn.Linear(WIDTH, 2)
        self.weigh.requires_grad_(bag is not None)
        self.bag = bag or (lambda net, x: net.table(*INPUTS[inputs](x)))

    def forward(self, x):
        return self.head(torch.sin(2 * self.bag(self, x)))


def records(rows: int, *, seed: int = 1) -> torch.Tensor:
    """A length 0..5, five ids 0..5 with repetitions, and five numbers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, LONGEST + 1, (rows, 1), generator=generator)
    ids = torch.randint(0, WORDS, (rows, LONGEST), generator=generator)
    return torch.cat([lengths, ids, torch.randn(rows, LONGEST, generator=generator)], 1)


def trained(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float, perf=None) -> np.ndarray:
    """The released sum, where some parameters may be frozen."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=bound, perf=perf), flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    return before - flat_parameters(net)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # What is released is read off parameters of order one.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=max(1e-6, 1e-5 * np.abs(expected).max()))


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bounds=(0.1, 1e4)) -> None:
    """Both clipped, and with a bound that clips nothing."""
    for bound in bounds:
        assert_close(trained(copy.deepcopy(net), x, counts, bound), oracle(net, x, counts, bound))


COUNTS = pytest.mark.parametrize("counts", [[1] * 7, [1], [3, 3], [2, 0, 3, 1]], ids=str)


@COUNTS
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_clipped_sums_are_exact(mode, inputs, padding_idx, counts):
    """Bags of any length, empty ones among them, for one row a unit, equal and ragged units."""
    torch.manual_seed(0)
    assert_exact(Net(mode, inputs, padding_idx=padding_idx), records(sum(counts)), counts)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_bags_are_exact(data):
    draw = data.draw
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5).filter(any))
    x = records(sum(counts), seed=draw(st.integers(0, 99)))
    x[:, 1 : 1 + LONGEST] %= draw(st.integers(1, WORDS))
    torch.manual_seed(draw(st.integers(0, 99)))
    padding_idx = draw(st.sampled_from([None, 0, 3]))
    net = Net(draw(st.sampled_from(MODES)), draw(st.sampled_from(list(INPUTS))), padding_idx=padding_idx)
    assert_exact(net, x, counts, (draw(st.sampled_from([1e-2, 1.0, 1e3])),))


def own(net, x):
    """Weights that the records have."""
    return net.table(x[:, 1 : 1 + LONGEST].long(), per_sample_weights=x[:, 1 + LONGEST :])


def flat(net, x):
    """Weights that the records have, of bags of any length."""
    chosen = torch.arange(LONGEST) < x[:, :1]
    return net.table(*flat_bags(x), per_sample_weights=x[:, 1 + LONGEST :][chosen])


def computed(net, x):
    """Weights that another layer computes."""
    weights = torch.tanh(net.weigh(x[:, 1 + LONGEST :]))
    return net.table(x[:, 1 : 1 + LONGEST].long(), per_sample_weights=weights)


def computed_flat(net, x):
    weights = torch.tanh(net.weigh(x[:, 1 + LONGEST :]))[torch.arange(LONGEST) < x[:, :1]]
    return net.table(*flat_bags(x), per_sample_weights=weights)


def learned(net, x):
    """One weight for each place in a bag."""
    weights = net.weigh.bias.expand(len(x), -1)
    return net.table(x[:, 1 : 1 + LONGEST].long(), per_sample_weights=weights)


def learned_from(net, x):
    """The same, computed from parameters and repeated."""
    weights = torch.tanh(net.weigh.weight.sum(0, keepdim=True) + net.weigh.bias).repeat(len(x), 1)
    return net.table(x[:, 1 : 1 + LONGEST].long(), per_sample_weights=weights)


WEIGHTED = [own, flat, computed, computed_flat, learned, learned_from]


@COUNTS
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("bag", WEIGHTED)
def test_weights_of_ids_are_exact(bag, padding_idx, counts):
    torch.manual_seed(0)
    assert_exact(Net(bag=bag, padding_idx=padding_idx), records(sum(counts)), counts)


@pytest.mark.parametrize("bag", WEIGHTED)
@pytest.mark.parametrize("frozen", ["table", "weigh", "head"])
def test_what_is_frozen_changes_nothing_else(frozen, bag):
    torch.manual_seed(0)
    net = Net(bag=bag)
    getattr(net, frozen).requires_grad_(False)
    assert_exact(net, records(4), [3, 1])


def tied(net, x):
    """The table is looked up, bagged and multiplied."""
    ids = x[:, 1 : 1 + LONGEST].long()
    looked = F.embedding(ids[:, 0], net.table.weight)
    return torch.sin(net.table(*flat_bags(x)) + looked) @ net.table.weight.t() @ net.table.weight


def twice(net, x):
    """Two kinds of bags of one table."""
    ids = x[:, 1 : 1 + LONGEST].long()
    return net.table(*flat_bags(x)) + torch.tanh(F.embedding_bag(ids[:, :2], net.table.weight, mode="sum"))


def looked_up(net, x):
    """A table that is bagged and looked up, and no more."""
    ids = x[:, 1 : 1 + LONGEST].long()
    return net.table(ids[:, :3]) + F.embedding(ids[:, 0], net.table.weight)


OTHERS = {
    "tied": tied,
    "twice": twice,
    "looked up": looked_up,
    "used twice": lambda net, x: net.table(*flat_bags(x)) + torch.tanh(net.table(x[:, 1:4].long())),
    "part of a table": lambda net, x: F.embedding_bag(
        x[:, 1:4].long() % 3, net.table.weight[2:5], mode=net.table.mode
    ),
    "a scaled table": lambda net, x: F.embedding_bag(
        x[:, 1:4].long(), 0.5 * net.table.weight, mode=net.table.mode
    ),
}


@COUNTS
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_other_uses_of_the_table_are_exact(mode, name, counts):
    torch.manual_seed(0)
    net = Net(mode, bag=OTHERS[name])
    net.weigh.requires_grad_(False)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.parametrize("mode", MODES)
def test_computed_weights(mode):
    torch.manual_seed(0)
    net = Net(mode, "bags of one length")
    weight_norm(net.table, "weight")
    assert_exact(net, records(4), [3, 1])


@pytest.mark.parametrize("mode", MODES)
def test_several_bags_for_each_row(mode):
    """Fields of a record, each a bag."""
    torch.manual_seed(0)

    def fields(net, x):
        bags = x[:, 1:5].long().view(-1, 2)
        return net.table(bags).view(len(x), 2, WIDTH).sin().sum(1)

    net = Net(mode, bag=fields)
    net.weigh.requires_grad_(False)
    for counts in ([1] * 4, [3, 1]):
        assert_exact(net, records(4), counts)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_units_of_shuffled_rows(mode, inputs):
    torch.manual_seed(0)
    net = Net(mode, inputs)
    net.weigh = None
    x, ids = records(7), torch.tensor([4, 0, 4, 2, 0, 4, 7])
    counts, before = torch.unique(ids, return_counts=True)[1].tolist(), flat_parameters(net)
    expected = oracle(net, x[torch.argsort(ids, stable=True)], counts, 0.1)
    engine = PrivacyEngine()
    module, optimizer, _ = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x), batch_size=7),
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
        loss_reduction="sum",
    )
    with engine.units(ids):
        row_losses(module, x).sum().backward()
    optimizer.step()
    assert_close((before - flat_parameters(net)) * 7, expected)


@pytest.mark.parametrize("counts", [[1] * 4, [1, 3]], ids=str)
@pytest.mark.parametrize("bag", [own, flat, computed, computed_flat])
def test_a_unit_that_is_not_finite_adds_nothing(bag, counts):
    torch.manual_seed(0)
    net, x = Net(bag=bag), records(4)
    x[0, 0] = 3
    for value in (torch.nan, torch.inf):
        x[0, 1 + LONGEST :] = value
        expected = oracle(net, x[1:], counts[1:], 0.1)
        assert_close(trained(copy.deepcopy(net), x, counts, 0.1), expected)


@pytest.mark.parametrize("counts", [[1] * 4, [1, 3]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_adds_nothing(mode, counts):
    torch.manual_seed(0)

    def bag(net, x):
        return net.table(*flat_bags(x)) * x[:, 1 + LONGEST :][:, :WIDTH]

    net, x = Net(mode, bag=bag), records(4)
    net.weigh.requires_grad_(False)
    x[0, 0], x[0, 1 + LONGEST] = 3, torch.inf
    expected = oracle(net, x[1:], counts[1:], 0.1)
    assert_close(trained(copy.deepcopy(net), x, counts, 0.1), expected)


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches_and_empty_bags(mode):
    torch.manual_seed(0)
    for inputs in INPUTS:
        np.testing.assert_array_equal(trained(Net(mode, inputs), records(0), [0, 0], 0.1), 0.0)
    x = records(4)
    x[:, 0] = 0
    assert_exact(Net(mode), x, [3, 1])


@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_kept_in_half_precision(mode, counts):
    torch.manual_seed(0)
    net, x = Net(mode), records(4)
    found, expected = (
        trained(copy.deepcopy(net), x, counts, 0.1, PerfSpec(keep="bf16")),
        oracle(net, x, counts, 0.1),
    )
    assert 0 < np.linalg.norm(found - expected) <= 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    torch.manual_seed(0)
    net, x = Net(mode), records(4)
    expected = oracle(net, x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(net, x, [2, 2], 0.1)
    assert 0 < np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_torch(mode, inputs, padding_idx):
    torch.manual_seed(0)
    net, x = Net(mode, inputs, padding_idx=padding_idx), records(6)
    expected = net.table(*INPUTS[inputs](x))
    trainer = make_trainer(net, torch.optim.SGD([*net.table.parameters(), *net.head.parameters()]))
    with trainer.capture():
        found = net.table(*INPUTS[inputs](x))
    torch.testing.assert_close(found, expected)
    assert [call[0] for call in trainer._step.state.calls] == ["embedding_bag"]


def test_what_is_kept_is_of_the_size_of_the_output():
    """However long the bags: no output gradient is repeated for their ids."""
    torch.manual_seed(0)
    net, kept = nn.EmbeddingBag(WORDS, 64, mode="sum"), []
    trainer, ids = make_trainer(net), torch.randint(0, WORDS, (2, 300))
    with trainer.capture():
        out = net(ids)
    with trainer._step.state.probe(kept.append):
        out.square().sum().backward()
    ((_, use),) = kept[0].uses
    assert isinstance(use, BagUse)
    assert (
        sum(value.nbytes for value in vars(use).values() if torch.is_tensor(value))
        == 2 * 64 * 4 + 2 * 600 * 8
    )


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2], [3, 0, 1]], ids=str)
@pytest.mark.parametrize("kind", ["bag", "max"])
def test_norm_sum_and_gradients_of_a_use_agree(kind, counts):
    """Ids repeat within a bag and between bags of a unit."""
    generator, rows, units = torch.Generator().manual_seed(0), sum(counts), len(counts)
    grads = torch.randn(rows, WIDTH, generator=generator)
    if kind == "bag":
        lengths = torch.randint(0, 4, (rows,), generator=generator)
        bags = torch.arange(rows).repeat_interleave(lengths)
        ids = torch.randint(-1, 3, (len(bags),), generator=generator)
        use = BagUse(ids, bags, torch.randn(len(bags), generator=generator), grads, 3)
    else:
        use = MaxBagUse(torch.randint(-1, 3, (rows, WIDTH), generator=generator), grads, 3)
    layout = Layout.ragged(torch.tensor([0, *counts]).cumsum(0))
    found, row_sums = torch.zeros(units), torch.zeros(units)
    use.add_norms(found, row_sums, layout, Norms())
    formed = use.unit_grads(layout, 0, units)
    torch.testing.assert_close(found, formed.square().sum(1))
    assert (row_sums * (1 + 1e-6) >= formed.norm(dim=1)).all()
    torch.testing.assert_close(use.unit_grads(layout, 1, units), formed[1:])
    weights, total = torch.rand(units, generator=generator), torch.zeros(3, WIDTH)
    use.add_weighted_sum(Weights(layout.to_rows(weights)), total)
    torch.testing.assert_close(total.flatten(), weights @ formed)
    assert not isinstance(use, ScatterUse)


WHERE = r"'table\.weight' in operation 'embedding_bag': "
IDS = torch.arange(4).view(2, 2)
REFUSED = {
    "max_norm": (lambda net: F.embedding_bag(IDS, net.table.weight, max_norm=1.0), f"{WHERE}max_norm"),
    "frequencies": (
        lambda net: F.embedding_bag(IDS, net.table.weight, scale_grad_by_freq=True),
        f"{WHERE}scale_grad_by_freq",
    ),
    "sparse": (lambda net: F.embedding_bag(IDS, net.table.weight, sparse=True), f"{WHERE}sparse=True"),
    "ids that are numbers": (
        lambda net: F.embedding_bag(IDS.float(), net.table.weight),
        f"{WHERE}its ids must",
    ),
    "three axes": (lambda net: F.embedding_bag(IDS[None], net.table.weight), f"{WHERE}its ids must"),
    "nested": (
        lambda net: F.embedding_bag(
            torch.nested.nested_tensor([IDS[0], IDS[1, :1]], layout=torch.jagged), net.table.weight
        ),
        f"{WHERE}its ids must",
    ),
    "no offsets": (lambda net: F.embedding_bag(IDS[0], net.table.weight), f"{WHERE}.*need offsets"),
    "offsets of bags": (
        lambda net: F.embedding_bag(IDS, net.table.weight, torch.tensor([0, 1])),
        f"{WHERE}.*have none",
    ),
    "offsets that begin late": (
        lambda net: F.embedding_bag(IDS[0], net.table.weight, torch.tensor([1, 2])),
        f"{WHERE}its offsets must begin with 0",
    ),
    "offsets that decrease": (
        lambda net: F.embedding_bag(IDS.view(-1), net.table.weight, torch.tensor([0, 3, 1])),
        f"{WHERE}its offsets must",
    ),
    "ids left out": (
        lambda net: F.embedding_bag(
            IDS.view(-1), net.table.weight, torch.tensor([0, 2, 3]), include_last_offset=True
        ),
        f"{WHERE}its offsets must",
    ),
    "no end": (
        lambda net: F.embedding_bag(
            IDS.view(-1), net.table.weight, torch.tensor([], dtype=torch.int64), include_last_offset=True
        ),
        f"{WHERE}its offsets must",
    ),
    "weights of a mean": (
        lambda net: F.embedding_bag(IDS, net.table.weight, mode="mean", per_sample_weights=torch.ones(2, 2)),
        f"{WHERE}per_sample_weights go with mode='sum', not 'mean'",
    ),
    "a parameter as weights": (
        lambda net: F.embedding_bag(
            IDS, net.table.weight, mode="sum", per_sample_weights=net.weigh.weight[:2, :2]
        ),
        r"'weigh\.weight' in operation 'embedding_bag': its first axis .length 2. lies along the batch's",
    ),
    "a parameter as flat weights": (
        lambda net: F.embedding_bag(
            IDS.view(-1),
            net.table.weight,
            torch.tensor([0, 1]),
            mode="sum",
            per_sample_weights=net.weigh.bias[:4],
        ),
        r"'weigh\.bias' in operation 'embedding_bag': learned weights of bags need ids \[bags, n\]",
    ),
    "a parameter as ids": (
        lambda net: F.embedding_bag(net.head.bias, net.table.weight, torch.tensor([0])),
        r"'head\.bias' in operation 'embedding_bag': a parameter as the input",
    ),
    "rows that are no multiple": (
        lambda net: F.embedding_bag(IDS.view(-1)[:3], net.table.weight, torch.tensor([0, 1, 2])),
        f"{WHERE}its input has 3 rows where the batch has 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_parameter_and_operation(name):
    torch.manual_seed(0)
    operation, message = REFUSED[name]

    def bag(net, x):
        found = operation(net)
        return x[:, :WIDTH] + found.sum()

    with pytest.raises(UnsupportedOperationError, match=message):
        trained(Net(bag=bag), records(2), [1, 1], 0.1)


def test_a_second_derivative_is_refused():
    net, weights = Net(), torch.rand(2, 2, requires_grad=True)
    trainer = make_trainer(net, torch.optim.SGD([*net.table.parameters(), *net.head.parameters()]))
    with (
        trainer.capture(),
        pytest.raises(UnsupportedOperationError, match=r"embedding_bag.*differentiated again"),
    ):
        out = net.table(IDS, per_sample_weights=weights)
        torch.autograd.grad(out.square().sum(), weights, create_graph=True)
