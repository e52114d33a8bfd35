"""Per-item losses that know which items are known, and their mean over the whole batch of all replicas.

Every loss takes targets in which NaN means "unknown" and returns `(loss, known)`: both float32 and of one shape, the
loss exactly 0 where nothing is known. `masked_mean` divides by the number of known items of the global batch, so that
two replicas take the step that one device would take on the joint batch, however unevenly the labels fall.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

# Focal factors are powers of a probability: kept off zero, where a power below one has an infinite gradient.
_SMALLEST = 1e-7


def softmax_cross_entropy(
    labels: tf.Tensor,
    logits: tf.Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cross-entropy between one class an item and a softmax over the logits.

    The loss of an item is `-sum_c w_c y_c (1 - p_c)^gamma log p_c`, where y are the smoothed labels
    `y (1 - s) + s / classes`.

    Args:
        labels: `[batch, classes]`, one-hot or soft. An item with a NaN in its row is unknown.
        logits: `[batch, classes]`.
        class_weights: One weight a class; multiplies that class's term.
        label_smoothing: s in [0, 1): the share of the label that is spread over all classes.
        focal_gamma: The focal exponent (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017); 0 for none.

    Returns:
        The loss `[batch]` and which items are known `[batch]` (1 or 0).

    Example:
        >>> loss, known = softmax_cross_entropy([[0.0, 1.0], [float("nan")] * 2], [[0.0, 0.0], [1.0, 2.0]])
        >>> loss.numpy().round(3).tolist(), known.numpy().tolist()
        ([0.693, 0.0], [1.0, 0.0])
    """
    labels, logits = _float(labels), _float(logits)
    known = ~tf.reduce_any(tf.math.is_nan(labels), axis=-1)
    labels, logits = _safe(known[:, tf.newaxis], labels), _safe(known[:, tf.newaxis], logits)
    if label_smoothing:
        labels = labels * (1.0 - label_smoothing) + label_smoothing / labels.shape[-1]
    log_p = tf.nn.log_softmax(logits, axis=-1)
    terms = -labels * log_p
    if focal_gamma:
        terms *= tf.maximum(-tf.math.expm1(log_p), _SMALLEST) ** focal_gamma
    if class_weights is not None:
        terms *= tf.constant(class_weights, tf.float32)
    return _safe(known, tf.reduce_sum(terms, axis=-1)), tf.cast(known, tf.float32)


