"""One picture of an evaluation, for a README or a slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from synthward.evaluate.result import CUSTODIAN_ONLY, Comparison, EvaluationResult, Marginal
from synthward.report.figures import HOLDOUT, figure_style, png_bytes, shorten
from synthward.report.numbers import format_delta, format_epsilon
from synthward.report.plots import draw_epsilon, draw_marginal, draw_pair_heatmap, draw_utility
from synthward.report.write import write_new_file


def save_overview_png(
    result: EvaluationResult, path: Path, *, overwrite: bool = False, dpi: int = 130
) -> Path:
    """Draw marginals, the pair heat map, TSTR/TRTR and the epsilon curve into one PNG.

    The picture compares with real records, and says so: it is for the custodian's eyes unless the records are public
    or invented. There is no form of it for release.

    Raises:
        OutputError: the path exists and ``overwrite`` is False, or it cannot be written.
    """
    found = result.comparison
    with figure_style():
        figure = Figure(figsize=(12.5, 7.6), layout="constrained")
        grid = figure.add_gridspec(3, 4, height_ratios=(1, 1, 1.05))
        for k, item in enumerate(pick_marginals(result)):
            axes = figure.add_subplot(grid[k // 2, k % 2])
            draw_marginal(axes, item, f"{shorten(item.column, 24)}   TV {found.one_way[item.column]:.3f}")
        heat = figure.add_subplot(grid[0:2, 2:4])
        draw_pair_heatmap(heat, found, names=len(found.pairs.names) <= 30)
        heat.set_title(_pair_title(found))
        bars = figure.add_subplot(grid[2, 0:2])
        bars.set_title("Usefulness: AUROC on held-out real rows")
        if found.utility is not None:
            draw_utility(bars, found.utility)
        else:
            bars.set_axis_off()
            bars.text(0.0, 0.8, "skipped: " + result.skipped.get("utility", ""), wrap=True, va="top")
        curve = figure.add_subplot(grid[2, 2:4])
        draw_epsilon(curve, result.epsilon_curve, result.privacy.get("target_epsilon"))
        curve.set_title("Privacy: epsilon spent over training")
        figure.suptitle(_title(result), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.supxlabel(CUSTODIAN_ONLY, x=0.99, ha="right", fontsize=8, color=HOLDOUT)
        content = png_bytes(figure, dpi)
    return write_new_file(Path(path), content, overwrite=overwrite)


def pick_marginals(result: EvaluationResult, count: int = 4) -> list[Marginal]:
    """The label, then numeric and categorical columns in turn, those of richest distribution first."""
    items = result.comparison.marginals

    def entropy(item: Marginal) -> float:
        shares = item.train[item.train > 0]
        return float(-(shares * np.log(shares)).sum())

    label = result.comparison.utility.label if result.comparison.utility else None
    chosen = [m for m in items if m.column == label]
    rest = sorted((m for m in items if m.column != label and len(m.labels) <= 40), key=entropy, reverse=True)
    numeric = [m for m in rest if m.kind in ("continuous", "integer", "datetime")]
    discrete = [m for m in rest if m not in numeric]
    while len(chosen) < count and (numeric or discrete):
        source = numeric if numeric and (len(chosen) % 2 or not discrete) else discrete
        chosen.append(source.pop(0))
    return chosen


def _pair_title(found: Comparison) -> str:
    text = f"Pairs: mean TV {found.pairs.mean:.3f} (below the diagonal)"
    if found.pairs_floor is not None:
        text += f"; held-out {found.pairs_floor.mean:.3f} (above)"
    return text


def _title(result: EvaluationResult) -> str:
    if not result.is_private:
        return f"{result.schema_name}: reproducible, not private"
    unit = result.privacy.get("unit") or "row"
    spent = f"epsilon {format_epsilon(result.epsilon)}, delta {format_delta(result.delta)}, unit {unit}"
    return f"{result.schema_name}: {spent}   (grey: train, blue: synthetic, brown dots: held-out)"
