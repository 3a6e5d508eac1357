"""Faults in the compiled kernels, in the instruction set that every machine has."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

DENSE = "tests/kernels/test_dense.py::"
CONV = "tests/kernels/test_conv.py::"
SUMS = "tests/kernels/test_sums.py::"
NORMS = "tests/kernels/test_norms.py::"
NOISE = "tests/kernels/test_noise.py::"
DISCRETE = "tests/kernels/test_discrete.py::"
UPDATE = "tests/kernels/test_update.py::"
CORRELATED = "tests/kernels/test_correlated.py::"
NORMALIZE = "tests/kernels/test_normalize.py::"
PRODUCT = "tests/kernels/test_product.py::"

# Convolutions of one place, of 129 places, of 129 channels, and of images whose size is no multiple of anything.
POINT = CONV + "test_edges[baseline-1x3-5 (1, 1, 1) (1, 1, 1)]"
PLACES = CONV + "test_edges[baseline-1x3-5 (1, 1, 129) (1, 1, 1)]"
CHANNELS = CONV + "test_edges[baseline-1x129-127 (1, 1, 1) (1, 1, 1)]"
IMAGES = CONV + "test_edges[baseline-17x1-1 (1, 12, 11) (1, 3, 3)]"
PATCHES = CONV + "test_edges[baseline-1x3-17 (1, 3, 3) (1, 3, 3)]"
CUT_SUM = DENSE + "test_a_long_sum_is_cut_by_rows[baseline-1025]"
WITH_BIAS = "tests/engine/rules/test_linear_bias.py::test_the_sum_is_exact_by_any_method[gram-flat-[2, 0, 3]]"

COMPILED = [
    # csrc/core/norms.inl
    Mutant(
        "the last columns of a row count in no norm",
        "csrc/core/norms.inl",
        "    add_squares(padded(row + i, n - i, scratch), sums);\n",
        "",
        (DENSE + "test_rank1_norms_of_any_shape", NORMS + "test_outer[baseline-17-31-rows]"),
    ),
    Mutant(
        "the last columns count in no product of two rows in double",
        "csrc/core/norms.inl",
        "  if (whole < width) {\n    float l[TILE]",
        "  if (whole < 0) {\n    float l[TILE]",
        (NORMS + "test_outer[baseline-17-31-ragged]",),
    ),
    Mutant(
        "the last row of a unit counts in no product of two rows in double",
        "csrc/core/norms.inl",
        "for (int64_t t = s + 1; t < rows; ++t) above +=",
        "for (int64_t t = s + 1; t < rows - 1; ++t) above +=",
        (NORMS + "test_outer[baseline-17-31-pairs]", NORMS + "test_rows_that_cancel_leave_little[baseline]"),
    ),
    Mutant(
        "the last columns of a unit's sum count in no norm",
        "csrc/core/norms.inl",
        "  if (c < r.p) add_column_squares<1, true>(r, c, lanes);\n",
        "",
        (NORMS + "test_diagonal[baseline-False-17-31-ragged]", NORMS + "test_scatter[baseline-17-31-long]"),
    ),
    Mutant(
        "an id that a unit has twice counts as two",
        "csrc/core/norms.inl",
        "for (int64_t t = first; t < s; ++t) earlier += ids[t] == ids[s];",
        "if (ids[s] >= 0) total += row_sq_norm(g + s * p, p) * (earlier = 1);",
        (NORMS + "test_scatter[baseline-3-2-ragged]",),
    ),
    Mutant(
        "padding of a table counts in a norm",
        "csrc/core/norms.inl",
        "if (ids[s] < 0 || earlier) continue;",
        "if (earlier) continue;",
        (NORMS + "test_scatter[baseline-3-2-ragged]",),
    ),
    # csrc/core/sums.inl
    Mutant(
        "the last columns of a scaled row are not written",
        "csrc/core/sums.inl",
        "for (int64_t i = 0; i < p; ++i) target[i] = w * row[i];",
        "for (int64_t i = 0; i < p / 8 * 8; ++i) target[i] = w * row[i];",
        (SUMS + "test_scaled_rows[baseline-13-17-33]",),
    ),
    Mutant(
        "the last columns of a bias are not summed",
        "csrc/core/sums.inl",
        "for (int64_t i = 0; i < width; ++i) out[c + i] += (float)sums[i];",
        "for (int64_t i = 0; i < width / 8 * 8; ++i) out[c + i] += (float)sums[i];",
        (SUMS + "test_diagonal[baseline-False-13-17-33]",),
    ),
    Mutant(
        "the last columns of a table are not summed",
        "csrc/core/sums.inl",
        "for (int64_t i = from; i < to; ++i) target[i] += w * row[i];",
        "for (int64_t i = from; i < to / 8 * 8; ++i) target[i] += w * row[i];",
        (SUMS + "test_scatter[baseline-13-17-33]",),
    ),
    # csrc/core/gemm.inl
    Mutant(
        "the last row of a unit counts in no product of two rows",
        "csrc/core/gemm.inl",
        "for (int64_t t = s + 1; t < rows; ++t) twice +=",
        "for (int64_t t = s + 1; t < rows - 1; ++t) twice +=",
        (
            DENSE + "test_products_stay_within_their_bound[baseline-129-1.0]",
            "tests/engine/test_clip_factors.py::test_no_contribution_exceeds_c",
        ),
    ),
    Mutant(
        "products of two rows count once",
        "csrc/core/gemm.inl",
        "total += own + 2.0 * twice;",
        "total += own + twice;",
        (DENSE + "test_products_stay_within_their_bound[baseline-129-1.0]",),
    ),
    Mutant(
        "a bias counts in no product of two rows",
        "csrc/core/gemm.inl",
        "const double one = with_bias ? 1.0 : 0.0;",
        "const double one = with_bias ? 0.0 : 0.0;",
        (WITH_BIAS,),
    ),
    Mutant(
        "the last block of columns counts in no product of two rows",
        "csrc/core/gemm.inl",
        "for (int64_t k = 0; k < width; k += BLOCK) {",
        "for (int64_t k = 0; k < width && (k == 0 || k + BLOCK <= width); k += BLOCK) {",
        (DENSE + "test_products_stay_within_their_bound[baseline-129-1.0]",),
    ),
    Mutant(
        "columns behind the last whole vector are not packed",
        "csrc/core/gemm.inl",
        "        for (; k < count; ++k)\n          for (int i = 0; i < LANES; ++i) to[k * PANEL",
        "        for (; k < count; ++k)\n          for (int i = 0; i < 0; ++i) to[k * PANEL",
        (DENSE + "test_norms_of_any_shape",),
    ),
    Mutant(
        "the last columns of a gradient have no weight",
        "csrc/core/gemm.inl",
        "to[l] = l < here ? from[l] * (is_scaled ? w : 1.0f) : 0.0f;",
        "to[l] = l < here ? from[l] : 0.0f;",
        (CUT_SUM, DENSE + "test_sums_of_any_shape"),
    ),
    Mutant(
        "the last block of a unit's rows is not in its gradient",
        "csrc/core/gemm.inl",
        "for (int64_t k = 0; k < inner; k += BLOCK) {",
        "for (int64_t k = 0; k < inner && (k == 0 || k + BLOCK <= inner); k += BLOCK) {",
        (DENSE + "test_gradients_stay_within_their_bound[baseline-129-1.0]",),
    ),
    Mutant(
        "the last row of a gradient counts in no norm",
        "csrc/core/gemm.inl",
        "      for (int64_t r = 0; r < rows; ++r) {\n        total +=",
        "      for (int64_t r = 0; r < rows - 1; ++r) {\n        total +=",
        (DENSE + "test_gradients_stay_within_their_bound[baseline-127-1.0]",),
    ),
    Mutant(
        "rank-1: the last row of a share has no norm",
        "csrc/core/gemm.inl",
        "  for (int64_t n = from; n < to; ++n) {\n    const double x = row_sq_norm",
        "  for (int64_t n = from; n < to - 1; ++n) {\n    const double x = row_sq_norm",
        (DENSE + "test_rank1_norms_of_any_shape",),
    ),
    Mutant(
        "the last columns of a sum are not added",
        "csrc/core/gemm.inl",
        "for (int64_t l = 0; l < columns; ++l) row[l] += from[l];",
        "for (int64_t l = 0; l < columns / 4 * 4; ++l) row[l] += from[l];",
        (DENSE + "test_sums_of_any_shape",),
    ),
    Mutant(
        "the last rows of a sum that is cut are lost",
        "csrc/core/gemm.inl",
        "const int64_t inner = n - first < plan.rows ? n - first : plan.rows;",
        "const int64_t inner = n - first < plan.rows ? (n - first) / BLOCK * BLOCK : plan.rows;",
        (CUT_SUM,),
    ),
    Mutant(
        "the last entry of a bias is not summed",
        "csrc/core/gemm.inl",
        "for (int64_t r = 0; r < rows; ++r) bias_to[r] =",
        "for (int64_t r = 0; r < rows - 1; ++r) bias_to[r] =",
        (CUT_SUM,),
    ),
    Mutant(
        "what underflows counts as nothing",
        "csrc/core/gemm.inl",
        "constexpr double kLost = 0x1p-126;",
        "constexpr double kLost = 0.0;",
        (DENSE + "test_underflow_is_covered", CONV + "test_underflow_is_covered"),
    ),
    # csrc/core/conv.inl
    Mutant(
        "the border of an image is whatever lay there",
        "csrc/core/conv.inl",
        "  __builtin_memset(image, 0, sizeof(float) * image_floats(v));\n",
        "  __builtin_memset(image, 0x3f, sizeof(float) * image_floats(v));\n",
        (IMAGES,),
    ),
    Mutant(
        "the last columns of an image are not loaded",
        "csrc/core/conv.inl",
        "        for (; x < x1; ++x)\n          for (int i = 0; i < 4; ++i) row",
        "        for (; x < 0; ++x)\n          for (int i = 0; i < 4; ++i) row",
        (CONV + "test_edges[baseline-1x17-3 (1, 3, 3) (1, 3, 3)]",),
    ),
    Mutant(
        "the last channels of an image are not loaded",
        "csrc/core/conv.inl",
        "      for (int64_t c = c4; c < v.channels; ++c)\n",
        "      for (int64_t c = c4; c < c4; ++c)\n",
        (PATCHES,),
    ),
    Mutant(
        "the last block of places is not in a gradient",
        "csrc/core/conv.inl",
        "for (int64_t at = 0; at < places; at += BLOCK) {",
        "for (int64_t at = 0; at < places && (at == 0 || at + BLOCK <= places); at += BLOCK) {",
        (PLACES,),
    ),
    Mutant(
        "the last columns of a convolution's gradient count in no norm",
        "csrc/core/conv.inl",
        "total += sum_of_squares(c + o * width + run * run_width, columns);",
        "total += sum_of_squares(c + o * width + run * run_width, columns / 8 * 8);",
        (PATCHES,),
    ),
    Mutant(
        "the last values of an image are not in the bound of its norm",
        "csrc/core/conv.inl",
        "  for (; i < count; ++i) total += (double)x[i] * (double)x[i];\n",
        "",
        (POINT,),
    ),
    Mutant(
        "the last images that share a block are not summed",
        "csrc/core/conv.inl",
        "if (n > 0) add_image_grads(v, images, n, grads, factors, c, panels);",
        "if (n == together) add_image_grads(v, images, n, grads, factors, c, panels);",
        (CONV + "test_sums_of_many_small_images[baseline-16-2]",),
    ),
    Mutant(
        "the last block of channels counts in no product of two places",
        "csrc/core/conv.inl",
        "for (int64_t k = 0; k < count; k += BLOCK) {",
        "for (int64_t k = 0; k < count && (k == 0 || k + BLOCK <= count); k += BLOCK) {",
        (CHANNELS,),
    ),
    Mutant(
        "the last column of an image with a border is not loaded",
        "csrc/core/conv.inl",
        "for (int64_t x = x0; x < x1; ++x) row[x] = from[x];",
        "for (int64_t x = x0; x < x1 - 1; ++x) row[x] = from[x];",
        (IMAGES,),
    ),
    Mutant(
        "the last place of a row counts in no product of two places",
        "csrc/core/conv.inl",
        "for (int64_t i = 0; i < here; ++i) part +=",
        "for (int64_t i = 0; i < here - 1; ++i) part +=",
        (IMAGES,),
    ),
    # csrc/core/normalize.inl
    Mutant(
        "the last values of a row are not in its normalisation's sums",
        "csrc/core/normalize.inl",
        "  if (i < count) {\n    // Zeros in g",
        "  if (i < 0) {\n    // Zeros in g",
        (NORMALIZE + "test_a_large_offset_does_not_drown_the_scale[cpp]", NORMALIZE + "test_group_norm[cpp]"),
    ),
    Mutant(
        "the last rows of a unit are not in its scale",
        "csrc/core/normalize.inl",
        "if ((n - first) % NORM_ROWS == NORM_ROWS - 1 || n + 1 == last) {",
        "if ((n - first) % NORM_ROWS == NORM_ROWS - 1) {",
        (NORMALIZE + "test_a_large_offset_does_not_drown_the_scale[cpp]", NORMALIZE + "test_layer_norm[cpp]"),
    ),
    # csrc/core/chacha.inl, gaussian.inl, update.inl
    Mutant(
        "the block counter does not carry inside a vector",
        "csrc/core/chacha.inl",
        " - (vu)(low < lane);",
        ";",
        (NOISE + "test_words_are_those_of_the_reference[baseline-68719476624]",),
    ),
    Mutant(
        "noise that begins inside a group begins with the group",
        "csrc/core/gaussian.inl",
        "use(at, (const float*)normals + place, count);",
        "use(at, (const float*)normals, count);",
        (NOISE + "test_normals_follow_the_documented_layout[baseline-100]",),
    ),
    Mutant(
        "the last normals of a run are not written",
        "csrc/core/gaussian.inl",
        "__builtin_memcpy(out + at, z, (size_t)n * sizeof(float));",
        "__builtin_memcpy(out + at, z, (size_t)(n / 4 * 4) * sizeof(float));",
        (NOISE + "test_added_noise_is_scaled_noise[baseline-257]",),
    ),
    Mutant(
        "the last elements of a run get no noise",
        "csrc/core/gaussian.inl",
        "for (int64_t i = 0; i < n; ++i) target[i] += noise_std * z[i];",
        "for (int64_t i = 0; i < n / 4 * 4; ++i) target[i] += noise_std * z[i];",
        (NOISE + "test_added_noise_is_scaled_noise[baseline-257]",),
    ),
    Mutant(
        "Adam without half of its noise",
        "csrc/core/update.inl",
        "    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float w =",
        "    const float noisy = kNoise && i % 2 ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float w =",
        (UPDATE + "test_noise_of_adam_is_that_of_the_stream[baseline]",),
    ),
    Mutant(
        "Adam does not update the last elements of a run",
        "csrc/core/update.inl",
        "  for (int64_t i = 0; i < n; ++i) {\n"
        "    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float w =",
        "  for (int64_t i = 0; i < n / 4 * 4; ++i) {\n"
        "    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float w =",
        (UPDATE + "test_noise_of_adam_is_that_of_the_stream[baseline]",),
    ),
    Mutant(
        "SGD does not update the last elements of a run",
        "csrc/core/update.inl",
        "    for (int64_t i = 0; i < n; ++i) {\n      const float noisy",
        "    for (int64_t i = 0; i < n / 4 * 4; ++i) {\n      const float noisy",
        (UPDATE + "test_the_noise_is_that_of_the_stream[baseline-255]",),
    ),
    Mutant(
        "SGD with momentum does not update the last elements of a run",
        "csrc/core/update.inl",
        "  for (int64_t i = 0; i < n; ++i) {\n"
        "    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float g =",
        "  for (int64_t i = 0; i < n / 4 * 4; ++i) {\n"
        "    const float noisy = kNoise ? grad[i] + a.noise_std * z[i] : grad[i];\n    const float g =",
        (UPDATE + "test_sgd_is_torchs[baseline-0.9-0.5-False-0.0-257]",),
    ),
    # csrc/core/correlated.inl
    Mutant(
        "all taps take the normals of this step",
        "csrc/core/correlated.inl",
        "stream->nonce - (uint64_t)j;",
        "stream->nonce;",
        (CORRELATED + "test_it_is_the_white_noise_through_the_inverse_matrix[baseline-inverse-257-0]",),
    ),
    Mutant(
        "noise of earlier steps is not taken off the last elements of a run",
        "csrc/core/correlated.inl",
        "for (int64_t i = 0; i < n; ++i) w[i] -= weight * slot[i];",
        "for (int64_t i = 0; i < n / 4 * 4; ++i) w[i] -= weight * slot[i];",
        (CORRELATED + "test_it_is_the_white_noise_through_the_inverse_matrix[baseline-blt-257-0]",),
    ),
    Mutant(
        "a slot is not written anew",
        "csrc/core/correlated.inl",
        "for (int64_t i = 0; i < n; ++i) slot[i] = gain * w[i];",
        "for (int64_t i = 0; i < n; ++i) slot[i] *= gain;",
        (CORRELATED + "test_it_is_the_white_noise_through_the_inverse_matrix[baseline-banded-257-0]",),
    ),
    # csrc/core/discrete.inl
    Mutant(
        "integer noise of a small radius loses digits",
        "csrc/core/discrete.inl",
        "choose_lanes((vl)(biased == 1024u + 64u), below_one, m - 1.0)",
        "choose_lanes((vl)(biased == 1024u + 65u), below_one, m - 1.0)",
        (DISCRETE + "test_normals_are_exact_to_fifty_bits",),
    ),
    Mutant(
        "integer noise has the words of float32 noise",
        "csrc/core/discrete.inl",
        "counter = DISCRETE_BIT | (",
        "counter = (",
        (DISCRETE + "test_integers_follow_the_documented_layout[baseline-100]",),
    ),
    Mutant(
        "a sum that is no number is released as it comes",
        "csrc/core/discrete.inl",
        "  x = (vd)((vl)x & (vl)(x == x));\n",
        "",
        (DISCRETE + "test_large_sums_are_exact_up_to_the_cut[baseline]",),
    ),
    Mutant(
        "a sum far below zero is not cut off",
        "csrc/core/discrete.inl",
        "  x = choose_lanes((vl)(x < -most), -most, x);\n",
        "",
        (DISCRETE + "test_large_sums_are_exact_up_to_the_cut[baseline]",),
    ),
    Mutant(
        "the last sums of a run are not released",
        "csrc/core/discrete.inl",
        "    if (i < n) release_lanes(args, at + i, k + i, n - i);\n",
        "",
        (DISCRETE + "test_a_release_is_the_rounded_sum_and_the_noise[baseline-1.0-3.0-129]",),
    ),
    # csrc/core/product.inl
    Mutant(
        "the last columns of a product get no bias",
        "csrc/core/product.inl",
        "for (int64_t l = 0; l < columns; ++l) to[l] = from[l] + bias[j + l];",
        "for (int64_t l = 0; l < columns; ++l) to[l] = from[l] + (l < columns - 1 ? bias[j + l] : 0.0f);",
        (PRODUCT + "test_any_shape[baseline]",),
    ),
]
