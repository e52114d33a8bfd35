"""What the pretext tasks share: one training step in three parts, its logs, and what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.models.layers import ModelError
from cxr_tf.train.step import apply_gradients, with_loss_scale


class PretextModel(keras.Model):
    """A model that learns from films without labels; `compile` and `fit` work as Keras users expect.

    A task says what happens in a step in three parts, which `Joint` calls for two tasks at once:

    - `prepare(data, training)`, before the gradient tape: what the loss needs and no gradient flows through;
    - `pretext_loss(data, prepared, training)`: this replica's *share* of the loss, such that the shares of all
      replicas add up to the loss of the global batch; figures to log, of the global batch and equal on each replica;
      and what `finish` needs of the outputs;
    - `finish(data, prepared, outputs)`, after the update: what the next step needs.

    Args:
        figures: names of the figures that `pretext_loss` returns.
        name: of the model.

    Attributes:
        encoder: the encoder that is trained, as `cxr_tf.encoder` makes it; save it for fine-tuning.
        figures: names of what is logged.
    """

    encoder: keras.Model

    def __init__(self, figures: Sequence[str], name: str):
        super().__init__(name=name)
        self.figures = ("loss", *figures)
        self._trackers = {figure: keras.metrics.Mean(name=figure) for figure in self.figures}

    def prepare(self, data: Any, training: bool) -> Any:
        """What the loss needs besides the data; nothing by default."""
        return

    @property
    def least_batch(self) -> int:
        """How many films each device takes at least."""
        return 1

    def check_batch(self, films: int) -> None:
        """Makes sure that a batch is large enough.

        Raises:
            ModelError: when `films`, of one device, are fewer than `least_batch`.
        """
        if films < self.least_batch:
            raise ModelError(
                f"{self.name} takes {self.least_batch} films or more on each device, for batch-norm over parts of the "
                f"batch needs two in each part; a larger batch or fewer `parts` would do. Received: {films}"
            )

    def pretext_loss(self, data: Any, prepared: Any, training: bool) -> tuple[tf.Tensor, dict[str, tf.Tensor], Any]:
        """This replica's share of the loss, the global batch's figures ("loss" among them), and outputs."""
        raise NotImplementedError

    def finish(self, data: Any, prepared: Any, outputs: Any) -> None:
        """What is done after an update; nothing by default."""
        return

    @property
    def trained(self) -> list[keras.Variable]:
        """The variables that gradients reach."""
        raise NotImplementedError

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """What the optimizer updates: `trained`, without what is frozen."""
        return [v for v in self.trained if v.trainable]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        """The same."""
        return self.trainable_variables

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        *,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
        auto_scale_loss: bool = True,
    ) -> None:
        """Configures the training step.

        Args:
            optimizer: a Keras optimizer or its name. With float16 layers it is wrapped in a `LossScaleOptimizer`.
            run_eagerly: as in `keras.Model.compile`.
            steps_per_execution: as in `keras.Model.compile`.
            jit_compile: as in `keras.Model.compile`.
            auto_scale_loss: False leaves the optimizer as it is.
        """
        super().compile(
            optimizer=with_loss_scale(optimizer, self.encoder.layers if auto_scale_loss else ()),
            run_eagerly=run_eagerly,
            steps_per_execution=steps_per_execution,
            jit_compile=jit_compile,
            auto_scale_loss=False,
        )

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given."""
        if not self.compiled:
            return {}
        given = super().get_compile_config()
        return {key: given[key] for key in ("optimizer", "run_eagerly", "steps_per_execution", "jit_compile")}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a reloaded model as it was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """One update. Returns the global batch's figures, unscaled and equal on each replica."""
        prepared = self.prepare(data, training=True)
        with tf.GradientTape() as tape:
            share, figures, outputs = self.pretext_loss(data, prepared, training=True)
            scaled = self.optimizer.scale_loss(share)
        variables = self.trainable_variables
        apply_gradients(self.optimizer, tape.gradient(scaled, variables), variables)
        self.finish(data, prepared, outputs)
        return self._log(figures)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """The global batch's figures, without an update."""
        return self._log(self.pretext_loss(data, self.prepare(data, training=False), training=False)[1])

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """The running means of the figures."""
        return list(self._trackers.values())

    def _log(self, figures: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        for name, tracker in self._trackers.items():
            tracker.update_state(figures[name])
        return figures
