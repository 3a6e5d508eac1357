"""Layouts: three ways to say which rows are whose, held to plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synthward.engine import Layout, PerfSpec
from synthward.engine.errors import ConfigError
from synthward.engine.rules import conv
from tests.engine.nets import make_trainer

IDS = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(ids=IDS, factor=st.integers(1, 3))
def test_ids_in_any_order(ids, factor):
    layout = Layout.from_ids(torch.tensor(ids)).expand(factor)
    repeated = [i for i in ids for _ in range(factor)]
    # Where every row is its own unit, units keep the order of the rows.
    names = ids if len(set(ids)) == len(ids) else sorted(set(ids))
    values = torch.arange(float(len(repeated)))
    expected = [sum(float(v) for v, i in zip(values, repeated, strict=True) if i == name) for name in names]
    assert layout.sum_rows(values).tolist() == expected
    assert layout.row_units.tolist() == [names.index(i) for i in repeated]
    assert layout.to_rows(torch.arange(float(layout.num_units))).tolist() == layout.row_units.tolist()
    in_order = layout.sort_rows(torch.tensor(repeated))
    assert [names.index(i) for i in in_order.tolist()] == sorted(layout.row_units.tolist())


@settings(max_examples=50, deadline=None)
@given(units=st.integers(0, 5), rows=st.integers(1, 4), factor=st.integers(1, 3))
def test_uniform_is_a_special_case_of_ragged(units, rows, factor):
    uniform = Layout.uniform(units, rows).expand(factor)
    ragged = Layout.ragged(torch.arange(0, units * rows + 1, rows)).expand(factor)
    values = torch.rand(units * rows * factor, 2)
    assert torch.equal(uniform.row_units, ragged.row_units)
    torch.testing.assert_close(uniform.sum_rows(values), ragged.sum_rows(values))
    assert torch.equal(uniform.to_rows(torch.arange(units)), ragged.to_rows(torch.arange(units)))


@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([1, 2]),
        torch.tensor([0, 2, 1]),
        torch.tensor([0.0, 1.0]),
        torch.zeros(0, dtype=torch.int64),
    ],
    ids=["start", "decreasing", "float", "empty"],
)
def test_offsets_that_are_none(offsets):
    with pytest.raises(ConfigError):
        Layout.ragged(offsets)


@pytest.mark.parametrize(
    "ids", [torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0.0]), torch.tensor([True])]
)
def test_ids_that_are_none(ids):
    with pytest.raises(ConfigError):
        Layout.from_ids(ids)


def test_offsets_of_single_rows_are_made_once():
    layout = Layout.uniform(5, 1)
    found = layout.offsets_on(torch.device("cpu"))
    assert found.tolist() == [0, 1, 2, 3, 4, 5] and found.dtype == torch.int64
    assert layout.offsets_on(torch.device("cpu")) is found and layout.row_offsets is found
    elsewhere = layout.offsets_on(torch.device("meta"))
    assert elsewhere.device.type == "meta" and layout.offsets_on(torch.device("meta")) is elsewhere
    many = Layout.uniform(2, 3)
    assert many.offsets_on(torch.device("meta")) is many.offsets, "they lie where the rows are"


def test_convolutions_of_a_pass_share_their_offsets(monkeypatch):
    """One for all layers, and for all passes over batches of one size."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten())
    trainer = make_trainer(net, perf=PerfSpec(method="tile"))
    found: list[torch.Tensor] = []
    norms = conv.conv_norms

    def noted(shape, images, grads, offsets, *sums, **options):
        found.append(offsets)
        norms(shape, images, grads, offsets, *sums, **options)

    monkeypatch.setattr(conv, "conv_norms", noted)
    x = torch.randn(4, 2, 6, 6)
    for _ in range(2):
        with trainer.capture():
            losses = net(x).square().sum(1)
        trainer.backward(losses, rows_per_unit=1)
        trainer.apply()
    assert len(found) == 4 and len({id(offsets) for offsets in found}) == 1
