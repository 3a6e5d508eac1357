"""Multi-head attention as a whole function: values against torch's own, clipped sums against the float64 loop."""

from __future__ import annotations

import contextlib
import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from synthward.engine.capture import CaptureMode, CaptureState
from synthward.engine.rules.registry import CHECKS, HANDLERS, HINTS
from tests.engine.nets import accumulate, make_trainer, oracle, unit_losses
from tests.oracles import flat_parameters

TIMES, SOURCE, WIDTH, HEADS = 3, 5, 4, 2
KINDS = {
    "plain": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 3, "vdim": 6},
    "other widths, no bias": {"kdim": 3, "vdim": 6, "bias": False},
    "added key": {"add_bias_kv": True},
    "added zero": {"add_zero_attn": True},
    "added key and zero": {"add_bias_kv": True, "add_zero_attn": True},
}


def padding(x: torch.Tensor) -> torch.Tensor:
    """Times that a record does not have [B, S]: the first is always there."""
    mask = x[..., 0] > 0.5
    return mask & (torch.arange(x.shape[1]) > 0)


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1)


def bias(*shape: int) -> torch.Tensor:
    return torch.sin(torch.arange(float(np.prod(shape))).view(shape) * 1.7)


# Masks by (query, key), the batch's axis first.
MASKS = {
    "none": lambda q, k: {},
    "padding": lambda q, k: {"key_padding_mask": padding(k)},
    "float padding": lambda q, k: {"key_padding_mask": torch.sin(k[..., 0].detach())},
    "causal": lambda q, k: {"attn_mask": causal(q.shape[1], k.shape[1])},
    "causal, by hint": lambda q, k: {"attn_mask": causal(q.shape[1], k.shape[1]), "is_causal": True},
    "float": lambda q, k: {"attn_mask": bias(q.shape[1], k.shape[1]).to(q)},
    "for each head": lambda q, k: {"attn_mask": bias(len(q) * HEADS, q.shape[1], k.shape[1]).to(q)},
    "both": lambda q, k: {"attn_mask": causal(q.shape[1], k.shape[1]), "key_padding_mask": padding(k)},
    "both, by hint": lambda q, k: {
        "attn_mask": causal(q.shape[1], k.shape[1]),
        "key_padding_mask": padding(k),
        "is_causal": True,
    },
}
# Which of query, key and value are one tensor.
TIES = {
    "self": lambda net, h: (h, h, h),
    "memory": lambda net, h: (h[:, :TIMES], net.memory(h), None),
    "query is key": lambda net, h: (h, h, torch.cos(h)),
    "query is value": lambda net, h: (h, torch.cos(h), h),
    "all differ": lambda net, h: (h[:, :TIMES], torch.cos(h), h * h),
}


class Net(nn.Module):
    """Attention between two layers; the loss sees its output, and its weights if there are any."""

    def __init__(self, attention, tie="self", mask="none", **options) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 2)
        self.attention, self.memory = attention, nn.Linear(WIDTH, WIDTH)
        self.keys, self.values = nn.Linear(WIDTH, attention.kdim), nn.Linear(WIDTH, attention.vdim)
        self.tie, self.mask, self.options = TIES[tie], MASKS[mask], options
        if tie != "memory":
            self.memory.requires_grad_(False)
        self.has_widths = attention.kdim != WIDTH
        if not self.has_widths:
            self.keys.requires_grad_(False), self.values.requires_grad_(False)

    def inputs(self, x):
        q, k, v = self.tie(self, torch.tanh(self.stem(x)))
        v = k if v is None else v
        return (q, self.keys(k), self.values(v)) if self.has_widths else (q, k, v)

    def forward(self, x):
        out, weights = self.attend(*self.inputs(x), **self.mask(*self.inputs(x)[:2]))
        found = torch.sin(3 * out).flatten(1).sum(1, keepdim=True)
        if weights is not None:
            found = found + torch.cos(5 * weights).flatten(1).sum(1, keepdim=True)
        return self.head(found)

    def attend(self, query, key, value, **masks):
        if self.attention.batch_first:
            return self.attention(query, key, value, **masks, **self.options)
        turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        query, key, value = (turned[id(x)] for x in (query, key, value))
        out, weights = self.attention(query, key, value, **masks, **self.options)
        return out.transpose(0, 1), weights


