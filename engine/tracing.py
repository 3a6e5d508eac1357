"""The pass over one physical batch as a graph of tensor operations: forward, backward, norms, clip and weighted sums.

The engine's own Python (capture, provenance, planning) runs once, on tensors that have shapes and no numbers, with all
its checks. What is left is a `torch.fx` graph: nothing in it can look at a number, so it takes the same operations for
any batch of those shapes, and no record was read to make it. Noise is never in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from synthward.engine.capture import Batch
from synthward.engine.errors import UnsupportedOperationError
from synthward.engine.layout import Layout
from synthward.engine.provenance import tensors_in
from synthward.engine.rows import named_tensors
from synthward.engine.step import DPStep
from synthward.engine.sums import FlatSums

LossesOf = Callable[..., Tensor]
# What is raised where Python asks for a number, or for a shape that follows from numbers.
_LOOKS = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_TAKES_NUMBERS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
# Its shape follows from numbers if its index is a mask.
_INDEXED = {torch.ops.aten.index.Tensor}
# Makes a tensor of a number that the traced Python wrote down.
_FRESH = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
# Which tensors a recording may read, by id: the tensor, and where the module has it.
Own = dict[int, tuple[Tensor, list[tuple[dict[str, Any], str]]]]


@dataclass(frozen=True)
class Constant:
    """What a recording reads beside the batch.

    Attributes:
        value: its memory, as it was when it was recorded.
        source: the tensor itself; held, so that no other one has its id.
        places: dictionaries of the module's layers that hold it, and its name there.
    """

    value: Tensor
    source: Tensor
    places: list[tuple[dict[str, Any], str]]

    def is_there(self) -> bool:
        """Whether the module still has this tensor there, and the tensor its memory."""
        return self.source.is_set_to(self.value) and all(
            holder.get(name) is self.source for holder, name in self.places
        )


@dataclass(frozen=True)
class TracedPass:
    """``graph(*constants, flat sums, unit mask, *inputs)`` adds a batch's clipped gradients to the sums; gives its
    losses [U] and the units' squared norms [groups, U].

    Inputs are those of the batch, after the offsets of its units if they have unequal numbers of rows.

    Attributes:
        graph: the operations.
        read: what they read beside the batch: parameters, buffers, and tensors of the engine's own.
        most_rows: rows of the longest use, for the bound on rounding of discrete sums.
    """

    graph: GraphModule
    read: list[Constant]
    most_rows: int

    @property
    def constants(self) -> list[Tensor]:
        """The first arguments of the graph."""
        return [constant.value for constant in self.read]

    def is_current(self) -> bool:
        """Whether the module has the tensors that it had."""
        return all(constant.is_there() for constant in self.read)


def trace_pass(
    step: DPStep,
    losses_of: LossesOf,
    units: int,
    rows_per_unit: int | None,
    inputs: tuple[Tensor, ...],
    mask: Tensor,
    scale: float,
    fixed: Sequence[Tensor] = (),
) -> TracedPass:
    """Trace ``losses_of(*batch)`` [U], its backward pass and all that the engine does in it, by shapes alone.

    Args:
        rows_per_unit: of each unit; None: the first of `inputs` are the units' offsets, int64 [U + 1].
        fixed: further tensors that may be read, which are no records.

    Raises:
        UnsupportedOperationError: something in it looks at a number, keeps a tensor, or reads one that is neither an
            argument nor the module's.
    """
    whole = None if rows_per_unit is None else Layout.uniform(units, rows_per_unit, step.flat.device)
    most_rows = 0

    def run(flat: Tensor, mask: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal most_rows
        layout, batch = whole, inputs
        if layout is None:
            batch = inputs[1:]
            layout = Layout(units, len(batch[0]), inputs[0])
        losses, norms, most_rows = _one_pass(step, losses_of, layout, flat, mask, batch, scale)
        return losses, norms

    # One tensor given twice would be one argument, and a later batch's second tensor never read.
    own_inputs = [tensor.detach() for tensor in (mask, *inputs)]
    with _set_aside(step), _without_gradients(fixed):
        try:
            graph = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(
                step.sums.flat, *own_inputs
            )
        except _LOOKS as problem:
            what = f"operation {problem.func}" if hasattr(problem, "func") else "the pass"
            raise UnsupportedOperationError(
                f"compile: {what} looks at a tensor's numbers, which a recorded pass does not have; compute it with "
                "tensors (torch.where), or run the pass as it is"
            ) from None
        except RuntimeError as problem:
            if "data pointer" not in str(problem):
                raise
            raise UnsupportedOperationError(
                "compile: a weight is computed from one parameter alone (spectral norm, a transpose), and its place in "
                "memory tells what it is, which a trace does not have; run the pass as it is"
            ) from None
    _check_randomness(step, graph)
    return TracedPass(graph, _lift_constants(graph, _own_tensors(step, whole, fixed)), most_rows)


def _one_pass(
    step: DPStep,
    losses_of: LossesOf,
    layout: Layout,
    flat: Tensor,
    mask: Tensor,
    batch: tuple[Tensor, ...],
    scale: float,
) -> tuple[Tensor, Tensor, int]:
    state, sums = step.state, cast(FlatSums, step.sums)
    with torch.enable_grad(), sums.traced(flat), _Untouched() as untouched, untouched.put_back():
        with step.capture(), _Unread():
            losses = losses_of(*batch)
        if not isinstance(losses, Tensor) or losses.shape != (layout.num_units,) or not losses.requires_grad:
            raise UnsupportedOperationError(
                "compile: expected one loss per unit [U] that depends on parameters"
            )
        if state.is_arranged:
            raise UnsupportedOperationError(
                "compile: rows are picked by what the data say, so that each pass has to be looked at for units that "
                "mix; run it as it is"
            )
        state.abandon()
        state.batch = Batch(layout, scale, mask)
        torch.autograd.backward(losses, torch.full_like(losses, 1.0 / scale))
        found = state.take()
        if found is None:
            raise UnsupportedOperationError("compile: the losses do not depend on any captured parameter")
        with torch.no_grad():
            found.finish()
        found.check_finished()
    return losses.detach(), found.sq_norms(), found.most_rows


class _Unread(TorchFunctionMode):
    """What takes numbers out of memory without an operation is refused as those are that look at them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TAKES_NUMBERS:
            raise DataDependentOutputException(func.__name__)
        return func(*args, **(kwargs or {}))


