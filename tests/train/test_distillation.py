"""Learning from a teacher: the loss by hand, what is not trained or saved, and runs that cannot teach."""

from __future__ import annotations

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

import cxr_tf
from cxr_tf import Distillation
from cxr_tf.config import DistillationSection, load_experiment
from cxr_tf.data.shards import open_shards
from cxr_tf.errors import CxrError
from cxr_tf.run import open_run
from cxr_tf.train import losses
from cxr_tf.train.distillation import TeacherError, load_teacher
from cxr_tf.train.finetune import finetune

NAN = float("nan")


def model_of(size: int, seed: int, **settings) -> cxr_tf.MultiTask:
    keras.utils.set_random_seed(seed)
    settings = {"hidden": 0, "dropout": 0.0, "decoder_channels": (8, 8, 4, 4, 4), "normalization": "group"} | settings
    return cxr_tf.multitask("small_resnet", (size, size, 1), 3, **settings)


def batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (4, 32, 32, 1)).astype("float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0]]
    masks = rng.integers(0, 2, (4, 32, 32, 1)).astype("float32")
    labels[:2], masks[2:] = NAN, NAN
    return tf.nest.map_structure(tf.constant, (images, {"logits": labels, "mask_logits": masks}))


def test_a_step_is_the_update_by_truth_and_teacher():
    student, teacher = model_of(32, 0), model_of(64, 1)
    student.compile(
        keras.optimizers.SGD(0.1),
        head_weights=(0.7, 0.3),
        distillation=Distillation(teacher, weight=0.2, temperature=3),
    )
    images, targets = batch()
    said = teacher(tf.image.resize(images, (64, 64), antialias=True), training=False)
    soft = tf.nn.softmax(said["logits"] / 3)
    mask = tf.sigmoid(tf.image.resize(said["mask_logits"], (32, 32)) / 3)
    with tf.GradientTape() as tape:
        outputs = student(images, training=True)
        truth = tf.reduce_sum(losses.softmax_cross_entropy(targets["logits"], outputs["logits"])[0]) / 2
        drawn = tf.reduce_sum(losses.dice_cross_entropy(targets["mask_logits"], outputs["mask_logits"])[0]) / 2
        # All four films have an opinion of the teacher's.
        taught = -tf.reduce_mean(tf.reduce_sum(soft * tf.nn.log_softmax(outputs["logits"] / 3), axis=-1))
        z = outputs["mask_logits"] / 3
        painted = -tf.reduce_mean(mask * tf.math.log_sigmoid(z) + (1 - mask) * tf.math.log_sigmoid(-z))
        parts = 0.8 * truth + 0.2 * 9 * taught, 0.8 * drawn + 0.2 * 9 * painted
        total = 0.7 * parts[0] + 0.3 * parts[1]
    gradients = tape.gradient(total, student.trainable_variables)
    expected = [v - 0.1 * g for v, g in zip(student.trainable_variables, gradients, strict=True)]
    logs = student.train_step((images, targets))
    for found, value in zip(student.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        [logs["loss"], logs["classification_loss"], logs["segmentation_loss"]], [total, *parts], rtol=1e-5
    )


def test_what_the_teacher_does_not_say_is_learned_from_the_truth():
    student, teacher = model_of(32, 0), model_of(32, 1, segmentation=False)
    images, targets = batch()
    student.compile(keras.optimizers.SGD(0.1))
    alone = student.test_step((images, targets))["segmentation_loss"]
    student.compile(keras.optimizers.SGD(0.1), distillation=Distillation(teacher))
    np.testing.assert_allclose(student.train_step((images, targets))["segmentation_loss"], alone, rtol=1e-5)


def test_several_labels_are_taught_one_by_one():
    student, teacher = model_of(32, 0, segmentation=False), model_of(32, 1, segmentation=False)
    student.compile(keras.optimizers.SGD(0.1), task="multilabel", distillation=Distillation(teacher, 1.0, 2.0))
    images, targets = batch()
    p, z = tf.sigmoid(teacher(images)["logits"] / 2), student(images)["logits"] / 2
    by_hand = -4 * tf.reduce_mean(p * tf.math.log_sigmoid(z) + (1 - p) * tf.math.log_sigmoid(-z))
    np.testing.assert_allclose(student.train_step((images, targets))["loss"], by_hand, rtol=1e-5)


def test_the_teacher_is_neither_trained_nor_saved(tmp_path):
    student, teacher = model_of(32, 0), model_of(32, 1, normalization="batch")
    number, before = len(student.variables), teacher.get_weights()
    student.compile(keras.optimizers.SGD(0.1), distillation=Distillation(teacher))
    for _ in range(2):
        student.train_step(batch())
    assert len(student.variables) == number
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    student.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(batch()[0])["logits"], student(batch()[0])["logits"], rtol=1e-5, atol=1e-6)
    loaded.train_step(batch())  # by the truth alone
    tracked = tf.train.Checkpoint(model=student).save(str(tmp_path / "checkpoint"))
    names = [name for name, _ in tf.train.list_variables(tracked)]
    assert names
    assert not any("distillation" in name or "teacher" in name for name in names)


