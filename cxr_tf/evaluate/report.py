"""The figures of an evaluation as one HTML page that a clinician can read: the verdict first, then what it stands on."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr_tf.files import replacing

NOTICE = "Research use, not a medical device."

_PAGE = Path(__file__).with_name("report.html")

Estimate = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of texts and estimates, the first of each row a heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Estimate | None]]


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        id: its anchor.
        title: its heading.
        paragraphs: plain words.
        tables: figures.
        pictures: names of files in `figures/` without their ending, what they show for those who do not see them, and
            their caption; a picture that is not there is left out.
        wide: pictures below each other, not side by side.
    """

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str, str]] = ()
    wide: bool = field(default=False)


def write_report(
    metrics: Mapping[str, Any],
    readiness: Mapping[str, Any],
    figures: Path,
    out: Path,
    *,
    name: str,
    facts: Sequence[str],
) -> None:
    """Writes the page.

    It asks nothing of the network, runs no script, and holds no identifier; it shows films.

    Args:
        metrics: `evaluation/metrics.json`.
        readiness: from `readiness_json`.
        figures: folder of PNG files; those that the page knows are put into it.
        out: the file.
        name: of the run.
        facts: sentences about the model and the data.

    Raises:
        WriteError: when the file cannot be written.
    """
    import jinja2

    parts = [part for make in _PARTS if (part := make(metrics)) is not None]
    wanted = {picture for part in parts for picture, _, _ in part.pictures}
    pictures = {
        picture: base64.b64encode((figures / f"{picture}.png").read_bytes()).decode()
        for picture in wanted
        if (figures / f"{picture}.png").is_file()
    }
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _PAGE.read_text(encoding="utf-8")
    )
    text = page.render(
        name=name,
        metrics=metrics,
        readiness=readiness,
        outcomes=Counter(criterion["outcome"] for criterion in readiness["criteria"]),
        facts=facts,
        body=parts,
        sections=[("tested", "What was tested"), *((p.id, p.title) for p in parts), ("words", "What the words mean")],
        pictures=pictures,
        words=_WORDS.items(),
    )
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


_TITLES = {
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "voc_average_precision": "Challenge's AP",
    "sensitivity_at_90_specificity": "Sensitivity at 90 % specificity, read off these films",
    "validated_sensitivity": "Sensitivity at the threshold set for 90 % specificity on validation patients",
    "validated_specificity": "Specificity that came of that threshold",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "brier": "Brier score",
    "kappa": "Kappa",
    "quadratic_kappa": "Quadratic kappa",
    "accuracy": "Accuracy",
}


def _discrimination(metrics: Mapping[str, Any]) -> Part | None:
    if "image" not in metrics:
        return None
    tables = []
    for level, title in (("study", "Studies (the mean over a study's films)"), ("image", "Films")):
        found = metrics[level]
        columns = {"all classes": found["macro"], **found["classes"]}
        rows = [
            [title_of, *(column.get(figure, "") for column in columns.values())]
            for figure, title_of in _TITLES.items()
            if figure in found["macro"]
        ]
        tables.append(Table(title, ["", *columns], rows))
    return Part(
        "discrimination",
        "Does it tell the classes apart?",
        [
            'Each class is held against all others; "all classes" is their mean. Whole patients are drawn for the '
            "intervals, because films of one patient are alike."
        ],
        tables,
        [
            ("roc", "ROC curves of all classes", "Sensitivity against false alarms, at every threshold."),
            (
                "precision_recall",
                "Precision-recall curves of all classes",
                "How many of those called positive are, against how many of the positive are called.",
            ),
            (
                "confusion",
                "Counts of films by true and predicted class",
                "Films by their true and their predicted class.",
            ),
            ("forest", "Figures of each class with intervals", "Figures of studies, class by class."),
        ],
    )


def _calibration(metrics: Mapping[str, Any]) -> Part | None:
    if "image" not in metrics:
        return None
    image = metrics["image"]
    rows: list[list[str | Estimate | None]] = [
        ["Expected calibration error, 15 bins of equal width", image["macro"]["ece"]],
        ["The same, 15 bins of equal mass", image["macro"].get("ece_equal_mass")],
        ["Brier score, mean over classes", image["macro"].get("brier")],
    ]
    if uncalibrated := metrics.get("calibration", {}).get("ece_before"):
        rows.append(["Expected calibration error before temperature scaling", uncalibrated])
    return Part(
        "calibration",
        "Do its probabilities mean what they say?",
        [
            "A calibrated model that says 70 % is right in 70 % of such films. On so many films a perfectly calibrated "
            f"model would still show an error of about {image.get('ece_if_calibrated', 0):.3f}: that is the bias of the "
            "bins, and an error near it is no evidence of miscalibration."
        ],
        [Table("Calibration on films", ["", "Found"], rows)],
        [("reliability", "Reliability diagram", "What it said against what came true, bin by bin.")],
    )


def _segmentation(metrics: Mapping[str, Any]) -> Part | None:
    if "segmentation" not in metrics:
        return None
    found = metrics["segmentation"]
    titles = {
        "dice": "Dice, films with an annotated opacity",
        "iou": "IoU, the same films",
        "lesion_sensitivity": "Share of separate opacities found",
        "false_lesions": "False areas a film",
        "false_positive_area": "Part of the film called on films without opacity",
    }
    return Part(
        "segmentation",
        "Does it find where the finding is?",
        ["Only films that somebody annotated count: no annotation is not the same as no opacity."],
        [Table("Masks", ["", "Found"], [[title, found[key]] for key, title in titles.items() if key in found])],
        [
            ("dice", "Histogram of Dice", "How well masks fit, film by film."),
            ("films", "Test films with predicted and annotated outlines", "Films with what it says and what is known."),
        ],
        wide=True,
    )


_PARTS = [_discrimination, _calibration, _segmentation]

_WORDS = {
    "AUROC": "The chance that a film with the finding gets a higher score than one without it. 1 is perfect, 0.5 is a "
    "coin.",
    "95 % interval": "Where the figure would fall in 95 of 100 repetitions of the test on other patients of the same "
    "kind. It says nothing about patients of another kind.",
    "Average precision": "The mean share of true alarms over all sensitivities. It depends on how frequent the finding "
    "is among these films.",
    "Sensitivity, specificity": "The share of films with the finding that are called, and of films without it that are "
    "not.",
    "Calibration": "Whether stated probabilities agree with frequencies.",
    "Kappa": "Agreement beyond chance. 1 is full agreement, 0 is chance.",
    "Dice, IoU": "Overlap of two areas. 1 is the same area, 0 is none in common.",
    "Not measurable": "The films at hand cannot give the figure. That is never counted as a pass.",
    "Skill kept": "What is left of AUROC above a coin's 0.5 when something is taken from the film. 1 is all, 0 is none.",
}
