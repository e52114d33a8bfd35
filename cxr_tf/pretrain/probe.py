"""`cxr-tf probe`: what a pre-trained encoder is worth with few labels and with many.

The encoder stays as it is; only what reads its pooled features is fitted. Beside it stand the same network with random
weights and logistic regression on thumbnails: what no pre-training was needed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from cxr_tf.config import DataSection, Pretraining, load_experiment
from cxr_tf.data.manifest import labels as label_columns
from cxr_tf.data.shards import ShardFolder, open_shards
from cxr_tf.data.split import SplitError, assign_folds, carve
from cxr_tf.evaluate.bootstrap import Estimate
from cxr_tf.evaluate.figures import label_efficiency
from cxr_tf.evaluate.paired import paired_auroc
from cxr_tf.files import writable_folder
from cxr_tf.models.encoders import encoder as make_encoder
from cxr_tf.pretrain.features import ProbeError, features, linear_probe, reader, thumbnails
from cxr_tf.progress import progress
from cxr_tf.run import Run, write_json
from cxr_tf.train.parts import choose_parts, one_class_a_film

DRAWS = 5  # of a fraction of the labels, as MoCo-CXR has it
_LEAST = 5  # test patients with a class, and without it: with fewer, many bootstrap draws have none
THUMBNAILS = (8, 32)


def probe(
    run: Run[Pretraining],
    *,
    shards: Path | None = None,
    experiment: Path | None = None,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    replicates: int = 2000,
) -> dict[str, Any]:
    """Judges a pre-trained encoder by linear probes with few and many labels.

    Probes are fitted on labeled films of patients that the pre-training did not hold out, and judged on those that it
    did; without any, or on other shards, on a fifth of the patients.

    Args:
        run: a finished pre-training run.
        shards: folder of labeled shards; by default those that it was pre-trained on.
        experiment: an experiment file of `cxr-tf train`, whose `[data]` section says which films, classes and patients;
            by default all classes of the shards.
        fractions: parts of the labeled training patients, in (0, 1]; each below 1 is drawn five times.
        replicates: of the patient-clustered bootstrap.

    Returns:
        What `RUN/probe/probe.json` says: for each fraction the macro AUROC of this encoder, of random weights and of
        thumbnails, and the paired differences from random weights, with 95 % intervals.

    Raises:
        ProbeError: when the run is not finished, a fraction makes no sense, or test films were pre-trained on.
        CxrError: for what is wrong with shards or settings.
    """
    if not run.finished:
        raise ProbeError(f"{run.folder}: the run is not finished; give its `cxr-tf pretrain` command again to go on.")
    if not fractions or not all(0.0 < fraction <= 1.0 for fraction in fractions):
        raise ProbeError(f"Fractions are above 0 and at most 1. Received: {', '.join(map(str, fractions))}")
    folder = writable_folder(run.folder / "probe")
    settings = run.experiment.model
    opened = open_shards(shards or run.experiment.data.shards)
    data, classes, films = _films(run, opened, experiment)
    keys = films.index.to_numpy()
    values = label_columns(opened.manifest.loc[keys], classes)
    part = {name: (films["part"] == name).to_numpy() for name in ("train", "validation", "test")}
    judged = _judged(values[part["test"]], films["patient_key"].to_numpy()[part["test"]])
    if not judged.any():
        raise ProbeError(
            f"None of {', '.join(classes)} has {_LEAST} test patients with it and {_LEAST} without: nothing can be "
            "judged. Give more labeled films, or an --experiment that tests on others."
        )

    keras.utils.set_random_seed(run.experiment.seed)
    starts = {
        "pre-trained": make_encoder(
            settings.encoder,
            (settings.size, settings.size, 1),
            weights=run.folder / "encoder.keras",
            normalization=settings.normalization,
        ),
        "random weights": make_encoder(
            settings.encoder,
            (settings.size, settings.size, 1),
            normalization=settings.normalization,
        ),
    }
    inputs = {}
    for name, encoder in starts.items():
        with progress(f"features, {name}") as update:
            inputs[name] = features(
                reader(encoder),
                opened,
                keys,
                size=settings.size,
                batch_size=run.experiment.train.batch_size,
                update=update,
            )
    inputs |= {f"{size} x {size} thumbnails": thumbnails(opened, keys, size=size) for size in THUMBNAILS}

    result: list[dict[str, Any]] = []
    with progress("probes") as update:
        drawn = [_draws(films, values, fraction, run.experiment.seed) for fraction in fractions]
        done, total = 0, len(inputs) * sum(map(len, drawn))
        for fraction, draws in zip(fractions, drawn, strict=True):
            scores: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
            for name, x in inputs.items():
                for rows in draws:
                    fitted = linear_probe(
                        x[rows], values[rows], x[part["validation"]], values[part["validation"]], data.task
                    )
                    scores[name].append(fitted(x[part["test"]])[:, judged])
                    done += 1
                    update(done, total)
            aurocs, differences = paired_auroc(
                {name: np.stack(each) for name, each in scores.items()},
                values[part["test"]][:, judged],
                films["patient_key"].to_numpy()[part["test"]],
                against="random weights",
                replicates=replicates,
            )
            result.append(
                {
                    "fraction": fraction,
                    "films": int(np.mean([len(rows) for rows in draws])),
                    "draws": len(draws),
                    "auroc": {name: estimate.to_json() for name, estimate in aurocs.items()},
                    "minus_random": {name: estimate.to_json() for name, estimate in differences.items()},
                }
            )
    found = {
        "run": run.experiment.name,
        "classes": [name for name, one in zip(classes, judged, strict=True) if one],
        "left_out": [name for name, one in zip(classes, judged, strict=True) if not one],
        "task": data.task,
        "films": {name: int(rows.sum()) for name, rows in part.items()},
        "patients": {name: int(films["patient_key"][rows].nunique()) for name, rows in part.items()},
        "data_hash": opened.data_hash,
        "replicates": replicates,
        "fractions": result,
    }
    write_json(folder / "probe.json", found)
    label_efficiency(result, folder / "probe.png")
    return found


def parse_fractions(text: str) -> list[float]:
    """The numbers of "0.01,0.1,1.0".

    Raises:
        ProbeError: when it holds something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ProbeError(f"Fractions are numbers between commas: 0.01,0.1,1.0. Received: {text}") from None


