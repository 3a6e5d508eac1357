"""What the commands share: options, output, interruption."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]

Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU where torch sees one), cpu, cuda or cuda:N.")
]


class Interrupted(Exception):
    """The user broke off a command; the text says how to go on."""


def interruptible(advice: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turns Ctrl-C inside a command into `Interrupted` with advice (the parser would only exit)."""

    def wrap(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                raise Interrupted(advice) from None

        return run

    return wrap


def on_ranks(command: Callable[P, None]) -> Callable[P, None]:
    """Runs a command that trains on all processes that `torchrun` has started: rank 0 runs it, the others take part in
    the training and are silent."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if not has_ranks():
            command(*args, **kwargs)
            return
        from synthward.engine.distributed.ranks import Ranks
        from synthward.run.fit import follow_run
        from synthward.run.shared import leading

        device = _device_of_rank(str(kwargs.get("device", "auto")))
        with Ranks.join(device=device) as ranks, ranks.telling():
            if not ranks.is_main:
                follow_run(ranks)
                return
            with leading(ranks):
                command(*args, **kwargs)

    return run


def has_ranks() -> bool:
    """Whether this is one of several processes that were started together."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def _device_of_rank(asked: str) -> Any:
    """This process's device; the first on a machine says what is wrong with it."""
    from synthward.engine.device import choose_device
    from synthward.engine.errors import ConfigError

    try:
        return choose_device(asked, one_each=True)
    except ConfigError as error:
        error.is_told = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def emit(result: Mapping[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    """Print a command's result: one JSON object, or lines for people."""
    text = json.dumps(json_ready(result), allow_nan=False) if as_json else "\n".join(lines)
    print(text)


def json_ready(value: Any) -> Any:
    """Paths as text; infinity as ``"inf"`` and NaN as null, which JSON has no numbers for."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def remark(text: str) -> None:
    """One line for the user, on standard error."""
    print(f"synthward: {text}", file=sys.stderr, flush=True)


def epsilon_up(epsilon: float) -> str:
    """Epsilon with up to three decimals, upwards: a shown figure never promises more than what it was made from."""
    # The small tolerance keeps 3.0000000000000004 from being shown as 3.001.
    return f"{math.ceil(epsilon * 1000 - 1e-6) / 1000:.12g}" if math.isfinite(epsilon) else str(epsilon)


def budget_line(epsilon: float, delta: float, unit: str, *, private: bool) -> str:
    """The budget in words; a seeded run is never shown without what it is."""
    spent = f"epsilon spent: {epsilon_up(epsilon)} at delta {delta:g}, privacy unit: {unit}"
    return spent if private else f"{spent} (REPRODUCIBLE, NOT PRIVATE: the noise follows from the seed)"
