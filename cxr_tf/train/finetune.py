"""The multi-task recipe: an experiment becomes a run folder. Read it top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from cxr_tf.config import Experiment
from cxr_tf.data.augment import Augment
from cxr_tf.data.pipeline import batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate.calibration import (
    Task,
    choose_thresholds,
    fit_temperature,
    probabilities_of,
    threshold_at_specificity,
)
from cxr_tf.evaluate.figures import training_curves
from cxr_tf.evaluate.inference import Predictions, predict_films
from cxr_tf.evaluate.metrics import auroc, macro
from cxr_tf.files import replacing
from cxr_tf.models.multitask import MultiTask, multitask
from cxr_tf.models.outputs import float32_model
from cxr_tf.progress import progress
from cxr_tf.run import Run, claim_run, write_json
from cxr_tf.train import distribute
from cxr_tf.train.distillation import Distillation, load_teacher
from cxr_tf.train.loop import Every, averaged_weights, fit, read_metrics
from cxr_tf.train.parts import choose_parts
from cxr_tf.train.schedule import optimizer
from cxr_tf.train.start import training, write_beginning

SPECIFICITY = 0.9  # of the thresholds that evaluation holds to what they promised


def finetune(experiment: Experiment, folder: Path) -> Run:
    """Trains a multi-task model as an experiment says, or goes on where a run of the same experiment was stopped.

    Args:
        experiment: the resolved experiment file.
        folder: the run folder.

    Returns:
        The finished run. The weights are those with the best figure on validation patients; temperature and thresholds
        are chosen on them, too.

    Raises:
        CxrError: for anything that is wrong with the settings, the data or the folder, in words.
    """
    run = claim_run(folder, experiment)
    if run.finished:
        return run
    train = experiment.train
    strategy = distribute.strategy()  # before anything else of TensorFlow's
    shards = run.shards()
    classes = experiment.data.classes or shards.classes
    heads = experiment.model.classification, experiment.model.segmentation
    parts = choose_parts(shards.manifest, experiment.data, classes, experiment.seed, heads)
    training_batches = _training_batches(shards, _keys(parts, "train"), classes, experiment)
    chief = distribute.is_chief(strategy)
    with training(run, strategy, shards):
        with strategy.scope():
            teacher = None
            if experiment.distillation is not None:
                teacher = load_teacher(experiment.distillation, shards, parts, classes, experiment.data.task)
            model = build(experiment, classes, teacher)
        training_batches(0, distribute.worker(strategy))
        # Nothing has been written so far: whatever is wrong with the settings has been said by now.
        if chief:
            write_beginning(run, shards, parts)
        best = _Best(model, shards, _keys(parts, "validation"), classes, experiment, folder)
        with progress(f"training {experiment.name}") as update:
            fit(
                model,
                training_batches,
                steps=train.steps,
                batch_size=train.batch_size,
                folder=folder,
                checkpoint_every=train.checkpoint_every,
                keep_checkpoints=train.keep_checkpoints,
                log_every=train.log_every,
                callbacks=[Every(train.validate_every, best)],
                update=update,
            )
        if chief:
            best.load()
            _finish(model, shards, parts, classes, run, best.step)
    return run


def build(experiment: Experiment, classes: list[str], teacher: Distillation | None = None) -> MultiTask:
    """The compiled model of an experiment, untrained (call it in a strategy's scope)."""
    settings, train, loss = experiment.model, experiment.train, experiment.loss
    model = multitask(
        settings.encoder,
        (settings.size, settings.size, 1),
        classes=classes,
        weights=settings.weights,
        normalization=settings.normalization,
        classification=settings.classification,
        segmentation=settings.segmentation,
        hidden=settings.hidden,
        dropout=settings.dropout,
        decoder_channels=tuple(settings.decoder_channels),
        decoder_weights=settings.decoder_weights if settings.segmentation else None,
        seed=experiment.seed,
    )
    if train.freeze_encoder:
        model.freeze_encoder()
    model.compile(
        optimizer=optimizer(
            train.optimizer,
            train.learning_rate,
            train.steps,
            warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay,
            momentum=train.momentum,
            clip_norm=train.clip_norm,
            ema=train.ema,
        ),
        task=experiment.data.task,
        head_weights=loss.head_weights,
        class_weights=loss.class_weights,
        label_smoothing=loss.label_smoothing,
        focal_gamma=loss.focal_gamma,
        distillation=teacher,
    )
    return model


class _Best:
    """Called at intervals: figures on validation patients; keeps the weights with the best one.

    Ties go to the earlier step, so that a run that goes on from a checkpoint ends with the same choice.
    """

    def __init__(
        self,
        model: MultiTask,
        shards: ShardFolder,
        keys: np.ndarray,
        classes: list[str],
        experiment: Experiment,
        folder: Path,
    ):
        self.model, self.shards, self.keys, self.classes, self.experiment = model, shards, keys, classes, experiment
        self.weights = folder / "checkpoints" / "best.weights.h5"
        self.log = folder / "metrics.jsonl"

    def __call__(self, step: int) -> dict[str, Any]:
        before = self._best_before(step)
        with averaged_weights(self.model):
            found = _predict(self.model, self.shards, self.keys, self.classes, self.experiment)
            figures = _figures(found, self.experiment.data.task)
            if before is None or figures["val_score"] > before:
                with replacing(self.weights) as temporary:
                    self.model.save_weights(temporary)
        return figures

    def load(self) -> None:
        """Puts the best weights into the model."""
        self.model.load_weights(self.weights)

    @property
    def step(self) -> int:
        """The step that the best weights are from."""
        rows = self._rows()
        return max(rows, key=lambda row: (row["val_score"], -row["step"]))["step"]

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.log) if "val_score" in row]

    def _best_before(self, step: int) -> float | None:
        return max((row["val_score"] for row in self._rows() if row["step"] < step), default=None)


def _figures(found: Predictions, task: Task) -> dict[str, float]:
    """Validation figures; "val_score", their mean, is what the best weights are chosen by."""
    figures = {}
    if found.logits is not None:
        figures["val_auroc"] = macro(auroc(probabilities_of(found.logits, task), found.labels))
    if found.masks is not None and not np.isnan(found.masks.dice).all():
        figures["val_dice"] = float(np.nanmean(found.masks.dice))
    return figures | {"val_score": float(np.mean(list(figures.values())))}


def _finish(
    model: MultiTask, shards: ShardFolder, parts: pd.DataFrame, classes: list[str], run: Run, step: int
) -> None:
    """Writes the model, its encoder, pictures, and last of all `operating.json`."""
    experiment, folder = run.experiment, run.folder
    keys = _keys(parts, "validation")
    plain = float32_model(model)
    for name, one in (("model.keras", plain), ("encoder.keras", plain.encoder)):
        with replacing(folder / name) as temporary:
            one.save(temporary)
    training_curves(read_metrics(folder / "metrics.jsonl"), folder / "figures" / "training.png")
    found = _predict(plain, shards, keys, classes, experiment)
    task = experiment.data.task
    chosen: dict[str, Any] = {"temperature": 1.0, "thresholds": {}, "specific_thresholds": {}}
    if found.logits is not None:
        temperature = fit_temperature(found.logits, found.labels, task)
        probabilities = probabilities_of(found.logits, task, temperature)
        thresholds = choose_thresholds(probabilities, found.labels)
        specific = threshold_at_specificity(probabilities, found.labels, SPECIFICITY)
        chosen = {
            "temperature": temperature,
            "thresholds": dict(zip(classes, map(float, thresholds), strict=True)),
            "specific_thresholds": dict(zip(classes, map(float, specific), strict=True)),
        }
    write_json(
        folder / "operating.json",
        {
            "classes": classes if found.logits is not None else [],
            "task": task,
            "size": experiment.model.size,
            "storage_size": shards.storage_size,
            **chosen,
            "specificity": SPECIFICITY,
            "mask_threshold": 0.5,
            "chosen_on": {"films": len(keys), "patients": int(parts.loc[keys, "patient_key"].nunique())},
            "step": step,
            "data_hash": shards.data_hash,
        },
    )


def _predict(
    model: keras.Model, shards: ShardFolder, keys: np.ndarray, classes: list[str], experiment: Experiment
) -> Predictions:
    size, batch_size = experiment.model.size, experiment.train.batch_size
    return predict_films(model, shards, keys, classes=classes, size=size, batch_size=batch_size)


def _training_batches(
    shards: ShardFolder, keys: np.ndarray, classes: list[str], experiment: Experiment
) -> Callable[[int, tuple[int, int]], tf.data.Dataset]:
    def from_step(first: int, worker: tuple[int, int]) -> tf.data.Dataset:
        return batches(
            shards,
            keys,
            size=experiment.model.size,
            batch_size=experiment.train.batch_size,
            seed=experiment.seed,
            first_step=first,
            steps=experiment.train.steps,
            augment=Augment(**experiment.augment.model_dump()),
            classes=classes,
            worker=worker,
        )

    return from_step


def _keys(parts: pd.DataFrame, part: str) -> np.ndarray:
    return parts.index[parts["part"] == part].to_numpy()
