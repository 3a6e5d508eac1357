"""Private choice of hyper-parameters: how many trials to run, and what the whole costs.

The trials' number is drawn here, from the operating system's randomness and before the first of them runs; whoever sees
it and the best trial's output learns no more than `SelectionEvent` charges. All trials have to cost at most what its
inner events say: settings may differ between them, drawn at random for each trial, as long as the mechanism does not.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from synthward.engine.accounting.accountant import epsilon_of
from synthward.engine.accounting.calibrate import Events, as_list, calibrate_noise_of
from synthward.engine.accounting.events import ADD_OR_REMOVE_ONE, Event, SelectionEvent
from synthward.engine.accounting.selection import probabilities
from synthward.engine.errors import ConfigError

# Beyond, the law's probabilities and their sum have lost the digits that they need.
_MOST_MEAN = 1e5
# A Poisson law, or one near it, begins with the exponential of minus its mean.
_MOST_POISSON_LIKE = 50.0
_WORD = 2**64


@dataclass(frozen=True)
class TrialBudget:
    """What one trial may spend so that the choice among all stays within the target.

    Attributes:
        noise_multiplier: of each trial.
        events: what one trial is charged as, inside ``selection``.
        trial_epsilon: of one trial alone, by RDP.
        selection: the event that is charged, once, for all trials.
        epsilon: of the selection and what comes beside it; at most the target.
    """

    noise_multiplier: float
    events: tuple[Event, ...]
    trial_epsilon: float
    selection: SelectionEvent
    epsilon: float


def calibrate_trial(
    events: Callable[[float], Events],
    target_epsilon: float,
    delta: float,
    mean_trials: float,
    shape: float = 0.0,
    other_events: Sequence[Event] = (),
    relation: str = ADD_OR_REMOVE_ONE,
) -> TrialBudget:
    """Least noise of each trial for which the best of a random number of them stays within the target.

    Args:
        events: what one trial costs at a noise multiplier.
        mean_trials: at least 1.
        shape: of the law of the number of trials: 0 logarithmic (the cheapest), 1 geometric, infinity Poisson.
        other_events: what is charged beside the selection.

    Raises:
        ConfigError: the choice alone, log(mean_trials) at every order, costs more than the target.
    """

    def selection(noise: float) -> SelectionEvent:
        return SelectionEvent(tuple(as_list(events(noise))), mean_trials, shape)

    noise = calibrate_noise_of(selection, target_epsilon, delta, "rdp", other_events, relation)
    chosen = selection(noise)
    return TrialBudget(
        noise_multiplier=noise,
        events=chosen.inner,
        trial_epsilon=epsilon_of(chosen.inner, delta, "rdp", relation),
        selection=chosen,
        epsilon=epsilon_of([*other_events, chosen], delta, "rdp", relation),
    )


def draw_trials(mean_trials: float, shape: float = 0.0, random_word: Callable[[], int] | None = None) -> int:
    """A number of trials, from the law that `SelectionEvent` charges; 0 is possible for Poisson only.

    Draw it once, before the first trial, and run exactly that many: drawing again after a look at it, or stopping
    early because a trial was good, is another mechanism.

    Args:
        mean_trials, shape: as in `SelectionEvent`.
        random_word: gives uniform 64-bit words; the operating system's by default.
    """
    if not 1.0 <= mean_trials <= _MOST_MEAN:
        raise ConfigError(f"mean trials: got {mean_trials!r}; give a number from 1 to {_MOST_MEAN:g}")
    if not shape >= 0.0:
        raise ConfigError(f"shape: got {shape!r}; give a number of at least 0, or infinity for Poisson")
    if shape > _MOST_POISSON_LIKE and mean_trials > _MOST_POISSON_LIKE:
        raise ConfigError(
            f"mean trials: got {mean_trials:g}; at most {_MOST_POISSON_LIKE:g} with a shape above that"
        )
    word = secrets.randbits(64) if random_word is None else random_word()
    left = (word + 0.5) / _WORD
    for k, probability in probabilities(mean_trials, shape):
        left -= probability
        # In the far tail the probabilities are below the rounding of what is left.
        if left <= 0.0 or (k > mean_trials and probability < 2.0**-80):
            return k
    raise AssertionError("the probabilities have no end")
