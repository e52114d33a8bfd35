"""A finished run on its test patients: figures with intervals, predictions and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.pipeline import batches
from cxr_tf.data.shards import ShardFolder, open_shards
from cxr_tf.evaluate import figures
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.inference import Predictions, predict_films
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.files import replacing
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import calibrated, load_model
from cxr_tf.progress import progress
from cxr_tf.run import Run, RunError, write_json

GALLERY = 12  # films in the picture of predictions


def evaluate(run: Run) -> dict[str, Any]:
    """Judges a run on its test patients and writes `evaluation/`.

    `metrics.json` has the figures, `predictions.csv` a row a film (whole-number keys, labels, probabilities, overlap of
    masks; no identifiers), `figures/` the pictures.

    Args:
        run: a finished run.

    Returns:
        The figures (see `cxr_tf.evaluate.judge`).

    Raises:
        RunError: when the run is not finished, or its shards are not those that it was trained on.
    """
    operating = run.operating()
    experiment, out = run.experiment, run.folder / "evaluation"
    shards = open_shards(experiment.data.shards)
    if shards.data_hash != operating["data_hash"]:
        raise RunError(
            f"{experiment.data.shards}: is not what {run.folder} was trained on (its checksum differs). "
            "Prepare the same data again, or train again."
        )
    model = load_model(run.folder / "model.keras")
    parts = pd.read_csv(run.folder / "parts.csv", index_col="image_key")
    parts = parts[parts["part"] == "test"]
    classes = experiment.data.classes or shards.classes
    with progress("predicting test films") as update:
        found = predict_films(
            model,
            shards,
            parts.index.to_numpy(),
            classes=classes,
            size=operating["size"],
            batch_size=experiment.train.batch_size,
            mask_threshold=operating["mask_threshold"],
            update=update,
        )
    probabilities = None
    if found.logits is not None:
        probabilities = probabilities_of(found.logits, operating["task"], operating["temperature"])
    metrics = judge(
        labels=found.labels,
        probabilities=probabilities,
        classes=classes,
        patients=parts["patient_key"].to_numpy(),
        studies=parts["study_key"].to_numpy(),
        task=operating["task"],
        thresholds=list(operating["thresholds"].values()),
        masks=found.masks,
        challenge=experiment.evaluate.challenge,
        replicates=experiment.evaluate.replicates,
        seed=experiment.seed,
    )
    _write_predictions(out / "predictions.csv", parts, found, probabilities, classes)
    _draw(out / "figures", metrics, found, probabilities, parts["patient_key"].to_numpy())
    picture = out / "figures" / "films.png"
    _gallery(picture, model, shards, parts, found, probabilities, operating, classes, experiment.seed)
    write_json(out / "metrics.json", metrics)
    return metrics


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
        figures.reliability(image["reliability"], out / "reliability.png", ece=image["macro"]["ece"])
        figures.forest(metrics["study"], out / "forest.png", title="Studies")
        if metrics["task"] == "multiclass":
            figures.confusion(image["confusion"], classes, out / "confusion.png")
    if found.masks is not None and not np.isnan(found.masks.dice).all():
        figures.dice_histogram(found.masks.dice, out / "dice.png", mean=metrics["segmentation"]["dice"])


def _gallery(
    path: Path,
    model: MultiTask,
    shards: ShardFolder,
    parts: pd.DataFrame,
    found: Predictions,
    probabilities: np.ndarray | None,
    operating: dict[str, Any],
    classes: list[str],
    seed: int,
) -> None:
    """Films with what the model says over what annotators said: as many of each class as there is room for."""
    rng = np.random.default_rng(seed)
    kind = np.nan_to_num(found.labels, nan=-1.0).argmax(axis=1)
    shuffled = rng.permutation(len(parts))
    turn = pd.Series(kind[shuffled]).groupby(kind[shuffled]).cumcount().to_numpy()  # 0 for the first of each class
    chosen = shuffled[np.lexsort((kind[shuffled], turn))][:GALLERY]
    chosen = chosen[np.argsort(kind[chosen], kind="stable")]
    films = []
    keys = parts.index.to_numpy()[chosen]
    size = operating["size"]
    for images, truth in batches(shards, keys, size=size, batch_size=len(keys), shuffle=False, classes=classes):
        said = {name: value.numpy() for name, value in calibrated(model(images, training=False), operating).items()}
        for i, row in enumerate(chosen):
            annotated = truth["mask_logits"][i, ..., 0].numpy()
            known = [c for c, value in zip(classes, found.labels[row], strict=True) if value == 1]
            caption = ""
            if probabilities is not None:
                best = int(probabilities[row].argmax())
                caption = f"says {classes[best]}: {probabilities[row, best]:.2f}"
            films.append(
                {
                    "film": images[i, ..., 0].numpy().round().astype(np.uint8),
                    "mask": said["mask"][i, ..., 0] if "mask" in said else None,
                    "truth": None if np.isnan(annotated).any() else annotated,
                    "title": ", ".join(known) or "no known finding",
                    "caption": caption,
                }
            )
    figures.contact_sheet(films, path, columns=4, title="Test films", threshold=operating["mask_threshold"])
