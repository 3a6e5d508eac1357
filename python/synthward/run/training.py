"""The private training loop: leases, logical steps, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from synthward.data import Records
from synthward.encoding import Encoded, TableEncoder
from synthward.engine import (
    KeySchedule,
    Ledger,
    PrivacyPlan,
    PrivateTrainer,
    physical_batches,
)
from synthward.engine.accounting import epsilon_curve
from synthward.engine.errors import BudgetExceededError, LedgerError
from synthward.generators import Batch
from synthward.progress import Progress, Task
from synthward.run.folder import CHECKPOINT_FILE, MODEL_FILE, RunFolder, draw_context

# Steps paid for at once. A kill loses at most the steps of one lease: they stay charged and are not repeated.
LEASE_STEPS = 50


class Training:
    """One process's part of a run: from the last checkpoint to the last step that the plan allows."""

    def __init__(
        self,
        folder: RunFolder,
        encoder: TableEncoder,
        records: Records,
        plan: PrivacyPlan,
        keys: KeySchedule,
        ledger: Ledger,
        progress: Progress,
    ) -> None:
        self.folder, self.encoder, self.plan, self.ledger, self.progress = (
            folder,
            encoder,
            plan,
            ledger,
            progress,
        )
        seed = folder.info["seed"]
        self.rng = np.random.default_rng(seed)
        self.torch_rng = torch.Generator()
        self.torch_rng.manual_seed(int(self.rng.integers(2**62)))
        if seed is not None:
            torch.manual_seed(seed)
        self.generator = folder.new_generator(encoder)
        self.data = _Tensors(encoder.encode(records, self.rng))
        settings = self.generator.settings
        optimizer = torch.optim.Adam(self.generator.private_module.parameters(), lr=settings.learning_rate)
        self.trainer = PrivateTrainer(
            self.generator.private_module, optimizer, plan, keys=keys, ledger=ledger
        )
        self.optimizer = optimizer
        self.sampler = plan.sampler(records.num_units, keys.key("sampler"))
        self.steps_done = 0
        self.physical = _physical_batch_size(plan.expected_batch_size, folder.info["physical_batch_size"])
        # A cap on the draw makes the number of physical batches public: it is then the same in every step.
        cap = plan.max_batch_size
        self.batches = 1 if cap is None else math.ceil(cap / self.physical)

    def run(self) -> None:
        """Train until every step of the plan is charged, then write the model."""
        step = self._restore()
        spent = self._charged_steps()
        # Steps that were charged but died with their process are not taken again: the budget is spent.
        step = max(step, spent)
        self.trainer.advance_to(step)
        epsilons = self._epsilons()
        task = self.progress.task("fit", self.plan.steps)
        try:
            task.advance(step, epsilon=epsilons(step))
            while step < self.plan.steps:
                after = self._lease(step, task, epsilons)
                if after == step:
                    break
                step = after
        finally:
            task.close()
        self.steps_done = step
        self.generator.calibrate(lambda rows: draw_context(self.encoder, rows, self.rng), self.torch_rng)
        self.folder.save_tensors(MODEL_FILE, self.generator.state(resume=False))
        (self.folder.path / CHECKPOINT_FILE).unlink(missing_ok=True)

    def _lease(self, first: int, task: Task, epsilons: Callable[[int], float]) -> int:
        """Pay for a run of steps, take them, keep a checkpoint; returns the step after them."""
        count = self._pay(first)
        for step in range(first, first + count):
            self._step(step)
            task.advance(1, epsilon=epsilons(step + 1))
        if count:
            self._checkpoint(first + count)
            self.ledger.close_lease(count)
            self.folder.update(ledger_head=self.ledger.head)
        return first + count

    def _pay(self, first: int) -> int:
        """Lease the next steps; returns how many.

        A run whose noise is correlated begins a mechanism of its own after a kill, which may cost a little more than
        the rest of the first one would have: it then ends a few steps early, within its budget.
        """
        count = min(LEASE_STEPS, self.plan.steps - first)
        while True:
            try:
                self.ledger.lease(self.plan.event(1), first, count)
                return count
            except BudgetExceededError:
                if not self.plan.event(1).is_one_mechanism:
                    raise
                if count == 1:
                    return 0
                count //= 2

    def _step(self, step: int) -> None:
        rate = self.generator.learning_rate(step, self.plan.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for units in physical_batches(self.sampler.draw(step), self.physical, at_least=self.batches):
            batch, mask = self.data.batch(units, self.generator.records_per_unit, self.torch_rng)
            with self.trainer.capture():
                losses = self.generator.unit_losses(batch, self.torch_rng)
            self.trainer.backward(losses, rows_per_unit=self.generator.rows_per_unit, unit_mask=mask)
        self.trainer.apply()
        self.generator.after_step(step, self.plan.steps, self.torch_rng)

    def _checkpoint(self, step: int) -> None:
        tensors = {f"generator.{k}": v for k, v in self.generator.state(resume=True).items()}
        tensors |= {f"trainer.{k}": v for k, v in self.trainer.state_dict().items()}
        tensors["step"] = torch.tensor(step)
        # Whoever puts an older ledger back has to put the model back, too.
        tensors["ledger_head"] = torch.tensor(list(bytes.fromhex(self.ledger.head)), dtype=torch.uint8)
        self.folder.save_tensors(CHECKPOINT_FILE, tensors)

    def _restore(self) -> int:
        if not (self.folder.path / CHECKPOINT_FILE).is_file():
            return 0
        tensors = self.folder.load_tensors(CHECKPOINT_FILE)
        head = tensors.pop("ledger_head", None)
        if head is not None and not self.ledger.holds(bytes(head.tolist()).hex()):
            raise LedgerError(
                f"{self.ledger.path}: does not hold the head that the checkpoint names; lines were cut off or replaced"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"generator": {}, "trainer": {}}
        for key, value in tensors.items():
            if key != "step":
                part, name = key.split(".", 1)
                parts[part][name] = value
        self.generator.load_state(parts["generator"])
        self.trainer.load_state_dict(parts["trainer"])
        return int(tensors["step"])

    def _charged_steps(self) -> int:
        return sum(getattr(event, "steps", 0) for event in self.ledger.events())

    def _epsilons(self) -> Callable[[int], float]:
        """Epsilon after a number of steps, for display: interpolated between a few accounted points."""
        info = self.folder.info
        others = [e for e in self.ledger.events() if not hasattr(e, "steps")]
        curve = epsilon_curve([*others, self.plan.event()], info["delta"], 12, info["accountant"])
        steps, values = zip(*curve, strict=True)
        return lambda step: float(np.interp(step, steps, values))


class _Tensors:
    """Encoded records as tensors, and batches of them: whole units, records drawn inside each."""

    def __init__(self, encoded: Encoded) -> None:
        self.tokens = torch.from_numpy(encoded.tokens)
        self.scores = torch.from_numpy(encoded.scores)
        self.context = torch.from_numpy(encoded.context)
        self.offsets = torch.from_numpy(encoded.unit_offsets)

    def batch(self, units: np.ndarray, draws: int, rng: torch.Generator) -> tuple[Batch, torch.Tensor]:
        """Rows of ``draws`` records per unit, and which units are real; padding (-1) repeats the first unit."""
        index = torch.from_numpy(units)
        mask = index >= 0
        index = index.clamp(min=0)
        first, last = self.offsets[index], self.offsets[index + 1]
        pick = torch.rand(len(index), draws, generator=rng, dtype=torch.float64) * (last - first).unsqueeze(1)
        rows = (first.unsqueeze(1) + pick.long()).flatten()
        return Batch(self.tokens[rows], self.scores[rows], self.context[rows]), mask


def _physical_batch_size(expected: float, largest: int) -> int:
    """Static number of units per physical batch: most draws fit in as few batches as memory allows."""
    reach = expected + 2.5 * math.sqrt(expected) + 1.0
    return math.ceil(reach / math.ceil(reach / largest))
