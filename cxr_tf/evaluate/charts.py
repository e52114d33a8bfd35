"""Pictures of how a model bears changes and where it differs: curves of what is left, intervals side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context

from cxr_tf.evaluate.figures import (
    _GRAY,
    _STYLE,
    COLORS,
    DASHES,
    FigureError,
    StrPath,
    _figure,
    _floats,
    _interval,
    _save,
)

Estimate = Mapping[str, Any]


def intervals(
    rows: Sequence[tuple[str, Estimate]], path: StrPath, *, title: str, axis: str, reference: float | None = None
) -> Path:
    """Figures with their intervals below each other, in print beside them.

    Args:
        rows: what, and its estimate.
        path: file to write, .png or .svg.
        title: above it all.
        axis: what the numbers are.
        reference: where a line is drawn: what would be no difference, or the rest.

    Raises:
        FigureError: when there is nothing to draw, or for another ending.
        WriteError: when the file cannot be written.
    """
    if not rows:
        raise FigureError("There is nothing to draw. Received: no row.")
    with rc_context(_STYLE):
        figure = _figure(6.4, 1.0 + 0.32 * len(rows))
        axes = figure.add_subplot()
        for i, (_, estimate) in enumerate(rows):
            if estimate["value"] is not None:
                if estimate["low"] is not None:
                    axes.plot([estimate["low"], estimate["high"]], [i, i], color=COLORS[0], lw=2, solid_capstyle="butt")
                axes.plot(estimate["value"], i, "s", color=COLORS[0], ms=5, zorder=4)
            axes.text(1.03, i, _interval(estimate), va="center", size=8, transform=axes.get_yaxis_transform())
        if reference is not None:
            axes.axvline(reference, color=_GRAY, lw=1, ls=":")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(axis)
        axes.grid(True, axis="x")
        axes.set_title(title)
        return _save(figure, path)


def skill_kept(curves: Mapping[str, Sequence[Estimate]], path: StrPath) -> Path:
    """What is left of a model's skill at growing strengths of each change; a panel a change.

    Args:
        curves: change -> an estimate a strength, weakest first.
        path: file to write, .png or .svg.

    Raises:
        FigureError: when there is nothing to draw, or for another ending.
        WriteError: when the file cannot be written.
    """
    if not curves:
        raise FigureError("There is nothing to draw. Received: no change.")
    columns = min(4, len(curves))
    lines = -(-len(curves) // columns)
    with rc_context(_STYLE):
        figure = _figure(2.0 * columns + 0.4, 1.9 * lines + 0.3)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (name, estimates) in zip(grid, curves.items(), strict=False):
            strength = np.arange(len(estimates) + 1)
            value, low, high = (_floats([1.0, *(e[key] for e in estimates)]) for key in ("value", "low", "high"))
            axes.fill_between(strength, low, high, color=COLORS[0], alpha=0.18, lw=0)
            axes.plot(strength, value, color=COLORS[0], marker="o", ms=3, lw=1.6)
            axes.axhline(1, color=_GRAY, lw=0.8, ls=":")
            axes.axhline(0, color=_GRAY, lw=0.8)
            axes.set(title=name, ylim=(-0.25, 1.25), xticks=strength)
            axes.grid(True, axis="y")
        for axes in grid[len(curves) :]:
            axes.set_visible(False)
        figure.supxlabel("Strength (0: as it is)", size=9)
        figure.supylabel("Skill kept", size=9)
        return _save(figure, path)


def risk_coverage(curves: Mapping[str, Sequence[tuple[float, float]]], path: StrPath) -> Path:
    """The error among the films that are kept, against how many are kept when the least certain go to a reader.

    Args:
        curves: what certainty was measured by -> points (coverage, risk).
        path: file to write, .png or .svg.

    Raises:
        FigureError: when there is nothing to draw, or for another ending.
        WriteError: when the file cannot be written.
    """
    if not any(curves.values()):
        raise FigureError("There is nothing to draw. Received: no point.")
    with rc_context(_STYLE):
        figure = _figure(4.6, 3.4)
        axes = figure.add_subplot()
        for i, (name, points) in enumerate(curves.items()):
            coverage, risk = np.asarray(points, np.float64).T
            axes.plot(coverage, risk, color=COLORS[i], ls=DASHES[i], lw=1.8, label=name)
        axes.set(xlim=(0, 1), xlabel="Share of films that the model answers", ylabel="Wrong among these")
        axes.set_ylim(bottom=0)
        axes.set_title("Leaving the least certain films to a reader")
        axes.grid(True)
        if len(curves) > 1:
            axes.legend(loc="best", fontsize=8)
        return _save(figure, path)
