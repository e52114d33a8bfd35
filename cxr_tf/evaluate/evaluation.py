"""A finished run on its test patients: figures with intervals, what they ask of them, and a page that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate import charts, figures
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.calibration import calibration_error_of, probabilities_of, reliability_table, table_json
from cxr_tf.evaluate.card import write_card
from cxr_tf.evaluate.explanation import explain_films
from cxr_tf.evaluate.gallery import gallery
from cxr_tf.evaluate.inference import Predictions, predict_films
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.evaluate.lungs import Lungs, lung_masks
from cxr_tf.evaluate.readers import ReadersError, agreement, read_readers
from cxr_tf.evaluate.readiness import load_criteria, readiness, readiness_json
from cxr_tf.evaluate.report import write_report
from cxr_tf.evaluate.robustness import robustness
from cxr_tf.evaluate.shortcuts import blanking, by_source, mean_intensity, source_classifier, thumbnail_baseline
from cxr_tf.evaluate.subgroups import subgroups
from cxr_tf.evaluate.uncertainty import uncertainty
from cxr_tf.files import replacing
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import load_model
from cxr_tf.progress import progress
from cxr_tf.run import Run, RunError, write_json

_FILLED_FROM = 512  # training films whose mean fills what is blanked


def evaluate(run: Run, *, criteria: Path | None = None, readers: Path | None = None) -> dict[str, Any]:
    """Judges a run on its test patients and writes `evaluation/` and `MODEL_CARD.md`.

    `report.html` is for people, the verdict first; `metrics.json` has all figures, `readiness.json` the verdict;
    `predictions.csv` has a row a film (whole-number keys, labels, probabilities, overlap of masks; no identifiers), and
    `figures/` the pictures. The report and its pictures show films.

    Args:
        run: a finished run.
        criteria: what it must reach, in place of the package's own `readiness.toml`.
        readers: a CSV of readers' labels (see `cxr_tf.evaluate.readers`).

    Returns:
        The figures: those of `cxr_tf.evaluate.judge`, and "calibration", "explanation", "shortcuts", "subgroups",
        "robustness", "uncertainty", "readers", "gallery" (see the modules of these names), each where the model has
        what it takes; "readiness" is the verdict (see `readiness_json`).

    Raises:
        RunError: when the run is not finished or damaged, or its shards are not those that it was trained on.
        ConfigError, ReadersError, LungError: for the files that are given beside; readers' labels for a run that only
            segments, too.
    """
    operating = run.operating()
    experiment = run.experiment
    if readers and not experiment.model.classification:
        raise ReadersError(
            "readers' labels are compared with the classes that a model says, and this run only segments. Give a run "
            "with a classification head, or leave out --readers.",
            str(readers),
        )
    asked = load_criteria(criteria)
    shards, everything = run.shards(), run.parts()
    parts = everything[everything["part"] == "test"]
    keys, patients = parts.index.to_numpy(), parts["patient_key"].to_numpy()
    model = load_model(run.folder / "model.keras")
    classes, task, size = experiment.data.classes or shards.classes, operating["task"], operating["size"]
    batch_size = experiment.train.batch_size
    films, studies = set(shards.manifest.index), set(shards.manifest["study_key"])
    read = read_readers(readers, classes=classes, task=task, films=films, studies=studies) if readers else None
    with progress("predicting test films") as update:
        found = predict_films(
            model,
            shards,
            keys,
            classes=classes,
            size=size,
            batch_size=batch_size,
            mask_threshold=operating["mask_threshold"],
            update=update,
        )
    probabilities = None
    if found.logits is not None:
        probabilities = probabilities_of(found.logits, task, operating["temperature"])
    draws: dict[str, Any] = {"replicates": experiment.evaluate.replicates, "seed": experiment.seed}
    said: dict[str, Any] = {
        "labels": found.labels,
        "probabilities": probabilities,
        "classes": classes,
        "patients": patients,
        "task": task,
        "thresholds": list(operating["thresholds"].values()),
        "masks": found.masks,
    }
    metrics = judge(
        **said,
        studies=parts["study_key"].to_numpy(),
        specific_thresholds=list(operating.get("specific_thresholds", {}).values()) or None,
        ordered=experiment.evaluate.ordered,
        challenge=experiment.evaluate.challenge,
        **draws,
    )
    lungs = _lungs(experiment.evaluate.lungs, shards, keys, size, batch_size)
    training = everything.index[everything["part"] == "train"].to_numpy()
    shared: dict[str, Any] = {"batch_size": batch_size, **draws}
    if found.logits is not None and probabilities is not None:
        metrics["calibration"] = _calibration(found.logits, found.labels, patients, operating, draws)
        metrics["shortcuts"] = _shortcuts(
            model, shards, everything, probabilities, operating, lungs, training, experiment.data.where, shared
        )
    metrics["subgroups"] = subgroups(shards.manifest.loc[keys], **said, **draws)
    with progress("explaining films") as update:
        metrics["explanation"] = explain_films(
            model,
            shards,
            keys,
            classes=classes,
            size=size,
            patients=patients,
            lungs=lungs.masks if lungs else None,
            update=update,
            **shared,
        )
    with progress("changing films") as update:
        metrics["robustness"] = robustness(model, shards, keys, operating, update=update, **shared)
    with progress("asking what it does not know") as update:
        metrics["uncertainty"] = uncertainty(model, shards, keys, training, operating, update=update, **shared)
    if read is not None and probabilities is not None:
        metrics["readers"] = agreement(
            read,
            films=keys,
            studies=parts["study_key"].to_numpy(),
            ordered=experiment.evaluate.ordered,
            **{name: said[name] for name in ("patients", "probabilities", "classes", "task", "thresholds")},
            **draws,
        )
    verdict = readiness_json(readiness(metrics, asked))
    metrics |= {"readiness": verdict, **_exports_before(run)}
    with replacing(run.folder / "evaluation") as out:
        _write_predictions(out / "predictions.csv", parts, found, probabilities, classes)
        _draw(out / "figures", metrics, found, probabilities, patients)
        metrics["gallery"] = gallery(
            model,
            shards,
            keys,
            found,
            probabilities,
            operating,
            out / "figures",
            classes=classes,
            batch_size=batch_size,
            seed=experiment.seed,
        )
        write_json(out / "readiness.json", verdict)
        facts = _facts(run, everything, len(shards.manifest))
        metrics["facts"] = list(facts.values())
        write_json(out / "metrics.json", metrics)
        _write_report(run, metrics, out)
    write_card(
        metrics,
        verdict,
        run.folder / "MODEL_CARD.md",
        name=experiment.name,
        details={name: facts[name] for name in ("Model", "Made")},
        training=[facts[name] for name in ("Training", "Choice")],
    )
    return metrics


def report_exports(run: Run, rows: list[dict[str, Any]]) -> bool:
    """Writes the report of an evaluated run again, with what its exported forms were found to be.

    One that shows more forms already is left as it is.

    Args:
        run: a finished run.
        rows: from `export.parity.parity_rows`.

    Returns:
        Whether there is a report, and it shows them now.

    Raises:
        RunError: when `evaluation/metrics.json` is damaged.
        WriteError: when the report cannot be written.
    """
    folder = run.folder / "evaluation"
    path = folder / "metrics.json"
    if not path.is_file():
        return False
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        shown = {row["form"] for row in metrics.get("exports", [])}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path}: is damaged. `cxr-tf evaluate {run.folder}` writes it again.") from error
    if "facts" not in metrics or shown - {row["form"] for row in rows}:  # of an earlier version, or with more forms
        return False
    metrics["exports"] = rows
    write_json(path, metrics)
    _write_report(run, metrics, folder)
    return True


def _exports_before(run: Run) -> dict[str, Any]:
    """What an earlier evaluation's report says of exported forms: the model is the same, so it still holds."""
    try:
        rows = json.loads((run.folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))["exports"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {"exports": rows}


def _write_report(run: Run, metrics: dict[str, Any], folder: Path) -> None:
    write_report(
        metrics,
        metrics["readiness"],
        folder / "figures",
        folder / "report.html",
        name=run.experiment.name,
        facts=metrics["facts"],
    )


def _lungs(source: str | None, shards: ShardFolder, keys: np.ndarray, size: int, batch_size: int) -> Lungs | None:
    if source is None:
        return None
    with progress("finding lungs") as update:
        return lung_masks(source, shards, keys, size, batch_size=batch_size, update=update)


def _calibration(
    logits: np.ndarray, labels: np.ndarray, patients: np.ndarray, operating: dict[str, Any], draws: dict[str, Any]
) -> dict[str, Any]:
    """The temperature, and what probabilities were worth before it: {"temperature", "before": {...}}."""
    raw, task = probabilities_of(logits, operating["task"], 1.0), operating["task"]
    errors = {
        name: calibration_error_of(raw, labels, task, mass=mass)
        for name, mass in (("ece", False), ("ece_equal_mass", True))
    }
    found = bootstrap(lambda weights: {name: error(weights) for name, error in errors.items()}, patients, **draws)
    before: dict[str, Any] = {name: estimate.to_json() for name, estimate in found.items()}
    before["reliability"] = table_json(reliability_table(raw, labels, task))
    return {"temperature": operating["temperature"], "before": before}


def _shortcuts(
    model: MultiTask,
    shards: ShardFolder,
    parts: pd.DataFrame,
    probabilities: np.ndarray,
    operating: dict[str, Any],
    lungs: Lungs | None,
    training: np.ndarray,
    where: dict[str, list[Any]],
    shared: dict[str, Any],
) -> dict[str, Any]:
    """What the model may go by besides the lungs."""
    test = parts.index[parts["part"] == "test"].to_numpy()
    draws = {name: shared[name] for name in ("replicates", "seed")}
    fill = mean_intensity(shards, training[:_FILLED_FROM], size=operating["size"], batch_size=shared["batch_size"])
    with progress("blanking parts of films") as update:
        blanked = blanking(
            model, shards, test, probabilities, operating, fill=fill, lungs=lungs, update=update, **shared
        )
    with progress("reading sources from features") as update:
        sources = source_classifier(model, shards, test, operating, update=update, **shared)
    with progress("testing other sources") as update:
        elsewhere = by_source(model, shards, parts, probabilities, operating, where=where, update=update, **shared)
    return {
        "blanking": blanked,
        "thumbnails": thumbnail_baseline(shards, parts, probabilities, operating, **draws),
        "source_classifier": sources,
        "by_source": elsewhere,
    }


def _facts(run: Run, parts: pd.DataFrame, films: int) -> dict[str, str]:
    """Sentences about the model and its data, without a path or an identifier."""
    model = run.experiment.model
    start = {None: "random weights", "imagenet": "ImageNet's weights"}.get(model.weights, "a pre-trained encoder")
    taught = "" if run.experiment.distillation is None else ", and taught by another model"
    made = json.loads((run.folder / "environment.json").read_text(encoding="utf-8"))
    count = parts["part"].value_counts()
    patients = parts.groupby("part")["patient_key"].nunique()
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("cxr-tf", "tensorflow", "keras"))
    return {
        "Model": f"A {model.encoder} encoder for films of {model.size} pixels, started from {start}{taught}.",
        "Training": f"Trained on {count.get('train', 0):,} films of {patients.get('train', 0):,} patients.",
        "Choice": f"Weights, temperature and thresholds were chosen on {count.get('validation', 0):,} films of "
        f"{patients.get('validation', 0):,} other patients.",
        "Made": f"Made with {versions}; data {made['data_hash'][:12]} ({films:,} films).",
    }


