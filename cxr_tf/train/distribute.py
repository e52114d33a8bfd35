"""Which devices and workers a run uses, and the few things that they must do together.

Each worker runs the same program. The chief, worker 0, alone writes. What takes all workers (a step, making a variable
in the strategy's scope, saving, averaging statistics, comparing a value) all do in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from cxr_tf.errors import CxrError, innermost

# What a collective raises on the workers that are left.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
)
_TF_CONFIG = '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, "task": {"type": "worker", "index": 0}}'


# Whether this process is one of several workers. It must leave by `os._exit` then: a normal exit may wait for others.
one_of_several = False


class DistributionError(CxrError):
    """Workers or devices that cannot train together: what is wrong in TF_CONFIG, the batch size or the folders."""


class WorkerLostError(CxrError):
    """Another worker stopped answering; the text names this one and the step that the same command goes on from."""


def strategy() -> tf.distribute.Strategy:
    """The strategy for where this process runs. Call it before anything else of TensorFlow's.

    Returns:
        - `MultiWorkerMirroredStrategy` where the environment has several workers: TF_CONFIG with a cluster, or a Slurm
          step of several tasks. It returns when all workers are there.
        - `MirroredStrategy` with several GPUs.
        - TensorFlow's default strategy with one device.

    Raises:
        DistributionError: when TF_CONFIG or Slurm's variables make no sense; the text says what.

    Example:
        >>> os.environ["TF_CONFIG"] = ...  # doctest: +SKIP
        >>> with strategy().scope():  # doctest: +SKIP
        ...     model = build()
    """
    global one_of_several
    tasks, index = _workers()
    one_of_several = len(tasks) > 1
    if one_of_several:
        jobs: dict[str, list[str]] = {}
        for job, address in tasks:
            jobs.setdefault(job, []).append(address)
        job, address = tasks[index]
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs),
            task_type=job,
            task_id=jobs[job].index(address),
            num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
            rpc_layer="grpc",
        )
        who = f"worker {index} of workers 0 to {len(tasks) - 1}, {address}"
        print(f"{who}: waiting for the others", file=sys.stderr, flush=True)
        try:
            # No timeout on collectives: workers wait in one while the chief validates. TensorFlow's coordination
            # service notices by missing heartbeats that one is dead or frozen, and ends the collectives of the others.
            return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
        except tf.errors.OpError as error:
            raise DistributionError(
                f"{who}: could not join the others ({innermost(error)}). Its port must be free, and it must reach the "
                "addresses of the others."
            ) from error
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


@contextmanager
def workers_answer(strategy: tf.distribute.Strategy, folder: Path) -> Iterator[None]:
    """A block that several workers enter and leave together, and in which the loss of one is a `WorkerLostError`.

    At its end each waits for all: one that leaves before the others is taken for dead, so what the chief alone does
    (validation, the last files) belongs inside. On one worker it does nothing.

    Args:
        strategy: from `strategy`.
        folder: the run folder, whose last checkpoint the error names.

    Raises:
        WorkerLostError: when another worker stopped answering. The process should then leave by `os._exit`: a normal
            exit waits for collectives that never end.

    Example:
        >>> with workers_answer(strategy, Path("runs/moco")):  # doctest: +SKIP
        ...     with strategy.scope():
        ...         model = build()
        ...     fit(model, ...)
        ...     if is_chief(strategy):
        ...         model.save("runs/moco/model.keras")
    """
    try:
        yield
        gather(strategy, 0)
    except (tf.errors.OpError, CxrError) as error:
        cause = error.__cause__ if isinstance(error, CxrError) else error
        index, workers = worker(strategy)
        if workers == 1 or not isinstance(cause, _LOST):
            raise
        last = tf.train.latest_checkpoint(str(folder / "checkpoints"))
        where = f"step {last.rpartition('-')[2]}, its last checkpoint" if last else "the start: it had no checkpoint"
        raise WorkerLostError(
            f"this is worker {index} of workers 0 to {workers - 1}, process {os.getpid()} on {socket.gethostname()}. "
            "Another worker stopped answering, so this one ends, too. It was killed, lost its network, or ended with "
            "an error that its own output shows. Give the same command on all workers again: the run goes on from "
            f"{where}. ({innermost(cause)})"
        ) from error


def worker(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """(i, n): this process is the i-th of n workers, counted from 0; (0, 1) on one machine."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0, 1
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    before = len(jobs.get("chief", ())) if resolver.task_type == "worker" else 0
    return before + (resolver.task_id or 0), max(sum(map(len, jobs.values())), 1)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is the one that writes: worker 0, or the only one."""
    return worker(strategy)[0] == 0


def batch_per_replica(strategy: tf.distribute.Strategy, batch_size: int) -> int:
    """Films that each replica gets of a global batch.

    Raises:
        DistributionError: when the batch cannot be divided evenly.
    """
    replicas = strategy.num_replicas_in_sync
    if batch_size < 1 or batch_size % replicas:
        raise DistributionError(
            f"batch_size counts the films of all devices together, so it must be a multiple of their number, "
            f"{replicas}. Received: {batch_size}; {max(batch_size // replicas, 1) * replicas} would do."
        )
    return batch_size // replicas


def distributed(
    strategy: tf.distribute.Strategy, batches: Callable[[tuple[int, int]], tf.data.Dataset], batch_size: int
) -> Any:
    """Global batches, divided so that replica r of n holds the r-th of n consecutive parts of each.

    Args:
        strategy: from `strategy`.
        batches: (i, n) -> endless or long enough dataset of the i-th of n consecutive parts of the global batches.
        batch_size: films in a global batch.

    Returns:
        A distributed dataset (on one device, the dataset itself).

    Raises:
        DistributionError: when the batch cannot be divided evenly.
    """
    each = batch_per_replica(strategy, batch_size)

    def part(context: tf.distribute.InputContext) -> tf.data.Dataset:
        dataset = batches((context.input_pipeline_id, context.num_input_pipelines))
        if batch_size > each * context.num_input_pipelines:
            dataset = dataset.rebatch(each, drop_remainder=True)
        if context.num_input_pipelines > 1:
            # Of a finite dataset workers ask each other at every step whether it goes on.
            dataset = dataset.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        return dataset

    return strategy.distribute_datasets_from_function(part)


def gather(strategy: tf.distribute.Strategy, number: int) -> list[int]:
    """Each worker's number, on every worker; all must call it. On one worker it is `[number]`."""
    workers = worker(strategy)[1]
    if workers == 1:
        return [number]
    own = strategy.experimental_distribute_values_from_function(lambda _: tf.constant([number], tf.int64))
    every = strategy.experimental_local_results(_gather(strategy)(own))[0]
    return [int(n) for n in every.numpy()[:: strategy.num_replicas_in_sync // workers]]


@cache
def _gather(strategy: tf.distribute.Strategy) -> Callable[[Any], Any]:
    def replica(own: Any) -> Any:
        return tf.distribute.get_replica_context().all_gather(tf.identity(own), axis=0)

    return tf.function(lambda own: strategy.run(replica, args=(own,)))


def agree(strategy: tf.distribute.Strategy, what: str, value: object) -> None:
    """Checks that a value is the same on all workers; all must call it.

    Args:
        strategy: from `strategy`.
        what: the value's name, for the error.
        value: anything whose `str` says all of it.

    Raises:
        DistributionError: on every worker, when it is not.

    Example:
        >>> agree(strategy, "the data", shards.data_hash)  # doctest: +SKIP
    """
    digest = hashlib.sha256(str(value).encode()).digest()
    numbers = gather(strategy, int.from_bytes(digest[:7], "big"))
    if other := [i for i, number in enumerate(numbers) if number != numbers[0]]:
        raise DistributionError(
            f"{what} is not the same on all workers: {', '.join(f'worker {i}' for i in other)} and worker 0 differ. "
            "All need the same experiment, the same data, and one run folder on a disk that they share. "
            f"Received: {str(value)[:100]} on worker {worker(strategy)[0]}"
        )


def average_statistics(model: keras.Model) -> None:
    """Gives every replica the mean of what each has gathered on its own: moving statistics of plain batch-norm.

    Such variables are assigned replica by replica, and a checkpoint or a file holds the first replica's alone. They do
    not influence training. A variable that is the same on all replicas stays as it is, to the last bit. With one
    replica nothing is done. All workers must call it.

    Args:
        model: its floating weights that are not trained are averaged.

    Example:
        >>> average_statistics(model)  # doctest: +SKIP
        >>> model.save("model.keras")  # doctest: +SKIP
    """
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync == 1:
        return
    trained = {id(v) for v in model.trainable_weights}
    variables = [v for v in model.weights if id(v) not in trained and keras.backend.is_float_dtype(v.dtype)]
    if not variables:
        return

    def average() -> None:
        context = tf.distribute.get_replica_context()
        own = [tf.convert_to_tensor(v) for v in variables]
        is_first = tf.equal(context.replica_id_in_sync_group, 0)
        first = context.all_reduce("SUM", [tf.where(is_first, value, tf.zeros_like(value)) for value in own])
        # The mean of differences is exactly 0 where there are none; a mean of equal values may be off by a bit.
        differences = context.all_reduce("MEAN", [value - start for value, start in zip(own, first, strict=True)])
        for variable, start, difference in zip(variables, first, differences, strict=True):
            variable.assign(start + difference)

    tf.function(lambda: strategy.run(average))()


def _workers() -> tuple[list[tuple[str, str]], int]:
    """Job and address of every worker, the chief first, and which of them this process is."""
    if text := os.environ.get("TF_CONFIG", "").strip():
        return _from_tf_config(text)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _from_slurm(os.environ)
    return [], 0


def _from_tf_config(text: str) -> tuple[list[tuple[str, str]], int]:
    def wrong(what: str) -> DistributionError:
        return DistributionError(f"TF_CONFIG {what}. It looks like {_TF_CONFIG}. Received: {text[:500]}")

    try:
        config = json.loads(text)
    except ValueError as error:
        raise wrong(f"is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise wrong("must be a JSON object")
    cluster = config.get("cluster") or {}
    if not isinstance(cluster, dict) or not all(isinstance(hosts, list) for hosts in cluster.values()):
        raise wrong('must have lists of addresses in "cluster"')
    if other := sorted(set(cluster) - {"chief", "worker"}):
        raise wrong(f'has {", ".join(other)} in "cluster", and we train with "worker" and one "chief" alone')
    if len(cluster.get("chief", ())) > 1:
        raise wrong('has more than one "chief"')
    tasks = [(job, address) for job in ("chief", "worker") for address in cluster.get(job, ())]
    for _, address in tasks:
        if not isinstance(address, str) or not re.fullmatch(r"\S+:\d+", address):
            raise wrong(f'has {address!r} in "cluster", and an address is "host:port"')
    if len({address for _, address in tasks}) < len(tasks):
        raise wrong("gives one address to several workers")
    if len(tasks) < 2:
        return tasks, 0
    task = config.get("task")
    if not isinstance(task, dict) or not str(task.get("index", "")).isdecimal():
        raise wrong('must say in "task" which worker this is: {"type": "worker", "index": 0}')
    hosts, index = cluster.get(task.get("type"), ()), int(task["index"])
    if index >= len(hosts):
        raise wrong(f'has no {task.get("type")!r} number {index} in "cluster", which "task" says this is')
    return tasks, tasks.index((task["type"], hosts[index]))


def _from_slurm(env: Any) -> tuple[list[tuple[str, str]], int]:
    """The tasks of a Slurm step in the order of their ranks, tasks of a node together (Slurm's default distribution).

    TensorFlow's own resolver fails on nodes without GPUs, and sorts hosts by name (node10 before node9), not by rank.
    """
    try:
        # Ports differ from job to job, as two may share a node.
        first_port = 20000 + int(env.get("SLURM_JOB_ID", 0)) % 1000 * 10
        tasks = [
            ("worker", f"{host}:{first_port + i}")
            for host, count in zip(
                _slurm_hosts(env["SLURM_STEP_NODELIST"]), _slurm_counts(env["SLURM_STEP_TASKS_PER_NODE"]), strict=True
            )
            for i in range(count)
        ]
        rank = int(env["SLURM_PROCID"])
        tasks[rank]
    except (KeyError, ValueError, IndexError) as error:
        raise DistributionError(
            "SLURM_STEP_NUM_TASKS says that this is a step of several tasks, but SLURM_STEP_NODELIST, "
            f"SLURM_STEP_TASKS_PER_NODE and SLURM_PROCID do not say which ({error!r}). Start it by srun, or set "
            f"TF_CONFIG: {_TF_CONFIG}"
        ) from error
    return tasks, rank


def _slurm_hosts(nodes: str) -> list[str]:
    """`a[08-10,12],b` -> a08, a09, a10, a12, b."""
    hosts = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodes):
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            numbers = [f"{n:0{len(first)}}" for n in range(int(first), int(last or first) + 1)] if part else [""]
            hosts += [prefix + number + suffix for number in numbers]
    return hosts


def _slurm_counts(tasks: str) -> list[int]:
    """`2(x3),1` -> 2, 2, 2, 1."""
    counts = []
    for part in tasks.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts
