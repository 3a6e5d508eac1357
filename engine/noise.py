"""The noise of a training run: which draws of the cipher each release takes, and with what standard deviation.

Fresh noise, noise that is correlated over steps by a strategy matrix, or integers on a grid: each is a function of
(key, stream, step, index of the coordinate), and a step is marked as used before anything of it is made.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import NoReturn

import torch
from torch import Tensor

from synthward.engine.correlation import noise_schedule, noise_variance, state_slots
from synthward.engine.errors import CheckpointError, PrivacyError
from synthward.engine.flat import Parameters
from synthward.engine.keys import KeySchedule
from synthward.engine.optim import Noise
from synthward.engine.spec import ClipSpec, NoiseSpec
from synthward.kernels import Correlation, discrete_release_, gaussian_noise, is_tracing

# Noise streams of training steps: one per object that draws from the same key schedule.
_FIRST_STREAM = 1
_streams: weakref.WeakKeyDictionary[KeySchedule, int] = weakref.WeakKeyDictionary()

# The grid is so fine that rounding all coordinates moves the sum by less than this share of the sensitivity ...
_GRID_SHARE = 2.0**-13
# ... and fp64 sums are off by less than this share of it, for up to _MOST_TERMS units times rows.
_SUM_SHARE = 2.0**-13
_MOST_TERMS = 2.0**38


def next_stream(keys: KeySchedule) -> int:
    """A stream of the noise key that no other object has."""
    stream = _streams.get(keys, _FIRST_STREAM)
    if stream >= 1 << 15:
        raise PrivacyError("this key schedule was given to too many trainers; draw a fresh one")
    _streams[keys] = stream + 1
    return stream


class NoiseSource:
    """Gives each release its noise.

    Guarantees: a (stream, step) is given out once, whatever fails afterwards; with a strategy C the noise of release t
    is row t of ``C^-1 z`` with z fresh in each release, and a run that would have to go back is refused. A fork
    or a copy would give the same noise out again: both are refused.
    """

    def __init__(self, spec: NoiseSpec, flat: Parameters, keys: KeySchedule) -> None:
        self._strategy, self._key, self._stream = spec.strategy, keys.key("noise"), next_stream(keys)
        self._released, self._is_open, self._process = 0, False, os.getpid()
        self._state: Tensor | None = None
        if self._strategy is not None and state_slots(self._strategy):
            self._state = torch.zeros(state_slots(self._strategy), flat.own_size, device=flat.device)

    @property
    def place(self) -> tuple[int, int]:
        """Stream and step of the next release."""
        return self._stream, self._released

    def next(self, std: float) -> Noise:
        """The noise of the next release, at this standard deviation of z."""
        if os.getpid() != self._process:
            raise PrivacyError(
                "this process is a fork of the one that made the training step, and would repeat its noise; wrap "
                "module and optimizer after the fork"
            )
        if is_tracing() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            raise PrivacyError(
                "a step is being recorded (a trace, or a CUDA graph): each replay would add the same noise again. "
                "Record the passes alone (`PrivateTrainer.compile`), and end steps outside of it"
            )
        if self._is_open and self._strategy is not None:
            raise PrivacyError(
                "an update failed half way, and with it the state of the correlated noise; resume from the last "
                "checkpoint in a new process"
            )
        step = self._released
        # Never given out again, even if what follows fails half way.
        self._released, self._is_open = step + 1, True
        if self._strategy is None:
            return Noise(self._key, self._stream, step, std)
        taps, weights, decays, gains = noise_schedule(self._strategy, step)
        correlation = Correlation(taps, weights, decays, gains, self._state)
        variance = std**2 * noise_variance(self._strategy, step)
        return Noise(self._key, self._stream, step, std, correlation, variance)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a source of noise can not be copied or pickled: the copy would repeat it")

    def close(self) -> None:
        """The release is done."""
        self._is_open = False

    def scalar(self, noise: Noise, index: int) -> float:
        """One more standard draw of a release, at a coordinate behind the parameters."""
        return float(gaussian_noise(1, key=noise.key, stream=noise.stream, step=noise.step, start=index)[0])

    def check_may_go_back(self) -> None:
        """`CheckpointError` where a checkpoint would be loaded over releases whose noise is correlated with the next
        ones: what is released after it would no longer be one mechanism."""
        if self._strategy is not None and self._released:
            raise CheckpointError(
                "correlated noise can not go back to a checkpoint once steps were taken; load it in a new process (or "
                "a new trainer), which starts a mechanism of its own"
            )


class DiscreteSums:
    """Sums in fp64 that are released as integers on a grid (`NoiseSpec.arithmetic`).

    Rounding to a grid of spacing g moves the difference of two sums of d coordinates by at most ``sqrt(d) g``; fp64
    sums of up to `_MOST_TERMS` units times rows are off by at most ``n 2^-53`` of the sum of norms (Higham 2002,
    section 3.1). Both are added to the sensitivity, so the noise is larger by less than 1 in 2,000. An integer plus a
    rounded Gaussian is that Gaussian, added to the integer and then rounded: post-processing of the Gaussian mechanism.
    """

    def __init__(self, flat: Parameters, clip: ClipSpec) -> None:
        self.sums = flat.new_sums(torch.float64)
        self._flat, bound = flat, clip.sensitivity()
        self.grid = 2.0 ** math.floor(math.log2(bound * _GRID_SHARE / math.sqrt(flat.size)))
        self.sensitivity = bound * (1.0 + _SUM_SHARE) + math.sqrt(flat.size) * self.grid
        self._units = self._rows = 0

    def count(self, units: int, rows: int) -> None:
        """Note the units and rows of a physical batch; other ranks have batches of the same size.

        Raises:
            PrivacyError: so many that the bound on rounding does not hold.
        """
        self._units, self._rows = self._units + units * self._flat.ranks.world_size, self._rows + rows
        if float(self._units) * self._rows > _MOST_TERMS:
            raise PrivacyError(
                f"arithmetic='discrete': a step of {self._units} units and {self._rows} rows is more than its bound on "
                "rounding covers; take smaller logical batches"
            )

    def release(self, noise: Noise) -> None:
        """Round, add the noise and leave the result, float32, where the update reads it. `finish` ends the release."""
        for piece in self._flat.pieces:
            discrete_release_(
                self.sums.own(piece.at, len(piece.param)),
                self._flat.sums.own(piece.at, len(piece.param)),
                key=noise.key,
                stream=noise.stream,
                step=noise.step,
                start=piece.start,
                grid=self.grid,
                noise_std=noise.std,
            )

    def finish(self) -> None:
        """All ranks have what they need of the sums; they are zero then."""
        self.sums.release()
        self._units = self._rows = 0

    def discard(self) -> None:
        """Drop what was accumulated."""
        self.sums.drop()
        self._units = self._rows = 0
