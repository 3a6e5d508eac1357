"""Faults in recorded passes: what they leave out of the checks, and what a recording must not hold."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

RECORDED = "tests/privacy/test_recorded.py::"
COMPILED = "tests/engine/test_compiled.py::"

RECORDINGS = [
    Mutant(
        "a recorded pass is not looked at again",
        "engine/compiled.py",
        "if recorded.calls & (recorded.calls - 1) == 0:",
        "if recorded.calls <= 2:",
        (RECORDED + "test_a_gate_between_units_that_opens_later_is_noticed",),
    ),
    Mutant(
        "a pass that is due is probed only by its own count",
        "engine/independence.py",
        "is_due or count & (count - 1) == 0 or",
        "count & (count - 1) == 0 or",
        (COMPILED + "test_passes_that_are_looked_at_are_probed",),
    ),
    Mutant(
        "a recording holds on to the batch that it was made with",
        "engine/tracing.py",
        "if id(value) not in own and value.dim():",
        "if False:",
        (COMPILED + "test_a_batch_that_is_no_argument_is_refused",),
    ),
    Mutant(
        "rows that the data arrange are recorded",
        "engine/trainer.py",
        "if self._step.state.is_arranged:",
        "if False:",
        (COMPILED + "test_what_can_not_be_recorded_is_refused_and_nothing_is_lost",),
    ),
    Mutant(
        "a replay counts masked units",
        "engine/compiled.py",
        "return unit_mask.to(self._step.flat.device, non_blocking=True)",
        "return torch.ones_like(unit_mask)",
        (COMPILED + "test_the_sums_are_those_of_the_pass_bit_for_bit[rows-flat]",),
    ),
    Mutant(
        "noise is made in a recording",
        "engine/noise.py",
        "if is_tracing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):",
        "if False:",
        (RECORDED + "test_noise_is_not_made_in_a_cuda_graph",),
    ),
    Mutant(
        "an operation without a graph is left out of it",
        "kernels/_select.py",
        'raise NotImplementedError("this operation can not be part of a traced step")',
        'return "shapes"',
        (RECORDED + "test_noise_is_not_made_in_a_trace",),
    ),
    Mutant(
        "a replay takes products as the user has set them",
        "engine/compiled.py",
        "        with exact_products():",
        "        if True:",
        (COMPILED + "test_replays_take_exact_products",),
    ),
    Mutant(
        "a fused pass is not compared",
        "engine/fusing.py",
        "    _compare(graph, run, given, flat_at)",
        "    pass",
        ("tests/engine/test_fused.py::test_a_compiler_that_errs_is_noticed",),
    ),
    Mutant(
        "checkpoints draw other random numbers",
        "engine/tracing.py",
        "    if not step.state.has_checkpoint:",
        "    if True:",
        (COMPILED + "test_a_random_checkpoint_is_refused",),
    ),
]
