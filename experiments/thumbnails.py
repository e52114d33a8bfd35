"""What brightness and framing alone reach: logistic regression on thumbnails, on the films of a run.

COMMAND  python -m experiments.thumbnails RUN [--size 8]

The run's training and validation films fit it (there is nothing to choose), its test films judge it. A network that
reads films must do better than this. `cxr-tf evaluate` prints the AUROC of 8 x 8 thumbnails beside the model's; this
takes other sizes, and gives AP too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cxr_tf.data.manifest import labels
from cxr_tf.evaluate.bootstrap import Estimate
from cxr_tf.evaluate.judge import judge
from cxr_tf.evaluate.shortcuts import SIDE, thumbnail_probabilities
from cxr_tf.run import open_run


def main() -> None:
    """Prints macro AUROC and AP with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--size", type=int, default=SIDE, help="side of the thumbnails in pixels")
    arguments = parser.parse_args()

    run = open_run(arguments.run)
    shards, parts = run.shards(), run.parts()
    classes, task = run.experiment.data.classes or shards.classes, run.experiment.data.task
    test = parts[parts["part"] == "test"]
    metrics = judge(
        labels=labels(shards.manifest.loc[test.index], classes),
        probabilities=thumbnail_probabilities(shards, parts, classes, task, arguments.size),
        classes=classes,
        patients=test["patient_key"].to_numpy(),
        studies=test["study_key"].to_numpy(),
        task=task,
        thresholds=[0.5] * len(classes),
    )
    for name in ("auroc", "average_precision"):
        found = Estimate(**metrics["image"]["macro"][name])
        print(f"{arguments.size}x{arguments.size} {name} {found}")


if __name__ == "__main__":
    main()
