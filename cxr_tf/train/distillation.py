"""Learning from another model: a small one for a phone from the large one whose figures it should come near."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import pandas as pd
import tensorflow as tf

from cxr_tf.config import DistillationSection
from cxr_tf.data.shards import ShardFolder
from cxr_tf.errors import CxrError
from cxr_tf.models.outputs import load_model
from cxr_tf.run import open_run
from cxr_tf.train import losses


class TeacherError(CxrError):
    """A run that cannot teach this experiment."""


@dataclass(frozen=True)
class Distillation:
    """What `MultiTask.compile` takes to learn from a teacher (Hinton et al., "Distilling the Knowledge in a Neural
    Network", 2015).

    The teacher sees the very images that the student sees, augmented as they are (Beyer et al., "Knowledge
    distillation: A good teacher is patient and consistent", CVPR 2022), made as large as its own input. Each head's
    loss is `(1 - weight) truth + weight teacher`, with the teacher's part

    - for classes `T² H(softmax(teacher / T), softmax(student / T))`, H the cross-entropy, or the same of sigmoids;
    - for masks the same of the sigmoids, mean over an image's pixels.

    The teacher has an opinion of every film: those without label or annotation count in its part, too.

    Args:
        teacher: with outputs "logits" and/or "mask_logits" of the student's classes. It is not trained. A head that it
            lacks learns from the truth alone.
        weight: of the teacher's part, 0 to 1.
        temperature: T, above 0.

    Raises:
        TeacherError: for a weight or a temperature that is not accepted.

    Example:
        >>> small.compile("adamw", distillation=cxr_tf.Distillation(large))  # doctest: +SKIP
    """

    teacher: keras.Model
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.weight <= 1.0 or not 0.0 < self.temperature < math.inf:
            raise TeacherError(
                "a teacher's weight is 0 to 1 and its temperature above 0. "
                f"Received: weight={self.weight}, temperature={self.temperature}"
            )

    def __call__(self, images: Any) -> dict[str, Any]:
        """The teacher's outputs for images `[batch, height, width, 1]`; its masks are made as large as those."""
        side, own = tf.shape(images)[1:3], self.teacher.input.shape[1:3]
        fits = None in own or tuple(images.shape[1:3]) == tuple(own)
        seen = images if fits else tf.image.resize(images, own, antialias=True)
        said = dict(self.teacher(seen, training=False))
        if "mask_logits" in said and not fits:
            said["mask_logits"] = tf.image.resize(said["mask_logits"], side)
        return {head: tf.stop_gradient(value) for head, value in said.items()}

    def loss(self, head: str, said: Any, logits: Any, task: str) -> tuple[Any, Any]:
        """The teacher's part of a head's loss and which of its items are known (all), as `losses` gives them."""
        said, logits = said / self.temperature, logits / self.temperature
        if head == "mask_logits":
            loss, known = losses.pixel_cross_entropy(tf.sigmoid(said), logits)
        elif task == "multiclass":
            loss, known = losses.softmax_cross_entropy(tf.nn.softmax(said), logits)
        else:
            loss, known = losses.sigmoid_cross_entropy(tf.sigmoid(said), logits)
        return self.temperature**2 * loss, known


def load_teacher(
    section: DistillationSection, shards: ShardFolder, parts: pd.DataFrame, classes: list[str], task: str
) -> Distillation:
    """The model of a finished run as the teacher of an experiment.

    Args:
        section: `[distillation]`.
        shards: what the experiment trains on.
        parts: which film goes where in it (see `choose_parts`).
        classes: that it learns, in its order.
        task: "multiclass" or "multilabel".

    Raises:
        TeacherError: the run knows other classes, another task or other data, or it has learned from patients that the
            experiment is judged on.
        RunError, ModelError: it is no finished run.
    """
    run = open_run(Path(section.run))
    operating, where = run.operating(), f"[distillation] run = {section.run}"
    if run.data_hash() != shards.data_hash:
        raise TeacherError(
            f"{where}: was trained on other shards than {shards.folder}, so that it cannot be told whether it has seen "
            "the films that this experiment is judged on. Give a run on the same shards."
        )
    if operating["classes"] and classes != operating["classes"]:
        raise TeacherError(f"{where}: knows the classes {operating['classes']}. Received: {classes}")
    if operating["classes"] and task != operating["task"]:
        raise TeacherError(f'{where}: has the task "{operating["task"]}". Received: "{task}"')
    theirs = run.parts()
    learned = {part: set(theirs["patient_key"][theirs["part"] == part]) for part in ("train", "validation")}
    for part, taught in (("test", learned["train"] | learned["validation"]), ("validation", learned["train"])):
        if both := taught & set(parts["patient_key"][parts["part"] == part]):
            raise TeacherError(
                f"{where}: has learned from {len(both)} of the patients of this experiment's {part} part, whose "
                "answers it would give away. Give a run with the same [data.split]."
            )
    return Distillation(load_model(run.folder / "model.keras"), section.weight, section.temperature)
