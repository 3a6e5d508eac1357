"""One ledger for all ranks: rank 0 has the file, and nobody goes on before it has written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from synthward.engine.accounting.events import Event, StepsEvent
from synthward.engine.distributed.agreement import check_same
from synthward.engine.distributed.ranks import Ranks
from synthward.engine.errors import ConfigError

if TYPE_CHECKING:
    from synthward.engine.ledger import Ledger


class SharedLedger:
    """The ledger of a run of several ranks, as `PrivateTrainer` and the training loop use it.

    Every method but `covers` is an exchange: all ranks call it in the same order, rank 0 does it, all have its result
    or its error. `covers` is asked once a step; rank 0 asks the ledger, the others go by the lease that they saw made.

    Args:
        ledger: rank 0's; None on the others.
    """

    def __init__(self, ranks: Ranks, ledger: Ledger | None) -> None:
        with ranks.as_one():
            if (ledger is not None) != ranks.is_main:
                raise ConfigError("ledger: give it on rank 0, and None on the others")
        self._ranks, self._ledger = ranks, ledger
        # By part: event, first step, number of steps, those that were let pass.
        self._leases: dict[str, tuple[StepsEvent, int, int, int]] = {}
        main = self._main
        self.path, self.is_private, self.is_adaptive = ranks.lead(
            lambda: (main().path, main().is_private, main().is_adaptive)
        )

    def _main(self) -> Ledger:
        assert self._ledger is not None
        return self._ledger

    @property
    def head(self) -> str:
        """Hash of the last line, hex."""
        return self._ranks.lead(lambda: self._main().head)

    def holds(self, head: str) -> bool:
        """Whether ``head`` was this ledger's head at some time."""
        return self._ranks.lead(lambda: self._main().holds(head))

    def events(self) -> list[Event]:
        """Everything charged so far; an unclosed lease counts whole."""
        return self._ranks.lead(lambda: self._main().events())

    def epsilon(self, delta: float | None = None, accountant: str | None = None) -> float:
        """Epsilon of all that was charged; at the ledger's own delta and accountant by default."""
        return self._ranks.lead(lambda: self._main().epsilon(delta, accountant))

    def add_key(self, key_id: str, *, private: bool = True, part: str | None = None) -> None:
        """Note a fresh key, of a resumed run or of one part; a key that was used before is refused."""
        self._ranks.lead(lambda: self._main().add_key(key_id, private=private, part=part))

    def new_part(self) -> str:
        """A name for the leases of one more network."""
        return self._ranks.lead(lambda: self._main().new_part())

    def lease(self, event: StepsEvent, first_step: int, steps: int, *, part: str = "") -> None:
        """Charge ``steps`` steps of ``event`` (one step's event) from logical step ``first_step`` on; returns when it
        is on rank 0's disk."""
        check_same(self._ranks, {"lease": (event, first_step, steps, part)})
        self._ranks.lead(lambda: self._main().lease(event, first_step, steps, part=part))
        self._leases[part] = (event, first_step, steps, 0)

    def close_lease(self, used_steps: int, *, part: str = "") -> None:
        """Give back what a lease did not use; steps that `covers` let pass stay charged."""
        self._ranks.lead(lambda: self._main().close_lease(used_steps, part=part))
        self._leases.pop(part, None)

    def covers(self, step: int, event: StepsEvent, *, part: str = "") -> bool:
        """Whether an open lease pays for logical step ``step`` of ``event`` (one step), and no step did before."""
        if self._ledger is not None:
            return self._ledger.covers(step, event, part=part)
        if part not in self._leases:
            return False
        leased, first, steps, taken = self._leases[part]
        at = step - first
        if not taken <= at < steps or leased != event:
            return False
        self._leases[part] = (leased, first, steps, at + 1)
        return True


def check_ledger(ranks: Ranks, ledger: object) -> None:
    """`ConfigError` where ranks would each go by a ledger of their own. All ranks take part."""
    if ranks.world_size == 1:
        return
    has_shared = isinstance(ledger, SharedLedger)
    if any(ranks.gather(ledger is not None and not has_shared)) or not ranks.all_have(has_shared):
        raise ConfigError("ledger: several ranks share one; wrap it by SharedLedger(ranks, ledger or None)")


def share_ledger(ranks: Ranks, ledger: Ledger | SharedLedger | None) -> Ledger | SharedLedger | None:
    """The ledger as all ranks use it: rank 0's, if it has one. All ranks take part."""
    if ranks.world_size == 1:
        return ledger
    kinds = ranks.gather((ledger is not None, isinstance(ledger, SharedLedger)))
    if not any(has_one for has_one, _ in kinds):
        return None
    if not any(is_shared for _, is_shared in kinds):
        assert not isinstance(ledger, SharedLedger)
        return SharedLedger(ranks, ledger)
    if not all(is_shared for _, is_shared in kinds):
        raise ConfigError("ledger: some ranks have wrapped it by SharedLedger, others have not")
    return ledger
