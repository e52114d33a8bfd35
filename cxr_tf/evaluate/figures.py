"""Pictures: curves with their bands, tables, training, and predictions over radiographs.

Drawn with matplotlib's object interface, so that nothing needs a display and no state is left behind. Colors are Okabe
and Ito's, told apart by readers with color-vision deficiency. Each function writes one file, PNG or SVG by its ending,
under a temporary name first.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from cxr_tf.evaluate.overlay import PREDICTED, TRUE, FigureError, outline, overlay
from cxr_tf.files import replacing

StrPath = str | os.PathLike[str]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_HEAT = "inferno"  # of evidence: rises in lightness, so that it is read without color too
_BETWEEN = 4  # pixels between two views of a film
_GRAY = "#5F6368"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GRAY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": _GRAY,
    "ytick.color": _GRAY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "cxr-tf",  # ids would be random
}


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: StrPath) -> Path:
    target = Path(path)
    if target.suffix.lower() not in (".png", ".svg"):
        raise FigureError(f"A figure's name must end in .png or .svg. Received: {target.name}.")
    with replacing(target) as temporary:
        # Neither a date nor a version, so that the same figures give the same file.
        figure.savefig(temporary, metadata={"Software": None} if target.suffix.lower() == ".png" else {"Date": None})
    return target


def _line(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8}


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)


def _unit_axes(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel=x, ylabel=y, aspect="equal")
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    axes.grid(True)


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate["value"] is None:
        return "not measurable"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f} (no interval)"
    # "to", because a dash before a negative number is read as two.
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})".replace("-", "−")


def roc(curves: Mapping[str, Mapping[str, Any]], path: StrPath, *, level: Mapping[str, Any] | None = None) -> Path:
    """ROC curve of each class with its interval band.

    Args:
        curves: from `judge.curves`.
        path: file to write, .png or .svg.
        level: `judge(...)["image"]` or `["study"]`, for the areas in the legend.

    Returns:
        The path.

    Raises:
        FigureError: when there is no curve, or for another ending.
        WriteError: when the file cannot be written.
    """
    return _curves(curves, path, level, "roc", "auroc", "False-positive rate (1 − specificity)", "Sensitivity")


def precision_recall(
    curves: Mapping[str, Mapping[str, Any]], path: StrPath, *, level: Mapping[str, Any] | None = None
) -> Path:
    """Precision-recall curve of each class with its interval band; a tick at the right marks its prevalence.

    Arguments and errors as `roc`.
    """
    return _curves(
        curves, path, level, "precision_recall", "average_precision", "Recall (sensitivity)", "Precision (PPV)"
    )


def _curves(
    curves: Mapping[str, Mapping[str, Any]],
    path: StrPath,
    level: Mapping[str, Any] | None,
    kind: str,
    summary: str,
    x_label: str,
    y_label: str,
) -> Path:
    if not curves:
        raise FigureError("There is no curve to draw: no class has both outcomes.")
    with rc_context(_STYLE):
        figure = _figure(5.0, 5.45 + 0.2 * len(curves))
        axes = figure.add_subplot()
        shade = 0.15 if len(curves) <= 5 else 0.04  # many bands would hide the curves
        for i, (name, curve) in enumerate(curves.items()):
            x, y = np.asarray(curve["x"]), _floats(curve[kind]["y"])
            label = name if level is None else f"{name}  {_interval(level['classes'][name].get(summary))}"
            axes.fill_between(
                x,
                _floats(curve[kind]["low"]),
                _floats(curve[kind]["high"]),
                color=COLORS[i % len(COLORS)],
                alpha=shade,
                lw=0,
            )
            if kind == "roc":
                x, y = np.append(0, x), np.append(0, y)
            axes.plot(x, y, label=label, clip_on=False, zorder=3, **_line(i))
            if kind != "roc":
                axes.plot([0.985, 1.015], [curve["prevalence"]] * 2, color=COLORS[i % len(COLORS)], lw=3, clip_on=False)
        _unit_axes(axes, x_label, y_label)
        if kind == "roc":
            axes.plot([0, 1], [0, 1], color=_GRAY, lw=0.8, ls=":", zorder=1)
            title = "ROC curves" if level is None else "ROC curves, with area (95 % interval)"
        else:
            title = "Precision and recall" if level is None else "Precision and recall, with AP (95 % interval)"
        axes.set_title(_level_text(title, level))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", handlelength=3)
        return _save(figure, path)


def _level_text(title: str, level: Mapping[str, Any] | None) -> str:
    """The title with the interval's own level in it."""
    if level is None:
        return title
    first = next(iter(level["macro"].values()), {"level": 0.95})
    return title.replace("95 %", f"{100 * first['level']:g} %")


