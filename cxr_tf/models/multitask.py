"""Encoder and heads as one flat functional graph that classifies and segments at once, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import keras
import tensorflow as tf

from cxr_tf.errors import nearest
from cxr_tf.models import encoders
from cxr_tf.models.decoder import CHANNELS, unet_decoder
from cxr_tf.models.layers import Dropout, ModelError
from cxr_tf.models.normalization import copy_model
from cxr_tf.models.saved import read_keras
from cxr_tf.train import losses
from cxr_tf.train.step import apply_gradients, with_loss_scale

if TYPE_CHECKING:
    from cxr_tf.train.distillation import Distillation

TASKS = ("multiclass", "multilabel")

# Output -> name of its loss in the logs.
_LOSS_NAMES = {"logits": "classification_loss", "mask_logits": "segmentation_loss"}


def multitask(
    encoder: str | keras.Model,
    input_shape: Sequence[int | None],
    classes: int | Sequence[str] | None = None,
    *,
    segmentation: bool = True,
    classification: bool = True,
    hidden: int = 1024,
    dropout: float = 0.5,
    decoder_channels: Sequence[int] = CHANNELS,
    weights: str | Path | None = None,
    decoder_weights: str | Path | None = None,
    normalization: str = "batch",
    seed: int = 0,
) -> MultiTask:
    """A model that classifies and segments radiographs.

    Args:
        encoder: A name of `cxr_tf.models.encoders.ENCODERS`, an encoder made by `cxr_tf.encoder`, or a keras-cv or
            keras-hub backbone.
        input_shape: Height, width, 1. Known sides must be multiples of 32.
        classes: How many, or their names. Needed for the classification head alone.
        segmentation: Whether it has a segmentation head: a U-Net decoder and a 1 × 1 convolution.
        classification: Whether it has a classification head: the mean of the last features, `hidden` units with ReLU,
            dropout, and one output a class.
        hidden: Units between features and classes; 0 for none, which is a linear probe's head.
        dropout: Rate before the last layer of the classification head.
        decoder_channels: Of the decoder, from stride 16 to stride 1.
        weights: Of the encoder, as in `cxr_tf.encoder`.
        decoder_weights: Of the decoder: path of a `reconstruction.keras`, saved from an `Inpainting` with skips whose
            encoder, `decoder_channels` and `normalization` are those of this model. None for random ones.
        normalization: Of the encoder and the decoder, as in `cxr_tf.encoder`. An encoder that was made before keeps its
            own.
        seed: Of the dropout. Weights are drawn from Keras' global seed (`keras.utils.set_random_seed`).

    Returns:
        A `MultiTask` from "image" `[batch, height, width, 1]`, intensities 0–255, to a dictionary of "logits"
        `[batch, classes]` and "mask_logits" `[batch, height, width, 1]`, both float32.

    Raises:
        ModelError: For settings that do not go together, and all that `cxr_tf.encoder` refuses.

    Example:
        >>> model = cxr_tf.multitask("densenet121", (320, 320, 1), classes=["negative", "pneumonia"])
        >>> model.compile(keras.optimizers.AdamW(1e-4))
        >>> model.fit(dataset)  # of (image, {"logits": one_hot, "mask_logits": mask}), NaN where unknown
    """
    if not (segmentation or classification):
        raise ModelError("A model has at least one head. Received: segmentation=False, classification=False")
    number = classes if isinstance(classes, int) else len(classes or ())
    if classification and number < 1:
        raise ModelError(f"classes is the number of classes, or their names. Received: {classes!r}")
    base = _flat_encoder(encoder, input_shape, weights, normalization, seed)
    levels = encoders.pyramid(base)
    outputs = {}
    if classification:
        x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(levels[max(levels)])
        if hidden:
            x = keras.layers.Dense(hidden, activation="relu", dtype="float32", name="hidden")(x)
        if dropout:
            x = Dropout(dropout, seed=seed, dtype="float32", name="dropout")(x)
        outputs["logits"] = keras.layers.Dense(number, dtype="float32", name="logits")(x)
    if segmentation:
        x = unet_decoder(levels, decoder_channels, normalization=normalization)
        outputs["mask_logits"] = keras.layers.Conv2D(1, 1, dtype="float32", name="mask_logits")(x)
    model = MultiTask(
        base.input,
        outputs,
        name="multitask",
        encoder_name=base.name,
        encoder_layers={f"stride_{stride}": level._keras_history.operation.name for stride, level in levels.items()},
        classes=None if isinstance(classes, int) or not classification else tuple(classes or ()),
    )
    if decoder_weights is not None:
        _load_decoder(model, Path(decoder_weights))
    return model


def _flat_encoder(
    encoder: str | keras.Model,
    input_shape: Sequence[int | None],
    weights: str | Path | None,
    normalization: str,
    seed: int,
) -> keras.Model:
    if not isinstance(encoder, keras.Model) or not isinstance(encoder.output, dict):
        return encoders.encoder(encoder, input_shape, weights=weights, normalization=normalization, seed=seed)
    if weights is not None:
        raise ModelError(f"This encoder has its weights: leave `weights` out. Received: weights={weights!r}")
    encoders.pyramid(encoder)
    image = keras.Input(encoders.checked_shape(input_shape), name="image")
    return copy_model(encoder, lambda layer: None, image=image)


def _load_decoder(model: MultiTask, path: Path) -> None:
    """Copies the weights of the layers named "decoder_…" from a saved reconstruction."""
    if "mask_logits" not in model.heads:
        raise ModelError("`decoder_weights` are for a model with a decoder. Received: segmentation=False")
    saved = read_keras(path, "a reconstruction saved from an `Inpainting` (reconstruction.keras)")
    theirs, ours = _decoder_layers(saved), _decoder_layers(model)
    if saved.name != "reconstruction" or not theirs:
        raise ModelError(
            f"{path} holds a Keras model, but not the `reconstruction` of an `Inpainting`. Received: {saved.name!r}"
        )
    if not any(isinstance(layer, keras.layers.Concatenate) for layer in theirs.values()):
        raise ModelError(
            f"{path} was made without skip connections, so its decoder takes other inputs than a U-Net's: pre-train "
            "with `Inpainting(..., skips=True)`."
        )
    channels, wanted = (
        tuple(layer.filters for layer in layers.values() if layer.name.endswith("_1_conv")) for layers in (theirs, ours)
    )
    if channels != wanted:
        raise ModelError(
            f"The decoder in {path} has other channels: give `decoder_channels={channels}`. Received: {wanted}"
        )
    ours = {name: layer for name, layer in ours.items() if layer.weights}
    for name, layer in ours.items():
        found, expected = ([tuple(w.shape) for w in each.weights] for each in (theirs[name], layer))
        if found != expected and name.endswith("_norm"):
            raise ModelError(
                f"The decoder in {path} has another normalization: GroupNorm and batch-norm cannot stand in for each "
                f"other. Received: {type(layer).__name__} for a decoder with {type(theirs[name]).__name__}"
            )
        if found != expected:
            raise ModelError(
                f"The decoder in {path} was made for another encoder: the weights of {name} have the shapes {found}. "
                f"Received: an encoder with which they have {expected}"
            )
    for name, layer in ours.items():
        layer.set_weights(theirs[name].get_weights())


def _decoder_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    return {layer.name: layer for layer in getattr(model, "layers", ()) if layer.name.startswith("decoder_")}


@keras.saving.register_keras_serializable("cxr_tf")
class MultiTask(keras.Model):
    """A flat functional model with outputs "logits" and/or "mask_logits" and the training step for both.

    Make it with `multitask`. Data are `(image, targets)`: images `[batch, height, width, 1]`, intensities 0–255, and a
    dictionary of

    - "logits": `[batch, classes]`, one-hot, or 0 and 1 for each class; NaN is an unknown label;
    - "mask_logits": `[batch, height, width, 1]`, 0 and 1; NaN all over is a film without annotation.

    Either may be left out, and what the model has no head for is ignored.

    Each loss is divided by the number of known items in the global batch, so that an unknown
    label adds nothing and an update on several replicas is that of one device on the joint batch. Logs are "loss",
    "classification_loss" and "segmentation_loss": of the batch while training, and at the end of an epoch and from
    `evaluate` the means over all batches, weighted by their images or known items.

    Args:
        inputs: The symbolic image.
        outputs: Dictionary of symbolic outputs.
        name: Of the model.
        encoder_name: Of the encoder in it.
        encoder_layers: "stride_2" … "stride_32" -> the encoder's layer whose output that level is.
        classes: Names, or None.
        **kwargs: Passed to `keras.Model`.
    """

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        name: str | None = None,
        *,
        encoder_name: str,
        encoder_layers: Mapping[str, str],
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.encoder_name = encoder_name
        self._encoder_layers = tuple(sorted(encoder_layers.items()))
        self.classes = None if classes is None else tuple(classes)
        self.heads = tuple(head for head in _LOSS_NAMES if head in outputs)
        self.task = "multiclass"
        self.uncertainty: UncertaintyWeights | None = None
        self._trackers = {
            name: keras.metrics.Mean(name=name) for name in ("loss", *(_LOSS_NAMES[head] for head in self.heads))
        }

    @property
    def encoder(self) -> keras.Model:
        """The encoder in it, as `cxr_tf.encoder` makes it; shares its weights with this model.

        Example:
            >>> model.encoder.save("encoder.keras")
            >>> cxr_tf.multitask("densenet121", (320, 320, 1), classes=4, weights="encoder.keras")
        """
        levels = {stride: self.get_layer(layer).output for stride, layer in self._encoder_layers}
        return keras.Model(self.input, levels, name=self.encoder_name)

    def __dir__(self) -> list[str]:
        # Keras saves the weights of everything that it finds here: the encoder's belong to the flat graph.
        return [name for name in super().__dir__() if name != "encoder"]

    def freeze_encoder(self) -> None:
        """Keeps the encoder as it is, for a linear probe: no updates, batch-norm by its moving statistics, no dropout.

        Call it before `compile`.
        """
        for layer in self.encoder.layers:
            layer.trainable = False

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        *,
        task: Literal["multiclass", "multilabel"] = "multiclass",
        head_weights: Sequence[float] | Literal["uncertainty"] = (0.6, 0.4),
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
        distillation: Distillation | None = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the training step, with the losses of `cxr_tf.train.losses`.

        Args:
            optimizer: A Keras optimizer or its name. With float16 layers it is wrapped in a `LossScaleOptimizer`.
            task: "multiclass": one class an item, softmax. "multilabel": each class by itself, sigmoid.
            head_weights: Of classification and segmentation, for models with both heads; the loss is their weighted
                sum. "uncertainty": learned, `exp(-s) loss + s / 2` summed over the heads with s the logarithm of a
                variance (Kendall et al., "Multi-Task Learning Using Uncertainty", CVPR 2018).
            class_weights: One weight a class; multiplies that class's loss.
            label_smoothing: Of the classification loss, in [0, 1).
            focal_gamma: Focal exponent of the classification loss; 0 for none.
            distillation: A teacher to learn from, too. `test_step` does not ask it, and a saved model does not keep it.
            run_eagerly: As in `keras.Model.compile`.
            steps_per_execution: As in `keras.Model.compile`.
            jit_compile: As in `keras.Model.compile`.
            auto_scale_loss: False leaves the optimizer as it is.

        Raises:
            ModelError: For a setting that is not accepted.
        """
        _check_settings(self, task, head_weights, class_weights, label_smoothing, focal_gamma)
        if distillation is not None:
            _check_teacher(self, distillation.teacher)
        super().compile(
            optimizer=with_loss_scale(optimizer, self.layers if auto_scale_loss else ()),
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=False,
        )
        self.task = task
        self._classification: dict[str, Any] = {
            "class_weights": None if class_weights is None else [float(w) for w in class_weights],
            "label_smoothing": float(label_smoothing),
            "focal_gamma": float(focal_gamma),
        }
        self._distillation = distillation
        learned = head_weights == "uncertainty"
        self._head_weights = "uncertainty" if learned else tuple(float(w) for w in head_weights)
        if learned and self.uncertainty is None:
            with self.distribute_strategy.scope():
                self.uncertainty = UncertaintyWeights(len(self.heads), name="uncertainty")
        if self.uncertainty is not None:
            self.uncertainty.trainable = learned

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One update. Returns the batch's losses, unscaled, over all replicas and equal on each."""
        images, targets = self._unpack(data)
        said = self._distillation(images) if self._distillation else {}
        with tf.GradientTape() as tape:
            outputs = self(images, training=True)
            shares, counts = self._shares(outputs, targets, said)
            scaled = self.optimizer.scale_loss(shares["loss"])
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        apply_gradients(self.optimizer, gradients, variables)
        return self._log(images, shares, counts)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """The losses of one batch, over all replicas and equal on each."""
        images, targets = self._unpack(data)
        shares, counts = self._shares(self(images, training=False), targets, {})
        return self._log(images, shares, counts)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The running means of the losses."""
        return list(self._trackers.values())

    def get_config(self) -> dict[str, Any]:
        """The graph and what else the constructor takes."""
        return {
            **super().get_config(),
            "encoder_name": self.encoder_name,
            "encoder_layers": dict(self._encoder_layers),
            "classes": self.classes,
        }

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given."""
        if not self.compiled:
            return {}
        keras_config = super().get_compile_config()
        return {
            **{key: keras_config[key] for key in ("optimizer", "run_eagerly", "steps_per_execution", "jit_compile")},
            "task": self.task,
            "head_weights": self._head_weights,
            **self._classification,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a reloaded model as it was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _unpack(self, data: Any) -> tuple[Any, dict[str, tf.Tensor]]:
        images, targets, weights = keras.utils.unpack_x_y_sample_weight(data)
        if weights is not None:
            raise ModelError("Sample weights are not taken: an item counts once, or not at all where it is NaN.")
        # Targets of a head that this model does not have are left alone: one dataset serves every model.
        if (
            not isinstance(targets, Mapping)
            or not set(targets) & set(self.heads)
            or not set(targets) <= set(_LOSS_NAMES)
        ):
            received = sorted(targets) if isinstance(targets, Mapping) else type(targets).__name__
            accepted = " and/or ".join(f'"{head}"' for head in self.heads)
            raise ModelError(f"Targets are a dictionary with {accepted}. Received: {received}")
        targets = {head: targets[head] for head in self.heads if head in targets}
        for head, target in targets.items():
            shape = self.output[head].shape
            if not target.shape.is_compatible_with((None, *shape[1:])):
                raise ModelError(f'The targets of "{head}" have the shape {shape}. Received: {target.shape}')
        return images, targets

    def _shares(
        self, outputs: dict[str, tf.Tensor], targets: dict[str, tf.Tensor], said: dict[str, tf.Tensor]
    ) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """This replica's shares of the losses, and the number of known items behind each over all replicas.

        `said` is what a teacher said of the same images.
        """
        shares, counts = {}, {}
        for head in self.heads:
            if head not in targets:
                share, count = tf.constant(0.0), tf.constant(0.0)
            elif head == "logits":
                loss = losses.softmax_cross_entropy if self.task == "multiclass" else losses.sigmoid_cross_entropy
                share, count = losses.masked_mean(*loss(targets[head], outputs[head], **self._classification))
            else:
                share, count = losses.masked_mean(*losses.dice_cross_entropy(targets[head], outputs[head]))
            if head in said:
                assert self._distillation is not None  # who else would have said it
                truth, weight = share, self._distillation.weight
                taught = self._distillation.loss(head, said[head], outputs[head], self.task)
                share, count = losses.masked_mean(*taught)
                share = (1.0 - weight) * truth + weight * share
            shares[_LOSS_NAMES[head]], counts[_LOSS_NAMES[head]] = share, count
        if self._head_weights == "uncertainty":
            assert self.uncertainty is not None  # made by compile
            weighted = self.uncertainty(tf.stack(list(shares.values())), tf.stack(list(counts.values())))
        elif len(self.heads) == 1:
            weighted = tf.add_n(list(shares.values()))
        else:
            weighted = tf.add_n([w * share for w, share in zip(self._head_weights, shares.values(), strict=True)])
        return {"loss": weighted, **shares}, counts

    def _log(self, images: Any, shares: dict[str, tf.Tensor], counts: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        items = tf.cast(tf.shape(keras.tree.flatten(images)[0])[0], tf.float32)
        *totals, items = tf.unstack(losses.sum_over_replicas(tf.stack([*shares.values(), items])))
        logs = dict(zip(shares, totals, strict=True))
        for name, total in logs.items():
            self._trackers[name].update_state(total, sample_weight=counts.get(name, items))
        return logs


@keras.saving.register_keras_serializable("cxr_tf")
class UncertaintyWeights(keras.layers.Layer):
    """Weighs losses by learned variances: the sum of `exp(-s) loss + s / 2` (Kendall et al., CVPR 2018).

    A loss without a known item in the batch is left out, with its `s / 2`, which would otherwise shrink without end.

    Args:
        number: Of losses.
        **kwargs: Passed to `keras.layers.Layer`.
    """

    def __init__(self, number: int, **kwargs: Any):
        super().__init__(dtype="float32", **kwargs)
        self.log_variance = self.add_weight(name="log_variance", shape=(number,), initializer="zeros")

    def call(self, shares, counts):  # noqa: D102
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        s = tf.convert_to_tensor(self.log_variance)
        terms = tf.exp(-s) * shares + s / (2.0 * replicas)
        return tf.reduce_sum(tf.where(counts > 0.0, terms, tf.zeros_like(terms)))


def _check_teacher(model: MultiTask, teacher: keras.Model) -> None:
    theirs = teacher.output if isinstance(teacher.output, Mapping) else {}
    if not set(model.heads) & set(theirs):
        raise ModelError(f"A teacher has outputs {' and/or '.join(model.heads)}. Received: {teacher.output}")
    if "logits" in model.heads and "logits" in theirs:
        number, known = model.output["logits"].shape[-1], theirs["logits"].shape[-1]
        if number != known:
            raise ModelError(f"A teacher knows the {number} classes of its student. Received: one with {known}")


def _check_settings(
    model: MultiTask,
    task: str,
    head_weights: Any,
    class_weights: Sequence[float] | None,
    label_smoothing: float,
    focal_gamma: float,
) -> None:
    if task not in TASKS:
        raise ModelError(f'task is "multiclass" or "multilabel".{nearest(str(task), TASKS)} Received: {task!r}')
    if head_weights != "uncertainty" and (
        isinstance(head_weights, str) or len(head_weights) != 2 or min(head_weights) < 0 or max(head_weights) <= 0
    ):
        raise ModelError(
            "head_weights are two numbers, of classification and segmentation, neither negative and not both 0, or "
            f'"uncertainty". Received: {head_weights!r}'
        )
    number = model.output["logits"].shape[-1] if "logits" in model.heads else 0
    if class_weights is not None and (len(class_weights) != number or min(class_weights) < 0):
        raise ModelError(f"class_weights are {number} numbers, none negative. Received: {class_weights!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ModelError(f"label_smoothing is at least 0 and below 1. Received: {label_smoothing}")
    if focal_gamma < 0.0:
        raise ModelError(f"focal_gamma is at least 0. Received: {focal_gamma}")
