"""The plots of a report. Each ``draw_*`` fills given axes; each ``*_image`` makes one figure of the page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from synthward.evaluate.result import Comparison, Marginal, Panel, PublicMarginal
from synthward.evaluate.utility import Utility
from synthward.report.figures import (
    HOLDOUT,
    INK,
    PALE,
    SEQUENTIAL,
    SYNTHETIC,
    TRAIN,
    Image,
    png_image,
    shorten,
    svg_image,
)

MAX_BARS = 10
MAX_NAMED_CELLS = 60

NUMERIC_KINDS = ("continuous", "integer", "datetime")


def draw_marginal(axes: Axes, item: Marginal | PublicMarginal, title: str | None = None) -> None:
    """One column: training as grey areas or bars, held-out as brown dots, synthetic in blue."""
    train = item.train if isinstance(item, Marginal) else None
    holdout = item.holdout if isinstance(item, Marginal) else None
    if item.kind in NUMERIC_KINDS:
        _draw_numeric(axes, item, train, holdout)
    else:
        _draw_levels(axes, item, train, holdout)
    axes.set_title(shorten(item.column, 30) if title is None else title)
    axes.tick_params(length=2, labelsize=7)


def _draw_numeric(
    axes: Axes, item: Marginal | PublicMarginal, train: np.ndarray | None, holdout: np.ndarray | None
) -> None:
    bins = len(item.labels) - 1
    edges = np.arange(bins + 1)
    # The missing share stands apart, to the right of the axis of values.
    gap = bins + 2.6
    if train is not None:
        axes.stairs(train[:-1], edges, fill=True, color=TRAIN, label="train")
        axes.bar([gap + 0.5], [train[-1]], width=1.6, color=TRAIN)
    axes.stairs(item.synthetic[:-1], edges, color=SYNTHETIC, linewidth=1.4, fill=False)
    axes.bar([gap + 0.5], [item.synthetic[-1]], width=1.6, fill=False, edgecolor=SYNTHETIC, linewidth=1.4)
    if holdout is not None:
        axes.plot([*(edges[:-1] + 0.5), gap + 0.5], holdout, ".", color=HOLDOUT, markersize=3)
    low, high = item.labels[0].split(" to ")[0], item.labels[-2].split(" to ")[-1]
    axes.set_xticks([0, bins, gap + 0.5], [low, high, "missing"])
    axes.get_xticklabels()[1].set_horizontalalignment("right")
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.set_xlim(-0.3, gap + 1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _percent(value))


def _draw_levels(
    axes: Axes, item: Marginal | PublicMarginal, train: np.ndarray | None, holdout: np.ndarray | None
) -> None:
    rows, labels, others = _top_levels(item.labels, train, holdout, item.synthetic)
    place = np.arange(len(labels))[::-1]
    if train is not None:
        axes.barh(place + 0.2, rows[0], height=0.38, color=TRAIN)
        axes.barh(place - 0.2, rows[2], height=0.38, color=SYNTHETIC)
    else:
        axes.barh(place, rows[2], height=0.7, color=SYNTHETIC)
    if holdout is not None:
        axes.plot(rows[1], place + 0.2, ".", color=HOLDOUT, markersize=4)
    axes.set_yticks(place, [shorten(label, 16) for label in labels])
    axes.set_ylim(-0.7, max(3, len(labels)) - 0.3)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: _percent(value))
    axes.locator_params(axis="x", nbins=4)
    if others:
        rest = 1.0 - rows.sum(axis=1)
        shares = f"{rest[2]:.0%}" if train is None else f"train {rest[0]:.0%}, synthetic {rest[2]:.0%}"
        axes.set_xlabel(f"{others:,} others: {shares}", fontsize=7)


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"


def _top_levels(
    labels: Sequence[str], train: np.ndarray | None, holdout: np.ndarray | None, synthetic: np.ndarray
) -> tuple[np.ndarray, list[str], int]:
    """Shares [3, shown] of the most frequent levels in declared order, their labels, and the number left."""
    leading = synthetic if train is None else train
    empty = np.zeros(len(labels))
    table = np.stack([empty if t is None else t for t in (train, holdout, synthetic)])
    shown = np.arange(len(labels))
    if table[:, -1].max() == 0:
        shown = shown[:-1]  # nothing is missing in any table: no bar for it
    kept = shown
    if len(shown) > MAX_BARS:
        kept = np.sort(shown[np.argsort(-leading[shown], kind="stable")[:MAX_BARS]])
    return table[:, kept], [labels[k] for k in kept.tolist()], len(shown) - len(kept)


def marginal_image(item: Marginal | PublicMarginal) -> Image:
    """One small figure for one column."""
    figure = Figure(figsize=(3.1, 2.15), layout="constrained")
    draw_marginal(figure.add_subplot(), item, title="")
    if isinstance(item, Marginal):
        tv = 0.5 * float(np.abs(item.train - item.synthetic).sum())
        alt = f"{item.column}: shares in training and synthetic rows; total variation {tv:.3f}"
    else:
        alt = f"{item.column}: shares in synthetic rows"
    return svg_image(figure, alt)


def draw_pair_heatmap(axes: Axes, found: Comparison, *, names: bool) -> None:
    """Total variation of all pairs: synthetic (below the diagonal) and held-out (above) against train."""
    matrix = found.pairs.matrix.copy()
    if found.pairs_floor is not None:
        upper = np.triu_indices(len(matrix), 1)
        matrix[upper] = found.pairs_floor.matrix[upper]
    top = float(np.nanmax(matrix)) if np.isfinite(matrix).any() else 1.0
    # A square-root scale, so that one pair of many codes does not make all others look alike.
    scale = PowerNorm(0.5, vmin=0.0, vmax=max(top, 0.05))
    image = axes.imshow(matrix, cmap=SEQUENTIAL, norm=scale, interpolation="nearest")
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label("total variation")
    bar.outline.set_visible(False)
    axes.set_facecolor("white")
    axes.spines[:].set_visible(False)
    if names:
        labels = [shorten(name, 20) for name in found.pairs.names]
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6.5)
        axes.set_yticks(range(len(labels)), labels, fontsize=6.5)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.tick_params(length=0)


def pair_heatmap_image(found: Comparison) -> Image:
    """The heat map of all pairs."""
    names = len(found.pairs.names) <= MAX_NAMED_CELLS
    side = min(9.0, max(4.2, 2.2 + 0.15 * len(found.pairs.names)))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    draw_pair_heatmap(figure.add_subplot(), found, names=names)
    floor = "" if found.pairs_floor is None else f"; held-out against train {found.pairs_floor.mean:.3f}"
    alt = f"Total variation of {len(found.pairs.values)} pairs of columns, mean {found.pairs.mean:.3f}"
    return png_image(figure, alt + floor, dpi=130)


def panel_image(panel: Panel) -> Image:
    """Joint shares of two columns, training beside synthetic; a square-root scale, so that rare is seen."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    top = np.sqrt(max(panel.train.max(), panel.synthetic.max(), 1e-9))
    for place, (title, table) in zip(
        axes, (("train", panel.train), ("synthetic", panel.synthetic)), strict=True
    ):
        place.imshow(
            np.sqrt(table.T),
            cmap=SEQUENTIAL,
            vmin=0,
            vmax=top,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        place.set_title(title)
        place.set_xlabel(shorten(panel.left, 30))
        place.spines[:].set_visible(False)
        place.tick_params(length=0, labelsize=6.5)
        _name_codes(place, "x", panel.left_labels)
    axes[0].set_ylabel(shorten(panel.right, 30))
    _name_codes(axes[0], "y", panel.right_labels)
    alt = f"{panel.left} by {panel.right}, training beside synthetic; total variation {panel.tv:.3f}"
    return png_image(figure, alt, dpi=130)


def _name_codes(axes: Axes, which: str, labels: Sequence[str]) -> None:
    every = max(1, -(-len(labels) // 11))
    places = list(range(0, len(labels), every))
    texts = [shorten(labels[k].split(" to ")[0], 14) for k in places]
    if which == "x":
        axes.set_xticks(places, texts, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_yticks(places, texts)


def draw_utility(axes: Axes, utility: Utility) -> None:
    """AUROC on held-out real rows with 95 % intervals: trained on real (grey) and on synthetic (blue)."""
    for k, model in enumerate(utility.models):
        for offset, colour, found in ((0.18, TRAIN, model.trtr), (-0.18, SYNTHETIC, model.tstr)):
            place = len(utility.models) - 1 - k + offset
            axes.barh([place], [found.value], height=0.32, color=colour)
            if np.isfinite([found.low, found.high]).all():
                axes.plot([found.low, found.high], [place, place], color=INK, linewidth=1.3)
            axes.text(
                0.315, place, f"{found.value:.3f}", va="center", color="white" if colour == SYNTHETIC else INK
            )
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(utility.models)), [m.model for m in utility.models][::-1])
    axes.set_ylim(-0.5, len(utility.models) - 0.5)
    axes.set_xlim(0.3, 1.0)
    axes.set_xlabel("AUROC on held-out real rows (dotted line: chance)")
    handles = [axes.barh([9], [0], color=c) for c in (TRAIN, SYNTHETIC)]
    axes.legend(handles, ["trained on real", "trained on synthetic"], loc="upper right", fontsize=7)


def utility_image(utility: Utility) -> Image:
    """The bars of TRTR and TSTR."""
    figure = Figure(figsize=(6.4, 2.5), layout="constrained")
    draw_utility(figure.add_subplot(), utility)
    parts = [
        f"{m.model}: trained on real {m.trtr.value:.3f}, on synthetic {m.tstr.value:.3f}"
        for m in utility.models
    ]
    return svg_image(figure, "AUROC on held-out real rows. " + "; ".join(parts))


def draw_epsilon(axes: Axes, curve: Sequence[tuple[int, float]], target: float | None = None) -> None:
    """Epsilon spent over the training steps; points without a finite epsilon are left out."""
    points = np.array([(s, e) for s, e in curve if np.isfinite(e)], dtype=float).reshape(-1, 2)
    marker = "o" if len(points) < 12 else None
    axes.plot(points[:, 0], points[:, 1], color=SYNTHETIC, linewidth=1.8, marker=marker, markersize=3)
    axes.fill_between(points[:, 0], points[:, 1], color=PALE, alpha=0.6, linewidth=0)
    if target is not None and np.isfinite(target):
        axes.axhline(target, color=HOLDOUT, linewidth=1.0, linestyle="--")
        axes.annotate(
            "budget", (0.01, target), xycoords=("axes fraction", "data"), color=HOLDOUT, va="bottom"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("epsilon spent")
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)


def epsilon_image(curve: Sequence[tuple[int, float]], target: float | None = None) -> Image:
    """The learning curve of epsilon."""
    figure = Figure(figsize=(6.4, 2.4), layout="constrained")
    draw_epsilon(figure.add_subplot(), curve, target)
    last = [e for _, e in curve if np.isfinite(e)]
    alt = "Epsilon spent over the training steps" + (f", ending at {last[-1]:.3f}" if last else "")
    return svg_image(figure, alt)


def legend_image(holdout: bool) -> Image:
    """The legend shared by all small figures."""
    figure = Figure(figsize=(5.2, 0.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    axes.barh([0.5], [0.5], left=0.1, height=0.5, color=TRAIN)
    axes.text(0.75, 0.47, "train (real)", va="center", fontsize=9)
    axes.barh([0.5], [0.5], left=3.0, height=0.5, color=SYNTHETIC)
    axes.text(3.65, 0.47, "synthetic", va="center", fontsize=9)
    if holdout:
        axes.plot([5.9], [0.5], ".", color=HOLDOUT, markersize=8)
        axes.text(6.15, 0.47, "held-out (real)", va="center", fontsize=9)
    text = "Legend: training rows grey, synthetic rows blue"
    return svg_image(figure, text + (", held-out rows brown dots" if holdout else ""))
