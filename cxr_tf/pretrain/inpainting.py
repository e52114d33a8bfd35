"""Inpainting: an encoder and a decoder fill in a hole of a film (Pathak et al., "Context Encoders", CVPR 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.models.decoder import unet_decoder
from cxr_tf.models.encoders import pyramid
from cxr_tf.models.layers import ModelError, Standardize
from cxr_tf.pretrain.filling import psnr
from cxr_tf.pretrain.pretext import PretextModel
from cxr_tf.train.losses import masked_mean, sum_over_replicas
from cxr_tf.train.step import apply_gradients, with_loss_scale


@keras.saving.register_keras_serializable("cxr_tf")
class Inpainting(PretextModel):
    """Trains an encoder by filling holes in films (Pathak et al., CVPR 2016; on radiographs Belli et al. 2018,
    arXiv:1812.00964).

    The hole shows the gray that the encoder standardizes to 0. The loss is the mean squared error, on a scale where
    black is 0 and white is 1: of each film over the pixels of its hole, then over the films of the global batch that
    have a hole. With the adversarial term a discriminator, four convolutions without batch-norm, tells filled films
    from whole ones, and the loss is `(1 - adversarial) * error + adversarial * cross-entropy` of being taken for whole.

    Data are dictionaries of "image" `[batch, size, size, 1]`, 0-255, and "hole" of that shape, 1 in the hole and 0
    elsewhere, as `cxr_tf.pretrain.holes.Holes` draws it. Logged are "loss", "mse" and "psnr" (in dB), both in the hole,
    and with the adversarial term "adversarial_loss" and "discriminator_loss". A film without a hole counts in none of
    them, but in the loss over the whole image.

    Args:
        encoder: From `cxr_tf.encoder`. Its very layers are trained, so this object is the result; to go on with it,
            save it, or give it to `cxr_tf.multitask`, which copies it.
        decoder_channels: Of the decoder, from stride 16 to stride 1.
        skips: True joins the encoder's features to the decoder's, as a U-Net does; then `cxr_tf.multitask` can start
            its decoder from this one. False sends all through the deepest features, which asks more of the encoder.
        whole_image: True takes the error over the whole image instead of the hole.
        adversarial: Weight of the adversarial term, at least 0 and below 1; 0 for none. Belli et al. take 0.002.
        normalization: Of the decoder: "batch", "synchronized" (take this with several replicas) or "group".
        seed: Of the discriminator's first weights. The decoder is drawn from Keras' global seed.
        name: Of the model.

    Attributes:
        reconstruction: The flat functional model from a holed image `[batch, size, size, 1]`, 0-255, to what it shows
            without the hole, float32 of that shape, 0 to 1. Saved, it is what `cxr_tf.multitask(decoder_weights=...)`
            reads.
        discriminator: From a film, -1 to 1, to the logit `[batch, 1]` that it is whole; None without the adversarial
            term.
        discriminator_optimizer: Its optimizer, once compiled.

    Raises:
        ModelError: For an encoder that is not ours or is frozen, or a setting out of its range.

    Example:
        >>> inpainting = cxr_tf.Inpainting(cxr_tf.encoder("densenet121", (256, 256, 1)))
        >>> inpainting.compile(keras.optimizers.Adam(1e-3))
        >>> inpainting.fit(dataset)  # of {"image": images, "hole": holes}
        >>> inpainting.encoder.save("encoder.keras")
        >>> inpainting.reconstruction.save("reconstruction.keras")
    """

    def __init__(
        self,
        encoder: keras.Model,
        *,
        decoder_channels: Sequence[int] = (512, 256, 128, 64, 32),
        skips: bool = False,
        whole_image: bool = False,
        adversarial: float = 0.0,
        normalization: str = "batch",
        seed: int = 0,
        name: str = "inpainting",
    ):
        if not 0.0 <= adversarial < 1.0:
            raise ModelError(f"adversarial is at least 0 and below 1. Received: {adversarial}")
        super().__init__(("mse", "psnr", *(("adversarial_loss", "discriminator_loss") if adversarial else ())), name)
        self._mean = _checked_mean(encoder)
        self.encoder = encoder
        self.decoder_channels = tuple(int(c) for c in decoder_channels)
        self.skips, self.whole_image, self.adversarial = bool(skips), bool(whole_image), float(adversarial)
        self.normalization, self.seed = normalization, int(seed)

        x = unet_decoder(pyramid(encoder), self.decoder_channels, skips=self.skips, normalization=normalization)
        # A sigmoid: what is filled in is always a gray between black and white, and starts as the middle one, which is
        # near the mean of a film. Left linear, the discriminator could tell a filled film by values out of range.
        x = keras.layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="reconstruction")(x)
        self.reconstruction = keras.Model(encoder.input, x, name="reconstruction")
        self.discriminator: Any = _discriminator(self.seed) if self.adversarial else None
        self.discriminator_optimizer: Any = None
        self.built = True

    def call(self, images: Any, training: bool = False) -> Any:
        """What holed images show without their holes.

        Args:
            images: `[batch, size, size, 1]`, 0-255, with the holes in them; or a dictionary as for training, of which
                the holes are made.
            training: Whether batch-norm takes the statistics of the batch.

        Returns:
            float32 `[batch, size, size, 1]`, 0 to 1.
        """
        if isinstance(images, Mapping):
            images = self.cut(*_films(images))
        return self.reconstruction(images, training=training)

    def cut(self, images: Any, holes: Any) -> Any:
        """Images with the encoder's mean gray in their holes: `[batch, size, size, 1]`, 0-255, float32."""
        return _joined(images, self._mean, holes)

    def fill(self, images: Any, holes: Any) -> Any:
        """Images with their holes filled in; what lies outside of a hole stays as it is.

        Args:
            images: `[batch, size, size, 1]`, 0-255. What they show in the hole is not looked at.
            holes: `[batch, size, size, 1]`, 1 in the hole and 0 elsewhere.

        Returns:
            float32 `[batch, size, size, 1]`, 0-255.
        """
        return _joined(images, 255.0 * self(self.cut(images, holes)), holes)

    @property
    def trained(self) -> list[keras.Variable]:
        """Encoder and decoder; the discriminator has an optimizer of its own."""
        return self.reconstruction.trainable_variables

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        *,
        discriminator_optimizer: str | keras.optimizers.Optimizer | None = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the training step.

        Args:
            optimizer: Of encoder and decoder; see `PretextModel.compile`.
            discriminator_optimizer: Of the discriminator, where there is one; by default Adam with a rate of 2e-4 and
                beta_1 of 0.5 (Radford et al. 2016, arXiv:1511.06434).
            run_eagerly: As in `keras.Model.compile`.
            steps_per_execution: As in `keras.Model.compile`.
            jit_compile: As in `keras.Model.compile`.
            auto_scale_loss: False leaves both optimizers as they are.

        Raises:
            ModelError: For a discriminator's optimizer without a discriminator.
        """
        scaled = self.reconstruction.layers if auto_scale_loss else ()
        if self.discriminator is None and discriminator_optimizer is not None:
            raise ModelError(
                "There is a discriminator where the adversarial term has a weight. "
                f"Received: adversarial={self.adversarial}, discriminator_optimizer={discriminator_optimizer!r}"
            )
        super().compile(
            with_loss_scale(optimizer, scaled),
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=auto_scale_loss,
        )
        if self.discriminator is not None:
            with self.distribute_strategy.scope():
                if discriminator_optimizer is None:
                    discriminator_optimizer = keras.optimizers.Adam(2e-4, beta_1=0.5)
                # The discriminator computes in float32, but where a film overflows in float16 it must skip the update.
                self.discriminator_optimizer = with_loss_scale(discriminator_optimizer, scaled)
                self.discriminator_optimizer.build(self.discriminator.trainable_variables)

    def pretext_loss(self, data: Any, prepared: Any, training: bool) -> tuple[Any, dict[str, Any], Any]:
        """The error of this replica's films; see `PretextModel`."""
        images, holes = _films(data)
        whole, filled = images / 255.0, self.reconstruction(self.cut(images, holes), training=training)
        errors, sizes = tf.square(filled - whole), tf.reduce_sum(holes, axis=(1, 2, 3))
        mse = tf.math.divide_no_nan(tf.reduce_sum(errors * holes, axis=(1, 2, 3)), sizes)
        known = tf.cast(sizes > 0.0, tf.float32)
        share, count = masked_mean(mse, known)

        def mean(loss: Any) -> Any:
            """This replica's share of the mean over all films with a hole, as `masked_mean` gives it."""
            return tf.math.divide_no_nan(tf.reduce_sum(tf.where(known > 0.0, loss, 0.0)), count)

        ratio = psnr(tf.stop_gradient(255.0 * filled), images, holes)
        figures, gradients = {"mse": share, "psnr": mean(ratio)}, None
        if self.whole_image:
            share, _ = masked_mean(tf.reduce_mean(errors, axis=(1, 2, 3)), tf.ones_like(known))
        if self.discriminator is not None:
            joined = _joined(whole, filled, holes)
            taken = mean(tf.nn.softplus(-self._logits(joined)))
            share = (1.0 - self.adversarial) * share + self.adversarial * taken
            figures["adversarial_loss"] = taken
            figures["discriminator_loss"], gradients = self._discriminate(whole, tf.stop_gradient(joined), mean)
        figures = {"loss": share, **figures}
        totals = tf.unstack(sum_over_replicas(tf.stack(list(figures.values()))))
        return share, dict(zip(figures, totals, strict=True)), gradients

    def finish(self, data: Any, prepared: Any, outputs: Any) -> None:
        """Updates the discriminator, by the gradients at the weights that the generator's loss saw."""
        if self.discriminator is not None and outputs is not None:
            apply_gradients(self.discriminator_optimizer, outputs, self.discriminator.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes."""
        settings = ("decoder_channels", "skips", "whole_image", "adversarial", "normalization", "seed", "name")
        return {
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            **{name: getattr(self, name) for name in settings},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Inpainting:
        """The model that `get_config` describes."""
        encoder = keras.saving.deserialize_keras_object(config["encoder"], custom_objects=custom_objects)
        return cls(encoder, **{key: value for key, value in config.items() if key != "encoder"})

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given."""
        if not self.compiled:
            return {}
        config = super().get_compile_config()
        return {
            **{key: config[key] for key in ("optimizer", "run_eagerly", "steps_per_execution", "jit_compile")},
            "discriminator_optimizer": keras.saving.serialize_keras_object(self.discriminator_optimizer),
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a reloaded model as it was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _logits(self, films: Any) -> Any:
        return self.discriminator(2.0 * films - 1.0)[:, 0]

    def _discriminate(self, whole: Any, filled: Any, mean: Any) -> tuple[Any, list[Any] | None]:
        """This replica's share of the discriminator's loss, and its gradients where there is an optimizer for them."""
        with tf.GradientTape() as tape:
            loss = (tf.nn.softplus(-self._logits(whole)) + tf.nn.softplus(self._logits(filled))) / 2.0
            share = mean(loss)
            scaled = share if self.discriminator_optimizer is None else self.discriminator_optimizer.scale_loss(share)
        if self.discriminator_optimizer is None:
            return share, None
        return share, tape.gradient(scaled, self.discriminator.trainable_variables)


def _joined(outside: Any, inside: Any, holes: Any) -> Any:
    return tf.where(tf.cast(holes, tf.float32) > 0.0, inside, tf.cast(outside, tf.float32))


def _discriminator(seed: int) -> keras.Model:
    """The mean over a film of what each of its patches says; no batch-norm, by which films would tell on each other."""
    film = x = keras.Input((None, None, 1), name="film")
    for i, filters in enumerate((32, 64, 128, 256), start=1):
        x = keras.layers.Conv2D(
            filters,
            4,
            2,
            padding="same",
            activation="silu",
            kernel_initializer=keras.initializers.HeNormal(seed + i),
            dtype="float32",
            name=f"conv{i}",
        )(x)
    x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)
    # Small weights: it starts undecided.
    last = keras.initializers.RandomNormal(stddev=0.02, seed=seed)
    logit = keras.layers.Dense(1, kernel_initializer=last, dtype="float32", name="logit")(x)
    return keras.Model(film, logit, name="discriminator")


def _films(data: Any) -> tuple[Any, Any]:
    if not isinstance(data, Mapping) or not {"image", "hole"} <= set(data):
        received = sorted(data) if isinstance(data, Mapping) else type(data).__name__
        raise ModelError(f'Inpainting takes dictionaries of "image" and "hole". Received: {received}')
    image, hole = (tf.cast(data[key], tf.float32) for key in ("image", "hole"))
    if not image.shape.is_compatible_with(hole.shape):
        raise ModelError(f"A hole has the shape of its image, {image.shape}. Received: {hole.shape}")
    return image, hole


def _checked_mean(encoder: Any) -> float:
    """The gray that an encoder of ours standardizes to 0."""
    pyramid(encoder)
    standardize = [layer for layer in encoder.layers if isinstance(layer, Standardize)]
    if len(standardize) != 1:
        raise ModelError(
            "An encoder standardizes its images in its first layer; make one with `cxr_tf.encoder`. "
            f"Received: {encoder.name}, which does not"
        )
    if not encoder.trainable_variables:
        raise ModelError(
            f"There is nothing to train: all layers of the encoder are frozen. Set `trainable` to True on them. "
            f"Received: {encoder.name}"
        )
    return standardize[0].mean
