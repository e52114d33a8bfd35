"""The pre-training recipe: an experiment becomes a run folder with an encoder. Read it top to bottom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cxr_tf.config import Pretraining
from cxr_tf.data.augment import Augment
from cxr_tf.data.manifest import labels, rows_where
from cxr_tf.data.pipeline import pretext_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.data.views import MOCO_CXR, MOCO_V2, Views
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.figures import training_curves
from cxr_tf.evaluate.metrics import auroc, macro
from cxr_tf.files import replacing
from cxr_tf.models.encoders import encoder as make_encoder
from cxr_tf.models.outputs import float32_model
from cxr_tf.pretrain.features import features, neighbors, reader
from cxr_tf.pretrain.filling import evaluate_baselines, evaluate_filling, filling_grid
from cxr_tf.pretrain.holes import Holes
from cxr_tf.pretrain.inpainting import Inpainting
from cxr_tf.pretrain.joint import Joint
from cxr_tf.pretrain.moco import MoCo
from cxr_tf.pretrain.pretext import PretextModel
from cxr_tf.progress import progress
from cxr_tf.run import Run, claim_run, write_json
from cxr_tf.train import distribute
from cxr_tf.train.loop import Every, averaged_weights, fit, read_metrics
from cxr_tf.train.parts import choose_unlabeled, one_class_a_film
from cxr_tf.train.schedule import optimizer
from cxr_tf.train.start import training, write_beginning

_LARGE_QUEUE = 0.1  # of the films: from there on a query meets other films of its own kind, and its own patient, often
_COLLAPSED, _INTERVALS = 0.05, 3
_FILLED = 64  # validation films that holes are filled in, to measure; the first few are drawn
_DRAWN = 4


class CollapseError(CxrError):
    """All embeddings have become one; the text says what to change."""


class PretrainingWarning(UserWarning):
    """A setting that will work, and probably not well."""


def pretrain(experiment: Pretraining, folder: Path) -> Run[Pretraining]:
    """Pre-trains an encoder as an experiment says, or goes on where a run of the same experiment was stopped.

    Args:
        experiment: the resolved experiment file.
        folder: the run folder. It ends with `encoder.keras`, for `model.weights` of a fine-tuning, for inpainting also
            `reconstruction.keras`, for `model.decoder_weights`; `pretraining.json` and pictures.

    Returns:
        The finished run.

    Raises:
        CollapseError: when the embeddings of MoCo have become one.
        CxrError: for anything else that is wrong with the settings, the data or the folder, in words.
    """
    run = claim_run(folder, experiment)
    if run.finished:
        return run
    train = experiment.train
    strategy = distribute.strategy()  # before anything else of TensorFlow's
    shards = run.shards()
    parts = choose_unlabeled(shards.manifest, experiment.data)
    keys = {part: parts.index[parts["part"] == part].to_numpy() for part in ("train", "validation", "test")}
    chief = distribute.is_chief(strategy)
    with training(run, strategy, shards):
        with strategy.scope():
            model = build(experiment, films=len(keys["train"]))
        model.check_batch(train.batch_size // strategy.num_replicas_in_sync)
        batches = _batches(shards, keys["train"], experiment)
        batches(0, distribute.worker(strategy))
        look = _Look(model, shards, keys, experiment, folder)
        # Nothing has been written so far: whatever is wrong with the settings has been said by now.
        if chief:
            write_beginning(run, shards, parts)
        with progress(f"pre-training {experiment.name}") as update:
            fit(
                model,
                batches,
                steps=train.steps,
                batch_size=train.batch_size,
                folder=folder,
                checkpoint_every=train.checkpoint_every,
                keep_checkpoints=train.keep_checkpoints,
                log_every=train.log_every,
                callbacks=[Every(train.validate_every, look)],
                check=_collapse_guard(train.warmup_steps, folder / "metrics.jsonl"),
                update=update,
            )
        if chief:
            _finish(model, run, keys, shards.data_hash)
    return run


def build(experiment: Pretraining, films: int) -> PretextModel:
    """The compiled model of an experiment, untrained (call it in a strategy's scope).

    Args:
        experiment: what to build.
        films: how many are trained on; they bound MoCo's queue.
    """
    settings, train = experiment.model, experiment.train
    encoder = make_encoder(
        settings.encoder,
        (settings.size, settings.size, 1),
        weights=settings.weights,
        normalization=settings.normalization,
        seed=experiment.seed,
    )
    made = {
        "moco": lambda: _moco(encoder, experiment, films),
        "inpainting": lambda: _inpainting(encoder, experiment),
        "joint": lambda: Joint(
            _moco(encoder, experiment, films), _inpainting(encoder, experiment), experiment.joint.weights
        ),
    }
    model = made[experiment.method]()
    other = {}
    if experiment.method != "moco" and experiment.inpainting.adversarial:
        rate = experiment.inpainting.discriminator_learning_rate
        other["discriminator_optimizer"] = keras.optimizers.Adam(rate, beta_1=0.5)
    model.compile(
        optimizer(
            train.optimizer,
            train.learning_rate,
            train.steps,
            warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay,
            momentum=train.momentum,
            clip_norm=train.clip_norm,
            ema=train.ema,
        ),
        **other,
    )
    return model


def _moco(encoder: keras.Model, experiment: Pretraining, films: int) -> MoCo:
    settings = experiment.moco
    queue = min(settings.queue, films)
    if queue > _LARGE_QUEUE * films:
        warnings.warn(
            f"a queue of {queue:,} keys is {queue / films:.0%} of the {films:,} films: many keys that a query is "
            "driven away from are of films like it. A shorter `moco.queue` may do better.",
            PretrainingWarning,
            stacklevel=2,
        )
    return MoCo(
        encoder,
        dim=settings.dim,
        queue_size=queue,
        temperature=settings.temperature,
        momentum=settings.momentum,
        momentum_steps=experiment.train.steps if settings.momentum_schedule == "cosine" else None,
        head=settings.head,
        symmetric=settings.symmetric,
        parts=settings.parts,
        seed=experiment.seed,
    )


def _inpainting(encoder: keras.Model, experiment: Pretraining) -> Inpainting:
    settings = experiment.inpainting
    return Inpainting(
        encoder,
        decoder_channels=settings.decoder_channels,
        skips=settings.skips,
        whole_image=settings.whole_image,
        adversarial=settings.adversarial,
        normalization=experiment.model.normalization,
        seed=experiment.seed,
    )


def _views(experiment: Pretraining) -> Views:
    if experiment.moco.views == "augment":
        augment = Augment(**experiment.augment.model_dump())
        return Views(query=augment, key=augment)
    return MOCO_CXR if experiment.moco.views == "moco-cxr" else MOCO_V2


def _make(experiment: Pretraining, augment: Augment) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """What the method takes, made of a batch of films."""
    views, holes = _views(experiment), Holes(experiment.inpainting.holes)

    def make(images: Any, seed: Any, positions: Any) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if experiment.method != "inpainting":
            data |= views(images, seed, positions)
        if experiment.method != "moco":
            image, _ = augment(images, None, seed, positions)
            data |= {"image": image, "hole": holes(seed, positions, experiment.model.size)}
        return data

    return make


def _batches(
    shards: ShardFolder, keys: np.ndarray, experiment: Pretraining
) -> Callable[[int, tuple[int, int]], tf.data.Dataset]:
    make = _make(experiment, Augment(**experiment.augment.model_dump()))

    def from_step(first: int, worker: tuple[int, int]) -> tf.data.Dataset:
        return pretext_batches(
            shards,
            keys,
            size=experiment.model.size,
            batch_size=experiment.train.batch_size,
            make=make,
            seed=experiment.seed,
            first_step=first,
            steps=experiment.train.steps,
            worker=worker,
        )

    return from_step


def _filler(model: PretextModel) -> Inpainting | None:
    """The part of a model that fills holes."""
    part = model.inpainting if isinstance(model, Joint) else model
    return part if isinstance(part, Inpainting) else None


class _Look:
    """Called at intervals: how the encoder and the filled holes do on validation patients."""

    def __init__(
        self,
        model: PretextModel,
        shards: ShardFolder,
        keys: Mapping[str, np.ndarray],
        experiment: Pretraining,
        folder: Path,
    ):
        self.model, self.shards, self.experiment, self.folder = model, shards, experiment, folder
        self.fills = _filler(model)
        self.read = reader(model.encoder)
        self.baselines: dict[str, float] = {}
        self.holed = np.random.default_rng(experiment.seed).permutation(keys["validation"])[:_FILLED]
        self.labeled: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if experiment.probe is not None:
            self.labeled = {part: self._labeled(part, keys[part]) for part in ("train", "validation")}

    def __call__(self, step: int) -> dict[str, Any]:
        with averaged_weights(self.model):
            return self._probe() | self._fill(step)

    def _labeled(self, part: str, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        settings = self.experiment.probe
        assert settings is not None
        films = self.shards.manifest.loc[keys]
        films = films[rows_where(films, settings.where)]
        if settings.task == "multiclass":
            films = one_class_a_film(films, settings.classes)
        values = labels(films, settings.classes)
        known = ~np.isnan(values).all(axis=1)
        if not any({0.0, 1.0} <= set(column) for column in values[known].T):
            raise CxrError(
                f"`probe.classes` {settings.classes} and `probe.where` leave {known.sum()} {part} films with a label, "
                "and no class that some of them have and others have not: there is nothing to tell apart. Name other "
                "classes or films, or leave [probe] out."
            )
        return films.index.to_numpy()[known], values[known]

    def _probe(self) -> dict[str, float]:
        if not self.labeled:
            return {}
        (bank, truth), (queries, asked) = self.labeled["train"], self.labeled["validation"]
        size, batch_size = self.experiment.model.size, self.experiment.train.batch_size
        found = [features(self.read, self.shards, keys, size=size, batch_size=batch_size) for keys in (bank, queries)]
        score = macro(auroc(neighbors(found[0], truth, found[1]), asked))
        return {} if math.isnan(score) else {"val_neighbors_auroc": score}

    def _fill(self, step: int) -> dict[str, float]:
        if self.fills is None:
            return {}
        films = pretext_batches(
            self.shards,
            self.holed,
            size=self.experiment.model.size,
            batch_size=self.experiment.train.batch_size,
            make=_make(self.experiment, Augment.none()),
            seed=self.experiment.seed,
            shuffle=False,
        )
        if not self.baselines:
            self.baselines = evaluate_baselines(films)
        first = next(iter(films))
        images, holes = first["image"][:_DRAWN], first["hole"][:_DRAWN]
        filling_grid(
            self.folder / "figures" / f"filling-{step:06}.png",
            images,
            self.fills.cut(images, holes),
            self.fills.fill(images, holes),
            holes,
            title=f"Validation films after {step:,} steps",
        )
        return {f"val_{name}": value for name, value in (evaluate_filling(self.fills, films) | self.baselines).items()}


def _collapse_guard(warmup_steps: int, log: Path) -> Callable[[int, Mapping[str, float]], None]:
    """A check of each logged step; of a run that goes on, the steps before count, too."""
    collapsed: int | None = None

    def low(step: int, figures: Mapping[str, float]) -> bool | None:
        spread = _spread(figures)
        return None if spread is None or step <= warmup_steps else spread < _COLLAPSED

    def check(step: int, figures: Mapping[str, float]) -> None:
        nonlocal collapsed
        if collapsed is None:
            before = [low(row["step"], row) for row in read_metrics(log) if row["step"] < step]
            known = [one for one in before if one is not None]
            collapsed = len(known) - max((i + 1 for i, one in enumerate(known) if not one), default=0)
        now = low(step, figures)
        if now is None:
            return
        collapsed = collapsed + 1 if now else 0
        if collapsed >= _INTERVALS:
            raise CollapseError(
                f"collapse: at step {step} the spread of the embeddings is {_spread(figures):.3f} (1 fills the "
                f"sphere), below {_COLLAPSED} for the last {_INTERVALS} logged steps, so all films look alike to the "
                "encoder. Try a lower `train.learning_rate`, a longer `train.warmup_steps`, or a lower "
                "`moco.temperature`, in another run folder."
            )

    return check


def _spread(figures: Mapping[str, float]) -> float | None:
    return figures.get("spread", figures.get("moco_spread"))


def _finish(model: PretextModel, run: Run[Pretraining], keys: Mapping[str, np.ndarray], data_hash: str) -> None:
    """Writes the encoder, what else can be gone on with, pictures, and last of all `pretraining.json`."""
    experiment, folder = run.experiment, run.folder
    with averaged_weights(model):
        saved = {"encoder.keras": model.encoder}
        if (fills := _filler(model)) is not None:
            saved["reconstruction.keras"] = fills.reconstruction
        for name, one in saved.items():
            with replacing(folder / name) as temporary:
                float32_model(one).save(temporary)
    rows = read_metrics(folder / "metrics.jsonl")
    training_curves(rows, folder / "figures" / "training.png")
    write_json(
        folder / "pretraining.json",
        {
            "method": experiment.method,
            "encoder": experiment.model.encoder,
            "size": experiment.model.size,
            "steps": experiment.train.steps,
            "films": {part: len(of_part) for part, of_part in keys.items()},
            "figures": {name: value for row in rows for name, value in row.items() if name != "step"},
            "data_hash": data_hash,
        },
    )