def _write_predictions(
    path: Path, parts: pd.DataFrame, found: Predictions, probabilities: np.ndarray | None, classes: list[str]
) -> None:
    table = parts[["patient_key", "study_key"]].copy()
    for c, name in enumerate(classes):
        table[f"label:{name}"] = found.labels[:, c]
        if probabilities is not None:
            table[f"probability:{name}"] = probabilities[:, c]
    if found.masks is not None:
        for column in ("dice", "iou", "false_positive_area"):
            table[column] = getattr(found.masks, column)
    with replacing(path) as temporary:
        table.to_csv(temporary, float_format="%.6g")


def _draw(
    out: Path,
    metrics: dict[str, Any],
    found: Predictions,
    probabilities: np.ndarray | None,
    patients: np.ndarray,
) -> None:
    if probabilities is not None:
        classes, image = metrics["classes"], metrics["image"]
        draws = {name: metrics[name] for name in ("replicates", "seed", "level")}
        lines = curves(probabilities, found.labels, classes, patients, **draws)
        figures.roc(lines, out / "roc.png", level=image)
        figures.precision_recall(lines, out / "precision_recall.png", level=image)
        before = metrics["calibration"]["before"]
        figures.reliability(
            before["reliability"], out / "reliability_before.png", ece=before["ece"], title="Before temperature scaling"
        )
        figures.reliability(
            image["reliability"], out / "reliability.png", ece=image["macro"]["ece"], title="After temperature scaling"
        )
        figures.forest(metrics["study"], out / "forest.png", title="Studies")
        if metrics["task"] == "multiclass":
            figures.confusion(image["confusion"], classes, out / "confusion.png")
    if found.masks is not None and not np.isnan(found.masks.dice).all():
        figures.dice_histogram(found.masks.dice, out / "dice.png", mean=metrics["segmentation"]["dice"])
    bears = {
        change["title"]: change["classification" if "classification" in change else "segmentation"]["kept"]
        for change in metrics["robustness"]["corruptions"].values()
    }
    charts.skill_kept(bears, out / "robustness.png")
    if curve := metrics["uncertainty"].get("selective", {}).get("curve"):
        charts.risk_coverage(
            {
                "by its own certainty": [(point["coverage"], point["error"]) for point in curve],
                "the best order": [(point["coverage"], point["best"]) for point in curve],
            },
            out / "uncertainty.png",
        )
    drops = [
        (f"{factor}: {group}", found["differences"]["auroc"])
        for factor, groups in metrics["subgroups"]["groups"].items()
        for group, found in groups.items()
        if "auroc" in found["differences"]
    ]
    if drops:
        charts.intervals(
            drops,
            out / "subgroups.png",
            title="AUROC of each group less that of the rest",
            axis="Difference",
            reference=0,
        )
