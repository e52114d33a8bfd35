"""A judgement in a few lines for the terminal, and in a few numbers for `summary.json`."""

from __future__ import annotations

from typing import Any

NAMES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "f1": "F1",
    "kappa": "kappa",
    "ece": "ECE",
    "voc_average_precision": "challenge mAP",
    "dice": "Dice",
    "iou": "IoU",
    "lesion_sensitivity": "separate opacities found",
    "false_lesions": "false areas a film",
    "false_positive_area": "area called on empty films",
}


def headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures that a run is known by: name -> {"value", "low", "high"}, `null` where not measurable."""
    found: dict[str, Any] = {}
    if "image" in metrics:
        films, studies = metrics["image"]["macro"], metrics["study"]["macro"]
        for key in ("auroc", "average_precision", "f1", "kappa", "ece"):
            found[f"films: macro {NAMES[key]}"] = films.get(key)
        for key in ("auroc", "average_precision", "voc_average_precision"):
            found[f"studies: macro {NAMES[key]}"] = studies.get(key)
    found |= {f"films: {NAMES[k]}": e for k, e in metrics.get("segmentation", {}).items()}
    return {name: {k: e[k] for k in ("value", "low", "high")} for name, e in found.items() if e is not None}


def summary(metrics: dict[str, Any]) -> str:
    """A table of the headline figures with their intervals."""
    n = metrics["n"]
    level = f"{100 * metrics['level']:g} %"
    lines = [f"{n['images']} films, {n['studies']} studies, {n['patients']} patients; {level} intervals over patients"]
    for name, e in headline(metrics).items():
        lines.append(f"  {name:34} {_figure(e)}")
    if verdict := metrics.get("readiness"):
        lines.append("ready: every criterion is met" if verdict["ready"] else "not ready:")
        marks = {"pass": "pass", "fail": "FAIL", "not measurable": "?"}
        for c in verdict["criteria"]:
            found = _figure(c["estimate"]) if c["estimate"] else "not measurable"
            lines.append(f"  {marks[c['outcome']]:5} {c['title']}: {found}, asked for {c['threshold']}")
    return "\n".join(lines)


def _figure(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "not measurable"
    if isinstance(estimate["value"], int):
        return f"{estimate['value']:,}"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f} (interval not measurable)"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"
