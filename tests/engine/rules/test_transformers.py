"""Transformers' whole modules, learned queries and masks, and what attention refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synthward.engine.errors import UnsupportedOperationError
from tests.engine.nets import make_trainer
from tests.engine.rules.test_attention import (
    HEADS,
    SOURCE,
    TIMES,
    WIDTH,
    assert_exact,
    causal,
    layer,
    padding,
    records,
    trained,
)

# learned queries and masks


class Learned(nn.Module):
    """`operation` on a layer, parameters of given shapes and the batch."""

    def __init__(self, operation, *, batch_first: bool = False, **shapes) -> None:
        super().__init__()
        self.mha, self.operation = layer(batch_first=batch_first), operation
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return torch.sin(2 * self.operation(self, x)).flatten(1)


def time_first(net, q, k, **options):
    """The layer on a query [Q, B, E] and records [B, S, E]."""
    k = k.transpose(0, 1)
    return net.mha(q, k, k, **options)[0].transpose(0, 1)


def masked(net, x, mask, **options):
    x = x.transpose(0, 1)
    return net.mha(x, x, x, attn_mask=mask, **options)[0].transpose(0, 1)


LEARNED = {
    "queries, expanded": (
        lambda net, x: time_first(net, net.q.expand(-1, len(x), -1), x),
        {"q": (2, 1, WIDTH)},
    ),
    "queries, repeated": (
        lambda net, x: time_first(net, net.q.unsqueeze(1).repeat(1, len(x), 1), x),
        {"q": (2, WIDTH)},
    ),
    "queries, scaled": (
        lambda net, x: time_first(net, (2 * net.q.unsqueeze(1)).expand(-1, len(x), -1), x),
        {"q": (2, WIDTH)},
    ),
    "a mask": (lambda net, x: masked(net, x, net.m), {"m": (SOURCE, SOURCE)}),
    "a mask, with weights left out": (
        lambda net, x: masked(net, x, net.m, need_weights=False),
        {"m": (SOURCE, SOURCE)},
    ),
    "a part of a mask": (lambda net, x: masked(net, x, net.m[1:, 2:]), {"m": (SOURCE + 1, SOURCE + 2)}),
    "a mask for each head": (
        lambda net, x: masked(net, x, net.m.repeat(len(x), 1, 1)),
        {"m": (HEADS, SOURCE, SOURCE)},
    ),
    "a mask beside padding": (
        lambda net, x: masked(net, x, net.m, key_padding_mask=torch.sin(x[..., 0])),
        {"m": (SOURCE, SOURCE)},
    ),
}


@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3, 1], [1], [1] * SOURCE], ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_learned_queries_and_masks_are_exact(name, counts):
    torch.manual_seed(0)
    operation, shapes = LEARNED[name]
    assert_exact(Learned(operation, **shapes), records(sum(counts)), counts)


def test_one_row_without_a_batch_axis_is_exact():
    for need_weights in (True, False):
        net = Learned(lambda net, x: net.mha(x[0], x[0], x[0], need_weights=need_weights)[0][None])  # noqa: B023
        assert_exact(net, records(1), [1])
    net = Learned(lambda net, x: net.mha(x[0], x[0], x[0], key_padding_mask=padding(x)[0])[0][None])
    assert_exact(net, records(1), [1])


# whole modules


class Whole(nn.Module):
    """A transformer's module on `run(net, x)`, x batch first."""

    def __init__(self, inner: nn.Module, run, batch_first: bool) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, 2)
        self.run, self.batch_first = run, batch_first

    def forward(self, x):
        h = self.stem(x)
        h = h if self.batch_first else h.transpose(0, 1)
        out = self.run(self.inner, h, h[:, :TIMES] if self.batch_first else h[:TIMES], padding(x))
        out = out if self.batch_first else out.transpose(0, 1)
        return self.head(out).flatten(1)


def transformer(kind, **options):
    return kind(WIDTH, HEADS, 6, **options)


