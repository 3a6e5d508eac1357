"""Multi-head attention as a whole function: captured projections around torch's own attention.

The function sees [T, B, E], whatever the module was given; everything here has the batch's axis first, so that the
rows of each projection are the batch's. Projections packed into one parameter are one product where query, key and
value are one tensor, and products with disjoint parts of it where they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthward.engine.capture import CaptureState
from synthward.engine.rules import bare
from synthward.engine.rules.linear import linear

_OPERATION = "multi_head_attention_forward"


def _batch_first(state: CaptureState, inputs: Sequence[Tensor], parameter: Tensor) -> list[Tensor]:
    """Query, key and value as data [B, T, ...]; one tensor stays one tensor."""
    rows = inputs[0].shape[1] if inputs[0].dim() == 3 else 1
    found: dict[int, Tensor] = {}
    for x in inputs:
        is_batch = x.dim() == inputs[0].dim() == 3 and x.shape[1] == rows
        if not is_batch and not x.dim() == inputs[0].dim() == 2:
            shapes = [list(value.shape) for value in inputs]
            state.refuse(parameter, _OPERATION, f"its query, key and value {shapes} are not of one batch")
        if id(x) not in found:
            found[id(x)] = _turned(state, x, rows)
    return [found[id(x)] for x in inputs]


def _turned(state: CaptureState, x: Tensor, rows: int) -> Tensor:
    """One input as data, the batch's axis first."""
    turn: Callable[[Tensor], Tensor] = (lambda t: t.transpose(0, 1)) if x.dim() == 3 else lambda t: t[None]
    if state.target(x) is None:
        return turn(x)
    assert state.mode is not None
    with state.mode:
        value = turn(x)
    return bare.as_data(state, value, rows, _OPERATION)