def layer(kind: str = "plain", *, batch_first: bool = True, **changes) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **KINDS[kind], **changes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def records(rows: int, times: int = SOURCE) -> torch.Tensor:
    return torch.randn(rows, times, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, x: torch.Tensor, counts: list[int], bound: float) -> np.ndarray:
    """The released sum, where some parameters may be frozen."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    trainer, before = make_trainer(net, optimizer, max_grad_norm=bound), flat_parameters(net)
    accumulate(trainer, net, x, counts)
    trainer.apply()
    return before - flat_parameters(net)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    # What is released is read off parameters of order one.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=max(1e-6, 1e-5 * np.abs(expected).max()))


def assert_exact(net: nn.Module, x: torch.Tensor, counts: list[int], bounds=(0.1,)) -> None:
    for bound in bounds:
        assert_close(trained(copy.deepcopy(net), x, counts, bound), oracle(net, x, counts, bound))


def captured(module: nn.Module) -> CaptureState:
    named = list(module.named_parameters())
    state = CaptureState([p for _, p in named], [name for name, _ in named])
    state.mode = CaptureMode(state, HANDLERS, CHECKS, HINTS)
    return state


# values


OPTIONS = ({}, {"average_attn_weights": False}, {"need_weights": False})
CASES = [("plain", tie) for tie in TIES] + [(kind, tie) for kind in KINDS for tie in ("self", "all differ")][
    2:
]


def outputs(net: Net, inputs: list[torch.Tensor], mode) -> list[torch.Tensor]:
    """Output, weights and gradients of the inputs; seeds dropout."""
    torch.manual_seed(5)
    with mode:
        out, weights = net.attend(*inputs, **net.mask(*inputs[:2]))
    found = [out] if weights is None else [out, weights]
    leaves = list({id(x): x for x in inputs}.values())
    return [*found, *torch.autograd.grad(sum(torch.sin(2 * part).sum() for part in found), leaves)]


@pytest.mark.parametrize(
    ("kind", "tie", "mask"),
    [(*case, "both") for case in CASES] + [("added key and zero", "memory", mask) for mask in MASKS],
)
def test_values_are_those_of_torch(kind, tie, mask):
    """Output, weights and gradients of the inputs, with dropout drawn as torch draws it."""
    for options in OPTIONS:
        for batch_first, dropout in ((True, 0.0), (False, 0.4)):
            attention = layer(kind, batch_first=batch_first, dropout=dropout)
            net = Net(attention, tie, mask, **options).double()
            made = net.inputs(records(4).double())
            leaves = {id(x): x.detach().requires_grad_() for x in made}
            inputs = [leaves[id(x)] for x in made]
            state = captured(net.attention)
            results = [outputs(net, inputs, mode) for mode in (contextlib.nullcontext(), state.mode)]
            for actual, expected in zip(*reversed(results), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
            is_separate = "other" in kind or tie not in ("self", "memory")
            products = 4 if is_separate else 2 if tie == "self" else 3
            assert [call[0] for call in state.calls].count("linear") == products


def test_a_layer_in_evaluation_mode_is_captured_all_the_same():
    """Its fused path must not take it past the capture."""
    for batch_first in (True, False):
        net = Net(layer(batch_first=batch_first, dropout=0.4), need_weights=False).eval()
        assert_exact(net, records(4), [1] * 4)


# per-unit gradients


@pytest.mark.parametrize("counts", [[1] * TIMES, [1] * SOURCE, [1], [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize(("kind", "tie"), CASES)
def test_clipped_sums_are_exact(kind, tie, counts):
    """As many rows as times of the queries or the keys, one row, and ragged units."""
    net = Net(layer(kind, batch_first=len(counts) == TIMES), tie)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.parametrize(("kind", "tie"), CASES)
def test_a_bound_that_clips_nothing_gives_the_plain_gradient(kind, tie):
    assert_exact(Net(layer(kind), tie), records(5), [2, 3], (1e4,))


@pytest.mark.parametrize("counts", [[1] * TIMES, [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_clipped_sums_under_masks_are_exact(mask, batch_first, counts):
    for need_weights in (True, False):
        if mask == "for each head":
            # The mask of a row must not depend on its place in the batch.
            net = Net(layer(batch_first=batch_first), need_weights=need_weights)
            net.mask = lambda q, k: {
                "attn_mask": torch.einsum("bld,bsd->bls", q, k).repeat_interleave(HEADS, 0)
            }
        else:
            net = Net(layer(batch_first=batch_first), "memory", mask, need_weights=need_weights)
        assert_exact(net, records(sum(counts)), counts)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_setting_is_exact(data):
    draw = data.draw
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = {} if draw(st.booleans()) else {"kdim": draw(st.integers(1, 5)), "vdim": draw(st.integers(1, 5))}
    flags = {name: draw(st.booleans()) for name in ("bias", "add_bias_kv", "add_zero_attn", "batch_first")}
    torch.manual_seed(draw(st.integers(0, 99)))
    mha = nn.MultiheadAttention(heads * width, heads, **sizes, **flags)
    query, source = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    need_weights, is_self = draw(st.booleans()), draw(st.booleans()) and not sizes

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = mha
            self.q, self.k, self.v = (nn.Linear(2, n) for n in (mha.embed_dim, mha.kdim, mha.vdim))
            if is_self:
                self.k.requires_grad_(False), self.v.requires_grad_(False)

        def forward(self, x):
            q = self.q(x[:, :query])
            if is_self:
                k = v = q
            else:
                k, v = self.k(x[:, query:]), self.v(torch.sin(x[:, query:]))
            if mha.batch_first:
                return self.mha(q, k, v, need_weights=need_weights)[0]
            turned = {id(t): t.transpose(0, 1) for t in (q, k, v)}
            q, k, v = (turned[id(t)] for t in (q, k, v))
            return self.mha(q, k, v, need_weights=need_weights)[0].transpose(0, 1)

    x = torch.randn(sum(counts), query + source, 2)
    assert_exact(Drawn(), x, counts, (draw(st.sampled_from([1e-2, 1.0, 1e3])),))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_exact(need_weights):
    net, x = Net(layer("added key", dropout=0.5), "memory", need_weights=need_weights), records(4)
    torch.manual_seed(3)
    unit_losses(net, x, [1, 3]).sum().backward()
    trainable = [p for p in net.parameters() if p.requires_grad]
    expected = np.concatenate([p.grad.double().flatten().numpy() for p in trainable])
    net.zero_grad()
    torch.manual_seed(3)
    assert_close(trained(net, x, [1, 3], 1e4), expected)


FROZEN = ("in_proj_weight", "in_proj_bias", "out_proj", "bias_k", "bias_v", "proj", "bias", "weight", "")


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("tie", ["self", "memory", "all differ"])
def test_what_is_frozen_changes_nothing_else(tie, frozen):
    net = Net(layer("added key"), tie)
    for name, parameter in net.attention.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_exact(net, records(4), [3, 1])


@pytest.mark.parametrize("kind", ["plain", "other widths", "added key and zero"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_unit_that_is_not_finite_adds_nothing(kind, need_weights):
    net, x = Net(layer(kind), "memory", need_weights=need_weights), records(4)
    for value in (torch.nan, torch.inf):
        x[2, 1, 0] = value
        expected = oracle(net, x[[0, 1, 3]], [1] * 3, 0.1)
        assert_close(trained(copy.deepcopy(net), x, [1] * 4, 0.1), expected)


def test_a_row_that_may_look_at_nothing_adds_nothing():
    """All keys masked: its weights are NaN, as torch's are."""
    net, x = Net(layer()), records(4)
    net.mask = lambda q, k: {"key_padding_mask": (torch.arange(len(q)) == 2)[:, None].expand(-1, k.shape[1])}
    found = trained(copy.deepcopy(net), x, [1] * 4, 0.1)
    net.mask = MASKS["none"]
    assert_close(found, oracle(net, x[[0, 1, 3]], [1] * 3, 0.1))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["plain", "added key and zero"])
