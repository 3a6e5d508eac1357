"""Faults in the queries: sensitivities, thresholds, noise, charges."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

ANSWERS = "tests/queries/test_answers.py::"
CHARGING = "tests/queries/test_charging.py::"
DISCOVERY = "tests/queries/test_discovery.py::"
NOISE = "tests/queries/test_noise.py::"
SENSITIVITY = "tests/queries/test_sensitivity.py::"

MOVES = SENSITIVITY + "test_one_unit_moves_a_query_by_at_most_its_sensitivity"
REACHED = SENSITIVITY + "test_the_declared_sensitivity_is_reached_and_not_passed"

QUERIES = [
    Mutant(
        "several tables cost as one",
        "engine/queries/marginals.py",
        "sensitivity = weights.most * math.sqrt(len(names))",
        "sensitivity = float(weights.most)",
        (MOVES + "[marginals]", ANSWERS + "test_marginals_say_their_noise"),
    ),
    Mutant(
        "each row of a unit weighs one",
        "engine/queries/units.py",
        "rows[counted] = (place + 1) * PARTS // size - place * PARTS // size",
        "rows[counted] = PARTS",
        (REACHED + "[marginals]", REACHED + "[bounds]", REACHED + "[quantiles]"),
    ),
    Mutant(
        "one row more than the cap counts",
        "engine/queries/units.py",
        "rows[counted] = place < max_rows",
        "rows[counted] = place <= max_rows",
        (REACHED + "[rows]", REACHED + "[marginals, rows capped]"),
    ),
    Mutant(
        "the longest column of C counts as one of norm 1",
        "engine/queries/quantiles.py",
        "sensitivity = weights.most * norm + math.sqrt(size)",
        "sensitivity = weights.most + math.sqrt(size)",
        (REACHED + "[quantiles]", MOVES + "[quantiles]"),
    ),
    Mutant(
        "a unit counts in all its categories",
        "engine/queries/discovery.py",
        "code[first][place < most]",
        "code[first]",
        (MOVES + "[categories]", DISCOVERY + "test_a_unit_counts_in_its_first_categories_only"),
    ),
    Mutant(
        "the order of codes says which categories of a unit count",
        "engine/queries/discovery.py",
        "first = np.sort(first)",
        "first = np.sort(first)[::-1]",
        (DISCOVERY + "test_a_unit_counts_in_its_first_categories_only",),
    ),
    Mutant(
        "the threshold is one too low",
        "engine/queries/discovery.py",
        "        threshold += 1\n    return threshold",
        "        threshold += 1\n    return threshold - 1",
        (
            DISCOVERY + "test_the_threshold_is_the_least_that_delta_allows",
            DISCOVERY + "test_what_one_unit_alone_has_is_released_as_rarely_as_said",
            DISCOVERY + "test_composed_the_charge_covers_both_directions",
        ),
    ),
    Mutant(
        "the tail forgets that noise is rounded",
        "engine/queries/discovery.py",
        "math.erfc((threshold - 1.5)",
        "math.erfc((threshold - 1.0)",
        (DISCOVERY + "test_the_threshold_is_the_least_that_delta_allows",),
    ),
    Mutant(
        "delta is not charged",
        "engine/queries/mechanism.py",
        "events = (ApproximateEvent(0.0, float(delta), 1), GaussianEvent(float(noise_multiplier), 1))",
        "events = (GaussianEvent(float(noise_multiplier), 1),)",
        (
            DISCOVERY + "test_both_parts_are_charged_in_one_question",
            CHARGING + "test_the_event_is_in_the_file_before_the_noise_is_drawn",
        ),
    ),
    Mutant(
        "an unpaid query is answered",
        "engine/queries/mechanism.py",
        "        for event in events:\n            self._ledger.append_event(event, note=note)",
        "        pass",
        (
            CHARGING + "test_a_query_beyond_the_budget_draws_no_noise",
            CHARGING + "test_a_closed_ledger_answers_nothing",
        ),
    ),
    Mutant(
        "all queries have the noise of the first",
        "engine/queries/mechanism.py",
        "noise = integer_noise(steps.size, noise_std, key=key, stream=_STREAM, step=step)",
        "noise = integer_noise(steps.size, noise_std, key=key, stream=_STREAM, step=0)",
        (NOISE + "test_no_two_queries_share_noise",),
    ),
    Mutant(
        "the noise is cut down to whole numbers instead of rounded",
        "engine/queries/noise.py",
        "np.rint(scaled)",
        "np.floor(scaled)",
        (NOISE + "test_integer_noise_has_the_law_of_a_rounded_gaussian",),
    ),
    Mutant(
        "the radius has 32 bits",
        "engine/queries/noise.py",
        "np.log(_uniform(radius))",
        "np.log(np.maximum(_uniform(radius), 2.0**-33))",
        (NOISE + "test_the_radius_has_the_tail_of_64_bits_at_both_ends",),
    ),
    Mutant(
        "the rounding of a vector is not charged",
        "engine/queries/mechanism.py",
        "reach = _above(l2_sensitivity / grid + math.sqrt(values.size))",
        "reach = _above(l2_sensitivity / grid)",
        (NOISE + "TestVectors::test_rounding_is_charged_and_costs_nothing_visible",),
    ),
    Mutant(
        "a vector keeps its last bits",
        "engine/queries/mechanism.py",
        "return self._noised(steps, noise_multiplier * reach) * grid",
        "return self._noised(steps, noise_multiplier * reach) * grid + (values - steps * grid)",
        (NOISE + "TestVectors::test_answers_lie_on_a_grid_that_does_not_depend_on_the_values",),
    ),
]
