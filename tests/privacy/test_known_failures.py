"""Failures of the table in docs/privacy.md that no other file is about: a process or an object that is there twice."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles import flat_parameters
from tests.privacy.harness import make_private, make_trainer
from tests.privacy.test_noise import NOISY, silent_module, silent_units

# By itself: a fork of a process with threads is a warning, and here an error, in newer Pythons.
FORKED = """
import os, sys
from synthward.engine.errors import PrivacyError
from tests.oracles import flat_parameters
from tests.privacy.harness import make_trainer
from tests.privacy.test_noise import NOISY, silent_module

module = silent_module(8)
trainer = make_trainer(module, **NOISY)
before = flat_parameters(module)
child = os.fork()
try:
    trainer.apply()
    refused = False
except PrivacyError as error:
    refused = "fork" in str(error)
moved = (flat_parameters(module) != before).any()
if child == 0:
    os._exit(0 if refused and not moved else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or int(refused or not moved))
"""


def test_a_fork_does_not_repeat_the_noise():
    """Two processes with one key: the difference of their releases would hold no noise. The first one goes on."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", FORKED], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_of_a_trainer_does_not_repeat_the_noise():
    module = silent_module(8)
    trainer = make_trainer(module, **NOISY)
    with pytest.raises(TypeError, match="would repeat"):
        copy.deepcopy(trainer)
    # A shallow one has the same source, which gives nothing out twice.
    steps = []
    for which in (trainer, copy.copy(trainer)):
        before = flat_parameters(module)
        which.apply()
        steps.append(before - flat_parameters(module))
    assert not (steps[0] == steps[1]).any()


def test_a_copy_in_the_user_s_own_loop_does_not_repeat_the_noise():
    engine, _, optimizer, _ = make_private(silent_module(8), silent_units(4, 8), 4, noise_multiplier=1.0)
    for whole in (engine, optimizer.session):
        with pytest.raises(TypeError, match="would repeat"):
            copy.deepcopy(whole)
    # torch copies groups and moments of an optimizer, and nothing else: such a copy can not step.
    assert not hasattr(copy.deepcopy(optimizer), "session")
