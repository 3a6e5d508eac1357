"""Faults in what several ranks do together: their parts, their sums, their noise, what they must have in common.

None leaves a rank waiting for another: that would be noticed, after minutes.
"""

from __future__ import annotations

from tests.privacy.mutants import Mutant

RELEASED = "tests/distributed/test_invariance.py::test_the_same_is_released"
BITS = "tests/distributed/test_invariance.py::test_the_noise_has_the_same_bits"
PARTS = "tests/distributed/test_sampling_global.py::test_the_ranks_parts_are_a_partition_of_the_draw"
PRIVACY = "tests/privacy/test_privacy_distributed.py::"
DIFFERS = PRIVACY + "test_a_rank_that_differs_is_refused_by_all_and_named"
LOOP = PRIVACY + "test_the_sum_is_that_of_the_loop"
ONCE = PRIVACY + "test_noise_is_exact_and_once_whatever_the_number_of_ranks"
OUT_OF_STEP = "tests/privacy/test_ranks_out_of_step.py::"

RANKS = [
    Mutant(
        "two ranks have the same unit",
        "engine/sampling.py",
        "return start, start + each + (rank < more)",
        "return start, min(start + each + 1, units)",
        (PARTS,),
    ),
    Mutant(
        "sums of replicas are not added up",
        "engine/sums.py",
        "self.flat[low:high] += self._memory[rank, low:high]",
        "pass",
        (LOOP + "[2-replicas]",),
    ),
    Mutant(
        "sums of shards are averaged",
        "engine/distributed/exchange.py",
        "torch.sum(received.view(ranks.world_size, -1), 0, out=own)",
        "torch.mean(received.view(ranks.world_size, -1), 0, out=own)",
        (LOOP + "[2-whole]",),
    ),
    Mutant(
        "every shard takes the noise of the first",
        "engine/distributed/sharded.py",
        "Piece(span.group, span.start + first * width, at, param)",
        "Piece(span.group, span.start, at, param)",
        (BITS + "[2-silent-whole-7]", PRIVACY + "test_no_noise_is_made_twice[2-whole]"),
    ),
    Mutant(
        "every replica takes the noise of the first",
        "engine/flat.py",
        "Piece(group, low, at + low - start, self.data[low:high])",
        "Piece(group, low - start, at + low - start, self.data[low:high])",
        (BITS + "[2-silent-replicas-1]", PRIVACY + "test_no_noise_is_made_twice[2-replicas]"),
    ),
    Mutant(
        "noise is taken for a sum over ranks",
        "engine/step.py",
        "noise = self.source.next(std)",
        "noise = self.source.next(std / self.ranks.world_size**0.5)",
        (ONCE + "[2-replicas-1-SGD]", ONCE + "[2-whole-1-SGD]"),
    ),
    Mutant(
        "the sum is divided by the number of ranks, too",
        "engine/step.py",
        "        self._grad_scale = 1.0 / expected_batch_size\n        self.source",
        "        self._grad_scale = 1.0 / expected_batch_size / self.ranks.world_size\n        self.source",
        (LOOP + "[2-replicas]", LOOP + "[2-whole]"),
    ),
    Mutant(
        "each rank counts its own units for the bound",
        "engine/step.py",
        "self._total = sum_over(ranks, total)",
        "self._total = total",
        (RELEASED + "[2-replicas-adaptive]",),
    ),
    Mutant(
        "keys are not compared",
        "engine/distributed/agreement.py",
        "(keys.key_id, keys.is_private)",
        "keys.is_private",
        (DIFFERS + "[2-keys: of their own]",),
    ),
    Mutant(
        "the order of parameters is not compared",
        "engine/distributed/agreement.py",
        'names.get(id(p), "?") for p in group["params"]',
        '"?" for p in group["params"]',
        (DIFFERS + "[2-optimizer: another order]",),
    ),
    Mutant(
        "draws are not compared",
        "engine/step.py",
        '"draw": draw,',
        '"draw": 0,',
        (OUT_OF_STEP + "test_a_rank_that_skips_an_empty_batch_ends_the_step[replicas]",),
    ),
    Mutant(
        "steps are not compared",
        "engine/distributed/agreement.py",
        "if high != -low:",
        "if high != -low and what != 'step':",
        (OUT_OF_STEP + "test_a_rank_that_counts_a_step_more_ends_all[whole-0]",),
    ),
    Mutant(
        "streams of noise are not compared",
        "engine/step.py",
        '"noise (stream)": stream',
        '"noise (stream)": 0',
        (OUT_OF_STEP + "test_a_rank_whose_noise_would_be_of_another_stream_ends_all[replicas]",),
    ),
    Mutant(
        "units are compared on no other rank",
        "engine/distributed/agreement.py",
        "everybody = ranks.gather(units)",
        "everybody = [units]",
        (OUT_OF_STEP + "test_a_unit_on_two_ranks_is_refused_where_ids_tell[replicas]",),
    ),
    Mutant(
        "records are not compared",
        "python/synthward/privacy_engine.py",
        'if self.ranks.world_size > 1 else ""',
        'if self.ranks.world_size > 9 else ""',
        (OUT_OF_STEP + "test_ranks_with_other_records_are_refused[tensors]",),
    ),
    Mutant(
        "the capture looks away after FSDP's hooks, too",
        "engine/distributed/sharded.py",
        "                state.is_paused = before\n",
        "                pass\n",
        (OUT_OF_STEP + "test_a_parameter_in_a_hook_is_clipped_as_in_replicas[blocks]",),
    ),
    Mutant(
        "frozen weights are each rank's own",
        "engine/flat.py",
        "[self.data, *self.untrained()]",
        "[self.data, *module.buffers()]",
        (OUT_OF_STEP + "test_what_is_not_trained_is_the_same_on_all_ranks",),
    ),
    Mutant(
        "a group that comes late goes unnoticed",
        "engine/step.py",
        "processes() > self._processes",
        "processes() < self._processes",
        (OUT_OF_STEP + "test_a_trainer_from_before_the_group_takes_no_step",),
    ),
    Mutant(
        "leases are not compared",
        "engine/distributed/ledger.py",
        '{"lease": (event, first_step, steps, part)}',
        "{}",
        (
            OUT_OF_STEP
            + "test_a_plan_or_lease_that_is_not_that_of_all_is_refused_before_it_is_charged[lease]",
        ),
    ),
]
