"""The processes of one run, as `torch.distributed` numbers them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist

from synthward.engine.errors import ConfigError, RankLostError, SynthwardError

T = TypeVar("T")

# The longest that one process waits for another in one exchange.
PATIENCE_SECONDS = 600.0
# While rank 0 reads records and calibrates noise; whoever started the processes ends them all if it dies.
_LONG = timedelta(days=7)
# What gloo and NCCL say of a connection is a plain RuntimeError, as is a fault that has nothing to do with one.
_OF_CONNECTIONS = re.compile(r"gloo|nccl|connection|socket|timed? ?out|broken pipe|store", re.IGNORECASE)
_LOST = (
    "another process of this run stopped or can not be reached; all of them end here. Steps since the last checkpoint "
    "are charged and lost"
)


class Ranks:
    """The processes that train (or sample) together; one process without a group is the usual case.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        group: the process group of all exchanges, or None.

    Guarantees: an exchange with a process that died ends in a `RankLostError`, at the latest when the group's time
    limit is over.
    """

    _joined: ClassVar[Ranks | None] = None

    def __init__(self, group: dist.ProcessGroup | None, store: dist.Store | None = None) -> None:
        self.group, self._store, self._waits = group, store, 0
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        #: Whether other ranks wait for rank 0 to tell them what to do; for the use of who tells.
        self.is_awaited = False
        # Where small things of Python are exchanged.
        self._device: torch.device | None = None
        self._backends = {} if group is None else _backends(group)
        if group is not None and "gloo" not in self._backends.values():
            self._device = torch.device("cuda", torch.cuda.current_device())

    @classmethod
    def alone(cls) -> Ranks:
        """One process."""
        return cls(None)

    @classmethod
    def current(cls) -> Ranks:
        """The processes of torch's default group, where there is one of more than one process; else this one alone."""
        if cls._joined is not None:
            return cls._joined
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls.alone()
        return cls(dist.group.WORLD)

    @classmethod
    @contextmanager
    def join(cls, patience: float = PATIENCE_SECONDS, device: torch.device | None = None) -> Iterator[Ranks]:
        """Take part in the group that `torchrun` describes in the environment, if it does; leave it at the end.

        Args:
            patience: seconds after which an exchange is given up.
            device: a GPU that no other process has, whose tensors are then exchanged by NCCL and those in CPU memory by
                gloo, and which becomes the current one; None or the CPU: gloo alone.

        Raises:
            ConfigError: the environment describes no group that can be joined.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
            yield cls.current()
            return
        store = _join(timedelta(seconds=patience), device or torch.device("cpu"))
        try:
            cls._joined = cls(dist.group.WORLD, store)
            yield cls._joined
        finally:
            cls._joined = None
            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads, writes and speaks for all."""
        return self.rank == 0

    @property
    def members(self) -> list[int]:
        """Their numbers in torch's default group, by rank."""
        if self.group is not None:
            return list(dist.get_process_group_ranks(self.group))
        return [dist.get_rank() if dist.is_available() and dist.is_initialized() else 0]

    @property
    def backend(self) -> str | None:
        """ "gloo", "nccl" or "cpu:gloo,cuda:nccl": who exchanges tensors; None for one process."""
        return None if self.group is None else str(dist.get_backend(self.group))

    def backend_of(self, device: torch.device) -> str | None:
        """ "gloo" or "nccl": who exchanges the tensors of a device; None: nobody, or one process alone."""
        return self._backends.get(device.type)

    @property
    def device(self) -> torch.device:
        """Where tensors are exchanged that belong to no device."""
        return self._device or torch.device("cpu")

    def broadcast(self, value: T) -> T:
        """Rank 0's value (anything that can be pickled), on all."""
        if self.group is None:
            return value
        values: list[Any] = [value]
        with self.exchanging():
            dist.broadcast_object_list(values, group=self.group, group_src=0, device=self._device)
        return values[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, on all."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.exchanging():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on all; an error there is raised on all."""
        if self.group is None:
            return work()
        if not self.is_main:
            followed: T = self._follow()
            return followed
        try:
            value = work()
        except BaseException as error:
            self.broadcast(_for_others(error))
            raise
        self.broadcast(_Done(value))
        return value

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """Around what each rank does for itself: where one fails, all raise the error of the first that did. All ranks
        take part; nothing inside is an exchange."""
        if self.group is None:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        found: list[SynthwardError | None] = [None]
        with suppress(RankLostError) if own is not None else nullcontext():
            found = self.gather(None if own is None else _for_others(own))
        first = next((rank for rank, error in enumerate(found) if error is not None), self.rank)
        if own is not None and first == self.rank:
            raise own
        if (told := found[first]) is not None:
            told.is_told = True
            raise told from own

    def _follow(self) -> Any:
        found = self.broadcast(None)
        if isinstance(found, _Done):
            return found.value
        assert isinstance(found, SynthwardError)
        # Rank 0 has said what went wrong.
        found.is_told = True
        raise found

    def apart(self) -> Ranks:
        """The same processes over connections of their own, which keep no order with others. All ranks take part."""
        if self.group is None:
            return self
        with self.exchanging():
            members, patience = self.members, timedelta(seconds=PATIENCE_SECONDS)
            is_part = len(members) < dist.get_world_size()
            group = dist.new_group(members, timeout=patience, use_local_synchronization=is_part)
        return Ranks(group, self._store)

    def await_main(self) -> None:
        """Wait for rank 0 to come here, however long it works on something else before."""
        if self.group is None or self._store is None:
            return
        self._waits += 1
        name = f"main-{self._waits}"
        with self.exchanging():
            if self.is_main:
                self._store.set(name, "here")
            else:
                self._store.wait([name], _LONG)

    def barrier(self) -> None:
        """Wait until all are here."""
        self.gather(None)

    def all_have(self, value: object) -> bool:
        """Whether `value` is equal on all ranks."""
        return self.group is None or len(set(self.gather(value))) == 1

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around all that a process does: an error of its own is told by it, and not once more by those who lose it."""
        try:
            yield
        except RankLostError:
            raise
        except BaseException:
            self._is_first_to_tell()
            raise

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Turns what an exchange raises when another process is gone into a `RankLostError`."""
        try:
            yield
        except SynthwardError:
            raise
        except (dist.DistError, RuntimeError) as error:
            if not (isinstance(error, dist.DistError) or _OF_CONNECTIONS.search(str(error))):
                raise
            lost = RankLostError(_LOST)
            lost.is_told = not self._is_first_to_tell()
            raise lost from error

    def _is_first_to_tell(self) -> bool:
        """Whether no other rank has said yet that one was lost."""
        if self._store is None:
            return True
        try:
            return int(self._store.add("lost", 1)) == 1
        except (dist.DistError, RuntimeError):
            return True


class _Done:
    """The result of something that rank 0 did."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _for_others(error: BaseException) -> SynthwardError:
    """What ranks raise that have no error of their own."""
    return error if isinstance(error, SynthwardError) else RankLostError(_LOST)


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """Who exchanges tensors, by kind of device."""
    config = str(dist.get_backend_config(group))
    return dict(pair.split(":") for pair in config.split(",") if ":" in pair)


def _join(patience: timedelta, device: torch.device) -> dist.Store:
    backend, bound = "gloo", None
    if device.type == "cuda":
        backend, bound = "cpu:gloo,cuda:nccl", device
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore("synthward", store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=patience, device_id=bound
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the other processes can not be reached ({error}); start all by torchrun"
        ) from None
    return store
