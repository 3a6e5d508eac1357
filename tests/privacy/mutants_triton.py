"""Faults in the Triton kernels: above all in the masks of their last, incomplete blocks."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

TESTS = "tests/kernels/test_triton.py::"
NOISE = "tests/kernels/test_triton_noise.py::"
CORRELATED = "tests/kernels/test_triton_correlated.py::"
DISCRETE = "tests/kernels/test_triton_discrete.py::"
SAMPLERS = "tests/kernels/test_triton_decode.py::"
WATCHED = "tests/kernels/test_triton_guard.py::test_kernels_stay_within_their_tensors"
LIES = "tests/kernels/test_triton_guard.py::test_offsets_and_orders_that_lie_lead_nowhere_else"
DECODE = "kernels/decode/triton_impl.py"
OUTER, OUTER_SUM = "kernels/outer/triton_impl.py", "kernels/outer/triton_sum.py"
DIAGONAL = "kernels/diagonal/triton_impl.py"
SCATTER = "kernels/scatter/triton_impl.py"
UPDATE = "kernels/update/triton_impl.py"

GRAM = TESTS + "test_outer_norms[gram-17-31-ragged]"
TILE = TESTS + "test_outer_norms[tile-17-31-ragged]"
SINGLE = TESTS + "test_single_rows_give_norms_row_sums_and_squares"
SUM = TESTS + "test_outer_sum[dtype0-13-17-33]"
NORMS = "tests/kernels/test_triton_norms.py::test_norms"
TRITON_SUM = "tests/kernels/test_triton_sum.py::"
SORTED = TRITON_SUM + "test_sums_over_blocks_of_one_weight"
CUT_SUM = TRITON_SUM + "test_parts_take_each_block_once[dtype0-3]"
PLANNED = TESTS + "test_the_functions_that_the_engine_plans_with_come_here_too"

TRITON = [
    Mutant(
        "rows of bfloat16 of which a sum would lose much count like others",
        OUTER,
        "if a_ptr.dtype.element_ty == tl.bfloat16:",
        "if False:",
        ("tests/kernels/test_triton_norms.py::test_rows_of_bfloat16_beyond_a_size_count_as_infinite",),
    ),
    Mutant(
        "rank-1: the last block of columns counts in no norm",
        OUTER,
        "mask=inside[:, None] & (col < width), other=0.0).to(tl.float64)",
        "mask=inside[:, None] & (col < width // BK * BK), other=0.0).to(tl.float64)",
        (SINGLE,),
    ),
    Mutant(
        "rank-1: the last row has no norm",
        OUTER,
        "    inside = n < rows\n",
        "    inside = n < rows - 1\n",
        (SINGLE,),
    ),
    Mutant(
        "gram: the last row of a unit counts in no product of two rows",
        OUTER,
        "aa = _gram(s_a, None, s_rows, 0, d, BT, BK)",
        "aa = _gram(s_a, None, s_rows - 1, 0, d, BT, BK)",
        (GRAM,),
    ),
    Mutant(
        "gram: the last columns count in no product",
        OUTER,
        "mask=(row < s_rows) & (col < width)",
        "mask=(row < s_rows) & (col < width // 16 * 16)",
        (GRAM,),
    ),
    Mutant(
        "gram: products of two rows count once",
        OUTER,
        "tl.where(later > 0, 2.0 * term,",
        "tl.where(later > 0, term,",
        (GRAM,),
    ),
    Mutant(
        "gram: pairs of rows of two blocks count once",
        OUTER,
        "_sixteenths(2.0 * _products(aa, gg, lost_a, lost_g), BT, BT)",
        "_sixteenths(_products(aa, gg, lost_a, lost_g), BT, BT)",
        (NORMS + "[gram-dtype0-17-31-across blocks]",),
    ),
    Mutant(
        "gram: rows of a later block are those of the first",
        OUTER,
        "gg = _gram(s_g, g_ptr + bottom * p, s_rows, t_rows, p, BT, BK)",
        "gg = _gram(s_g, s_g, s_rows, t_rows, p, BT, BK)",
        (NORMS + "[gram-dtype0-17-31-across blocks]",),
    ),
    Mutant(
        "gram: what underflows counts as nothing",
        OUTER,
        "_TINY = 2.0**-126",
        "_TINY = 0.0",
        (TESTS + "test_norms_do_not_vanish_where_one_side_is_tiny[1e-23-gram_norms]",),
    ),
    Mutant(
        "tile: the last columns count in no norm",
        OUTER,
        "mask=(k < left)[:, None] & (j < d)[None, :], other=0.0)",
        "mask=(k < left)[:, None] & (j < d - 1)[None, :], other=0.0)",
        (TILE,),
    ),
    Mutant(
        "tile: the last row of a unit counts in no norm",
        OUTER,
        "mask=(k < left)[None, :] & (i < p)[:, None], other=0.0",
        "mask=(k < left - 1)[None, :] & (i < p)[:, None], other=0.0",
        (TILE,),
    ),
    Mutant(
        "tile: the last row of a gradient is not kept",
        OUTER,
        "tl.store(grads_ptr + place, acc, mask=(i < p)[:, None] & (j < d)[None, :])",
        "tl.store(grads_ptr + place, acc, mask=(i < p - 1)[:, None] & (j < d)[None, :])",
        (TESTS + "test_gradients_of_units_are_kept_if_asked_for",),
    ),
    Mutant(
        "outer_sum: the last block of rows is not summed",
        OUTER_SUM,
        "w = tl.load(weights_ptr + n, mask=n < rows, other=0.0)\n        # What",
        "w = tl.load(weights_ptr + n, mask=n < rows // BK * BK, other=0.0)\n        # What",
        (SUM,),
    ),
    Mutant(
        "outer_sum: the last columns are not summed",
        OUTER_SUM,
        "mask=live[:, None] & (j < a_stride)[None, :], other=0.0)",
        "mask=live[:, None] & (j < a_stride - 1)[None, :], other=0.0)",
        (SUM,),
    ),
    Mutant(
        "outer_sum: the last part of a tile is lost",
        OUTER_SUM,
        "for part in range(parts):",
        "for part in range(parts - 1):",
        (CUT_SUM,),
    ),
    Mutant(
        "outer_sum: the bias is not summed",
        OUTER_SUM,
        "        diagonal_weighted_sum(output_grads.contiguous(), row_weights, None, bias)\n",
        "        pass\n",
        (PLANNED,),
    ),
    Mutant(
        "outer_sum: rows are not weighted",
        OUTER_SUM,
        "g.to(tl.float32) * w[None, :], 0.0)",
        "g.to(tl.float32), 0.0)",
        (SUM,),
    ),
    Mutant(
        "outer_sum: rows of weight zero are summed",
        OUTER_SUM,
        "scaled = tl.where(live[None, :], g.to(tl.float32) * w[None, :], 0.0)",
        "scaled = g.to(tl.float32) * w[None, :]",
        (SUM,),
    ),
    Mutant(
        "outer_sum: blocks of one weight are weighted by the next one's",
        OUTER_SUM,
        "total += w * acc",
        "total += following * acc",
        (SORTED + "[dtype1-3-units of two blocks]",),
    ),
    Mutant(
        "outer_sum: a block counts as one of one weight if its first two rows do",
        OUTER_SUM,
        "axis=1) == BK",
        "axis=1) > 1",
        (SORTED + "[dtype1-3-units across blocks]",),
    ),
    Mutant(
        "outer_sum: what was added up is not forgotten when the weight changes",
        OUTER_SUM,
        "                acc = tl.zeros((BP, BD), tl.float32)\n    # A mixed",
        "    # A mixed",
        (SORTED + "[dtype1-3-units of two blocks]",),
    ),
    Mutant(
        "outer_sum: a mixed block on a seam is taken twice",
        OUTER_SUM,
        "first = tl.cdiv(tl.maximum(begin - shared, 0), COST)",
        "first = tl.maximum(begin - shared, 0) // COST",
        (TRITON_SUM + "test_parts_take_each_block_once",),
    ),
    Mutant(
        "outer_sum: three bf16 are two",
        OUTER_SUM,
        "            if TERMS > 2:\n",
        "            if TERMS > 3:\n",
        (TRITON_SUM + "test_rounding_is_what_was_asked_for[3]",),
    ),
    Mutant(
        "scaled rows: the last elements are not written",
        OUTER_SUM,
        "    inside = place < total\n",
        "    inside = place < total // 16 * 16\n",
        (TESTS + "test_scaled_rows[dtype0]",),
    ),
    Mutant(
        "unit of each slot: the last slot has none",
        "kernels/_triton.py",
        "tl.store(slots_ptr + slot, unit.to(tl.int32), mask=slot < end)",
        "tl.store(slots_ptr + slot, unit.to(tl.int32), mask=slot < end - 1)",
        (GRAM,),
    ),
    Mutant(
        "totals: the last partial result counts for nothing",
        "kernels/_triton.py",
        "tl.load(partials_ptr + place, mask=place < end, other=0.0)",
        "tl.load(partials_ptr + place, mask=place < end - 1, other=0.0)",
        (TILE, TESTS + "test_scatter_norms[4-ragged]"),
    ),
    Mutant(
        "diagonal: the last columns of single rows count in no norm",
        DIAGONAL,
        "(n[:, None] < rows) & (col < p))  # [BR, BP]",
        "(n[:, None] < rows) & (col < p // 16 * 16))  # [BR, BP]",
        (TESTS + "test_diagonal_norms[dtype0-31-rows]",),
    ),
    Mutant(
        "diagonal: the last row of a unit counts in no norm",
        DIAGONAL,
        "(n[:, None] < last) & (col < p))  # [BR, BP]",
        "(n[:, None] < last - 1) & (col < p))  # [BR, BP]",
        (TESTS + "test_diagonal_norms[dtype0-31-ragged]",),
    ),
    Mutant(
        "diagonal sum: the last row of a piece is not summed",
        DIAGONAL,
        "w = tl.load(weights_ptr + n, mask=n < last, other=0.0)",
        "w = tl.load(weights_ptr + n, mask=n < last - 1, other=0.0)",
        (TESTS + "test_diagonal_sum[False-13-131]",),
    ),
    Mutant(
        "diagonal sum: the last column is not written",
        DIAGONAL,
        "tl.store(out_ptr + col, total.to(tl.float32), mask=col < p)",
        "tl.store(out_ptr + col, total.to(tl.float32), mask=col < p - 1)",
        (TESTS + "test_diagonal_sum[True-13-131]",),
    ),
    Mutant(
        "scatter: the last row of the last span is not added",
        SCATTER,
        "end = tl.minimum(top + SPAN, rows)",
        "end = tl.minimum(top + SPAN, rows - 1)",
        (TESTS + "test_scatter_norms[32-rows]", TESTS + "test_scatter_sum[32-75-4-33]"),
    ),
    Mutant(
        "scatter: the last column of a sum is not written",
        SCATTER,
        "inside = col < tl.where(taken, p, 0)",
        "inside = col < tl.where(taken, p - 1, 0)",
        (TESTS + "test_scatter_sum[4-75-4-33]",),
    ),
    Mutant(
        "scatter: a run over several spans ends with its second",
        SCATTER,
        "more = (top < rows) & (tl.load(keys_ptr + tl.minimum(top, rows - 1)) == key)",
        "more = top < 0",
        (TESTS + "test_scatter_norms[4-long]", TESTS + "test_scatter_sum[4-75-4-33]"),
    ),
    Mutant(
        "noise: the last element gets none",
        "kernels/noise/triton_impl.py",
        "inside = (i >= 0) & (i < count)",
        "inside = (i >= 0) & (i < count - 1)",
        (NOISE + "test_normals_are_those_of_the_cpu_bit_for_bit[100-1500]",),
    ),
    Mutant(
        "noise: the first element gets none",
        "kernels/noise/triton_impl.py",
        "inside = (i >= 0) & (i < count)",
        "inside = (i > 0) & (i < count)",
        (NOISE + "test_normals_are_those_of_the_cpu_bit_for_bit[100-1500]",),
    ),
    Mutant(
        "integer noise: the last digit of the angle",
        "kernels/discrete/triton_impl.py",
        "* 3.4061215800865545e-19",
        "* 3.406121580086556e-19",
        (DISCRETE + "test_integers_are_those_of_the_cpu[1099511627776.0-0-8000]",),
    ),
    Mutant(
        "integer noise: the last sum is not released",
        "kernels/discrete/triton_impl.py",
        "        inside = (i >= 0) & (i < count)\n",
        "        inside = (i >= 0) & (i < count - 1)\n",
        (DISCRETE + "test_releases_are_those_of_the_cpu[1.0-0.0-127]",),
    ),
    Mutant(
        "Adam: the last element is not updated",
        UPDATE,
        "param_ptr, grad_ptr, m_ptr, v_ptr, i, inside, noise_std * w, keep,",
        "param_ptr, grad_ptr, m_ptr, v_ptr, i, inside & (i < count - 1), noise_std * w, keep,",
        (NOISE + "test_adam_is_that_of_the_cpu_bit_for_bit[False-1.3-700]",),
    ),
    Mutant(
        "Adam without noise: the last element is not updated",
        UPDATE,
        "param_ptr, grad_ptr, m_ptr, v_ptr, i, i < count, 0.0, keep,",
        "param_ptr, grad_ptr, m_ptr, v_ptr, i, i < count - 1, 0.0, keep,",
        (NOISE + "test_adam_is_that_of_the_cpu_bit_for_bit[False-0.0-700]",),
    ),
    Mutant(
        "SGD: the last element is not updated",
        UPDATE,
        "param_ptr, grad_ptr, buffer_ptr, i, inside, noise_std * w,",
        "param_ptr, grad_ptr, buffer_ptr, i, inside & (i < count - 1), noise_std * w,",
        (NOISE + "test_sgd_is_that_of_the_cpu_bit_for_bit[0.9-0.5-False-1.3-700]",),
    ),
    Mutant(
        "SGD without noise: the last element is not updated",
        UPDATE,
        "param_ptr, grad_ptr, buffer_ptr, i, i < count, 0.0,",
        "param_ptr, grad_ptr, buffer_ptr, i, i < count - 1, 0.0,",
        (NOISE + "test_sgd_is_that_of_the_cpu_bit_for_bit[0.9-0.5-False-0.0-700]",),
    ),
    Mutant(
        "noise: all taps take the normals of this step",
        "kernels/noise/triton_impl.py",
        "_earlier(n0, n1, j)\n            z",
        "_earlier(n0, n1, 0)\n            z",
        (CORRELATED + "test_a_step_of_more_than_32_bits_goes_back_over_their_border",),
    ),
    Mutant(
        "noise: that of earlier steps is not taken off",
        "kernels/noise/triton_impl.py",
        "            if weight != 0.0:",
        "            if weight > 1e30:",
        (CORRELATED + "test_it_is_that_of_the_cpu_bit_for_bit[blt-by_itself]",),
    ),
    Mutant(
        "watch: columns behind a row of the head are read, and not counted",
        DECODE,
        "mask=inside[:, None] & (col < p), other=0.0)\n        products",
        "mask=inside[:, None], other=0.0)\n        products",
        (WATCHED + "[decode]",),
    ),
    Mutant(
        "watch: numbers behind the last are written",
        "kernels/noise/triton_impl.py",
        "tl.store(out_ptr + i, uniform, mask=(i >= 0) & (i < count))",
        "tl.store(out_ptr + i, uniform, mask=i >= 0)",
        (WATCHED + "[uniform]",),
    ),
    Mutant(
        "watch: every program of a row adds to its first columns",
        DIAGONAL,
        "tl.store(partials_ptr + piece * p + col, total, mask=col < p)",
        "tl.store(partials_ptr + piece * p + col % BP, total, mask=col < p)",
        (WATCHED + "[diagonal sum]",),
    ),
    Mutant(
        "watch: a slot that no unit wrote begins before the matrix",
        "kernels/_triton.py",
        "return tl.maximum(first + (slot - first // STEP - unit) * STEP, first), first, last",
        "return first + (slot - first // STEP - unit) * STEP, first, last",
        (LIES + "[decreasing]",),
    ),
    Mutant(
        "watch: an offset beyond the head is followed",
        DECODE,
        "last = tl.minimum(tl.maximum(tl.load(offsets_ptr + column + 1), first), tokens)",
        "last = tl.maximum(tl.load(offsets_ptr + column + 1), first)",
        (LIES + "[all of it]",),
    ),
    Mutant(
        "samplers: the last column of a norm does not count",
        DECODE,
        "        sums += tl.load(x_ptr + n[:, None] * p + col, mask=inside, other=0.0)",
        "        sums += tl.load(x_ptr + n[:, None] * p + col, mask=inside & (col < p - 1), other=0.0)",
        (SAMPLERS + "test_features_of_far_inputs_and_wide_rows",),
    ),
    Mutant(
        "samplers: a forbidden token is drawn by a uniform number of 0",
        DECODE,
        "> target) & (share > 0.0)",
        ">= target)",
        (SAMPLERS + "test_what_is_forbidden_is_never_drawn[128]",),
    ),
    Mutant(
        "samplers: of a long column only the first tokens are drawn",
        DECODE,
        "            below += tl.sum(share, axis=0)",
        "            below += 0.0",
        (SAMPLERS + "test_borders_are_those_of_the_softmax[40]",),
    ),
]