class _Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors that have numbers, which are those of the module and of others: a trace reads none of them, and what it
    writes there is taken back (torch does both where all arguments of an operation have numbers)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in([*args, *kwargs.values()]))
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
            if torch.Tag.data_dependent_output in func.tags:
                raise DataDependentOutputException(func)
            is_picked = func not in _INDEXED or any(tensor.dtype == torch.bool for tensor in tensors[1:])
            if torch.Tag.dynamic_output_shape in func.tags and is_picked:
                raise DynamicOutputShapeException(func)
            self._note_writes(func, args, kwargs)
        return func(*args, **kwargs)

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not func._schema.is_mutable:
            return
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in tensors_in([given]):
                if not isinstance(tensor, FakeTensor):
                    with _disable_current_modes():
                        self._before.append((tensor, tensor.detach().clone()))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        try:
            yield
        finally:
            with _disable_current_modes(), torch.no_grad():
                # The first one last.
                for tensor, value in reversed(self._before):
                    tensor.copy_(value)


@contextmanager
def _without_gradients(fixed: Sequence[Tensor]) -> Iterator[None]:
    """
    Raises:
        UnsupportedOperationError: one of these tensors was given a gradient, which nothing clips.
    """
    leaves = [(tensor, tensor.grad) for tensor in fixed if tensor.requires_grad and tensor.is_leaf]
    for tensor, _ in leaves:
        tensor.grad = None
    try:
        yield
        found = next((tensor for tensor, _ in leaves if tensor.grad is not None), None)
    finally:
        for tensor, grad in leaves:
            tensor.grad = grad
    if found is not None:
        raise UnsupportedOperationError(
            f"compile: a tensor of `fixed`, of shape {list(found.shape)}, gets a gradient of single records, which "
            "nothing clips; compute what the losses read of it under torch.no_grad()"
        )