def confusion(counts: Sequence[Sequence[int]] | np.ndarray, classes: Sequence[str], path: StrPath) -> Path:
    """Confusion matrix: counts, and shares of each row; the shade is the share.

    Args:
        counts: `[classes, classes]`, rows are the truth.
        classes: their names.
        path: file to write, .png or .svg.

    Raises:
        FigureError: when the table does not fit the names, or for another ending.
        WriteError: when the file cannot be written.
    """
    table = np.asarray(counts)
    size = len(classes)
    if table.shape != (size, size) or not size:
        raise FigureError(f"A confusion matrix of {size} classes must be [{size}, {size}]. Received: {table.shape}.")
    rows = table.sum(1, keepdims=True)
    share = np.divide(table, rows, out=np.zeros(table.shape), where=rows > 0)
    with rc_context(_STYLE):
        side = 1.6 + 0.95 * size
        figure = _figure(side + 0.6, side)
        axes = figure.add_subplot()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i in range(size):
            for j in range(size):
                color = "white" if share[i, j] > 0.55 else "black"
                weight = "bold" if i == j else "normal"
                axes.text(j, i - 0.1, f"{table[i, j]:,}", ha="center", va="center", color=color, weight=weight, size=11)
                if rows[i, 0]:
                    axes.text(j, i + 0.2, f"{100 * share[i, j]:.0f} %", ha="center", va="center", color=color, size=8)
        names = [_wrap(name) for name in classes]
        axes.set_xticks(range(size), names)
        axes.set_yticks(range(size), [f"{name}\n(n = {n:,})" for name, n in zip(names, rows[:, 0], strict=True)])
        axes.set(xlabel="Predicted class", ylabel="True class")
        figure.suptitle("Count, and % of the true class", x=0.01, ha="left", weight="bold", size=10)
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _save(figure, path)


def _wrap(name: str, width: int = 14) -> str:
    """Breaks a class name at spaces into lines of about `width` characters."""
    lines = [""]
    for word in name.replace("_", " ").split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def reliability(
    table: Sequence[Mapping[str, Any]],
    path: StrPath,
    *,
    ece: Mapping[str, Any] | None = None,
    title: str = "Reliability",
) -> Path:
    """Reliability diagram: how often what was said came true, and how often it was said.

    Args:
        table: `judge(...)["image"]["reliability"]`: rows of {"low", "high", "n", "confidence", "accuracy"}.
        path: file to write, .png or .svg.
        ece: the expected calibration error, an `Estimate` as JSON.
        title: above it.

    Raises:
        FigureError: when the table is empty, or for another ending.
        WriteError: when the file cannot be written.
    """
    if not table:
        raise FigureError("There is nothing to draw a reliability diagram of: no label is known.")
    with rc_context(_STYLE):
        figure = _figure(4.6, 5.6)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        said = np.array([row["confidence"] for row in table])
        came = np.array([row["accuracy"] for row in table])
        count = np.array([row["n"] for row in table])
        upper.plot([0, 1], [0, 1], color=_GRAY, lw=0.8, ls=":", label="perfect calibration")
        upper.vlines(
            said, np.minimum(said, came), np.maximum(said, came), color=COLORS[1], lw=2, alpha=0.6, label="gap"
        )
        upper.plot(said, came, color=COLORS[0], lw=1, alpha=0.5)
        upper.scatter(said, came, s=12 + 90 * count / count.max(), color=COLORS[0], zorder=3, clip_on=False)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="Observed frequency")
        upper.grid(True)
        upper.legend(loc="upper left")
        upper.set_title(title if ece is None else f"{title}\nECE {_interval(ece)}")
        low = np.array([row["low"] for row in table])
        lower.bar(low, count, width=[row["high"] - row["low"] for row in table], align="edge", color=COLORS[5])
        for patch in lower.patches:
            patch.set(edgecolor="white", linewidth=0.6)
        lower.set(xlabel="Predicted probability", ylabel="Predictions")
        lower.grid(True, axis="y")
        return _save(figure, path)


