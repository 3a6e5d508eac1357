"""The private training loop: leases, logical steps, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from synthward.data import Records
from synthward.encoding import TableEncoder
from synthward.engine import (
    KeySchedule,
    Ledger,
    PrivacyPlan,
    PrivateTrainer,
    physical_batches,
)
from synthward.engine.device import describe, use_device
from synthward.engine.distributed.checkpoint import (
    is_saved,
    load_sharded,
    read_index,
    remove_sharded,
    save_sharded,
)
from synthward.engine.distributed.exchange import copy_from_main
from synthward.engine.distributed.ledger import SharedLedger
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.distributed.sharded import shard, shard_like, whole
from synthward.engine.draws import Draws
from synthward.engine.errors import BudgetExceededError, LedgerError
from synthward.engine.sampling import rank_part
from synthward.observe import EpsilonSoFar, Observer
from synthward.progress import Progress, Task
from synthward.run.folder import CHECKPOINT_FOLDER, MODEL_FILE, RunFolder, draw_context
from synthward.run.passes import Passes
from synthward.run.shared import Start, Units, agreed_device, begin

# Steps paid for at once. A kill loses at most the steps of one lease: they stay charged and are not repeated.
LEASE_STEPS = 50


class Training:
    """One process's part of a run: from the last checkpoint to the last step that the plan allows.

    Args:
        records, ledger, parallel, device: rank 0's; those of the others, who have `start`, are not used.
        is_recorded: whether passes are recorded (`PrivateTrainer.compile`); None: on a GPU, where they can be.
    """

    def __init__(
        self,
        folder: RunFolder,
        encoder: TableEncoder,
        records: Records | None,
        plan: PrivacyPlan,
        keys: KeySchedule,
        ledger: Ledger | None,
        progress: Progress,
        ranks: Ranks | None = None,
        start: Start | None = None,
        observer: Observer | None = None,
        parallel: str = "replicate",
        device: str = "cpu",
        is_recorded: bool | None = None,
    ) -> None:
        self.ranks = ranks or Ranks.alone()
        self.folder, self.encoder, self.plan, self.progress = folder, encoder, plan, progress
        self.observer = observer or Observer()
        num_units = records.num_units if records is not None else start.num_units  # type: ignore[union-attr]
        if start is None:
            seed = begin(self.ranks, folder, encoder, plan, num_units, keys, parallel, device)
        else:
            seed, parallel, device = start.seed, start.parallel, start.device
        self.device = agreed_device(device, self.ranks)
        use_device(self.device)
        self.ledger = _ledger_of(self.ranks, ledger)
        self.rng = np.random.default_rng(seed)
        self.torch_rng = torch.Generator()
        self.torch_rng.manual_seed(int(self.rng.integers(2**62)))
        # Networks that the engine does not see begin alike on all ranks, too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.generator = folder.new_generator(encoder).to(self.device)
        if parallel == "shard":
            for module in self.generator.sharded_modules:
                copy_from_main(self.ranks, [*module.parameters()])
                shard(module, self.ranks)
        self.data = Units(None if records is None else encoder.encode(records, self.rng), self.ranks)
        settings = self.generator.settings
        optimizer = torch.optim.Adam(self.generator.private_module.parameters(), lr=settings.learning_rate)
        self.trainer = PrivateTrainer(
            self.generator.private_module, optimizer, plan, keys=keys, ledger=self.ledger, ranks=self.ranks
        )
        self.optimizer = optimizer
        if is_recorded is None:
            # What the launches cost there is more than what most tables' networks compute.
            can_be = parallel != "shard" and plan.clip.clipping != "adaptive"
            is_recorded = self.device.type == "cuda" and can_be
        self.passes = Passes(self.trainer, self.generator, is_recorded=is_recorded)
        self.sampler = plan.sampler(num_units, keys.key("sampler"))
        self.random_key = keys.key("training")
        self.steps_done = 0
        world = self.ranks.world_size
        self.physical = _physical_batch_size(
            plan.expected_batch_size / world, folder.info["physical_batch_size"]
        )
        # A cap on the draw makes the number of physical batches public: it is then the same in every step.
        cap = plan.max_batch_size
        self.batches = 1 if cap is None else math.ceil(math.ceil(cap / world) / self.physical)

    def run(self) -> None:
        """Train until every step of the plan is charged, then write the model."""
        step = self._restore()
        spent = self._charged_steps()
        # Steps that were charged but died with their process are not taken again: the budget is spent.
        step = max(step, spent)
        self.trainer.advance_to(step)
        epsilons = self._epsilons(step)
        self.observer.started(
            self.folder.info,
            self.plan,
            self.generator.private_module.parameters(),
            step=step,
            world_size=self.ranks.world_size,
            backend=self.ranks.backend,
            device=self.device.type,
        )
        self.progress.note(f"device: {describe(self.device)}")
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
        trained = {name: whole(value) for name, value in self.generator.state(resume=False).items()}
        if self.ranks.is_main:
            generator = self.folder.new_generator(self.encoder).to(self.device)
            generator.load_state(trained)
            generator.calibrate(lambda rows: draw_context(self.encoder, rows, self.rng), self.torch_rng)
            self.folder.save_tensors(MODEL_FILE, generator.state(resume=False))
            remove_sharded(self._checkpoint_path)

    def _lease(self, first: int, task: Task, epsilons: Callable[[int], float]) -> int:
        """Pay for a run of steps, take them, keep a checkpoint; returns the step after them."""
        count = self._pay(first)
        if count:
            self.observer.leased(first, count)
        for step in range(first, first + count):
            self._step(step)
            epsilon = epsilons(step + 1)
            task.advance(1, epsilon=epsilon)
            self.observer.stepped(step + 1, epsilon, self.optimizer.param_groups[0]["lr"])
        if count:
            self._checkpoint(first + count)
            self.observer.checkpointed(first + count)
            self.ledger.close_lease(count)
            head = self.ledger.head
            self.ranks.lead(lambda: self.folder.update(ledger_head=head))
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
        draw, ranks = self.sampler.draw(step), self.ranks
        batches = physical_batches(
            draw, self.physical, at_least=self.batches, rank=ranks.rank, world_size=ranks.world_size
        )
        place, _ = rank_part(len(draw), ranks.rank, ranks.world_size)
        for index, units in enumerate(batches):
            rng = Draws(self.random_key, step=step, first=place + index * self.physical)
            records = self.generator.records_per_unit
            batch, mask = self.data.batch(torch.from_numpy(units), records, rng, self.device)
            self.passes.take(batch, mask, rng.to(self.device), is_last=index == len(batches) - 1)
        self.trainer.apply()
        self.generator.after_step(step, self.plan.steps, self.torch_rng)

    def _checkpoint(self, step: int) -> None:
        tensors = {f"generator.{k}": v for k, v in self.generator.state(resume=True).items()}
        tensors |= {f"trainer.{k}": v for k, v in self.trainer.state_dict().items()}
        tensors["step"] = torch.tensor(step)
        # Whoever puts an older ledger back has to put the model back, too.
        save_sharded(self._checkpoint_path, tensors, self.ranks, {"ledger_head": self.ledger.head})

    def _restore(self) -> int:
        path = self._checkpoint_path
        if not self.ranks.lead(lambda: is_saved(path)):
            return 0
        head = self.ranks.lead(lambda: read_index(path)).info.get("ledger_head")
        if not isinstance(head, str) or not self.ledger.holds(head):
            raise LedgerError(
                f"{self.ledger.path}: does not hold the head that the checkpoint names; lines were cut off or replaced"
            )
        tensors = load_sharded(path, None, self.ranks)
        parts: dict[str, dict[str, torch.Tensor]] = {"generator": {}, "trainer": {}}
        for key, value in tensors.items():
            if key != "step":
                part, name = key.split(".", 1)
                parts[part][name] = value
        begun = self.generator.state(resume=True)
        kept = {k: shard_like(v, begun.get(k, v)) for k, v in parts["generator"].items()}
        self.generator.load_state(kept)
        self.trainer.load_state_dict(parts["trainer"])
        return int(tensors["step"])

    @property
    def _checkpoint_path(self) -> Path:
        return self.folder.path / CHECKPOINT_FOLDER

    def _charged_steps(self) -> int:
        return sum(getattr(event, "steps", 0) for event in self.ledger.events())

    def _epsilons(self, first: int) -> Callable[[int], float]:
        """At least what a number of steps cost, with all before them; of use to rank 0."""
        info, charged = self.folder.info, self.ledger.events()
        if not self.ranks.is_main:
            return lambda step: 0.0
        return EpsilonSoFar(
            charged,
            self.plan.event,
            first=first,
            steps=self.plan.steps,
            stretch=LEASE_STEPS,
            target=info["epsilon"],
            delta=info["delta"],
            accountant=info["accountant"],
            relation=info["relation"],
        )


def _ledger_of(ranks: Ranks, ledger: Ledger | None) -> Ledger | SharedLedger:
    if ranks.world_size > 1:
        return SharedLedger(ranks, ledger)
    assert ledger is not None
    return ledger


def _physical_batch_size(expected: float, largest: int) -> int:
    """Static number of units per physical batch: most draws fit in as few batches as memory allows."""
    reach = expected + 2.5 * math.sqrt(expected) + 1.0
    return math.ceil(reach / math.ceil(reach / largest))
