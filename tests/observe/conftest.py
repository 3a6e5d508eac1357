"""An environment without TensorBoard."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture
def no_tensorboard(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "tensorboard" else real(name, *rest)
    )