def sigmoid_cross_entropy(
    labels: tf.Tensor,
    logits: tf.Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Binary cross-entropy of each class by itself, for findings that may occur together.

    The loss of an element is `-w_c (y (1 - p)^gamma log p + (1 - y) p^gamma log(1 - p))`, where y is the smoothed label
    `y (1 - s) + s / 2`.

    Args:
        labels: `[batch, classes]` in 0 to 1. Every NaN is one unknown label; the rest of its row counts.
        logits: `[batch, classes]`.
        class_weights: One weight a class; multiplies that class's column.
        label_smoothing: s in [0, 1).
        focal_gamma: The focal exponent (Lin et al., ICCV 2017); 0 for none.

    Returns:
        The loss and which labels are known (1 or 0), both `[batch, classes]`.
    """
    labels, logits = _float(labels), _float(logits)
    known = ~tf.math.is_nan(labels)
    labels, logits = _safe(known, labels), _safe(known, logits)
    if label_smoothing:
        labels = labels * (1.0 - label_smoothing) + label_smoothing / 2.0
    positive, negative = -tf.math.log_sigmoid(logits), -tf.math.log_sigmoid(-logits)
    if focal_gamma:
        positive *= tf.maximum(tf.sigmoid(-logits), _SMALLEST) ** focal_gamma
        negative *= tf.maximum(tf.sigmoid(logits), _SMALLEST) ** focal_gamma
    loss = labels * positive + (1.0 - labels) * negative
    if class_weights is not None:
        loss *= tf.constant(class_weights, tf.float32)
    return _safe(known, loss), tf.cast(known, tf.float32)


def soft_dice(masks: tf.Tensor, mask_logits: tf.Tensor, *, smooth: float = 1.0) -> tuple[tf.Tensor, tf.Tensor]:
    """One minus the soft Dice coefficient of each image (Milletari et al., "V-Net", 3DV 2016).

    `1 - (2 sum(p m) + smooth) / (sum(p) + sum(m) + smooth)` over the image's own pixels; an empty mask is matched by an
    empty prediction.

    Args:
        masks: `[batch, height, width, 1]` in 0 to 1. An image with a NaN is unknown: no annotation, not an empty mask.
        mask_logits: `[batch, height, width, 1]`.
        smooth: Pixels added above and below.

    Returns:
        The loss `[batch]` and which masks are known `[batch]` (1 or 0).
    """
    masks, mask_logits, known = _known_masks(masks, mask_logits)
    p = tf.sigmoid(mask_logits)
    both = tf.reduce_sum(p * masks, axis=(1, 2, 3))
    either = tf.reduce_sum(p, axis=(1, 2, 3)) + tf.reduce_sum(masks, axis=(1, 2, 3))
    return _safe(known, 1.0 - (2.0 * both + smooth) / (either + smooth)), tf.cast(known, tf.float32)


def pixel_cross_entropy(masks: tf.Tensor, mask_logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Binary cross-entropy, mean over the pixels of each image.

    Args:
        masks: `[batch, height, width, 1]` in 0 to 1. An image with a NaN is unknown.
        mask_logits: `[batch, height, width, 1]`.

    Returns:
        The loss `[batch]` and which masks are known `[batch]` (1 or 0).
    """
    masks, mask_logits, known = _known_masks(masks, mask_logits)
    pixels = tf.nn.sigmoid_cross_entropy_with_logits(labels=masks, logits=mask_logits)
    return _safe(known, tf.reduce_mean(pixels, axis=(1, 2, 3))), tf.cast(known, tf.float32)


def dice_cross_entropy(masks: tf.Tensor, mask_logits: tf.Tensor, *, smooth: float = 1.0) -> tuple[tf.Tensor, tf.Tensor]:
    """The sum of `soft_dice` and `pixel_cross_entropy`: Dice for the overlap, cross-entropy for a gradient everywhere.

    Args:
        masks: `[batch, height, width, 1]` in 0 to 1. An image with a NaN is unknown.
        mask_logits: `[batch, height, width, 1]`.
        smooth: As in `soft_dice`.

    Returns:
        The loss `[batch]` and which masks are known `[batch]` (1 or 0).
    """
    dice, known = soft_dice(masks, mask_logits, smooth=smooth)
    return dice + pixel_cross_entropy(masks, mask_logits)[0], known


def masked_mean(loss: tf.Tensor, known: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """This replica's share of the mean over every known item of the global batch.

    The shares of all replicas *add up* to the mean, and so do their gradients, which is what a Keras optimizer does
    with them. Outside tf.distribute the share is the mean. With nothing known anywhere it is 0, and so is its gradient.

    Args:
        loss: Float32 of any shape, 0 where unknown.
        known: Of the same shape, 1 or 0.

    Returns:
        The share and the number of known items in the global batch, both float32 scalars.
    """
    count = sum_over_replicas(tf.reduce_sum(known))
    return tf.math.divide_no_nan(tf.reduce_sum(loss), count), count


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of a tensor over all replicas; the tensor itself outside tf.distribute. Carries no gradient."""
    value = tf.stop_gradient(value)
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def _float(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(x), tf.float32)


def _safe(known: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Zero where unknown. Done to inputs and result alike: a gradient through one `where` alone can be NaN."""
    return tf.where(known, x, tf.zeros_like(x))


def _known_masks(masks: tf.Tensor, mask_logits: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    masks, mask_logits = _float(masks), _float(mask_logits)
    known = ~tf.reduce_any(tf.math.is_nan(masks), axis=(1, 2, 3))
    column = known[:, tf.newaxis, tf.newaxis, tf.newaxis]
    return _safe(column, masks), _safe(column, mask_logits), known
