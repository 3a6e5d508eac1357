"""Fixtures of all tests: the shared data, poisoned memory, few threads."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Without a GPU, Triton's kernels run in its interpreter, which must be known before Triton is imported."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: most faults show within a minute."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real data sets: `data` in SYNTHWARD_SHARED, or in `shared` beside the checkout."""
    named = os.environ.get("SYNTHWARD_SHARED")
    shared = Path(named) if named else CHECKOUT.parent / "shared"
    if not (shared / "data").is_dir():
        pytest.skip(f"no real data: {shared / 'data'} is not a folder (set SYNTHWARD_SHARED)")
    return shared / "data"


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """`allocate` whose memory is NaN (all bits set for integers) when synthward asks for it."""

    import torch

    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

    @functools.wraps(allocate)
    def poison(*args: Any, **kwargs: Any) -> Any:
        made = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("synthward") and made.device.type == "cpu" and not made.requires_grad:
            if made.dtype.is_floating_point:
                made.fill_(float("nan"))
            elif made.dtype in integers:
                made.fill_(-1 if made.dtype.is_signed else 255)
        return made

    return poison


@pytest.fixture(scope="session", autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    """A value that is read before it was written fails the test, instead of being zero by luck."""
    import torch

    names = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    originals = [(place, name, getattr(place, name)) for place, name in names]
    for place, name, function in originals:
        setattr(place, name, _poisoned(function))
    yield
    for place, name, function in originals:
        setattr(place, name, function)


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    """The same thread count on every machine; tests that need another set it themselves."""
    import torch

    torch.set_num_threads(2)
