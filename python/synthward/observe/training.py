"""What training tells of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from synthward.engine import PrivacyPlan
from synthward.engine.errors import (
    BudgetExceededError,
    CheckpointError,
    LedgerError,
    OutputError,
    RankLostError,
)
from synthward.observe.events import Progress, Versions
from synthward.observe.log import LOG_FILE, NullLog, RunLog
from synthward.observe.norms import ParameterNorms
from synthward.observe.scalars import NullScalars, Scalars

EVERY_STEPS = 50
"""Steps between two progress lines. A rate over fewer would tell of single draws."""

# Errors whose text is made of settings, files and the ledger. That of others may hold a value or a size of records.
_TOLD = (BudgetExceededError, CheckpointError, LedgerError, OutputError, RankLostError)


class Observer:
    """Is told how training goes; this base does nothing with it.

    A context manager around training: an error that leaves it is told, and what was opened is closed.
    """

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failed(error)
        self.close()

    def started(
        self,
        info: Mapping[str, Any],
        plan: PrivacyPlan,
        parameters: Iterable[Tensor],
        *,
        step: int,
        world_size: int = 1,
        backend: str | None = None,
        device: str = "cpu",
    ) -> None:
        """Training goes on from `step`; `info` is the run's run.json, `parameters` what is trained."""

    def leased(self, first: int, steps: int) -> None:
        """`steps` steps from `first` on are paid for."""

    def stepped(self, step: int, epsilon: float, learning_rate: float) -> None:
        """`step` steps are taken, and cost at most `epsilon` with all before; cheap."""

    def checkpointed(self, step: int) -> None:
        """A checkpoint after `step` steps is whole."""

    def finished(self, step: int, epsilon: float) -> None:
        """The model is written."""

    def failed(self, error: BaseException) -> None:
        """Training ends in `error`."""

    def close(self) -> None:
        """Nothing more is told; calling it twice does no harm."""


class TrainingObserver(Observer):
    """Writes the run's log, and scalars for TensorBoard if asked to.

    To be made on every rank: where parameters are sharded, all take part in their norms. Only rank 0 writes.

    Args:
        folder: of the run.
        is_main: whether this is rank 0.
        resumed: whether an earlier process began the run.
        tensorboard: folder of event files, or None.
        remark: shows one line to the user.
        clip_bound: gives the released clip bound where it is adapted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool = True,
        resumed: bool = False,
        tensorboard: Path | None = None,
        remark: Callable[[str], None] = lambda text: None,
        clip_bound: Callable[[], float] | None = None,
        every: int = EVERY_STEPS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._is_main, self._resumed = is_main, resumed
        self._tensorboard, self._remark = tensorboard, remark
        self._log = RunLog(folder / LOG_FILE, remark) if is_main else NullLog()
        self._scalars = NullScalars()
        self._clip_bound, self._every, self._clock = clip_bound, every, clock
        self._begun = clock()
        self._norms = ParameterNorms([])
        self._looks = False
        self._steps, self._noise = 0, 0.0
        self._marks: list[tuple[int, float]] = []

    def started(
        self,
        info: Mapping[str, Any],
        plan: PrivacyPlan,
        parameters: Iterable[Tensor],
        *,
        step: int,
        world_size: int = 1,
        backend: str | None = None,
        device: str = "cpu",
    ) -> None:
        self._norms = ParameterNorms(parameters)
        self._looks = self._is_main or self._norms.are_collective
        self._steps, self._noise = plan.steps, plan.noise_multiplier
        same = ("run_id", "generator", "epsilon", "delta", "accountant", "unit", "relation", "private")
        self._log.write(
            "resumed" if self._resumed else "started",
            **{name: info[name] for name in (*same, "max_grad_norm", "physical_batch_size")},
            step=step,
            steps=plan.steps,
            sample_rate=plan.sample_rate,
            period=plan.period,
            noise_multiplier=plan.noise_multiplier,
            correlated=plan.strategy is not None,
            arithmetic=plan.arithmetic,
            max_batch_size=plan.max_batch_size,
            max_units=plan.max_units,
            world_size=world_size,
            backend=backend,
            device=device,
            versions=Versions.current(),
        )
        if self._is_main and self._tensorboard is not None:
            self._scalars = Scalars(self._tensorboard, step, self._remark)
        self._marks = [(step, self._clock())]
        self._remember_before(step + 1)

    def leased(self, first: int, steps: int) -> None:
        self._log.write("leased", first=first, steps=steps)

    def stepped(self, step: int, epsilon: float, learning_rate: float) -> None:
        if self._looks and self._is_shown(step):
            self._show(step, epsilon, learning_rate)
        self._remember_before(step + 1)

    def checkpointed(self, step: int) -> None:
        self._log.write("checkpointed", step=step)

    def finished(self, step: int, epsilon: float) -> None:
        self._log.write("finished", step=step, epsilon=epsilon, seconds=round(self._clock() - self._begun))

    def failed(self, error: BaseException) -> None:
        message = " ".join(str(error).split()) if type(error) in _TOLD else None
        self._log.write("stopped", error=type(error).__name__, message=message)

    def close(self) -> None:
        self._log.close()
        self._scalars.close()

    def _show(self, step: int, epsilon: float, learning_rate: float) -> None:
        rate = self._rate(step)
        progress = self._log.write(
            "progress",
            step=step,
            steps=self._steps,
            steps_per_second=None if rate is None else float(f"{rate:.3g}"),
            seconds_left=None if rate is None else round((self._steps - step) / rate),
            epsilon=epsilon,
            learning_rate=learning_rate,
            noise_multiplier=self._noise,
            parameter_norm=self._norms.parameters(),
            update_norm=self._norms.update(),
            clip_bound=None if self._clip_bound is None else self._clip_bound(),
        )
        assert isinstance(progress, Progress)
        self._scalars.write(progress)

    def _is_shown(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    def _remember_before(self, step: int) -> None:
        if self._looks and self._is_shown(step):
            self._norms.remember()

    def _rate(self, step: int) -> float | None:
        """Steps per second since the last mark that lies far enough back."""
        now = self._clock()
        self._marks.append((step, now))
        while len(self._marks) > 1 and step - self._marks[1][0] >= self._every:
            self._marks.pop(0)
        first, then = self._marks[0]
        return (step - first) / (now - then) if step - first >= self._every and now > then else None
