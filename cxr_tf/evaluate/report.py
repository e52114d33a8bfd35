"""The figures of an evaluation as one HTML page that a clinician can read: the verdict, then what it stands on."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxr_tf.files import replacing

NOTICE = "Research use, not a medical device."

_PAGE = Path(__file__).with_name("report.html")

Estimate = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of texts and estimates, the first of each row a heading; and sentences below them."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Estimate | None]]
    notes: Sequence[str] = ()


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
        films: headings, and films as `cxr_tf.evaluate.gallery` gives them.
    """

    id: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str, str]] = ()
    wide: bool = False
    films: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = ()


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
        figures: folder of pictures; those that the page knows are put into it.
        out: the file.
        name: of the run.
        facts: sentences about the model and the data.

    Raises:
        WriteError: when the file cannot be written.
    """
    import jinja2

    parts = [part for make in _PARTS if (part := make(metrics)) is not None]
    wanted = {f"{picture}.png" for part in parts for picture, _, _ in part.pictures}
    wanted |= {film["picture"] for part in parts for _, films in part.films for film in films}
    pictures = {name: _embedded(figures / name) for name in wanted if (figures / name).is_file()}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        _PAGE.read_text(encoding="utf-8")
    )
    text = page.render(
        name=name,
        notice=NOTICE,
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


def _embedded(path: Path) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


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
    levels = {"study": "Studies (the mean over a study's films)", "image": "Films"}
    if metrics["n"]["studies"] == metrics["n"]["images"]:
        levels = {"study": "Films, of which each study has one"}
    for level, title in levels.items():
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
            ("forest", "Figures of each class with intervals", "Figures of studies, class by class."),
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
        ],
    )


def _calibration(metrics: Mapping[str, Any]) -> Part | None:
    if "image" not in metrics:
        return None
    image, fitted = metrics["image"], metrics.get("calibration")
    before = fitted["before"] if fitted else {}
    figures = {
        "ece": "Expected calibration error (ECE), 15 bins of equal width",
        "ece_equal_mass": "The same, 15 bins of equal mass",
    }
    rows = [[title, *([before[name]] if before else []), image["macro"].get(name)] for name, title in figures.items()]
    paragraphs = [
        "A calibrated model that says 70 % is right in 70 % of such films. On so many films a perfectly calibrated "
        f"model would still show an error of about {image['ece_if_calibrated']:.3f}: that is the bias of the bins, "
        "and an error near it is no evidence of miscalibration."
    ]
    if fitted:
        paragraphs.append(
            f"The temperature, {fitted['temperature']:.2f}, was fitted on validation patients and is part of every "
            "export: above 1 it tones probabilities down, below 1 it sharpens them. Only what comes after it counts."
        )
    head = ["", "Before temperature scaling", "After"] if before else ["", "Found"]
    return Part(
        "calibration",
        "Do its probabilities mean what they say?",
        paragraphs,
        [Table("Calibration on films", head, rows)],
        [
            ("reliability_before", "Reliability diagram before temperature scaling", "Before temperature scaling."),
            ("reliability", "Reliability diagram", "What it said against what came true, bin by bin."),
        ],
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
        [("dice", "Histogram of Dice", "How well masks fit, film by film.")],
    )


def _explanation(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("explanation")
    if not found:
        return None
    overall = found["overall"]
    maps = {
        "grad_cam": "Saliency map",
        "segmentation": "Segmentation head",
        "randomized": "Saliency of random weights",
        "chance": "Chance",
    }
    shown = {name: title for name, title in maps.items() if name in overall}
    figures = {
        "pointing_game": "The strongest place lies on an annotated opacity (pointing game)",
        "iou_at_area": "Overlap (IoU) at the opacity's own area",
        "share_in_lungs": "Share of the map inside the lungs",
    }
    rows: list[list[str | Estimate | None]] = [
        [title, *(overall[name].get(figure) for name in shown)] for figure, title in figures.items()
    ]
    tables = [Table("Where the model looks for the film's true class", ["", *shown.values()], rows)]
    if sanity := overall.get("randomized", {}).get("absolute_rank_correlation"):
        tables.append(
            Table(
                "Does the map depend on what was learned?",
                ["", "Found"],
                [["Rank correlation with random weights, sign aside", sanity]],
            )
        )
    return Part(
        "explanation",
        "Does it look where the finding is?",
        [
            "A saliency map (Grad-CAM) shows which parts of the film speak for a class. It is held against opacities "
            "that somebody annotated, and against chance. A map that hardly changes when the model's weights are "
            "replaced by random ones explains nothing."
        ],
        tables,
    )


def _shortcuts(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("shortcuts")
    if not found:
        return None
    blanked = {
        "lungs_blanked": "Lungs blanked",
        "all_but_lungs_blanked": "Everything but the lungs blanked",
        "borders_blanked": "Borders and corners blanked",
    }
    rows = [
        [title, *(found["blanking"][name][figure] for figure in ("auroc", "auroc_blanked", "kept"))]
        for name, title in blanked.items()
        if name in found["blanking"]
    ]
    tables = [Table("What is left of its skill", ["", "AUROC as it is", "AUROC then", "Skill kept"], rows)]
    thumbnails, sources, elsewhere = found["thumbnails"], found["source_classifier"], found["by_source"]
    tables.append(
        Table(
            "What is known without looking closely",
            ["", "AUROC"],
            [
                [f"Logistic regression on {thumbnails['side']} x {thumbnails['side']} thumbnails", thumbnails["auroc"]],
                ["The model less that", thumbnails["difference"]],
                ["The source of a film, read from the model's features", sources["auroc"]],
            ],
        )
    )
    rows = [[f"Films from {source}", estimate] for source, estimate in elsewhere["tested"].items()]
    unseen = elsewhere["unseen_source"]
    rows += [
        ["Films from sources that it never saw", unseen["auroc"]],
        ["That less its own sources", unseen["difference"]],
    ]
    tables.append(Table("From source to source", ["", "AUROC"], rows))
    lungs = found["blanking"].get("lungs")
    return Part(
        "shortcuts",
        "Does it read lungs, or something that goes with disease?",
        [
            "A model that keeps its skill when the lungs are taken away does not need them; one that loses it when "
            "borders and corners are taken away reads what is written or visible there."
            + (f" Lungs are {lungs}." if lungs else " Where the lungs are is not known here (evaluate.lungs says).")
        ],
        tables,
    )


def _subgroups(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("subgroups")
    if not found or not found["groups"]:
        return None
    figures = {
        "auroc": "AUROC",
        "sensitivity": "Sensitivity",
        "specificity": "Specificity",
        "ece": "ECE",
        "dice": "Dice",
    }
    tables = []
    for factor, groups in found["groups"].items():
        there = [key for key in figures if any(key in group["figures"] for group in groups.values())]
        rows: list[list[str | Estimate | None]] = [
            [
                name,
                f"{group['films']:,} of {group['patients']:,} patients",
                *(group["figures"].get(key) for key in there),
            ]
            for name, group in groups.items()
        ]
        words = [group["text"] for group in groups.values()]
        tables.append(Table(factor.capitalize(), ["", "Films", *(figures[key] for key in there)], rows, words))
    return Part(
        "subgroups",
        "Is it as good for every group?",
        [found["text"]],
        tables,
        [("subgroups", "Differences of AUROC by group", "Each group less the rest; 0 is no difference.")],
        wide=True,
    )


def _robustness(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("robustness")
    if not found:
        return None
    rows = []
    for change in found["corruptions"].values():
        head = change["classification" if "classification" in change else "segmentation"]
        values = ", ".join(f"{value:g}" for value in change["values"])
        rows.append([change["title"], f"{values} {change['unit']}".strip(), head["mean_kept"]])
    return Part(
        "robustness",
        "Does it bear what films go through?",
        [
            "The same films, made worse in eight ways at five strengths. Skill kept is 1 where nothing is lost, 0 at "
            "chance."
        ],
        [Table("Mean over five strengths", ["Change", "Strengths", "Skill kept"], rows)],
        [
            (
                "robustness",
                "Skill kept at growing strengths",
                "Skill kept, from the films as they are (0) to the worst (5).",
            )
        ],
        wide=True,
    )


def _uncertainty(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("uncertainty")
    if not found:
        return None
    rows: list[list[str | Estimate | None]] = []
    if selective := found.get("selective"):
        rows += [
            ["Wrong, all films answered (risk)", selective["error"]],
            ["Wrong, the least certain fifth left to a reader (selective risk)", selective["error_at_80"]],
            ["Its certainty tells right from wrong (AUROC)", selective["auroc"]],
        ]
    if same := found.get("agreement"):
        rows.append(["Says the same of a mildly changed film (share)", same["mean"]])
    strange = found["out_of_distribution"]
    rows.append(["Tells images that are no chest from films (out-of-distribution, AUROC)", strange["auroc"]])
    return Part(
        "uncertainty",
        "Does it know when it does not know?",
        [strange["note"]],
        [Table("Uncertainty", ["", "Found"], rows)],
        [("uncertainty", "Error against coverage", "The fewer films it answers, the fewer should be wrong.")],
    )


def _readers(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("readers")
    if not found:
        return None
    rows = [[" and ".join(pair["readers"]), pair["kappa"]] for pair in found["between"]]
    rows += [[f"the model and {pair['reader']}", pair["kappa"]] for pair in found["model"]]
    return Part(
        "readers",
        "Does it agree with readers?",
        [found["position"]["text"]],
        [Table("Kappa: agreement beyond chance", ["", "Found"], rows)],
    )


def _exports(metrics: Mapping[str, Any]) -> Part | None:
    forms = metrics.get("exports")
    if not forms:
        return None
    figures = {"auroc": "AUROC", "average_precision": "AP", "ece": "ECE", "dice": "Dice"}
    keras = forms[0]
    there = [figure for figure in figures if keras[figure] is not None]
    errors = {"logits_max": "Logits, largest error", "mask_max": "Mask, largest error"}
    kept = [error for error in errors if any(form[error] is not None for form in forms)]
    rows = []
    for form in forms:
        row = ["Keras" if form is keras else form["form"], f"{form['megabytes']:.2f}"]
        row += ["" if form[error] is None else f"{form[error]:.1g}" for error in kept]
        for figure in there:
            change = form[f"{figure}_change"]
            row.append(f"{form[figure]:.4f}" if form is keras else "" if change is None else f"{change:+.4f}")
        row += [f"{form['load']:.2f} s", f"{form['latency']:.1f} ms", f"{form['throughput']:,.0f} films/s"]
        rows.append(row)
    head = ["", "MB", *(errors[error] for error in kept), *(figures[figure] for figure in there)]
    return Part(
        "exports",
        "Is it the same when it is exported?",
        [
            f"Each form ran on {keras['films']:,} test films beside the Keras model; figures are what it has more or "
            "less than that model. All are within the tolerances of parity.json. Times are those of the machine that "
            "exported them."
        ],
        [Table("Exported forms", [*head, "Loading", "One film", "16 films"], rows)],
    )


def _gallery(metrics: Mapping[str, Any]) -> Part | None:
    found = metrics.get("gallery")
    if not found:
        return None
    kinds = {
        "worst": "Most wrong: read these before anything else",
        "uncertain": "Least certain",
        "best": "Most right",
        "films": "At random, of every class",
    }
    legend = "Cyan is what annotators drew."
    if "segmentation" in metrics:
        legend = "Orange is what the model marks, cyan what annotators drew."
    if "image" in metrics:
        legend += (
            " Each film is shown a second time, with the evidence for the class that the model says: from violet for "
            "little to yellow for the strongest on this film. It is coarse, and two films' maps cannot be compared."
        )
    return Part(
        "gallery",
        "Films to look at",
        [f"{legend} Numbers are those of predictions.csv. These are patients' films: this page stays where they are."],
        films=[(title, found[kind]) for kind, title in kinds.items() if kind in found],
    )


_PARTS = [
    *(_discrimination, _calibration, _segmentation, _explanation, _shortcuts),
    *(_subgroups, _robustness, _uncertainty, _readers, _exports, _gallery),
]

_WORDS = {
    "Film, study, patient": "A patient may have several studies (visits), and a study several films (images).",
    "Test, validation and training patients": "The model learned from training patients, its settings were chosen on "
    "validation patients, and all figures here are of test patients, who had no part in either.",
    "95 % interval": "The range in which the figure would fall in 95 of 100 repetitions of the test on other patients "
    "of the same kind; it says nothing about patients of another kind.",
    "Bootstrap": "How intervals are made: the test is repeated on patients drawn at random from those that there are.",
    "Not measurable": "The films at hand cannot give the figure, which is never counted as a pass.",
    "Keras, SavedModel, LiteRT, ONNX": "File formats of one and the same model: as it was trained, for servers, for "
    "phones and small computers, and for other software.",
    "Threshold": "The probability from which a film is called positive, chosen on validation patients.",
    "Sensitivity (recall)": "The share of films with the finding that are called positive.",
    "Specificity": "The share of films without the finding that are not called positive.",
    "Precision": "The share of films called positive that have the finding.",
    "ROC curve, AUROC": "The curve shows sensitivity against false alarms at every threshold; the area under it is the "
    "chance that a film with the finding gets a higher score than one without it: 1 is perfect, 0.5 is a coin.",
    "Average precision (AP)": "The mean precision over all sensitivities, 1 at best; it depends on how frequent the "
    "finding is among these films.",
    "Challenge's AP": "Average precision as the SIIM-FISABIO-RSNA challenge computed it, with its curve smoothed.",
    "F1": "Sensitivity and precision in one figure (their harmonic mean), 1 at best.",
    "Accuracy": "The share of films whose most probable class is the true one.",
    "Confusion matrix": "A count of films for each pair of true class and predicted class.",
    "Kappa, quadratic kappa": "Agreement beyond what chance would give, where 1 is full agreement and 0 is chance; "
    "quadratic kappa counts a disagreement the more, the further apart two ordered classes are.",
    "Calibration, reliability diagram": "Whether films that get 70 % have the finding in 70 of 100 cases, and the "
    "picture of it, on whose diagonal a perfect model lies.",
    "Expected calibration error (ECE)": "How far stated probabilities and true frequencies are apart on average, 0 at "
    "best.",
    "Brier score": "The mean squared distance of probabilities from what came true, 0 at best.",
    "Temperature scaling": "One number, fitted on validation patients, that makes all of a model's probabilities more "
    "or less extreme, and changes no order among them.",
    "Dice, IoU": "Two measures of how much two areas overlap: 1 is the same area, 0 is none in common.",
    "Saliency map (Grad-CAM)": "A picture of which places on a film speak for a class, computed from the model.",
    "Pointing game": "How often the map's strongest place lies on what annotators drew.",
    "Rank correlation": "How alike two maps order the places of a film: 1 is the same order, 0 is no relation.",
    "Skill kept": "What is left of AUROC above a coin's 0.5 when a film is changed, where 1 is all and 0 is none.",
    "Shortcut": "Something that goes with disease in these films and is not disease, such as a letter in a corner.",
    "Blanked": "Filled with the training films' mean gray, so that nothing can be read there.",
    "Thumbnail": "The film at 8 x 8 pixels, which shows no finding: what can be told from it, needs no radiology.",
    "Selective prediction (coverage, selective risk)": "The model answers the share of films that it is most certain "
    "of (coverage), and the error among these is the selective risk.",
    "Out-of-distribution": "Of another kind than the films that the model learned from, such as an image that is no "
    "chest.",
}