@contextmanager
def _set_aside(step: DPStep) -> Iterator[None]:
    """Tensors without numbers stay in the trace: what engine and module keep is put back."""
    state = step.state
    kept = state.batch, dict(state.batches), state.start_pass, step.is_last_pass, set(step.open)
    layers = [(layer, dict(layer.__dict__), dict(layer._buffers)) for layer in step.module.modules()]
    step.is_last_pass = False
    state.batches.clear()
    try:
        yield
    finally:
        state.take()
        state.reset()
        state.batch, state.batches, state.start_pass, step.is_last_pass, step.open = kept
        changed = [layer for layer, before, _ in layers if _has_shapes(layer, before)]
        for layer, before, buffers in layers if changed else ():
            layer.__dict__.clear()
            layer.__dict__.update(before)
            layer._buffers.clear()
            layer._buffers.update(buffers)
    if changed:
        raise UnsupportedOperationError(
            f"compile: {type(changed[0]).__name__} keeps a tensor of its forward pass as an attribute; compute it "
            "beforehand, or run the pass as it is"
        )


def _has_shapes(layer: nn.Module, before: dict[str, Any]) -> bool:
    """Whether a layer has put tensors of the trace into its attributes."""
    own = {key: value for key, value in layer.__dict__.items() if before.get(key) is not value}
    return any(isinstance(tensor, FakeTensor) for _, tensor in named_tensors(own)) or any(
        isinstance(tensor, FakeTensor) for tensor in layer._buffers.values()
    )


def _check_randomness(step: DPStep, graph: GraphModule) -> None:
    """Random numbers inside a checkpoint would be drawn anew when it is run again."""
    if not step.state.has_checkpoint:
        return
    for node in _calls(graph):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _drops_nothing(node):
            raise UnsupportedOperationError(
                f"compile: {node.target} is random, and the network has activation checkpoints, whose second run would "
                "draw other numbers; leave dropout out, or run the pass as it is"
            )


def _drops_nothing(node: Node) -> bool:
    """Whether it is attention without dropout: torch marks its kernels as random for the dropout they could do."""
    schema = getattr(node.target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.name == "dropout_p":
            default = node.kwargs.get(argument.name, argument.default_value)
            given = node.args[place] if place < len(node.args) else default
            return isinstance(given, float) and given == 0.0
    return False


def _lift_constants(graph: GraphModule, own: Own) -> list[Constant]:
    """Make what the graph holds on to its first arguments.

    Raises:
        UnsupportedOperationError: it would read a tensor of somebody else's: the batch that it was traced with, say,
            in each step again.
    """
    nodes: dict[int, Node] = {}
    constants: list[Constant] = []
    first = next(iter(graph.graph.nodes))
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        value = getattr(graph, str(node.target))
        if id(value) not in nodes:
            is_number = value.dim() == 0 and all(user.target in _FRESH for user in node.users)
            if id(value) not in own and not is_number:
                raise UnsupportedOperationError(
                    f"compile: the losses read a tensor of shape {list(value.shape)} that is neither an argument nor a "
                    "parameter or buffer of the module; its numbers would be the same in each step. Give it as an "
                    "argument, or register it as a buffer (or name it in `fixed`, if it is no record)"
                )
            with graph.graph.inserting_before(first):
                nodes[id(value)] = graph.graph.placeholder(f"constant_{len(constants)}")
            constants.append(Constant(value.detach(), *own.get(id(value), (value, []))))
        node.replace_all_uses_with(nodes[id(value)])
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return constants


def _own_tensors(step: DPStep, layout: Layout | None, fixed: Sequence[Tensor]) -> Own:
    state = step.state
    beside = [state.anchor, state.anchor_grad, *fixed, *([] if layout is None else layout.tensors())]
    found: Own = {id(tensor): (tensor, []) for tensor in beside}
    for layer in step.module.modules():
        for holder in (vars(layer), layer._parameters, layer._buffers):
            for name, value in holder.items():
                if isinstance(value, Tensor):
                    found.setdefault(id(value), (value, []))[1].append((holder, name))
    return found


def _calls(graph: GraphModule) -> Iterator[Node]:
    return (node for node in graph.graph.nodes if node.op == "call_function")
