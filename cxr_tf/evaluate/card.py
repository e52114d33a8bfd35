"""A model card from the figures of an evaluation (Mitchell et al., "Model Cards for Model Reporting", FAT* 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cxr_tf.evaluate.report import NOTICE
from cxr_tf.run import write_text


def write_card(
    metrics: Mapping[str, Any],
    readiness: Mapping[str, Any],
    out: Path,
    *,
    name: str,
    details: Mapping[str, str],
    training: Sequence[str],
) -> None:
    """Writes `MODEL_CARD.md`. It holds no identifier and no film.

    Args:
        metrics: `evaluation/metrics.json`.
        readiness: from `readiness_json`.
        out: the file.
        name: of the run.
        details: what the model is: "Architecture" -> "...", and so on.
        training: sentences about the data it was trained on.

    Raises:
        WriteError: when the file cannot be written.
    """
    n = metrics["n"]
    classes = metrics["classes"]
    failed = [c for c in readiness["criteria"] if c["outcome"] == "fail"]
    unknown = [c for c in readiness["criteria"] if c["outcome"] == "not measurable"]
    lines = [
        f"# Model card: {name}",
        "",
        f"**{NOTICE}**",
        "",
        "## Model details",
        *(f"- {title}: {text}" for title, text in details.items()),
        f"- Says: {'probabilities of ' + ', '.join(classes) if 'image' in metrics else 'no class'}"
        + ("; where the finding is, as a mask" if "segmentation" in metrics else ""),
        "",
        "## Intended use",
        "- Research on chest radiographs: comparing methods, looking at what models learn.",
        "- Not for diagnosis, triage or any decision about a patient. Nobody has cleared or certified it.",
        "- Made for frontal films of the kind it was trained on. Lateral films, other parts of the body and "
        "photographs of films get an answer too, and it means nothing.",
        "",
        "## Factors",
        _factors(metrics),
        "",
        "## Metrics",
        "- Figures have 95 % intervals from a bootstrap over patients. Thresholds and temperature were chosen on "
        "validation patients, none of whom is among those reported.",
        "",
        "## Evaluation data",
        f"- {n['images']:,} films of {n['studies']:,} studies of {n['patients']:,} patients.",
        *(
            f"- {title}: {count['images']['positive']:,} films with it, {count['images']['negative']:,} without, "
            f"{count['images']['unknown']:,} unknown"
            for title, count in n.get("classes", {}).items()
        ),
        "",
        "## Training data",
        *(f"- {sentence}" for sentence in training),
        "",
        "## Quantitative analyses",
        "| criterion | asked for | found | outcome |",
        "|---|---|---|---|",
        *(
            f"| {_cell(c['title'])} | {c['threshold']} | {_number(c['estimate'])} | {c['outcome']} |"
            for c in readiness["criteria"]
        ),
        "",
        "## Ethical considerations",
        "- Radiographs are patients' data. The report beside this card shows some; the card does not.",
        "- A model that learned from one hospital's films may fail the patients of another, and fail some groups more "
        "than others; what is known of that stands above.",
        "",
        "## Caveats and recommendations",
        "- " + ("It meets every criterion above." if readiness["ready"] else "It does not meet the criteria above."),
        *(f"- Fails: {c['title'].lower()}." for c in failed),
        *(f"- Not known: {c['title'].lower()} ({c['reason']})." for c in unknown),
        "",
    ]
    write_text(out, "\n".join(lines))


def _factors(metrics: Mapping[str, Any]) -> str:
    groups = metrics.get("subgroups", {}).get("groups", {})
    if not groups:
        return "- Not broken down."
    return "\n".join(f"- {factor}: {', '.join(map(str, found))}" for factor, found in groups.items())


def _number(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate["value"] is None:
        return "not measurable"
    if estimate["low"] is None:
        return f"{estimate['value']:.3g}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
