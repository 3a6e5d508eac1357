"""Invariant 4: keys come from the operating system, are never reused, never written; a seed is not
private."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from tests.privacy.harness import make_trainer, step
from tests.privacy.stats import assert_uncorrelated
from tests.privacy.test_noise import NOISY, one_release, silent_module, silent_units

PURPOSES = ("noise", "sampler", "queries", "canaries")


def test_two_schedules_share_nothing():
    from synthward.engine import KeySchedule

    keys = [KeySchedule.from_os() for _ in range(50)]
    material = [k.key(purpose) for k in keys for purpose in PURPOSES]
    assert len(set(material)) == len(material) == 50 * len(PURPOSES)
    assert len({k.key_id for k in keys}) == 50
    assert all(len(m) == 32 for m in material)


def test_one_schedule_is_one_key_per_purpose():
    from synthward.engine import KeySchedule
    from synthward.engine.errors import SynthwardError

    keys = KeySchedule.from_os()
    assert keys.key("noise") == keys.key("noise")
    with pytest.raises((ValueError, KeyError, SynthwardError)):
        keys.key("anything else")


def test_the_key_id_is_not_key_material():
    from synthward.engine import KeySchedule

    keys = KeySchedule.from_os()
    for purpose in PURPOSES:
        assert keys.key_id not in keys.key(purpose).hex()
        assert keys.key(purpose).hex() not in keys.key_id


def test_the_root_never_leaves_by_printing_or_pickling():
    """repr, str and JSON hold no key; a pickle is refused or empty of it."""
    from synthward.engine import KeySchedule
    from synthward.engine.errors import PrivacyError

    keys = KeySchedule.from_os()
    text = repr(keys) + str(keys)
    for purpose in PURPOSES:
        key = keys.key(purpose)
        assert key.hex() not in text and str(key)[2:-1] not in text
    with pytest.raises(TypeError):
        json.dumps(keys)
    try:
        blob = pickle.dumps(keys)
    except (TypeError, PrivacyError):
        return
    assert not any(keys.key(purpose) in blob for purpose in PURPOSES)
    with pytest.raises((TypeError, AttributeError, PrivacyError)):
        pickle.loads(blob).key("noise")


def test_a_seed_is_reproducible_and_says_that_it_is_not_private():
    from synthward.engine import KeySchedule

    assert KeySchedule.from_os().is_private is True
    seeded = KeySchedule.reproducible(3)
    assert seeded.is_private is False

    def noise(seed):
        return one_release(KeySchedule.reproducible(seed), width=300)

    assert np.array_equal(noise(3), noise(3))
    assert_uncorrelated(noise(3), noise(4))


def test_a_resumed_run_draws_a_fresh_key_and_other_noise():
    """Two continuations of one checkpoint: with one key the difference of their releases would hold no
    noise."""
    module = silent_module(300)
    trainer = make_trainer(module, **NOISY)
    step(trainer, module, [silent_units(2, 300)])
    saved = copy.deepcopy(trainer.state_dict())
    continued = step(trainer, module, [silent_units(2, 300)])
    again = silent_module(300)
    resumed = make_trainer(again, **NOISY)
    resumed.load_state_dict(saved)
    assert torch.allclose(again.weight, torch.as_tensor(flat_of(module, continued)), atol=1e-6)
    assert_uncorrelated(step(resumed, again, [silent_units(2, 300)]), continued)


def flat_of(module, last_update: np.ndarray) -> np.ndarray:
    """The weights as they were one update ago."""
    return (module.weight.detach().double().numpy() + last_update.reshape(300, 300)).astype(np.float32)


def test_the_state_of_a_trainer_holds_no_key():
    from synthward.engine import KeySchedule

    module = silent_module(20)
    keys = KeySchedule.from_os()
    trainer = make_trainer(module, keys=keys, **NOISY)
    step(trainer, module, [silent_units(2, 20)])
    blob = pickle.dumps(trainer.state_dict())
    for purpose in PURPOSES:
        assert keys.key(purpose) not in blob
        assert keys.key(purpose).hex().encode() not in blob
