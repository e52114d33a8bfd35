"""A finished run on its test patients: figures with intervals, predictions and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate import figures
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.figures import contact_sheet
from cxr_tf.evaluate.inference import Predictions, predict_films
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.files import replacing
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import calibrated, load_model
from cxr_tf.progress import progress
from cxr_tf.run import Run, write_json

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
        RunError: when the run is not finished or damaged, or its shards are not those that it was trained on.
    """
    operating = run.operating()
    experiment = run.experiment
    shards, parts = run.shards(), run.parts()
    parts = parts[parts["part"] == "test"]
    model = load_model(run.folder / "model.keras")
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
    with replacing(run.folder / "evaluation") as out:
        _write_predictions(out / "predictions.csv", parts, found, probabilities, classes)
        _draw(out / "figures", metrics, found, probabilities, parts["patient_key"].to_numpy())
        chosen = _one_of_each_kind(found.labels, GALLERY, experiment.seed)
        films = _films(model, shards, parts.index.to_numpy()[chosen], operating, classes)
        contact_sheet(films, out / "figures" / "films.png", columns=4, threshold=operating["mask_threshold"])
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


def _one_of_each_kind(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of films at random, as many of each class as there is room for, class by class."""
    kind = np.where((labels == 1).any(axis=1), np.nan_to_num(labels).argmax(axis=1), labels.shape[1])
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(kind[shuffled]).groupby(kind[shuffled]).cumcount().to_numpy()  # 0 for the first of each kind
    chosen = shuffled[np.lexsort((kind[shuffled], turn))][:count]
    return chosen[np.argsort(kind[chosen], kind="stable")]


def _films(
    model: MultiTask, shards: ShardFolder, keys: np.ndarray, operating: dict[str, Any], classes: list[str]
) -> list[dict[str, Any]]:
    """What `contact_sheet` draws of films: pixels, what the model says, what annotators said."""
    dataset = batches(
        shards, keys, size=operating["size"], batch_size=len(keys), shuffle=False, classes=classes, content_boxes=True
    )
    images, truth = next(read_batches(dataset))
    said = {name: value.numpy() for name, value in calibrated(model(images, training=False), operating).items()}
    films = []
    for i in range(len(keys)):
        top, left, height, width = truth["content_box"][i].numpy()
        on_film = np.s_[i, top : top + height, left : left + width, 0]
        annotated = truth["mask_logits"].numpy()[on_film]
        labels = truth["logits"][i].numpy()
        caption = ""
        if "probabilities" in said:
            best = int(said["probabilities"][i].argmax())
            caption = f"says {classes[best]}: {said['probabilities'][i, best]:.2f}"
        films.append(
            {
                "film": images.numpy()[on_film].round().clip(0, 255).astype(np.uint8),
                "mask": said["mask"][on_film] if "mask" in said else None,
                "truth": None if np.isnan(annotated).any() else annotated,
                "title": ", ".join(name for name, label in zip(classes, labels, strict=True) if label == 1)
                or "no known finding",
                "caption": caption,
            }
        )
    return films
