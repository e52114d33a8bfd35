"""How fast the figures of many films are made, the network apart.

COMMAND  python -m experiments.benchmarks.evaluation [--films 10000] [--replicates 1000]
COST     about 40 s on two cores
RESULT   10,000 films of 3,293 patients, 1,000 draws, on two quiet virtual cores:
             judge         3.9 s,   7.6 s of processor
             subgroups     9.4 s,  18.4 s of processor
             agreement     0.2 s,   0.4 s of processor
             memory: 303 MB

Films of made-up patients (one to five films each) with made-up probabilities of four classes and, on a third of them,
masks. `judge` gives all figures of films and of studies with their intervals; `subgroups` those of view, sex, age and
three sources, with differences; `agreement` kappa with three readers.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.evaluate.judge import judge
from cxr_tf.evaluate.metrics import MaskScores
from cxr_tf.evaluate.readers import agreement
from cxr_tf.evaluate.subgroups import subgroups

CLASSES = ["negative", "typical", "indeterminate", "atypical"]


def made_up(films: int, seed: int = 0) -> tuple[dict[str, Any], pd.DataFrame, np.ndarray]:
    """What `judge` takes, the films' attributes, and their true classes."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(films), rng.integers(1, 6, films))[:films]
    truth = rng.choice(4, p=[0.3, 0.4, 0.2, 0.1], size=films)[patients]
    labels = np.eye(4)[truth]
    logits = rng.normal(size=(films, 4)) + 1.5 * labels
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    dice = np.where(rng.random(films) < 1 / 3, rng.beta(4, 2, films), np.nan)
    known, nan = ~np.isnan(dice), np.full(films, np.nan)
    case = {
        "labels": labels,
        "probabilities": probabilities,
        "classes": CLASSES,
        "patients": patients,
        "task": "multiclass",
        "thresholds": [0.3, 0.4, 0.25, 0.2],
        "masks": MaskScores(dice, dice / (2 - dice), nan, known, np.zeros(films, bool), nan, nan, nan),
    }
    attributes = pd.DataFrame(
        {
            "view": rng.choice(["PA", "AP"], films),
            "sex": rng.choice(["M", "F"], films)[patients],
            "age": rng.uniform(0, 95, films)[patients],
            "source": rng.choice(["a", "b", "c"], films)[patients],
        }
    )
    return case, attributes, truth


def main() -> None:
    """Prints seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=10_000)
    parser.add_argument("--replicates", type=int, default=1000)
    arguments = parser.parse_args()
    case, attributes, truth = made_up(arguments.films)
    draws = {"replicates": arguments.replicates}
    films = np.arange(arguments.films)
    rng = np.random.default_rng(1)
    read = [np.where(rng.random(len(films)) < 0.8, truth, rng.integers(4, size=len(films))) for _ in range(3)]
    columns: dict[Any, Any] = {"film": np.tile(films, 3), "reader": np.repeat(["A", "B", "C"], len(films))}
    table = pd.DataFrame(columns | {c: np.concatenate(read) == c for c in range(len(CLASSES))})
    of_readers = {name: value for name, value in case.items() if name not in ("labels", "masks")}

    works: dict[str, Callable[[], Any]] = {
        "judge": lambda: judge(**case, studies=films, **draws),
        "subgroups": lambda: subgroups(attributes, **case, **draws),
        "agreement": lambda: agreement(table, films=films, studies=films, **of_readers, **draws),
    }
    print(f"{arguments.films:,} films of {len(np.unique(case['patients'])):,} patients, {arguments.replicates:,} draws")
    for name, work in works.items():
        wall, processor = time.perf_counter(), time.process_time()
        work()
        print(f"{name:10} {time.perf_counter() - wall:5.1f} s, {time.process_time() - processor:5.1f} s of processor")
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
