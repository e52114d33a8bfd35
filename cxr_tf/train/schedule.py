"""Optimizers with warm-up, cosine decay, weight decay and weight averaging, from Keras' own parts."""

from __future__ import annotations

from typing import Any

import keras

NO_DECAY = ["bias", "gamma", "beta", "log_variance"]


def warmup_cosine(learning_rate: float, steps: int, warmup_steps: int = 0) -> Any:
    """A linear warm-up to `learning_rate`, then half a cosine to 0 at `steps` (Loshchilov & Hutter 2017).

    Args:
        learning_rate: the peak.
        steps: all updates of the run, the warm-up included.
        warmup_steps: updates until the peak; the first has `learning_rate / warmup_steps`.

    Returns:
        A `keras.optimizers.schedules.LearningRateSchedule`.
    """
    if warmup_steps == 0:
        return keras.optimizers.schedules.CosineDecay(learning_rate, decay_steps=steps)
    return keras.optimizers.schedules.CosineDecay(
        learning_rate / warmup_steps,
        decay_steps=steps - warmup_steps,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )


def optimizer(
    name: str,
    learning_rate: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    clip_norm: float | None = None,
    ema: float | None = None,
) -> keras.optimizers.Optimizer:
    """An optimizer whose decoupled weight decay spares biases, normalization and learned loss weights.

    Args:
        name: "adamw" (Loshchilov & Hutter 2019), "sgd" (with Nesterov's momentum) or "lamb" (You et al. 2020).
        learning_rate: the peak of `warmup_cosine`.
        steps: all updates of the run.
        warmup_steps: updates until the peak.
        weight_decay: per update, times the learning rate.
        momentum: of SGD.
        clip_norm: global norm that the gradients are clipped to, or `None`.
        ema: momentum of a running average of the weights (`use_ema`), or `None`.

    Raises:
        ValueError: for another name.

    Example:
        >>> optimizer("adamw", 1e-4, steps=1000, warmup_steps=100, weight_decay=1e-4, ema=0.997)  # doctest: +SKIP
    """
    settings: dict[str, Any] = {
        "learning_rate": warmup_cosine(learning_rate, steps, warmup_steps),
        "weight_decay": weight_decay or None,
        "global_clipnorm": clip_norm,
        "use_ema": ema is not None,
        "ema_momentum": 0.99 if ema is None else ema,
    }
    if name == "adamw":
        made = keras.optimizers.AdamW(**(settings | {"weight_decay": weight_decay}))
    elif name == "sgd":
        made = keras.optimizers.SGD(momentum=momentum, nesterov=momentum > 0, **settings)
    elif name == "lamb":
        made = keras.optimizers.Lamb(**settings)
    else:
        raise ValueError(f'optimizer is one of "adamw", "sgd", "lamb". Received: {name!r}')
    made.exclude_from_weight_decay(var_names=NO_DECAY)
    return made
