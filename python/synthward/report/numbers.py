"""Numbers as text that never promises more than the number does."""

from __future__ import annotations

import math


def format_epsilon(value: float) -> str:
    """Epsilon with up to three decimals, rounded up so that the text never understates it."""
    if not math.isfinite(value):
        return "infinite"
    # The small tolerance keeps a value such as 3.0000000000000004 from being printed as 3.001.
    return f"{math.ceil(value * 1000 - 1e-6) / 1000:g}"


def format_delta(value: float) -> str:
    """Delta in scientific notation, e.g. 1e-06."""
    return "not given" if math.isnan(value) else f"{value:.3g}"


def round_up(value: float) -> str:
    """Three significant digits, upwards."""
    if value <= 0.0:
        return "0"
    scale = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / scale - 1e-9) * scale:.3g}"


def percent_up(share: float) -> str:
    """A share in per cent with one decimal, upwards."""
    return f"{min(math.ceil(1000 * share - 1e-9) / 10, 100.0):.1f} %"


def exact(value: float) -> str:
    """A setting: the shortest text that reads back to the same number."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))
