"""The batch-norm leak: what MoCo learns when a query is normalized with the companions of its key.

COMMAND  python -m experiments.leak --shards shards/cxr
COST     5 minutes on two cores
RESULT   top-1 after 300, 600, 900, 1200 and 1500 steps: keys in order .23, .38, .53, .62, .70; permuted .09, .14, .24,
         .32, .38. The leak nearly doubles top-1 and buys nothing: the probe is .704 beside .694, a difference that
         190 films cannot show either way. A probe made poor by the leak was not seen here.

Twice the same training (64 pixels, batches of 32 in parts of 4 films, films of all sources outside of fold 3), once
with the keys in their order, once permuted before the key network and put back after, which is `cxr_tf.MoCo`'s default.
Linear probes of NIH adults' sex are fitted on the training films and read on fold 3.
"""

from __future__ import annotations

import argparse

import keras
import numpy as np
import tensorflow as tf

import cxr_tf
from cxr_tf.data.split import carve
from cxr_tf.evaluate.metrics import auroc
from cxr_tf.pretrain.features import features, linear_probe, reader
from experiments.starts import tasks

SIZE, BATCH, FILMS_A_PART = 64, 32, 4


def main() -> None:
    """Prints top-1 and loss on the way, and the probe at the end, of both trainings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/cxr")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    shards = cxr_tf.open_shards(arguments.shards)
    manifest = shards.manifest
    fold = manifest["fold"].astype(str)
    truth = tasks(manifest, shards.classes)["NIH adults: sex"]
    known = manifest.assign(split=np.where(fold == "3", "test", "train"))[~np.isnan(truth)]
    parts = carve(known, 0.15, 0, stratify=False)["split"]
    rows = {name: parts.index[parts == name].to_numpy() for name in ("train", "validation", "test")}
    y = np.stack([1 - truth, truth], axis=1)

    tone = {"brightness": 0.05, "contrast": 0.15, "gamma": 0.15, "noise": 0.0, "blur": 0.0}
    augment = cxr_tf.Augment(rotation=10.0, scale=(1.0, 1.0), shift=0.0, crop=0.5, **tone)
    for shuffle in (False, True):
        keras.utils.set_random_seed(0)
        encoder = cxr_tf.encoder("small_resnet", (SIZE, SIZE, 1))
        moco = cxr_tf.MoCo(encoder, queue_size=512, momentum=0.99, parts=BATCH // FILMS_A_PART, shuffle=shuffle)
        moco.compile(keras.optimizers.AdamW(1e-3, weight_decay=1e-4))
        step = tf.function(moco.train_step)
        dataset = cxr_tf.pretext_batches(
            shards,
            np.flatnonzero(fold != "3"),
            size=SIZE,
            batch_size=BATCH,
            make=cxr_tf.Views(augment, augment),
            steps=arguments.steps,
        )
        print("keys permuted" if shuffle else "keys in order")
        top1: list[float] = []
        for i, batch in enumerate(dataset, start=1):
            logs = step(batch)
            top1.append(float(logs["top1"]))
            if i % (arguments.steps // 5) == 0:
                print(f"  step {i}: top-1 {np.mean(top1[-50:]):.2f}, loss {float(logs['loss']):.2f}", flush=True)
        x = features(reader(encoder), shards, np.arange(len(shards)), size=SIZE, batch_size=64)
        probe = linear_probe(
            x[rows["train"]], y[rows["train"]], x[rows["validation"]], y[rows["validation"]], "multiclass"
        )
        score = auroc(probe(x[rows["test"]])[:, 1], y[rows["test"]][:, 1])[0]
        print(f"  linear probe, sex of NIH adults, {len(rows['test'])} films of fold 3: AUROC {score:.3f}", flush=True)


if __name__ == "__main__":
    main()
