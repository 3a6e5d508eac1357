"""Faults in recorded passes: what they leave out of the checks, and what a recording must not hold."""

from __future__ import annotations

from tests.privacy.mutants import Mutant

RECORDED = "tests/privacy/test_recorded.py::"
COMPILED = "tests/engine/test_compiled.py::"
READS = "tests/privacy/test_recorded_reads.py::"
FUSED = "tests/engine/test_fused.py::"

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
        "if id(value) not in own and not is_number:",
        "if False:",
        (COMPILED + "test_a_batch_that_is_no_argument_is_refused",),
    ),
    Mutant(
        "any number of the batch passes for one that the losses write down",
        "engine/tracing.py",
        "is_number = value.dim() == 0 and all(user.target in _FRESH for user in node.users)",
        "is_number = value.dim() == 0",
        (READS + "test_a_number_of_the_batch_that_is_no_argument_is_refused",),
    ),
    Mutant(
        "one tensor that is given twice is one argument from then on",
        "engine/tracing.py",
        "own_inputs = [tensor.detach() for tensor in (mask, *inputs)]",
        "own_inputs = [mask, *inputs]",
        (
            READS + "test_a_mask_that_was_an_argument_too_still_leaves_units_out",
            READS + "test_one_tensor_that_stood_for_two_arguments",
        ),
    ),
    Mutant(
        "what the module holds now is not compared with what was recorded",
        "engine/compiled.py",
        "if recorded.traced is not None and not recorded.traced.is_current():",
        "if False:",
        (READS + "test_what_the_module_holds_is_read_as_it_is_now[replaced-False]",),
    ),
    Mutant(
        "an attribute that was replaced passes for the one that was recorded",
        "engine/tracing.py",
        "holder.get(name) is self.source for holder, name in self.places",
        "True for holder, name in self.places",
        (READS + "test_what_the_module_holds_is_read_as_it_is_now[replaced-False]",),
    ),
    Mutant(
        "memory that was replaced passes for what was recorded",
        "engine/tracing.py",
        "return self.source.is_set_to(self.value) and all(",
        "return all(",
        (READS + "test_what_the_module_holds_is_read_as_it_is_now[moved-True]",),
    ),
    Mutant(
        "a trace reads numbers of the module",
        "engine/tracing.py",
        "if torch.Tag.data_dependent_output in func.tags:",
        "if False:",
        (READS + "test_numbers_of_the_module_are_not_looked_at_either[item]",),
    ),
    Mutant(
        "strides of a batch are no part of its form",
        "engine/compiled.py",
        "(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)",
        "(tensor.shape, tensor.dtype, tensor.device)",
        (READS + "test_batches_of_other_strides_are_another_form[many rows]",),
    ),
    Mutant(
        "a fused pass is compared on padding",
        "engine/fusing.py",
        "args[flat_at + 1].fill_(True)",
        "pass",
        (FUSED + "test_a_batch_of_padding_shows_what_a_compiler_did",),
    ),
    Mutant(
        "norms of a fused pass are not compared",
        "engine/fusing.py",
        "is_close = (norms[1] - norms[0]).abs() <= _CLOSE_NORM * norms[0]",
        "is_close = norms[0].isfinite()",
        (FUSED + "test_norms_are_compared_also_where_no_unit_is_clipped",),
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
