"""What may be told of a run while it goes on: a closed set of lines, each of a closed set of fields.

Each field is a setting, a count of steps, a time, or a function of what a charged mechanism released. A loss, the norm
of a gradient, the size of a draw and a number of records are none of these: there are no fields for them, and no others
can be given.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from synthward import __version__
from synthward.engine.errors import PrivacyError


class Event(BaseModel):
    """One line; its values are of the types that are declared, without conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Versions(Event):
    """Of the software; not of the machine."""

    synthward: str
    python: str
    torch: str
    numpy: str

    @classmethod
    def current(cls) -> Versions:
        return cls(
            synthward=__version__,
            python=platform.python_version(),
            torch=str(torch.__version__),
            numpy=numpy.__version__,
        )


class Started(Event):
    """A run began, or went on after `step` steps: its settings, all of which its run.json holds, too."""

    run_id: str
    step: int
    generator: str
    epsilon: float
    delta: float
    accountant: str
    unit: str
    relation: str
    private: bool
    steps: int
    sample_rate: float
    period: int
    noise_multiplier: float
    correlated: bool
    arithmetic: str
    max_grad_norm: float
    max_batch_size: int | None
    max_units: int | None
    physical_batch_size: int
    world_size: int
    backend: str | None
    device: str
    versions: Versions


class Leased(Event):
    """`steps` steps from `first` on are paid for."""

    first: int
    steps: int


class Progress(Event):
    """How far the run is.

    Attributes:
        steps_per_second: over at least as many steps as lie between two such lines; None before there are so many.
        epsilon: at least what the steps so far cost, the preparation included.
        learning_rate: of the step last taken.
        parameter_norm, update_norm: L2, of the trained parameters and of their last change. Both are released.
        clip_bound: where it is adapted, the released one.
    """

    step: int
    steps: int
    steps_per_second: float | None
    seconds_left: int | None
    epsilon: float
    learning_rate: float
    noise_multiplier: float
    parameter_norm: float
    update_norm: float | None
    clip_bound: float | None


class Checkpointed(Event):
    """A checkpoint after `step` steps is whole."""

    step: int


class Finished(Event):
    """The model is written."""

    step: int
    epsilon: float
    seconds: int


class Stopped(Event):
    """The run ended before its time.

    Attributes:
        error: class of the error.
        message: its text, for errors whose text is of settings, files and the ledger; others may quote records.
    """

    error: str
    message: str | None


EVENTS: dict[str, type[Event]] = {
    "started": Started,
    "resumed": Started,
    "leased": Leased,
    "progress": Progress,
    "checkpointed": Checkpointed,
    "finished": Finished,
    "stopped": Stopped,
}


def make_event(name: str, fields: dict[str, Any]) -> Event:
    """The line `name` of these fields.

    Raises:
        PrivacyError: there is no such line, or a field is not one of its own, is missing, or is of another type.
    """
    kind = EVENTS.get(name)
    if kind is None:
        raise PrivacyError(f"log: {name!r} is no line of a run's log; those are {', '.join(EVENTS)}")
    unknown = [field for field in fields if field not in kind.model_fields]
    if unknown:
        raise PrivacyError(
            f"log: {unknown[0]!r} is no field of {name!r} lines; they hold what is public or released under noise: "
            + ", ".join(kind.model_fields)
        )
    try:
        return kind(**fields)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise PrivacyError(f"log: field {where!r} of {name!r} lines: {fault['msg']}") from None