def table(found: dict[str, Any]) -> str:
    """What `probe` found, as text for a terminal."""
    films, patients = found["films"], found["patients"]
    lines = [
        f"linear probes of {', '.join(found['classes'])}: macro AUROC on {films['test']:,} films of "
        f"{patients['test']:,} other patients, 95 % intervals over patients"
    ]
    if found["left_out"]:
        lines.append(
            f"not judged, for fewer than {_LEAST} test patients have it or not: {', '.join(found['left_out'])}"
        )
    for row in found["fractions"]:
        draws = f", mean of {row['draws']} draws" if row["draws"] > 1 else ""
        lines.append(f"\n{row['fraction']:.3g} of the labels ({row['films']:,} films{draws})")
        for name, estimate in row["auroc"].items():
            difference = Estimate(**row["minus_random"][name])
            against = "" if name == "random weights" else f"   minus random weights {_signed(difference)}"
            lines.append(f"  {name:20} {Estimate(**estimate)}{against}")
    return "\n".join(lines)


def _signed(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None:
        return "not measurable"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def _judged(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Which classes enough test patients have, and enough have not; bool `[classes]`."""
    return np.array(
        [min(len(np.unique(patients[column == outcome])) for outcome in (0, 1)) >= _LEAST for column in values.T]
    )


def _films(
    run: Run[Pretraining], shards: ShardFolder, experiment: Path | None
) -> tuple[DataSection, list[str], pd.DataFrame]:
    """Which labeled films fit, choose and judge: "part", "patient_key" and "study_key" by film key."""
    seen = run.parts() if shards.data_hash == run.data_hash() else None
    if experiment is not None:
        data = load_experiment(experiment).data
        classes = data.classes or shards.classes
        films = choose_parts(shards.manifest, data, classes, run.experiment.seed, (True, False))
        if seen is not None:
            tested = films.index[films["part"] == "test"]
            trained = seen.index[seen["part"] == "train"]
            if both := len(tested.intersection(trained)):
                raise ProbeError(
                    f"{both} of {len(tested)} test films of {experiment} were pre-trained on. Pre-train with "
                    "[data.holdout] naming them, or judge on other films."
                )
        return data, classes, films
    data, classes = DataSection(shards=str(shards.folder)), shards.classes
    if not classes:
        raise ProbeError(f"{shards.folder}: these films have no labels, so nothing can be probed. Give others.")
    films = one_class_a_film(shards.manifest, classes)
    films = films[~np.isnan(label_columns(films, classes)).any(axis=1)]
    if seen is not None and (seen["part"] == "test").any():
        return data, classes, seen.loc[seen.index.intersection(films.index)]
    folds = assign_folds(films, 5, 0)
    split = np.where(folds["fold"].astype(str) == "0", "test", "train")
    films = carve(films.assign(split=split), 0.15, 0).rename(columns={"split": "part"})
    return data, classes, films[["part", "patient_key", "study_key"]]


def _draws(films: pd.DataFrame, values: np.ndarray, fraction: float, seed: int) -> list[np.ndarray]:
    """Rows to fit on: all training films, or five draws of a part of their patients with every class in it."""
    train = np.flatnonzero((films["part"] == "train").to_numpy())
    if fraction == 1.0:
        return [train]
    drawn = []
    patients = films["patient_key"].to_numpy()[train]
    there = np.nansum(values[train], axis=0) > 0
    names = np.unique(patients)
    number = max(1, round(fraction * len(names)))
    for draw in range(DRAWS):
        random = np.random.default_rng([seed, draw, round(fraction * 1e6)])
        for _ in range(1000):
            rows = train[np.isin(patients, random.choice(names, number, replace=False))]
            held = np.nansum(values[rows], axis=0) > 0
            if held[there].all() if there.sum() <= number else held.sum() >= 2:
                break
        else:
            raise SplitError(
                f"a fraction of {fraction:g} is {number} of {len(names)} patients: too few for films of all classes."
            )
        drawn.append(rows)
    return drawn