def _projected(
    state: CaptureState, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Query, key and value [B, T, E] after their projections; `weights` are one packed one, or three."""
    query, key, value = inputs
    width = query.shape[-1]
    sizes = [width] * 3
    xs: list[Tensor] = [query, key, value]
    if len(weights) == 1 and key is value:
        sizes, xs = ([3 * width], [query]) if query is key else ([width, 2 * width], [query, key])
    parts = list(weights) if len(weights) == 3 else _split(state, weights[0], sizes)
    biases = _split(state, bias, sizes)
    outs: list[Tensor] = []
    for x, weight, part, size in zip(xs, parts, biases, sizes, strict=True):
        assert weight is not None
        outs += _linear(state, x, weight, part).chunk(size // width, dim=-1)
    return tuple(outs)


def _linear(state: CaptureState, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = linear(state, x, weight, bias)
    state.forward_bytes += out.nbytes
    return out


def _split(state: CaptureState, packed: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
    """Parts of a parameter, as parameters."""
    if packed is None or len(sizes) == 1:
        return [packed] * len(sizes)
    assert state.mode is not None
    with state.mode:
        return list(packed.split_with_sizes(sizes))


def _extended(state: CaptureState, x: Tensor, bias: Tensor | None, *, add_zero: bool) -> Tensor:
    """Keys or values [B, S, E] with the times that the layer adds: a learned one, one of zeros."""
    added = [x]
    if bias is not None:
        expand = bare.HANDLERS[Tensor.expand]
        added.append(expand(state, bias, len(x), -1, -1))
    if add_zero:
        added.append(x.new_zeros(len(x), 1, x.shape[2]))
    return torch.cat(added, 1) if len(added) > 1 else x


def _additive(state: CaptureState, mask: Tensor, dtype: torch.dtype, parameter: Tensor) -> Tensor:
    """What is added to the scores."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        state.refuse(parameter, _OPERATION, f"a mask of {mask.dtype}; only bool and floating point are masks")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _scores_mask(state: CaptureState, mask: Tensor, rows: int, heads: int) -> Tensor:
    """An additive mask [L, S] or [B * heads, L, S] as data [1 or B, 1 or heads, L, S]."""

    def spread(values: Tensor) -> Tensor:
        return values[None, None] if values.dim() == 2 else values.reshape(rows, heads, *values.shape[1:])

    if state.target(mask) is None:
        return spread(mask)
    assert state.mode is not None
    with state.mode:
        found = spread(mask)
    if mask.dim() == 3:
        return bare.as_data(state, found, rows, _OPERATION)
    expanded: Tensor = bare.HANDLERS[Tensor.expand](state, found, rows, -1, -1, -1)
    return expanded


def _masks(
    state: CaptureState,
    attn_mask: Tensor | None,
    padding: Tensor | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    parameter: Tensor,
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcast to `shape` [B, heads, L, S]; None if there is none."""
    rows, heads, length, source = shape
    found = None
    if attn_mask is not None:
        if list(attn_mask.shape) not in ([length, source], [rows * heads, length, source]):
            expected = [rows * heads, length, source]
            state.refuse(
                parameter,
                _OPERATION,
                f"its attn_mask {list(attn_mask.shape)} is not {expected[1:]} or {expected}",
            )
        found = _scores_mask(state, _additive(state, attn_mask, dtype, parameter), rows, heads)
    if padding is not None:
        state.refuse_tracked(padding, _OPERATION)
        if list(padding.shape) != [rows, source]:
            expected = [rows, source]
            state.refuse(
                parameter, _OPERATION, f"its key_padding_mask {list(padding.shape)} is not {expected}"
            )
        added = _additive(state, padding, dtype, parameter).view(rows, 1, 1, source)
        found = added if found is None else found + added
    return found


def _attend(
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    dropout: float,
    *,
    is_causal: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of heads [B, heads, T, d], and its weights if they are asked for, as torch takes either."""
    q, k, v = heads
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
    shape = (*q.shape[:3], k.shape[2])
    # Three axes, so that dropout draws what torch draws.
    q, k, v = (x.flatten(0, 1) for x in (q * math.sqrt(1.0 / q.shape[-1]), k, v))
    if mask is None:
        scores = torch.bmm(q, k.mT)
    else:
        if mask.shape[0] > 1 or mask.shape[1] > 1:
            mask = mask.expand(*shape[:2], -1, -1)
        scores = torch.baddbmm(mask.flatten(0, 1), q, k.mT)
    weights = torch.softmax(scores, -1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).view(*shape[:3], v.shape[-1]), weights.view(shape)


def multi_head_attention_forward(
    state: CaptureState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Handler of ``torch.nn.functional.multi_head_attention_forward``; query [T, B, E], key and value [S, B, ...],
    or all without B where the batch is of one row."""
    separate = [q_proj_weight, k_proj_weight, v_proj_weight]
    weights = separate if use_separate_proj_weight else [in_proj_weight]
    given = (
        *weights,
        in_proj_bias,
        out_proj_weight,
        out_proj_bias,
        bias_k,
        bias_v,
        query,
        key,
        value,
        attn_mask,
    )
    tensors = [t for t in (*given, key_padding_mask) if t is not None]
    parameter = next((t for t in tensors if state.target(t) is not None), out_proj_weight)
    if static_k is not None or static_v is not None:
        state.refuse(parameter, _OPERATION, "static_k and static_v have no rule; leave them out")
    if (bias_k is None) != (bias_v is None) or (is_causal and attn_mask is None):
        state.refuse(
            parameter, _OPERATION, "bias_k goes with bias_v, and is_causal with the attn_mask it is about"
        )
    is_batched = query.dim() == 3
    inputs = _batch_first(state, (query, key, value), parameter)
    if not is_batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    shape = (len(inputs[0]), num_heads, inputs[0].shape[1], inputs[1].shape[1])
    is_causal = is_causal and key_padding_mask is None and not need_weights
    attn_mask = None if is_causal else attn_mask
    mask = _masks(state, attn_mask, key_padding_mask, shape, query.dtype, parameter)
    q, k, v = _projected(state, inputs, weights, in_proj_bias)
    k = _extended(state, k, bias_k, add_zero=add_zero_attn)
    v = _extended(state, v, bias_v, add_zero=add_zero_attn)
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - shape[3]))
    size = (num_heads, embed_dim_to_check // num_heads)
    q, k, v = (x.reshape(*x.shape[:2], *size).transpose(1, 2) for x in (q, k, v))
    dropout = dropout_p if training else 0.0
    out, found = _attend((q, k, v), mask, dropout, is_causal=is_causal, need_weights=need_weights)
    out = _linear(state, out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if found is not None and average_attn_weights:
        found = found.mean(dim=1)
    if is_batched:
        return out.transpose(0, 1), found
    return out.squeeze(0), None if found is None else found.squeeze(0)


HANDLERS: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention_forward}