def forest(
    level: Mapping[str, Any],
    path: StrPath,
    *,
    figures: Sequence[str] = ("auroc", "average_precision"),
    title: str = "Figures with intervals",
) -> Path:
    """Forest plot: each class's figures and their macro mean, with intervals, in print beside them.

    Args:
        level: `judge(...)["image"]` or `["study"]`.
        path: file to write, .png or .svg.
        figures: which, a panel each.
        title: above it all.

    Raises:
        FigureError: when a figure is unknown, or for another ending.
        WriteError: when the file cannot be written.
    """
    if unknown := [figure for figure in figures if figure not in level["macro"]]:
        raise FigureError(f"Figures must be of {', '.join(level['macro'])}. Received: {', '.join(unknown)}.")
    names = [*level["classes"], "Macro mean"]
    rows = [*level["classes"].values(), level["macro"]]
    short = {"auroc": "AUROC", "average_precision": "Average precision", "voc_average_precision": "VOC-2010 AP"}
    with rc_context(_STYLE):
        figure = _figure(2.0 + 3.6 * len(figures), 1.3 + 0.42 * len(names))
        panels = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, figures, strict=True):
            for i, (label, row) in enumerate(zip(names, rows, strict=True)):
                estimate = row.get(name)
                strong = label == "Macro mean"
                if estimate and estimate["value"] is not None:
                    color = "black" if strong else COLORS[0]
                    if estimate["low"] is not None:
                        axes.plot([estimate["low"], estimate["high"]], [i, i], color=color, lw=2, solid_capstyle="butt")
                    axes.plot(estimate["value"], i, "D" if strong else "s", color=color, ms=6, clip_on=False, zorder=4)
                axes.text(
                    1.04, i, _interval(estimate), va="center", size=8, transform=axes.get_yaxis_transform(),
                    weight="bold" if strong else "normal",
                )  # fmt: skip
            axes.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6))
            axes.set_xlabel(short.get(name, name.replace("_", " ").capitalize()))
            axes.axhline(len(names) - 1.5, color=_GRAY, lw=0.8)
            if name == "auroc":
                axes.axvline(0.5, color=_GRAY, lw=0.8, ls=":")
            axes.grid(True, axis="x")
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", length=0)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=10)
        return _save(figure, path)


def dice_histogram(dice: np.ndarray, path: StrPath, *, mean: Mapping[str, Any] | None = None) -> Path:
    """How Dice is distributed over the films with a known mask that is not empty.

    Args:
        dice: `[n]`, 0-1; NaN is left out (`MaskScores.dice`).
        path: file to write, .png or .svg.
        mean: `judge(...)["segmentation"]["dice"]`.

    Raises:
        FigureError: when no film has a Dice, or for another ending.
        WriteError: when the file cannot be written.
    """
    values = np.asarray(dice, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise FigureError("There is no Dice to draw: no film has a known mask that is not empty.")
    with rc_context(_STYLE):
        figure = _figure(5.0, 3.2)
        axes = figure.add_subplot()
        axes.hist(values, bins=np.linspace(0, 1, 21).tolist(), color=COLORS[5], edgecolor="white", linewidth=0.6)
        axes.axvline(np.median(values), color=COLORS[1], lw=1.6, label=f"median {np.median(values):.3f}")
        axes.axvline(values.mean(), color="black", lw=1.6, ls=(0, (5, 1.5)),
                     label=f"mean {values.mean():.3f}" if mean is None else f"mean {_interval(mean)}")  # fmt: skip
        axes.set(xlim=(0, 1), xlabel="Dice", ylabel="Films")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"Dice of {len(values):,} films with a known finding")
        axes.grid(True, axis="y")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return _save(figure, path)


