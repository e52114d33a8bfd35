"""How every training begins, alone or with other workers, new or going on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras
import pandas as pd
import tensorflow as tf

from cxr_tf.config import Experiment, Pretraining
from cxr_tf.data.shards import ShardFolder
from cxr_tf.files import replacing
from cxr_tf.progress import progress
from cxr_tf.run import Run, create_run, environment, write_json
from cxr_tf.train import distribute
from cxr_tf.train.step import dtype_policy


@contextmanager
def training(
    run: Run[Experiment] | Run[Pretraining], strategy: tf.distribute.Strategy, shards: ShardFolder
) -> Iterator[None]:
    """Data whole, random numbers seeded, workers of one mind, and layers of the experiment's precision: the block that
    a recipe builds its model and trains in. Writes nothing.

    Raises:
        CxrError: when a shard is damaged, the batch cannot be shared out, workers differ, or one of them is lost.
    """
    experiment, train = run.experiment, run.experiment.train
    with progress("checking shards") as update:
        shards.verify(update)
    keras.utils.set_random_seed(experiment.seed)
    if train.deterministic:
        tf.config.experimental.enable_op_determinism()
    with distribute.workers_answer(strategy, run.folder):
        distribute.batch_per_replica(strategy, train.batch_size)
        distribute.agree(strategy, "the experiment", experiment.model_dump_json())
        distribute.agree(strategy, "the data", shards.data_hash)
        with dtype_policy(train.precision):
            yield


def write_beginning(run: Run[Experiment] | Run[Pretraining], shards: ShardFolder, parts: pd.DataFrame) -> None:
    """Makes the run folder: settings, what figures depend on besides, and which film goes where."""
    create_run(run)
    write_json(run.folder / "environment.json", environment(shards.data_hash))
    with replacing(run.folder / "parts.csv") as temporary:
        parts.rename_axis("film").to_csv(temporary)
