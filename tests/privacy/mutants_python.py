"""Faults in the engine's own steps: capture, clipping, the sums, noise."""

from __future__ import annotations

from tests.privacy.mutants import Mutant
from tests.privacy.mutants_ledger import LEDGERS
from tests.privacy.mutants_queries import QUERIES

CLIP = "tests/engine/test_clip_factors.py::"
EXACT = "tests/engine/test_exact.py::"
DENSE = "tests/kernels/test_dense.py::"
CONV = "tests/kernels/test_conv.py::"
SUMS = "tests/kernels/test_sums.py::"
NORMS = "tests/kernels/test_norms.py::"
SENSITIVITY = "tests/privacy/test_sensitivity.py::"
NONFINITE = "tests/privacy/test_nonfinite.py::"
NOISE = "tests/privacy/test_noise.py::"

MANY_ROWS = SENSITIVITY + "test_fifty_rows_of_one_patient_are_one_unit"
ORACLE = SENSITIVITY + "test_released_sum_is_the_clipped_sum_of_the_oracle"
OWN_PART = SENSITIVITY + "test_the_moved_part_is_the_unit_s_own_clipped_gradient"
SILENT_STEP = NOISE + "test_a_step_without_any_physical_batch_still_adds_the_whole_noise"

PYTHON = [
    *QUERIES,
    *LEDGERS,
    Mutant(
        "the clip turned round",
        "engine/clipping.py",
        "(bound / norm).clamp_max_(1.0)",
        "(bound / norm).clamp_min_(1.0)",
        (CLIP + "test_masked_units_weigh_exactly_nothing", MANY_ROWS),
    ),
    Mutant(
        "units below C are scaled up a little",
        "engine/clipping.py",
        ".clamp_max_(1.0)",
        ".clamp_max_(1.01)",
        (CLIP + "test_masked_units_weigh_exactly_nothing", OWN_PART + "[mlp]"),
    ),
    Mutant(
        "rounding of sums of products is not covered",
        "engine/clipping.py",
        "return (2 * chain + 4) * UNIT_ROUNDOFF * row_sums.square()",
        "return 0.0 * row_sums",
        (
            CLIP + "test_rows_that_cancel_inside_a_unit_stay_within_c",
            DENSE + "test_products_stay_within_their_bound",
        ),
    ),
    Mutant(
        "rounding of formed gradients is not covered",
        "engine/clipping.py",
        "off = (chain + 2) * UNIT_ROUNDOFF * row_sums",
        "off = 0.0 * row_sums",
        (DENSE + "test_gradients_stay_within_their_bound", CONV + "test_norms_stay_within_their_bound"),
    ),
    Mutant(
        "the bound on rounding is not added",
        "engine/clipping.py",
        "upper = (sample_sq_norm + error + LOST_SQUARES) * (1.0 + (2 * parameters + 16) * UNIT_ROUNDOFF)",
        "upper = sample_sq_norm + LOST_SQUARES",
        (CLIP + "test_rows_that_cancel_inside_a_unit_stay_within_c",),
    ),
    Mutant(
        "what underflows in a squared norm counts as nothing",
        "engine/clipping.py",
        "LOST_SQUARES = 2.0**30 * SMALLEST_NORMAL",
        "LOST_SQUARES = 0.0",
        (CLIP + "test_what_underflow_takes_from_a_norm_is_covered[1e-30-automatic]",),
    ),
    Mutant(
        "what underflows in a row's square counts as nothing",
        "engine/rules/row_values.py",
        "return self.squares(rows).add(SMALLEST_NORMAL).sqrt()",
        "return self.squares(rows).sqrt()",
        (CLIP + "test_rows_that_cancel_and_whose_squares_underflow_are_not_taken_for_nothing",),
    ),
    Mutant(
        "a long chain of additions counts as a short one",
        "kernels/outer/dense.py",
        "return min(length, SUM_BLOCK) + -(-length // SUM_BLOCK) if compiled else length",
        "return min(length, 2)",
        (DENSE + "test_products_stay_within_their_bound", DENSE + "test_chains"),
    ),
    Mutant(
        "NaN is multiplied away",
        "engine/clipping.py",
        "torch.where(counts, factor, torch.zeros_like(factor))",
        "factor * counts",
        (
            CLIP + "test_not_finite_weighs_exactly_nothing",
            NONFINITE + "test_a_batch_of_only_bad_units_releases_zero",
        ),
    ),
    Mutant(
        "the mask of units is forgotten",
        "engine/clipping.py",
        "counts = counts & unit_mask",
        "pass",
        (
            CLIP + "test_masked_units_weigh_exactly_nothing",
            SENSITIVITY + "test_masked_units_weigh_nothing[mlp]",
        ),
    ),
    Mutant(
        "the scale of a mean is not undone",
        "engine/clipping.py",
        "norm = upper.clamp_min(0.0).sqrt().mul_(scale * (1.0 + 8 * UNIT_ROUNDOFF))",
        "norm = upper.clamp_min(0.0).sqrt().mul_(1.0 + 8 * UNIT_ROUNDOFF)",
        (CLIP + "test_the_scale_of_a_mean_is_undone_before_the_clip",),
    ),
    Mutant(
        "a bias counts in no norm",
        "engine/contributions.py",
        "        group.norms.add(pair, product",
        "        if not isinstance(items[0][1], DiagonalUse):\n            group.norms.add(pair, product",
        (ORACLE + "[0.01-mlp-rows]", ORACLE + "[0.01-mlp-ragged]"),
    ),
    Mutant(
        "the bias takes unclipped rows",
        "kernels/outer/dense.py",
        "bias += g.sum(0)",
        "bias += output_grads.float().sum(0)",
        (DENSE + "test_a_long_sum_is_cut_by_rows",),
    ),
    Mutant(
        "the sum over a unit's bias rows loses its weights",
        "engine/rules/uses.py",
        "diagonal_weighted_sum(self.unit_rows, weights.rows, out=out.view(-1))",
        "out.view(-1).add_(self.unit_rows.sum(0))",
        (ORACLE + "[0.01-layer_norm-four_rows]",),
    ),
    Mutant(
        "the cross term of tied weights is left out",
        "engine/contributions.py",
        "add_cross_term(outer, outer_layout, scatter, scatter_layout, sq_norms)",
        "pass",
        (EXACT + "test_a_table_that_is_also_an_output_weight",),
    ),
    Mutant(
        "the cross term of tied weights counts once",
        "engine/rules/uses.py",
        "sum((1, 2)), alpha=2.0)",
        "sum((1, 2)), alpha=1.0)",
        (EXACT + "test_a_table_that_is_also_an_output_weight",),
    ),
    Mutant(
        "what underflows in the cross term counts as nothing",
        "engine/rules/uses.py",
        "torch.bmm(a, e.transpose(1, 2)) + lost)",
        "torch.bmm(a, e.transpose(1, 2)))",
        (CLIP + "test_a_cross_term_that_underflows_stays_within_c",),
    ),
    Mutant(
        "uses of one layer count as if they were layers",
        "engine/rules/uses.py",
        "merged, Layout.uniform(layouts[0].num_units, each, units.device)",
        "uses[0], layouts[0]",
        (ORACLE + "[0.01-reused_linear-four_rows]",),
    ),
    Mutant(
        "units of several rows: norms of rows, without their products",
        "kernels/outer/reference.py",
        "return ((a @ a.mT) * (g @ g.mT)).sum((-2, -1))",
        "return ((a * a).sum(-1) * (g * g).sum(-1)).sum(-1)",
        (NORMS + "test_outer[reference-17-31-ragged]", NORMS + "test_rows_that_cancel_leave_little"),
    ),
    Mutant(
        "two rows of a unit are taken for one",
        "engine/rules/uses.py",
        "            outer_sq_norms(a, g, offsets, out=sq_norms)\n",
        "            sq_norms += layout.sum_rows(outer_sq_norms(self.activations, self.output_grads))\n",
        (ORACLE + "[0.01-mlp-four_rows]", EXACT + "test_the_two_layouts_of_equal_units_agree"),
    ),
    Mutant(
        "each row of a unit gets the weight of the unit with its number",
        "engine/layout.py",
        "return per_unit.index_select(0, self.row_units)",
        "return per_unit.repeat(self.num_rows)[: self.num_rows].contiguous()",
        (ORACLE + "[0.7-mlp-ragged]",),
    ),
    Mutant(
        "rows in any order are taken as they come",
        "engine/layout.py",
        "self._row_units = torch.empty_like(in_order).index_copy_(0, self.order, in_order)",
        "self._row_units = in_order",
        (SENSITIVITY + "test_engine_units_make_the_patient_the_unit[mlp-shuffled]",),
    ),
    Mutant(
        "a weight of zero is multiplied with what is no number",
        "kernels/outer/reference.py",
        "return torch.where((row_weights == 0).unsqueeze(1), torch.zeros_like(scaled), scaled)",
        "return scaled",
        (DENSE + "test_weights_of_zero_alone_leave_everything_as_it_was", SUMS + "test_scaled_rows"),
    ),
    Mutant(
        "padding of a table takes part",
        "engine/rules/embedding.py",
        "if ctx.padding >= 0:",
        "if ctx.padding > 1 << 40:",
        (EXACT + "test_padding_takes_no_gradient_and_counts_in_no_norm",),
    ),
    Mutant(
        "a convolution that forgets its border",
        "engine/rules/conv.py",
        "padding=three(self.padding, 0),",
        "padding=three([0] * len(self.padding), 0),",
        ("tests/engine/rules/test_conv.py::test_padding_modes[1-zeros]",),
    ),
    Mutant(
        "half of the noise under SGD",
        "engine/optim.py",
        "if momentum else None,\n                key=noise.key,\n                stream=noise.stream,\n"
        "                step=noise.step,\n                start=piece.start,\n                noise_std=noise.std,",
        "if momentum else None,\n                key=noise.key,\n                stream=noise.stream,\n"
        "                step=noise.step,\n                start=piece.start,\n"
        "                noise_std=0.98 * noise.std,",
        (SILENT_STEP,),
    ),
    Mutant(
        "noise that ignores C",
        "engine/step.py",
        "std = bound * (self.noise",
        "std = (self.noise",
        (SILENT_STEP,),
    ),
    Mutant(
        "the same noise in each step",
        "engine/noise.py",
        "self._released, self._is_open = step + 1, True",
        "self._released, self._is_open = step, True",
        (NOISE + "test_steps_do_not_share_noise",),
    ),
    Mutant(
        "correlated noise begins anew in each group of the optimizer",
        "engine/optim.py",
        "self.correlation.part(piece.at, piece.at + len(piece.param))",
        "self.correlation.part(0, len(piece.param))",
        ("tests/engine/test_corrected_adam.py::test_correlated_noise_reaches_every_updater[sgd]",),
    ),
    Mutant(
        "taps reach behind the first step",
        "kernels/noise/correlation.py",
        "taps=self.taps[: step - self.first_step + 1]",
        "taps=self.taps[: step + 1]",
        (
            "tests/kernels/test_correlated.py::test_steps_count_from_the_first_of_the_instance[baseline-inverse]",
        ),
    ),
]