def training_curves(rows: Sequence[Mapping[str, Any]], path: StrPath) -> Path:
    """Training figures against the step: a panel for every figure, with its validation twin.

    Args:
        rows: lines of `metrics.jsonl`: {"step": int, figure: float, ...}. "val_x" or "val/x" is drawn beside "x". A row
            need not have every figure.
        path: file to write, .png or .svg.

    Raises:
        FigureError: when there is nothing to draw, or for another ending.
        WriteError: when the file cannot be written.
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and "step" in row:
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    panels: dict[str, list[str]] = {}
    for name in series:
        base = name[4:] if name.startswith(("val_", "val/")) else name
        panels.setdefault(base, []).append(name)
    if not panels:
        raise FigureError("There is nothing to draw: no row has a step and a figure.")
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    with rc_context(_STYLE):
        figure = _figure(3.3 * columns + 0.2, 2.4 * lines + 0.2)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (base, names) in zip(
            grid, sorted(panels.items(), key=lambda item: "loss" not in item[0]), strict=False
        ):
            for name in sorted(names, key=lambda name: name != base):
                validation = name != base
                steps, values = series[name]
                style = {"color": COLORS[1], "marker": "o", "ms": 3, "label": "validation"} if validation else {
                    "color": COLORS[0], "label": "training"
                }  # fmt: skip
                axes.plot(steps, values, lw=1.4, **style)
            axes.set_title(base.replace("_", " "))
            axes.grid(True)
            if len(names) > 1:
                axes.legend(loc="best", fontsize=8)
            finite = [v for name in names for v in series[name][1] if math.isfinite(v)]
            if finite and 0 < max(map(abs, finite)) < 1e-2:
                axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("Step")
        return _save(figure, path)


def label_efficiency(rows: Sequence[Mapping[str, Any]], path: StrPath) -> Path:
    """AUROC against how many labeled films were fitted on, a line a start, with its interval.

    Args:
        rows: [{"films": int, "auroc": {start: estimate}}, …], estimates as `Estimate.to_json` gives them.
        path: file to write, .png or .svg.

    Raises:
        FigureError: when there is nothing to draw, or for another ending.
        WriteError: when the file cannot be written.
    """
    if not rows:
        raise FigureError("There is nothing to draw: no fraction was probed.")
    rows = sorted(rows, key=lambda row: row["films"])
    with rc_context(_STYLE):
        figure = _figure(5.6, 3.9)
        axes = figure.add_subplot()
        for i, name in enumerate(rows[0]["auroc"]):
            there = [(row["films"], row["auroc"][name]) for row in rows if row["auroc"][name]["value"] is not None]
            films = np.array([x for x, _ in there]) * 1.02 ** (i - 1)  # side by side, so that no interval hides another
            value, low, high = (_floats([e[key] for _, e in there]) for key in ("value", "low", "high"))
            axes.errorbar(
                films,
                value,
                yerr=np.nan_to_num([value - low, high - value]),
                color=COLORS[i % len(COLORS)],
                ls=DASHES[i % len(DASHES)],
                marker="o",
                ms=4,
                lw=1.5,
                elinewidth=0.9,
                capsize=2.5,
                label=name,
            )
        axes.axhline(0.5, color=_GRAY, lw=0.8, ls=":")
        axes.set_xscale("log")
        ticks = sorted({row["films"] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("Labeled films that were fitted on")
        axes.set_ylabel("Macro AUROC")
        axes.set_title("Linear probes")
        axes.grid(True, axis="y")
        axes.legend(loc="best", fontsize=8)
        return _save(figure, path)


# --- over radiographs -------------------------------------------------------------------------------------------------


def heat(pixels: np.ndarray, saliency: np.ndarray, truth: np.ndarray | None = None) -> np.ndarray:
    """A radiograph with where the evidence for a class lies, and what annotators said.

    Args:
        pixels: uint8 `[h, w]`, the film in display polarity.
        saliency: float `[h, w]`, 0-1 (`saliency.saliency_of`). From nothing at 0 over violet and orange to yellow at 1.
        truth: `[h, w]`, not zero = finding: outlined in cyan.

    Returns:
        uint8 RGB `[h, w, 3]`.

    Raises:
        FigureError: when shapes differ or the saliency is not in 0-1.

    Example:
        >>> heat(np.zeros((4, 4), np.uint8), np.ones((4, 4), np.float32)).shape
        (4, 4, 3)
    """
    film = overlay(pixels)  # checks it
    evidence = np.asarray(saliency, np.float32)
    if evidence.shape != film.shape[:2]:
        raise FigureError(f"Saliency must have the film's shape, {film.shape[:2]}. Received: {evidence.shape}.")
    if not ((evidence >= 0) & (evidence <= 1)).all():
        raise FigureError("Saliency must lie in 0-1 (`normalized`). Received: values outside.")
    color = 255 * colormaps[_HEAT](evidence)[:, :, :3]
    alpha = 0.6 * evidence[:, :, None]  # the film's own structures stay readable beneath
    mixed = np.rint(film * (1 - alpha) + color * alpha).astype(np.uint8)
    if truth is not None:
        if np.shape(truth) != film.shape[:2]:
            raise FigureError(
                f"The true mask must have the film's shape, {film.shape[:2]}. Received: {np.shape(truth)}."
            )
        mixed[outline(np.asarray(truth) != 0, max(1, round(max(film.shape) / 300)))] = TRUE
    return mixed


def contact_sheet(
    films: Sequence[Mapping[str, Any]],
    path: StrPath,
    *,
    columns: int | None = None,
    side: int = 320,
    title: str = "",
    threshold: float = 0.5,
) -> Path:
    """A sheet of radiographs with predictions over them, each with its caption.

    Args:
        films: for each film {"film": uint8 [h, w], "mask": float [h, w] or None, "truth": [h, w] or None,
            "boxes": list, "saliency": float [h, w] or None, "title": str, "caption": str}; all but "film" may be
            missing. `overlay` and `heat` say what they are; with saliency a film is shown twice, side by side.
        path: file to write, .png.
        columns: films a row; about a square by default.
        side: longer side of a film on the sheet, in pixels.
        title: on top.
        threshold: of the predicted contours.

    Raises:
        FigureError: when there is no film, or for another ending.
        WriteError: when the file cannot be written.
    """
    target = Path(path)
    if not films:
        raise FigureError("There is no film to draw.")
    if target.suffix.lower() != ".png":
        raise FigureError(f"A contact sheet's name must end in .png. Received: {target.name}.")
    columns = columns or min(len(films), max(2, math.ceil(math.sqrt(len(films) * 1.4))))
    rows = math.ceil(len(films) / columns)
    big, small = (ImageFont.load_default(size) for size in (max(12, side // 20), max(10, side // 24)))
    gap, line = max(8, side // 32), max(16, side // 16)
    lines = 1 + max(_text(film, "caption").count("\n") + 1 if _text(film, "caption") else 0 for film in films)
    text_height = line * lines + gap // 2
    top = (2 * line if title else gap) + gap // 2
    bottom = 2 * line
    wide = max(_width(film, side) for film in films)
    width = gap + columns * (wide + gap)
    sheet = Image.new("RGB", (width, top + rows * (side + text_height + gap) + bottom), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), _fit(draw, title, big, width - 2 * gap), "black", big)
    for i, film in enumerate(films):
        left, up = gap + i % columns * (wide + gap), top + i // columns * (side + text_height + gap)
        sheet.paste(_pictured(film, side, threshold), (left, up))
        texts = [_text(film, "title"), *_text(film, "caption").split("\n")]
        for k, text in enumerate(texts):
            font = small if k else big
            color = _GRAY if k else "black"
            draw.text((left, up + side + gap // 2 + k * line), _fit(draw, text, font, wide), color, font)
    _key(draw, films, gap, sheet.height - bottom, line, small)
    with replacing(target) as temporary:
        sheet.save(temporary)
    return target


def film_picture(film: Mapping[str, Any], path: StrPath, *, side: int = 224, threshold: float = 0.5) -> Path:
    """One radiograph with predictions over it, and with its saliency beside, for a page: a JPEG of about 20 kB.

    Args:
        film: as one of `contact_sheet`'s; its texts are not drawn.
        path: file to write, .jpg.
        side: of the square that each view of the film is fitted in, in pixels.
        threshold: of the predicted contours.

    Raises:
        FigureError: for arrays that do not fit, or for another ending.
        WriteError: when the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() != ".jpg":
        raise FigureError(f"A film's picture must end in .jpg. Received: {target.name}.")
    picture = _pictured(film, side, threshold)
    with replacing(target) as temporary:
        picture.save(temporary, "JPEG", quality=85, subsampling=0, optimize=True)  # thin colored lines stay sharp
    return target