SIZES = {"num_encoder_layers": 2, "num_decoder_layers": 2, "dim_feedforward": 6}
WHOLE = {
    "encoder layer": (
        lambda **options: transformer(nn.TransformerEncoderLayer, **options),
        lambda inner, h, tgt, pad: inner(h, src_key_padding_mask=pad),
    ),
    "causal encoder layer": (
        lambda **options: transformer(
            nn.TransformerEncoderLayer, norm_first=True, activation="gelu", **options
        ),
        lambda inner, h, tgt, pad: inner(h, src_mask=causal(SOURCE, SOURCE), is_causal=True),
    ),
    "encoder": (
        lambda **options: nn.TransformerEncoder(
            transformer(nn.TransformerEncoderLayer, **options), 2, nn.LayerNorm(WIDTH)
        ),
        lambda inner, h, tgt, pad: inner(h, src_key_padding_mask=pad),
    ),
    "decoder layer": (
        lambda **options: transformer(nn.TransformerDecoderLayer, **options),
        lambda inner, h, tgt, pad: inner(
            tgt, h, tgt_mask=causal(TIMES, TIMES), memory_key_padding_mask=pad, tgt_is_causal=True
        ),
    ),
    "decoder layer without biases": (
        lambda **options: transformer(nn.TransformerDecoderLayer, bias=False, norm_first=True, **options),
        lambda inner, h, tgt, pad: inner(tgt, h),
    ),
    "transformer": (
        lambda **options: nn.Transformer(WIDTH, HEADS, **SIZES, **options),
        lambda inner, h, tgt, pad: inner(
            h,
            tgt,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(TIMES).to(h),
            src_key_padding_mask=pad,
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize("counts", [[1] * 4, [2, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules_are_exact(name, is_training, counts):
    """Also in evaluation mode, where torch has fused kernels for some of them."""
    torch.manual_seed(0)
    build, run = WHOLE[name]
    dropout = 0.0 if is_training else 0.3
    net = Whole(build(batch_first=True, dropout=dropout), run, True).train(is_training)
    assert_exact(net, records(sum(counts)), counts)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:Support for mismatched")
@pytest.mark.parametrize("rows", [SOURCE, TIMES, 4, 2 * SOURCE, 1])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_modules_with_time_first_are_refused(name, rows):
    """Their other layers see times in the place of the batch: as many as rows, another number, a multiple."""
    torch.manual_seed(0)
    build, run = WHOLE[name]
    net = Whole(build(batch_first=False, dropout=0.0), run, False)
    counts = [1] * rows if rows > 1 else [1, 1]
    with pytest.raises(UnsupportedOperationError, match=r"'inner\.\S+' in operation '(linear|layer_norm)': "):
        trained(net, records(len(counts), SOURCE if rows > 1 else 6), counts, 0.1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_evaluation_without_gradients_takes_torchs_own_path(batch_first):
    torch.manual_seed(0)
    build, run = WHOLE["encoder layer"]
    net, x = Whole(build(batch_first=batch_first), run, batch_first).eval(), records(4)
    trainer = make_trainer(net)
    with torch.no_grad():
        expected = net(x)
        with trainer.capture():
            found = net(x)
    torch.testing.assert_close(found, expected)
    assert not trainer._step.state.calls


def test_all_weights_frozen_but_one():
    """A frozen encoder under a new head, and one trained bias within it."""
    torch.manual_seed(0)
    build, run = WHOLE["encoder layer"]
    net = Whole(build(batch_first=True, dropout=0.0), run, True).requires_grad_(False)
    net.head.requires_grad_(True)
    assert_exact(copy.deepcopy(net), records(4), [3, 1])
    net.inner.self_attn.in_proj_bias.requires_grad_(True)
    assert_exact(net, records(4), [3, 1])


# refusals


def call(net, x, **changes):
    """The function itself, past the checks of the layer."""
    mha, x = net.mha, x.transpose(0, 1)
    positional = (mha.bias_k, mha.bias_v, False, 0.0, mha.out_proj.weight, mha.out_proj.bias)
    names = ("query", "key", "value")
    q, k, v = (changes.pop(name, x) for name in names)
    weights = (mha.in_proj_weight, mha.in_proj_bias)
    out, _ = F.multi_head_attention_forward(q, k, v, WIDTH, HEADS, *weights, *positional, **changes)
    return out.transpose(0, 1)


WHERE = "'mha.in_proj_weight' in operation 'multi_head_attention_forward': "
REFUSED = {
    "static keys": (lambda net, x: call(net, x, static_k=x.new_zeros(4 * HEADS, 1, 2)), f"{WHERE}static_k"),
    "static values": (lambda net, x: call(net, x, static_v=x.new_zeros(4 * HEADS, 1, 2)), f"{WHERE}static_k"),
    "a hint without its mask": (lambda net, x: call(net, x, is_causal=True), f"{WHERE}.*is_causal with"),
    "one added key": (
        lambda net, x: F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3,
            *(WIDTH, HEADS, net.mha.in_proj_weight, net.mha.in_proj_bias, x.new_zeros(1, 1, WIDTH), None),
            *(False, 0.0, net.mha.out_proj.weight, net.mha.out_proj.bias),
        )[0],
        f"{WHERE}bias_k goes with bias_v",
    ),
    "other rows": (
        lambda net, x: call(net, x, key=x[:1].transpose(0, 1)),
        f"{WHERE}its query, key and value",
    ),
    "a wrong mask": (
        lambda net, x: call(net, x, attn_mask=x.new_zeros(1, SOURCE)),
        f"{WHERE}its attn_mask .1, 5.",
    ),
    "wrong heads": (
        lambda net, x: call(net, x, attn_mask=x.new_zeros(HEADS, SOURCE, SOURCE)),
        f"{WHERE}its attn_mask .2, 5, 5. is not .5, 5. or .8, 5, 5.",
    ),
    "wrong padding": (
        lambda net, x: call(net, x, key_padding_mask=x.new_zeros(1, SOURCE)),
        f"{WHERE}its key_padding_mask .1, 5. is not .4, 5.",
    ),
    "a mask of numbers": (
        lambda net, x: call(net, x, attn_mask=torch.zeros(SOURCE, SOURCE, dtype=torch.int64)),
        f"{WHERE}a mask of torch.int64",
    ),
    "learned padding": (
        lambda net, x: call(net, x, key_padding_mask=net.p),
        "'p' in operation 'multi_head_attention_forward': a parameter as the input",
    ),
    "a query for each place": (
        lambda net, x: call(net, x, query=net.q),
        "'q' in operation 'multi_head_attention_forward': its first axis .length 4. lies along the batch's",
    ),
    "a mask for each place": (
        lambda net, x: call(net, x, attn_mask=net.m),
        "'m' in operation 'multi_head_attention_forward': its first axis .length 4. lies along the batch's",
    ),
    "unbatched": (
        lambda net, x: net.mha(x[:, 0], x[:, 0], x[:, 0])[0],
        "'mha.* in operation 'linear': its input has 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_parameter_and_operation(name):
    torch.manual_seed(0)
    operation, message = REFUSED[name]
    shapes = {"p": (4, SOURCE), "q": (2, 4, WIDTH), "m": (4 * HEADS, SOURCE, SOURCE)}
    with pytest.raises(UnsupportedOperationError, match=message):
        trained(Learned(operation, **shapes), records(4), [1] * 4, 0.1)


@pytest.mark.parametrize("rows", [SOURCE, 1 + SOURCE, 2 * SOURCE, 1])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_batch_axis_in_the_place_of_time_is_refused(rows, need_weights):
    """As many times as rows, another number, a divisor and a multiple."""
    net = Learned(lambda net, x: net.mha(x, x, x, need_weights=need_weights)[0])
    x, counts = records(rows), [1] * rows
    if rows == 1:
        x, counts = records(2, 4), [1, 1]
    with pytest.raises(UnsupportedOperationError, match=r"'mha.* in operation 'linear'"):
        trained(net, x, counts, 0.1)


def test_a_learned_mask_of_the_fused_function_is_refused_with_what_to_do():
    """And what the message says is exact."""

    def attend(net, x, mask):
        h = net.mha.out_proj(x).unsqueeze(1)
        return F.scaled_dot_product_attention(h, h, h, mask)

    shapes = {"m": (1, 1, SOURCE, SOURCE)}
    with pytest.raises(UnsupportedOperationError, match=r"'m' in.*mask\.expand\(rows, -1, -1, -1\)"):
        trained(Learned(lambda net, x: attend(net, x, net.m), **shapes), records(4), [1] * 4, 0.1)
    net = Learned(lambda net, x: attend(net, x, net.m.expand(len(x), -1, -1, -1)), **shapes)
    for name, parameter in net.mha.named_parameters():
        parameter.requires_grad_("out_proj" in name)
    assert_exact(net, records(4), [1] * 4)


def test_a_second_derivative_is_refused():
    net, x = Learned(None), records(4).requires_grad_()
    trainer = make_trainer(net)
    with trainer.capture(), pytest.raises(UnsupportedOperationError, match="differentiated again"):
        torch.autograd.grad(net.mha(x, x, x)[0].square().sum(), x, create_graph=True)
