"""A tiny finished run with two heads on generated films, and run folders around any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import cxr_tf
from cxr_tf.run import Run, open_run, write_json

SIZE = 64


def settings(shards: Path, **model: Any) -> dict[str, Any]:
    """An experiment on the tiny shards."""
    return {
        "name": "tiny",
        "seed": 3,
        "data": {"shards": str(shards), "split": {"folds": 3}},
        "model": {
            "encoder": "small_resnet",
            "size": SIZE,
            "hidden": 16,
            "decoder_channels": [16, 16, 8, 8, 8],
            **model,
        },
        "train": {
            "steps": 30,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "checkpoint_every": 30,
            "validate_every": 30,
            "log_every": 10,
        },
    }


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of generated films."""
    from cxr_tf.data.phantom import write_siim
    from cxr_tf.data.prepare import prepare_dataset

    root = tmp_path_factory.mktemp("films")
    write_siim(root / "siim", studies=60, size=96, seed=5)
    prepare_dataset("siim", root / "siim", root / "shards", storage_size=80, workers=1)
    return root / "shards"


@pytest.fixture(scope="session")
def tiny_run(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with both heads, trained for a moment."""
    from cxr_tf.config import parse_experiment
    from cxr_tf.train.finetune import finetune

    run = finetune(parse_experiment(settings(tiny_shards)), tmp_path_factory.mktemp("runs") / "tiny")
    (run.folder / "MODEL_CARD.md").write_text("# tiny\n", encoding="utf-8")
    return run


@pytest.fixture(scope="session")
def run_of(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[keras.Model], Run]:
    """A function: any multi-task model -> a finished run folder that holds it, on the films of `tiny_run`."""
    from cxr_tf.config import to_toml

    def make(model: keras.Model) -> Run:
        folder = tmp_path_factory.mktemp("run")
        for name in ("parts.csv", "environment.json"):
            (folder / name).write_bytes((tiny_run.folder / name).read_bytes())
        (folder / "config.toml").write_text(to_toml(tiny_run.experiment.model_dump(mode="json")), encoding="utf-8")
        model.save(folder / "model.keras")
        operating = tiny_run.operating()
        if "logits" not in model.heads:
            operating |= {"classes": [], "thresholds": {}, "specific_thresholds": {}, "temperature": 1.0}
        write_json(folder / "operating.json", operating)
        return open_run(folder)

    return make


@pytest.fixture
def images() -> np.ndarray:
    """Three smooth films of noise: float32 `[3, S, S, 1]`, 0-255."""
    coarse = np.random.default_rng(0).uniform(0, 255, (3, 8, 8, 1)).astype(np.float32)
    return coarse.repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)


@pytest.fixture(scope="session")
def small_model() -> Callable[..., keras.Model]:
    """A function: an encoder and settings of `cxr_tf.multitask` -> a model with drawn statistics."""

    def make(encoder: str | keras.Model = "small_resnet", policy: str = "float32", **given: Any) -> keras.Model:
        keras.utils.set_random_seed(1)
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(policy)
        try:
            model = cxr_tf.multitask(
                encoder,
                (SIZE, SIZE, 1),
                **{"classes": ["a", "b", "c", "d"], "hidden": 16, "decoder_channels": (8, 8, 8, 8, 8)} | given,
            )
        finally:
            keras.config.set_dtype_policy(before)
        drawn = np.random.default_rng(2)
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.set_weights([drawn.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
        return model

    return make


def keras_cv_backbone(kind: str) -> keras.Model:
    """A tiny one of keras-cv."""
    models = pytest.importorskip("keras_cv").models
    given = {"include_rescaling": False, "input_shape": (None, None, 1)}
    if kind == "densenet":
        return models.DenseNetBackbone(stackwise_num_repeats=[1, 1, 1, 2], **given)
    return models.ResNetV2Backbone(
        stackwise_filters=[16, 32, 48, 64], stackwise_blocks=[2, 2, 2, 2], stackwise_strides=[1, 2, 2, 2], **given
    )


def keras_hub_backbone() -> keras.Model:
    """A tiny one of keras-hub."""
    hub = pytest.importorskip("keras_hub")
    return hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64, 64, 64],
        stackwise_num_blocks=[1, 1, 1, 1],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        use_pre_activation=True,
        image_shape=(None, None, 1),
    )


@pytest.fixture(scope="session", params=["keras_cv densenet", "keras_cv resnetv2", "keras_hub resnetv2"])
def foreign_model(request: pytest.FixtureRequest, small_model: Callable[..., keras.Model]) -> keras.Model:
    """A model around a backbone of keras-cv or keras-hub."""
    library, _, kind = request.param.partition(" ")
    return small_model(keras_hub_backbone() if library == "keras_hub" else keras_cv_backbone(kind))