def _width(film: Mapping[str, Any], side: int) -> int:
    return side if film.get("saliency") is None else 2 * side + _BETWEEN


def _pictured(film: Mapping[str, Any], side: int, threshold: float) -> Image.Image:
    """The views of a film side by side, each in the middle of a black square."""
    views = _views(film, side, threshold)
    picture = Image.new("RGB", (_width(film, side), side), "white")
    for i, view in enumerate(views):
        left = i * (side + _BETWEEN)
        picture.paste("black", (left, 0, left + side, side))
        picture.paste(view, (left + (side - view.width) // 2, (side - view.height) // 2))
    return picture


def _text(film: Mapping[str, Any], name: str) -> str:
    return str(film.get(name) or "")


def _views(film: Mapping[str, Any], side: int, threshold: float) -> list[Image.Image]:
    """A film with predictions, and with saliency where it has some; drawn upon at this size, so that outlines are of
    one width.
    """
    pixels = np.asarray(film["film"])
    if pixels.ndim != 2 or pixels.dtype != np.uint8 or not pixels.size:
        raise FigureError(f"A film must be uint8 [h, w]. Received: {pixels.dtype} {pixels.shape}.")
    height, width = pixels.shape
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    mask, truth, saliency = film.get("mask"), film.get("truth"), film.get("saliency")
    for name, given in (("mask", mask), ("true mask", truth), ("saliency", saliency)):
        if given is not None and np.shape(given) != pixels.shape:
            raise FigureError(f"The {name} must have the film's shape, {pixels.shape}. Received: {np.shape(given)}.")
    if mask is not None:
        mask = _resized(mask, size)
    if truth is not None:
        region = Image.fromarray((np.asarray(truth) != 0).astype(np.uint8) * 255)
        truth = np.asarray(region.resize(size, Image.Resampling.BILINEAR)) >= 128
    boxes = [[value * scale for value in box] for box in film.get("boxes") or ()]
    views = [overlay(small, mask, truth, boxes, threshold=threshold)]
    if saliency is not None:
        views.append(heat(small, _resized(saliency, size), truth))
    return [Image.fromarray(view) for view in views]


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Numbers in 0-1 at another size, (width, height)."""
    image = Image.fromarray(np.asarray(values, np.float32)).resize(size, Image.Resampling.BILINEAR)
    return np.clip(np.asarray(image), 0, 1)


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """The text, cut with "…" where it is wider than `width` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _key(draw: ImageDraw.ImageDraw, films: Sequence[Mapping[str, Any]], x: int, y: int, line: int, font: Any) -> None:
    """What the colors mean, for those that occur."""
    predicted = any(film.get("mask") is not None for film in films)
    annotated = any(film.get("truth") is not None or film.get("boxes") for film in films)
    explained = any(film.get("saliency") is not None for film in films)
    hot = tuple(round(255 * part) for part in colormaps[_HEAT](0.75)[:3])
    for shown, color, text in (
        (predicted, PREDICTED, "predicted"),
        (annotated, TRUE, "annotated"),
        (explained, hot, "at the right: evidence for the class it says"),
    ):
        if shown:
            size = line * 2 // 3
            draw.rectangle([x, y + line // 2, x + size, y + line // 2 + size], fill=color, outline=_GRAY)
            draw.text((x + size + 6, y + line // 2 - 1), text, "black", font)
            x += int(size + draw.textlength(text, font) + 24)
