"""Both pretext tasks on one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from cxr_tf.models.layers import ModelError
from cxr_tf.pretrain.inpainting import Inpainting
from cxr_tf.pretrain.moco import MoCo
from cxr_tf.pretrain.pretext import PretextModel


@keras.saving.register_keras_serializable("cxr_tf")
class Joint(PretextModel):
    """Trains one encoder on the losses of `MoCo` and `Inpainting` at once, as the supervised side trains two heads.

    Each step has one update, by the gradient of the weighted sum of both losses. Data are dictionaries of what both
    take: "query", "key", "image" and "hole". Logged are "loss", the weighted sum, and the figures of either task behind
    its name: "moco_loss", "moco_top1", "inpainting_psnr", …

    Args:
        moco: The one task; its batch-norm over parts of the batch is that of both, since the layers are the same.
        inpainting: The other, on the same encoder object.
        weights: Of the two losses.
        name: Of the model.

    Raises:
        ModelError: When the two have different encoders, or for weights that make no sense.

    Example:
        >>> encoder = cxr_tf.encoder("densenet121", (256, 256, 1))
        >>> joint = cxr_tf.Joint(cxr_tf.MoCo(encoder), cxr_tf.Inpainting(encoder))
        >>> joint.compile(keras.optimizers.AdamW(1e-4))
        >>> joint.fit(dataset)  # of {"query": …, "key": …, "image": …, "hole": …}
    """

    def __init__(self, moco: MoCo, inpainting: Inpainting, weights: Sequence[float] = (1.0, 1.0), name: str = "joint"):
        self._tasks = (("moco", moco), ("inpainting", inpainting))
        figures = [f"{task}_{figure}" for task, model in self._tasks for figure in model.figures]
        super().__init__(figures, name)
        if moco.encoder is not inpainting.encoder:
            raise ModelError("Both tasks train one encoder: give the same object to `MoCo` and to `Inpainting`.")
        if len(weights) != 2 or min(weights) < 0.0 or max(weights) <= 0.0:
            raise ModelError(
                "weights are two numbers, of MoCo and inpainting, neither negative and not both 0. "
                f"Received: {weights!r}"
            )
        self.encoder = moco.encoder
        self.moco, self.inpainting = moco, inpainting
        self.loss_weights = tuple(float(w) for w in weights)
        self.built = True

    def call(self, images: Any, training: bool = False) -> Any:
        """The query network's embeddings, as `MoCo` gives them."""
        return self.moco(images, training=training)

    @property
    def trained(self) -> list[keras.Variable]:
        """The encoder, MoCo's head and the decoder."""
        return list({id(v): v for v in (*self.moco.trained, *self.inpainting.trained)}.values())

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        *,
        discriminator_optimizer: str | keras.optimizers.Optimizer | None = None,
        **settings: Any,
    ) -> None:
        """Configures the training step.

        Args:
            optimizer: Of everything but the discriminator; see `PretextModel.compile`.
            discriminator_optimizer: As in `Inpainting.compile`.
            **settings: The others of `PretextModel.compile`.
        """
        super().compile(optimizer, **settings)
        with self.distribute_strategy.scope():
            self.inpainting.compile(self.optimizer, discriminator_optimizer=discriminator_optimizer, **settings)

    @property
    def least_batch(self) -> int:
        """The larger one of both tasks."""
        return max(model.least_batch for _, model in self._tasks)

    def prepare(self, data: Any, training: bool) -> Any:
        """What either task prepares."""
        return [model.prepare(data, training) for _, model in self._tasks]

    def pretext_loss(self, data: Any, prepared: Any, training: bool) -> tuple[Any, dict[str, Any], Any]:
        """The weighted sum of both losses; see `PretextModel`."""
        share, total, outputs = 0.0, 0.0, []
        figures: dict[str, Any] = {}
        for (task, model), weight, own in zip(self._tasks, self.loss_weights, prepared, strict=True):
            loss, found, output = model.pretext_loss(data, own, training)
            share, total = share + weight * loss, total + weight * found["loss"]
            figures |= {f"{task}_{name}": value for name, value in found.items()}
            outputs.append(output)
        return share, {"loss": total, **figures}, outputs

    def finish(self, data: Any, prepared: Any, outputs: Any) -> None:
        """What either task does after an update."""
        for (_, model), own, output in zip(self._tasks, prepared, outputs, strict=True):
            model.finish(data, own, output)

    def get_config(self) -> dict[str, Any]:
        """What the constructor takes, each task by its own configuration."""
        return {
            "moco": self.moco.get_config(),
            "inpainting": self.inpainting.get_config(),
            "weights": self.loss_weights,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Joint:
        """The model that `get_config` describes; both tasks get one encoder."""
        moco = MoCo.from_config(config["moco"], custom_objects)
        settings = {key: value for key, value in config["inpainting"].items() if key != "encoder"}
        return cls(moco, Inpainting(moco.encoder, **settings), config["weights"], config["name"])