def test_autocast(kind, need_weights):
    net, x = Net(layer(kind), "memory", "padding", need_weights=need_weights), records(4)
    expected = oracle(net, x, [2, 2], 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = trained(net, x, [2, 2], 0.1)
    assert np.linalg.norm(found - expected) <= 3e-2 * np.linalg.norm(expected)


class Twice(nn.Module):
    """A layer over its own output, and over both."""

    batch_first, kdim, vdim = True, WIDTH, WIDTH

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, q, k, v):
        out, _ = self.inner(q, k, v)
        return self.inner(out, k, k)


class Recomputed(Twice):
    def forward(self, q, k, v):
        return checkpoint(self.inner, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("around", [Twice, Recomputed])
@pytest.mark.parametrize("counts", [[1] * 4, [3, 1]], ids=str)
def test_a_layer_called_twice_and_one_recomputed(around, counts):
    assert_exact(Net(around(layer("added key")), "self"), records(4), counts)


def test_computed_weights():
    net = Net(layer(), "all differ")
    for name in ("in_proj_weight", "in_proj_bias"):
        weight_norm(net.attention, name)
    assert_exact(net, records(4), [3, 1])


@pytest.mark.parametrize("need_weights", [True, False])
def test_an_empty_batch(need_weights):
    net = Net(layer("added key"), "memory", "both", need_weights=need_weights)
    np.testing.assert_array_equal(trained(net, records(0), [0, 0], 0.1), 0.0)


def test_no_warning_is_given_of_its_own():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(Net(layer("added key and zero"), "memory", "both"), records(4), [1] * 4, 0.1)
