"""One loop around `strategy.run(model.train_step)`: step-exact resume, a guard against losses that are not finite,
checkpoints that survive full disks and pre-emption, and callbacks for everything that is not the recipe.

The state that a checkpoint holds is all that the next step depends on: weights, optimizer slots, running averages,
random counters and the step. Batches are a function of the step, so a run that is killed at any moment and started
again ends in the same weights as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cxr_tf.data.pipeline import read_batches
from cxr_tf.errors import CxrError, innermost
from cxr_tf.files import WriteError, replacing, writable_folder
from cxr_tf.progress import Update, silent
from cxr_tf.train import distribute


class NotFiniteError(CxrError):
    """A loss or weight became NaN or infinite; the text names the step and the last good checkpoint."""


class PreemptedError(CxrError):
    """The process was asked to end (SIGTERM); a checkpoint of the last step was written."""


class CheckpointError(CxrError):
    """A checkpoint that cannot be written or does not fit the model."""


@dataclass(frozen=True)
class Every:
    """A callback: after every `steps` steps, and after the last one, `call(step)` returns figures to log."""

    steps: int
    call: Callable[[int], dict[str, Any]]


def fit(
    model: keras.Model,
    batches: Callable[[int, tuple[int, int]], tf.data.Dataset],
    *,
    steps: int,
    batch_size: int,
    folder: Path,
    checkpoint_every: int = 200,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    callbacks: Sequence[Every] = (),
    check: Callable[[int, Mapping[str, float]], None] | None = None,
    update: Update = silent,
) -> None:
    """Trains a compiled model up to `steps`, going on from the folder's last checkpoint if it has one.

    It uses the strategy that the model was made under. On several workers (see `cxr_tf.train.distribute`) each calls it
    with the same arguments, outside of the strategy's scope: all train, worker 0 alone writes and runs the callbacks.

    Args:
        model: built and compiled; its `train_step` returns a dictionary of scalars with "loss", equal on all replicas.
        batches: called as `batches(first step, (i, n))`: worker i's part of the n parts of the global batches from that
            step on, as `cxr_tf.data.pipeline.batches(..., worker=(i, n))` makes it. With several devices its batch
            dimension must be static.
        steps: the step to end at, counted from the start of the run.
        batch_size: films in a global batch, over all devices and workers.
        folder: run folder; gets `metrics.jsonl` and `checkpoints/`. Several workers need it on a disk that they share.
        checkpoint_every: steps between checkpoints; the last step always gets one.
        keep_checkpoints: how many are kept.
        log_every: steps between lines of `metrics.jsonl`.
        callbacks: side effects at their own intervals. They run before that step's checkpoint is written, on worker 0
            alone, so they must not do what takes all workers (a training step, making a variable in the strategy's
            scope).
        check: called as `check(step, figures)` with each logged line, right after it was logged, on every worker. It
            may raise to end the run, and should decide by figures that are equal on all workers, so not by
            `images_per_second`.
        update: shows progress.

    Raises:
        NotFiniteError: when a loss or a weight is not finite. The last good checkpoint stays.
        PreemptedError: after SIGTERM, when the checkpoint has been written. On several workers all end, at the next
            logged line after one of them got it.
        DistributionError: before training, when the batch does not divide among the devices or the workers do not see
            the same checkpoints.
        WriteError: before training, when the folder cannot be written or has too little room for the checkpoints.
        CheckpointError: when a checkpoint cannot be written later, or belongs to another model.
        PipelineError: when a batch cannot be read.
    """
    strategy = model.distribute_strategy
    distribute.batch_per_replica(strategy, batch_size)
    several, chief = distribute.worker(strategy)[1] > 1, distribute.is_chief(strategy)
    if several and tf.distribute.has_strategy():
        raise distribute.DistributionError("fit on several workers belongs outside of the strategy's scope.")
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
    step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
    random_state = [v.value for v in model.variables if not any(v is w for w in model.weights)]
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer, step=step, random_state=random_state)
    if chief:
        need = (keep_checkpoints + 1) * _bytes([*model.variables, *model.optimizer.variables])
        # The best weights, the ones that replace them, and the final model stand beside the checkpoints.
        writable_folder(folder, need_bytes=need + 4 * _bytes(model.variables))
    manager = tf.train.CheckpointManager(checkpoint, str(folder / "checkpoints"), max_to_keep=keep_checkpoints)
    _restore(checkpoint, manager)
    first = int(step.numpy())
    distribute.agree(strategy, "the step of the last checkpoint", first)

    log = MetricsLog(folder / "metrics.jsonl", first) if chief else None
    pending: list[tuple[int, Any]] = []

    @tf.function(reduce_retracing=True)
    def train_step(batch: Any) -> dict[str, Any]:
        logs = strategy.run(model.train_step, args=(batch,))
        return {name: strategy.experimental_local_results(value)[0] for name, value in logs.items()}

    @tf.function
    def average_statistics() -> None:
        distribute.average_statistics(model)

    def check_finite() -> None:
        losses = [float(loss) for _, loss in pending]
        for (at, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise NotFiniteError(_not_finite(f"the loss of step {at} is {loss}", manager))
        pending.clear()

    def check_weights(at: int) -> None:
        check_finite()
        if bad := _not_finite_weight(model):
            raise NotFiniteError(_not_finite(f"after step {at} the weight {bad} is not finite", manager))

    def save(at: int) -> None:
        average_statistics()
        check_weights(at)
        step.assign(at)
        if chief:
            _save(manager, at)
        else:
            _take_part_in_saving(checkpoint)

    if first >= steps:
        return
    stream = read_batches(distribute.distributed(strategy, partial(batches, first), batch_size))
    update = update if chief else silent
    update(first, steps)
    logs: dict[str, Any] = {}
    with _sigterm() as asked_to_end:
        logged_at, since = first, time.perf_counter()
        for at in range(first + 1, steps + 1):
            logs = train_step(next(stream))
            pending.append((at, logs["loss"]))
            ends, note = asked_to_end.is_set() and not several, ""
            if at % log_every == 0 or at == steps:
                check_finite()
                now = time.perf_counter()
                rate = batch_size * (at - logged_at) / (now - since)
                figures = {k: float(v) for k, v in logs.items()} | {"images_per_second": round(rate, 2)}
                note = f"loss {figures['loss']:.4f}"
                if log is not None:
                    log.write(at, figures)
                if check is not None:
                    check(at, figures)
                if several:  # saving takes all workers, so all must know that one was asked
                    ends = any(distribute.gather(strategy, int(asked_to_end.is_set())))
                logged_at, since = at, now
            update(at, steps, note)
            for callback in callbacks:
                if at % callback.steps == 0 or at == steps:
                    average_statistics()
                    check_weights(at)
                    pause = time.perf_counter()
                    if log is not None and (found := callback.call(at)):
                        log.write(at, found)
                    since += time.perf_counter() - pause
            if at % checkpoint_every == 0 or at == steps or ends:
                save(at)
            if ends and at < steps:
                raise PreemptedError(f"asked to end: step {at} of {steps} is saved; the same command goes on from it.")


@contextmanager
def averaged_weights(model: keras.Model) -> Iterator[None]:
    """Puts the optimizer's running average of the weights into the model for the length of the block, if it keeps one.

    Example:
        >>> with averaged_weights(model):  # doctest: +SKIP
        ...     model.save("model.keras")
    """
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    if not inner.use_ema or not inner.built:
        yield
        return
    variables = model.trainable_variables
    kept = [np.array(v) for v in variables]
    inner.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


class MetricsLog:
    """`metrics.jsonl`: a line of figures a logged step; lines after the step that a run goes on from are dropped.

    Args:
        path: the file.
        step: last step that counts.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Appends one line."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step} | figures) + "\n")
        except OSError as error:
            raise WriteError(
                f"{self.path}: cannot be written ({error.strerror or error}). Make room and go on."
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _restore(checkpoint: tf.train.Checkpoint, manager: tf.train.CheckpointManager) -> None:
    """Restores the newest checkpoint that can be read."""
    for path in reversed(manager.checkpoints):
        try:
            checkpoint.restore(path).assert_consumed()
            return
        except tf.errors.OpError as error:
            warnings.warn(f"{path}: is damaged ({innermost(error)}); going back to an earlier one.", stacklevel=2)
        except (AssertionError, ValueError) as error:
            raise CheckpointError(
                f"{path}: does not fit the model ({innermost(error)}). Give another run folder with --out."
            ) from error
    if manager.checkpoints:
        raise CheckpointError(f"{manager.directory}: no checkpoint can be read. Delete the run folder to start again.")


def _save(manager: tf.train.CheckpointManager, at: int) -> None:
    last_good = manager.latest_checkpoint
    try:
        manager.save(checkpoint_number=at)
    except (tf.errors.OpError, OSError) as error:
        for partial in Path(manager.directory).glob(f"ckpt-{at}*"):
            partial.unlink(missing_ok=True) if partial.is_file() else None
        raise CheckpointError(
            f"the checkpoint of step {at} could not be written ({innermost(error)}). "
            f"{_kept(last_good)} Make room and give the same command again."
        ) from error


def _take_part_in_saving(checkpoint: tf.train.Checkpoint) -> None:
    """What a worker does while the chief saves: reading variables that are summed when read takes all workers."""
    with tempfile.TemporaryDirectory() as unused:
        checkpoint.write(f"{unused}/checkpoint")


def _bytes(variables: Sequence[Any]) -> int:
    return sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)


def _kept(checkpoint: str | None) -> str:
    return f"The last good one is kept: {checkpoint}." if checkpoint else "There is no earlier one."


def _not_finite(what: str, manager: tf.train.CheckpointManager) -> str:
    return f"{what}. {_kept(manager.latest_checkpoint)} Try a lower learning rate, clip_norm or float32."


def _not_finite_weight(model: keras.Model) -> str | None:
    for variable in model.weights:
        if variable.dtype.startswith(("float", "bfloat")) and not bool(
            tf.reduce_all(tf.math.is_finite(variable.value))
        ):
            return str(variable.path)
    return None


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in the main thread; elsewhere signals cannot be caught."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
