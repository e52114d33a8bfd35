"""What every training step here shares: precision, loss scaling, and gradients that replicas add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import keras
import tensorflow as tf


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Keras' global dtype policy for the length of a block: "float32", "mixed_float16" or "mixed_bfloat16"."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def with_loss_scale(
    optimizer: str | keras.optimizers.Optimizer, layers: Iterable[keras.layers.Layer]
) -> keras.optimizers.Optimizer:
    """The optimizer, wrapped in a `LossScaleOptimizer` where some layer computes in float16.

    Keras asks the model's own policy, which a reloaded functional model does not keep.
    """
    optimizer = keras.optimizers.get(optimizer)
    float16 = any(layer.compute_dtype == "float16" for layer in layers)
    if float16 and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return optimizer


def apply_gradients(
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[tf.Tensor | None], variables: Sequence[keras.Variable]
) -> None:
    """Updates variables by gradients of this replica's share of the loss; the optimizer adds replicas up.

    Args:
        optimizer: built or not.
        gradients: of `optimizer.scale_loss(share)`, in the order of the variables.
        variables: what to update.
    """
    optimizer.apply(_total_on_first(list(gradients), optimizer), variables)


def _total_on_first(gradients: list[tf.Tensor | None], optimizer: keras.optimizers.Optimizer) -> list[tf.Tensor | None]:
    """Gradients such that what the optimizer does before it adds them up over replicas is done to the total.

    Keras clips, and looks for overflow in float16, replica by replica. Where either is asked for, the first replica
    gets the total and the others get zeros (NaN where the total is not finite, so that all agree to skip the update).
    """
    context = tf.distribute.get_replica_context()
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    clips = any(c is not None for c in (inner.clipnorm, inner.global_clipnorm, inner.clipvalue))
    if context.num_replicas_in_sync == 1 or not (clips or inner is not optimizer):
        return gradients
    known = [g for g in gradients if g is not None]
    is_first = tf.equal(context.replica_id_in_sync_group, 0)
    totals = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, known))
    return [None if g is None else next(totals) * tf.cast(is_first, g.dtype) for g in gradients]
