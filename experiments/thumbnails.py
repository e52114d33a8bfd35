"""What brightness and framing alone reach: logistic regression on thumbnails, on the films of a run.

COMMAND  python -m experiments.thumbnails RUN [--size 8]

The run's training and validation films fit it (there is nothing to choose), its test films judge it. A network that
reads films must do better than this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_tf.data.pipeline import batches
from cxr_tf.evaluate.judge import judge
from cxr_tf.run import open_run


def main() -> None:
    """Prints macro AUROC and AP with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of one class a film")
    parser.add_argument("--size", type=int, default=8, help="side of the thumbnails in pixels")
    arguments = parser.parse_args()

    run = open_run(arguments.run)
    shards, parts = run.shards(), run.parts()
    classes = run.experiment.data.classes or shards.classes
    films, labels = [], []
    for images, truth in batches(
        shards, parts.index.to_numpy(), size=arguments.size, batch_size=64, shuffle=False, classes=classes
    ):
        films.append(images.numpy().reshape(len(images), -1))
        labels.append(truth["logits"].numpy())
    x, y = np.concatenate(films), np.concatenate(labels)
    known = ~np.isnan(y).any(axis=1)
    test = (parts["part"] == "test").to_numpy()

    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    regression.fit(x[~test & known], y[~test & known].argmax(axis=1))
    metrics = judge(
        labels=y[test],
        probabilities=regression.predict_proba(x[test]),
        classes=classes,
        patients=parts["patient_key"].to_numpy()[test],
        studies=parts["study_key"].to_numpy()[test],
        task="multiclass",
        thresholds=[0.5] * len(classes),
    )
    for name in ("auroc", "average_precision"):
        found = metrics["image"]["macro"][name]
        print(
            f"{arguments.size}x{arguments.size} {name} {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
        )


if __name__ == "__main__":
    main()
