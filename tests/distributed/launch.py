"""Starts ranks: processes that join one group of `torch.distributed`, run one function and hand its result back.

`run_ranks(2, "tests.distributed.module:function", arguments...)` gives each rank's result, by rank. A start costs
seconds (every process imports torch), so a test starts one group for many cases. `started` gives the processes
themselves, to tests that kill some. Run as a script, this file is one rank.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent.parent
# One thread, and the loopback device: a machine's own name need not resolve to an address.
PLAIN = {
    **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    **{"MASTER_ADDR": "127.0.0.1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"},
}
# What others may take, after one rank failed, to notice and say so.
GRACE = 20.0
PR_SET_PDEATHSIG = 1


class RanksFailedError(AssertionError):
    """Ranks raised, were killed or did not end; the text has what each wrote to stderr."""


@dataclass
class Group:
    """Started ranks. ``statuses()`` are exit codes (negative: the signal that ended it) or None while it runs."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def statuses(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def kill(self, rank: int) -> None:
        """SIGKILL, as a machine that fails: the rank says nothing any more."""
        self.processes[rank].kill()

    def wait(self, timeout: float) -> list[int | None]:
        """Wait until all have ended, or ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while None in (found := self.statuses()) and time.monotonic() < end:
            time.sleep(0.02)
        return found

    def stderr(self, rank: int) -> str:
        return (self.folder / f"stderr{rank}").read_text(errors="replace")

    def stdout(self, rank: int) -> str:
        return (self.folder / f"stdout{rank}").read_text(errors="replace")

    def result(self, rank: int) -> Any:
        """What the function returned on a rank that ended with 0."""
        return pickle.loads((self.folder / f"result{rank}").read_bytes())


def run_ranks(
    world_size: int,
    function: str | Callable[..., Any],
    *arguments: Any,
    timeout: float = 120.0,
    join: bool = True,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``function(*arguments)`` on every rank, all in one group (gloo); its results, by rank.

    Args:
        function: "module:name", or a function at the top of a module that can be imported by its name.
        arguments: are pickled, and so is what the function returns.
        timeout: seconds for all of it. A rank that hangs shows in the error where it stood.
        join: whether the group is joined before the function is called; without, the function finds what `torchrun`
            puts in the environment.
        environment: added to the processes' environment.

    Raises:
        RanksFailedError: a rank raised, was killed or took too long. None is left running.
    """
    with started(
        world_size, function, *arguments, timeout=timeout, join=join, environment=environment
    ) as group:
        end = time.monotonic() + timeout
        while None in (found := group.statuses()) and not any(found) and time.monotonic() < end:
            time.sleep(0.02)
        if any(found):
            found = group.wait(min(GRACE, max(0.0, end - time.monotonic())))
        if any(code != 0 for code in found):
            how = {None: f"did not end in {timeout:g} s", 0: "ended well"}
            said = [
                f"rank {rank} {how.get(code, f'ended with {code}')}\n{group.stderr(rank)[-4000:]}"
                for rank, code in enumerate(found)
            ]
            raise RanksFailedError(f"{function} on {world_size} ranks:\n" + "\n".join(said))
        return [group.result(rank) for rank in range(world_size)]


@contextmanager
def started(
    world_size: int,
    function: str | Callable[..., Any],
    *arguments: Any,
    timeout: float = 120.0,
    join: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Group]:
    """The running ranks of `run_ranks`; what still runs at the end of the block is killed."""
    import torch.distributed as dist

    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    # As torchrun does, who starts the ranks keeps their store: no port is chosen before it is taken.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks") as scratch:
        group = Group(Path(scratch))
        (group.folder / "call").write_bytes(pickle.dumps((name, arguments, join, timeout)))
        shared = {**os.environ, **PLAIN, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world_size)}
        shared |= {"LOCAL_WORLD_SIZE": str(world_size), **_package(), **(environment or {})}
        try:
            for rank in range(world_size):
                numbered = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with (
                    (group.folder / f"stdout{rank}").open("wb") as out,
                    (group.folder / f"stderr{rank}").open("wb") as err,
                ):
                    process = subprocess.Popen(
                        [sys.executable, "-P", __file__, scratch, str(rank), str(os.getpid())],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        env=shared | numbered,
                        start_new_session=True,
                    )
                group.processes.append(process)
            yield group
        finally:
            for process in group.processes:
                _end(process)


def _package() -> dict[str, str]:
    """Where this process has the package from, if that is a copy (with a fault, say) and not what is installed."""
    import synthward

    place = Path(synthward.__file__).resolve().parent.parent
    return {} if any(map(_is_redirect, sys.meta_path)) else {"RANKS_PACKAGE": str(place)}


def _is_redirect(finder: object) -> bool:
    """Whether it finds the package that is installed in place."""
    return "ScikitBuild" in type(finder).__name__


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a rank and whatever it started itself."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _be_a_rank(folder: Path, rank: int, parent: int) -> None:
    # A parent that is killed can not clean up.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    if "RANKS_PACKAGE" in os.environ:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_redirect(finder)]
        sys.path.insert(0, os.environ["RANKS_PACKAGE"])
    name, arguments, join, timeout = _call(folder)
    faulthandler.dump_traceback_later(max(1.0, timeout - 5.0), exit=False)
    module, _, function = name.partition(":")
    work: Any = importlib.import_module(module)
    for part in function.split("."):
        work = getattr(work, part)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if join:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        try:
            result = work(*arguments)
            # Nobody leaves while another may still need it.
            dist.barrier()
        finally:
            dist.destroy_process_group()
    else:
        result = work(*arguments)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    # Not by the interpreter's own last steps: a thread of gloo that still holds a tensor then aborts the process, about
    # once in a hundred exits of ranks with a mesh (torch 2.13).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _call(folder: Path) -> tuple[str, tuple[Any, ...], bool, float]:
    """What is to be called. The tests are no package that is installed: only their name is made known."""
    tests = ModuleType("tests")
    tests.__path__ = [str(CHECKOUT / "tests")]
    sys.modules["tests"] = tests
    call: tuple[str, tuple[Any, ...], bool, float] = pickle.loads((folder / "call").read_bytes())
    return call


if __name__ == "__main__":
    _be_a_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
