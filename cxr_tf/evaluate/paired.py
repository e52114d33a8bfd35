"""Several predictors of the same films, compared on the same draws of patients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.metrics import Ranked, auroc_of


def paired_auroc(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    *,
    against: str,
    replicates: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Macro AUROC of several predictors of the same films, and each one's difference from one of them.

    All are computed on the same bootstrap draws of patients, so a difference has a paired interval.

    Args:
        scores: name -> `[draws, n, classes]`; the AUROC is the mean over the draws.
        labels: `[n, classes]`; 1, 0, NaN = unknown.
        patients: `[n]`, whose each film is.
        against: the name that the others are compared with.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Name -> macro AUROC, and name -> AUROC minus that of `against`.
    """
    ranked = {
        name: [[Ranked(draw[:, c], labels[:, c]) for c in range(labels.shape[1])] for draw in each]
        for name, each in scores.items()
    }

    def statistic(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        found = {
            name: np.mean([np.mean([auroc_of(*one.counts(weights)) for one in draw], axis=0) for draw in draws], axis=0)
            for name, draws in ranked.items()
        }
        differences = {("difference", name): value - found[against] for name, value in found.items()}
        return {("auroc", name): value for name, value in found.items()} | differences

    estimates = bootstrap(statistic, patients, replicates=replicates, seed=seed)
    return tuple({name: estimates[kind, name] for name in scores} for kind in ("auroc", "difference"))  # type: ignore[return-value]
