"""Figures as data addresses: matplotlib's Agg and SVG canvases, without pyplot and global state."""

from __future__ import annotations

import base64
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

TRAIN, HOLDOUT, SYNTHETIC, INK, PALE = "#9aa3ab", "#b35c00", "#0b62a8", "#1f2933", "#d9dee3"
"""Colours that stay apart for colour-blind readers and in grey print; shapes differ as well."""

SEQUENTIAL = "cividis"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.edgecolor": "#7b8794",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    # Names and levels come from a schema and may hold a dollar sign: never read them as mathematics.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "synthward",
    "legend.frameon": False,
}

# rc_context changes matplotlib's process-wide settings while it is open.
_STYLE_LOCK = threading.Lock()


@dataclass(frozen=True)
class Image:
    """A figure for the page: a ``data:`` address, a text alternative and its width in CSS pixels."""

    address: str
    alt: str
    width: int


@contextmanager
def figure_style() -> Iterator[None]:
    """Style of all figures, restoring matplotlib's settings after. A glyph that a font lacks is no error."""
    with _STYLE_LOCK, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        warnings.filterwarnings("ignore", message=".*constrained_layout.*")
        yield


def svg_image(figure: Figure, alt: str) -> Image:
    """The figure as an SVG data address (for line art)."""
    FigureCanvasSVG(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _image(figure, "image/svg+xml", buffer.getvalue(), alt)


def png_image(figure: Figure, alt: str, dpi: int = 160) -> Image:
    """The figure as a PNG data address (for grids of many cells)."""
    return _image(figure, "image/png", png_bytes(figure, dpi), alt)


def png_bytes(figure: Figure, dpi: int) -> bytes:
    """The figure as the bytes of a PNG file."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def shorten(text: str, length: int = 18) -> str:
    """Text cut to ``length`` characters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _image(figure: Figure, kind: str, content: bytes, alt: str) -> Image:
    address = f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return Image(address, alt, round(figure.get_figwidth() * 96))