def test_a_teacher_that_does_not_fit_is_refused():
    student = model_of(32, 0, segmentation=False)
    two = cxr_tf.multitask("small_resnet", (32, 32, 1), 2, segmentation=False)
    for teacher, told in (
        (two, "knows the 3 classes of its student. Received: one with 2"),
        (model_of(32, 1, classification=False), "A teacher has outputs logits"),
        (two.encoder, "A teacher has outputs logits"),
    ):
        with pytest.raises(CxrError, match=told):
            student.compile(distillation=Distillation(teacher))
    for settings in ({"weight": 1.5}, {"weight": float("nan")}, {"temperature": 0.0}):
        with pytest.raises(TeacherError, match="weight is 0 to 1 and its temperature above 0"):
            Distillation(two, **settings)


# From a run


def taught(journey, **changes):
    """The journey's experiment on its own shards, with its run as a teacher."""
    section = {"run": str(journey / "run")} | changes.pop("distillation", {})
    experiment = load_experiment(journey / "experiment.toml")
    changes = {"distillation": DistillationSection(**section)} | changes
    return experiment.model_copy(update=changes)


def test_a_run_learns_from_a_run(journey, tmp_path):
    run = finetune(taught(journey), tmp_path / "run")
    assert run.finished
    assert f'run = "{journey / "run"}"' in (tmp_path / "run" / "config.toml").read_text()
    assert open_run(tmp_path / "run").experiment.distillation.weight == 0.5
    plain, other = (
        [json.loads(line)["loss"] for line in (at / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for at in (journey / "run", tmp_path / "run")
    )
    assert plain[0] != other[0]


def test_a_run_that_learned_from_what_is_tested_cannot_teach(journey, tmp_path):
    experiment = taught(journey)
    split = experiment.data.split.model_copy(update={"fold": 1})
    experiment = experiment.model_copy(update={"data": experiment.data.model_copy(update={"split": split})})
    with pytest.raises(TeacherError, match=r"has learned from \d+ of the patients of this experiment's test part"):
        finetune(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("classes", "task", "told"),
    [
        (["x", "y"], "multiclass", r"knows the classes \['Negative for Pneumonia', .*\. Received: \['x', 'y'\]"),
        (None, "multilabel", 'has the task "multiclass". Received: "multilabel"'),
    ],
)
def test_a_run_of_another_kind_cannot_teach(journey, classes, task, told):
    run, section = open_run(journey / "run"), DistillationSection(run=str(journey / "run"))
    with pytest.raises(TeacherError, match=told):
        load_teacher(section, run.shards(), run.parts(), classes or run.operating()["classes"], task)


def test_a_run_that_is_none_or_saw_other_data_cannot_teach(journey, tmp_path):
    run, classes = open_run(journey / "run"), open_run(journey / "run").operating()["classes"]
    section = DistillationSection(run=str(tmp_path / "none"))
    with pytest.raises(CxrError, match="none"):
        load_teacher(section, run.shards(), run.parts(), classes, "multiclass")
    shutil.copytree(journey / "run", tmp_path / "other", ignore=shutil.ignore_patterns("evaluation", "checkpoints"))
    environment = json.loads((tmp_path / "other" / "environment.json").read_text())
    (tmp_path / "other" / "environment.json").write_text(json.dumps(environment | {"data_hash": "0" * 64}))
    section = DistillationSection(run=str(tmp_path / "other"))
    with pytest.raises(TeacherError, match="was trained on other shards"):
        load_teacher(section, open_shards(journey / "shards"), run.parts(), classes, "multiclass")
