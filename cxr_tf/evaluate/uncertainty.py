"""Does a model know when it does not know? Films referred to a reader, changed slightly, or that are no chest at all.

    {"selective":  {"error", "error_at_80", "aurc", "excess_aurc", "auroc": Estimates,
                    "curve": [{"coverage", "error", "low", "high", "best"}, ...]},
     "agreement":  {"mean", "auroc": Estimates, "changes": {name: Estimate}},
     "out_of_distribution": {"auroc": Estimate,
                             "mahalanobis": {"non_chest": Estimate, "kinds": {kind: Estimate}},
                             "energy":      the same,
                             "fitted_on": films, "note": text}}

Selective prediction (Geifman & El-Yaniv, "Selective classification for deep neural networks", NIPS 2017): the least
confident films are referred to a reader, and the rest, the coverage, is judged. A multi-class film's confidence is the
probability of its most probable class, and its error is 1 where that is wrong. A multi-label film is as confident as
its least certain call, the one closest to its threshold in log-odds, and its error is the share of its known calls that
are wrong. Films without a known label are left out.

    error         with no film referred
    error_at_80   of the 80 % that the model is most confident of
    aurc          mean error over all coverages; 0 is best
    excess_aurc   aurc above that of the best order, in which all errors are referred first (Geifman, Uziel & El-Yaniv,
                  "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019); 0 is best
    auroc         of the confidence, for telling films with an error from those without
    curve         error against coverage; "best" is that of the best order

Agreement: each film is changed mildly in five ways (`MILD`); its agreement is the share of changes under which the
model says the same (multi-label: the share of calls). `auroc` is of the agreement, for telling films with an error from
those without (test-time augmentation as a measure of doubt: Ayhan & Berens, MIDL 2018).

Out of distribution: does a score tell other images from test films? An AUROC below 0.5 means that they look more usual
to it than the films do. Two scores:

    mahalanobis   distance of the pooled features from those of the training films: one Gaussian for all classes, as
                  labels may be several or unknown, with Ledoit & Wolf's shrunk covariance (after Lee et al., "A simple
                  unified framework for detecting out-of-distribution samples and adversarial attacks", NeurIPS 2018,
                  which has a Gaussian a class)
    energy        -logsumexp of the logits (Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020);
                  multi-label: the sum over the labels (Wang et al., NeurIPS 2021). Models with classes only

The other images are made, one of each kind in the place of each test film (`outside`): non-chest images, whose
distance gives the headline `auroc`, and the film turned by 90°, which stands in for laterals. Real laterals are judged
where the shards have some that were not trained on; `note` says whether.

A model that only segments has no "selective" and no "agreement".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.special import logit, logsumexp
from sklearn.covariance import LedoitWolf

from cxr_tf.data.manifest import labels
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate import metrics
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.calibration import Task, probabilities_of
from cxr_tf.evaluate.inference import Change, Films, predict_changed
from cxr_tf.evaluate.metrics import MetricError, Ranked, auroc_of, ratio
from cxr_tf.evaluate.robustness import Ordered, contrast, on_films, rotated
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import pooled_features
from cxr_tf.progress import Update, silent

COVERAGES = np.linspace(0.05, 1, 20)  # of the curve

_ENOUGH = 2000  # training films that the Gaussian is fitted on, drawn where there are more
_NO_LATERALS = "no film here is marked as lateral and was not trained on"

Figures = dict[str, np.ndarray]

Pixels = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # film [height, width], 0-255 -> another in its place

AS_IT_IS = "as it is"

# --- selective prediction ---------------------------------------------------------------------------------------------


class Referred:
    """Films in falling order of confidence, ready for weights, as `cxr_tf.evaluate.metrics.Ranked`.

    Films of equal confidence are referred in random order: figures are their expectation.

    Args:
        confidence: `[n]`, higher = referred later.
        error: `[n]`, 0-1; NaN = unknown, left out.
    """

    def __init__(self, confidence: np.ndarray, error: np.ndarray) -> None:
        known = np.flatnonzero(~np.isnan(error))
        self._order = known[np.argsort(-confidence[known], kind="stable")]
        falling = confidence[self._order]
        self._last = np.flatnonzero(np.append(falling[1:] != falling[:-1], True)[: len(falling)])
        self._error = error[self._order]

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many films are kept, and their summed error, when those down to each step of confidence are kept.

        Args:
            weights: `[replicates, n]`, whole numbers from 0: how often each film counts.

        Returns:
            Two float64 arrays `[replicates, steps]`; at the last step every film is kept.
        """
        w = weights[:, self._order].astype(np.float64, copy=False)
        return np.cumsum(w, axis=1)[:, self._last], np.cumsum(w * self._error, axis=1)[:, self._last]


def aurc(confidence: np.ndarray, error: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean, over k = 1 to n, of the mean error of the k most confident films.

    Args:
        confidence: `[n]`.
        error: `[n]`, 0-1; NaN = unknown, left out.

    Returns:
        0 (best) to 1; NaN without a known film.

    Raises:
        MetricError: for shapes or values that do not fit.

    Example:
        >>> aurc(np.array([0.9, 0.8]), np.array([0, 1]))  # (0 + 1/2) / 2
        0.25
    """
    films = Referred(*_checked(confidence, error))
    return float(aurc_of(*films.counts(np.ones((1, len(error)))))[0])


def excess_aurc(confidence: np.ndarray, error: np.ndarray) -> float:
    """`aurc` above that of the best order, in which the films with the largest errors are referred first."""
    confidence, error = _checked(confidence, error)
    return aurc(confidence, error) - aurc(-np.nan_to_num(error), error)


def _checked(confidence: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sure, wrong = np.asarray(confidence, np.float64), np.asarray(error, np.float64)
    if sure.shape != wrong.shape or sure.ndim != 1:
        raise MetricError(f"Confidence and error must be [n], one a film. Received: {sure.shape} and {wrong.shape}.")
    if np.isnan(sure).any() or not (np.isnan(wrong) | ((wrong >= 0) & (wrong <= 1))).all():
        raise MetricError("Confidences are numbers, and errors lie in 0-1 or are NaN. Received: others.")
    return sure, wrong


def aurc_of(kept: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """`aurc` from `Referred.counts`: `[replicates]`, NaN for one without a film."""
    if kept.shape[1] == 0:
        return np.full(len(kept), np.nan)
    before, lost_before = (np.pad(each, ((0, 0), (1, 0)))[:, :-1] for each in (kept, lost))
    rate = ratio(lost - lost_before, kept - before)
    # Within a step the summed error grows evenly, a + rate k, so that its mean over k films, summed over k, is a sum of
    # 1 / k: a difference of harmonic numbers.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, kept.max() + 1))])
    area = rate * (kept - before)
    area += (lost_before - rate * before) * (harmonic[kept.astype(np.int64)] - harmonic[before.astype(np.int64)])
    return np.where(kept[:, -1] > 0, ratio(area.sum(1), kept[:, -1]), np.nan)


def error_at_of(kept: np.ndarray, lost: np.ndarray, coverages: np.ndarray) -> np.ndarray:
    """Mean error of the most confident films, from `Referred.counts`: `[replicates, coverages]`, NaN without a film.

    A coverage that is no whole number of films counts the last one in part.
    """
    result = np.full((len(kept), len(coverages)), np.nan)
    if kept.shape[1]:
        for row in np.flatnonzero(kept[:, -1] > 0):
            k = np.asarray(coverages) * kept[row, -1]
            result[row] = np.interp(k, np.append(0, kept[row]), np.append(0, lost[row])) / k
    return result


def certainty(
    logits: np.ndarray, labels: np.ndarray, task: Task, temperature: float, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How sure the model is of each film, and how wrong it is.

    Args:
        logits: `[n, classes]`.
        labels: `[n, classes]`; 1, 0, or NaN = unknown.
        task: "multiclass" or "multilabel".
        temperature: of the probabilities.
        thresholds: `[classes]`, of multi-label calls.

    Returns:
        confidence float64 `[n]` and error float64 `[n]`, 0-1, NaN where no label is known; as the module's text says.
    """
    p, y = probabilities_of(logits, task, temperature), np.asarray(labels, np.float64)
    if task == "multiclass":
        truth = metrics.one_hot_rows(y)
        return p.max(1), np.where(truth >= 0, (p.argmax(1) != truth).astype(np.float64), np.nan)
    cut = logit(np.clip(thresholds, 1e-9, 1 - 1e-9))
    margin = np.abs(np.asarray(logits, np.float64) / temperature - cut).min(1)
    known = ~np.isnan(y)
    wrong = (known & ((p >= thresholds) != (y == 1))).sum(1)
    return margin, np.divide(wrong, known.sum(1), out=np.full(len(y), np.nan), where=known.any(1))


def _selective(
    confidence: np.ndarray, error: np.ndarray, patients: np.ndarray, draws: Mapping[str, Any]
) -> dict[str, Any]:
    order, best = Referred(confidence, error), Referred(-np.nan_to_num(error), error)
    wrong = Ranked(-confidence, _any_error(error))

    def statistic(weights: np.ndarray) -> dict[Any, np.ndarray]:
        counts = order.counts(weights)
        whole, most = error_at_of(*counts, np.array([1.0, 0.8])).T
        area = aurc_of(*counts)
        return {
            "error": whole,
            "error_at_80": most,
            "aurc": area,
            "excess_aurc": area - aurc_of(*best.counts(weights)),
            "auroc": auroc_of(*wrong.counts(weights)),
            **dict(enumerate(error_at_of(*counts, COVERAGES).T)),
        }

    known = ~np.isnan(error)
    names = ("error", "error_at_80", "aurc", "excess_aurc", "auroc")
    made = bootstrap(statistic, patients, used=dict.fromkeys((*names, *range(len(COVERAGES))), known), **draws)
    floor = error_at_of(*best.counts(np.ones((1, len(error)))), COVERAGES)[0]
    return {name: made[name].to_json() for name in names} | {
        "curve": [
            {
                "coverage": float(round(coverage, 4)),
                "error": made[i].value,
                "low": made[i].low,
                "high": made[i].high,
                "best": None if np.isnan(floor[i]) else float(floor[i]),
            }
            for i, coverage in enumerate(COVERAGES)
        ]
    }


def _any_error(error: np.ndarray) -> np.ndarray:
    """1 for films with an error, 0 for those without, NaN where it is not known."""
    return np.where(np.isnan(error), np.nan, error > 0)


# --- agreement --------------------------------------------------------------------------------------------------------


MILD: dict[str, Pixels] = {
    "mirrored": lambda film, rng: film[:, ::-1],
    "turned left by 5°": lambda film, rng: rotated(film, 5),
    "turned right by 5°": lambda film, rng: rotated(film, -5),
    "contrast lowered to 85 %": lambda film, rng: contrast(film, 0.85),
    "contrast raised to 115 %": lambda film, rng: contrast(film, 1.15),
}
"""Changes under which a model should say the same."""


def _agreement(
    calls: Mapping[str, np.ndarray], error: np.ndarray, patients: np.ndarray, draws: Mapping[str, Any]
) -> dict[str, Any]:
    """From the calls `[n, ...]` on the films as they are and under each mild change."""
    same = {name: (calls[name] == calls[AS_IT_IS]).mean(1) for name in MILD}
    agreement = np.mean(list(same.values()), axis=0)
    wrong = Ranked(-agreement, _any_error(error))

    def statistic(weights: np.ndarray) -> Figures:
        count = weights.sum(1)
        changes = {name: weights @ each / count for name, each in same.items()}
        return {"mean": weights @ agreement / count, "auroc": auroc_of(*wrong.counts(weights)), **changes}

    made = {
        name: one.to_json()
        for name, one in bootstrap(statistic, patients, used={"auroc": ~np.isnan(error)}, **draws).items()
    }
    return {"mean": made["mean"], "auroc": made["auroc"], "changes": {name: made[name] for name in MILD}}


# --- out of distribution ----------------------------------------------------------------------------------------------


def _noise(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Grains of one to eight pixels."""
    grain = int(rng.choice([1, 2, 4, 8]))
    height, width = film.shape
    grains = rng.normal(rng.uniform(64, 192), rng.uniform(20, 80), (-(-height // grain), -(-width // grain)))
    return np.kron(grains, np.ones((grain, grain)))[:height, :width]


def _checkerboard(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cell = max(1, round(max(film.shape) * rng.uniform(1 / 16, 1 / 4)))
    down, right = np.indices(film.shape) // cell
    return np.where((down + right) % 2, rng.uniform(155, 255), rng.uniform(0, 100))


def _gradient(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """From dark to bright, in any direction."""
    angle = rng.uniform(0, 2 * math.pi)
    down, right = np.indices(film.shape)
    along = down * math.sin(angle) + right * math.cos(angle)
    return rng.uniform(0, 100) + (along - along.min()) * (rng.uniform(100, 155) / max(float(np.ptp(along)), 1.0))


def _shapes(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ellipses and rectangles over one another."""
    height, width = film.shape
    image = Image.new("L", (width, height), int(rng.integers(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(5, 13)):
        (left, right), (top, bottom) = np.sort(rng.uniform(0, 1, (2, 2))) * [[width], [height]]
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((left, top, right, bottom), fill=int(rng.integers(256)))
    return np.asarray(image, np.float32)


def _text(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lines of random letters, dark on bright or bright on dark."""
    height, width = film.shape
    ink, paper = (int(gray) for gray in rng.permutation([rng.integers(0, 60), rng.integers(195, 256)]))
    image = Image.new("L", (width, height), paper)
    draw = ImageDraw.Draw(image)
    size = max(6.0, max(film.shape) * rng.uniform(1 / 16, 1 / 8))
    for top in np.arange(0, height, 1.25 * size):
        line = "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz"), 40))
        draw.text((size / 4, top), line, ink, ImageFont.load_default(size))
    return np.asarray(image, np.float32)


def _scrambled(film: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The film cut into 16 tiles, none of which stays in its place; what does not divide by 4 stays, at the edges."""
    height, width = (side // 4 for side in film.shape)
    tiles = [np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width] for i in range(4) for j in range(4)]
    order = rng.permutation(16)
    mixed = film.copy()
    for tile, place in zip(order, np.roll(order, 1), strict=True):  # one round through all
        mixed[tiles[place]] = film[tiles[tile]]
    return mixed


NON_CHEST: dict[str, Pixels] = {
    "noise": _noise,
    "checkerboard": _checkerboard,
    "gradient": _gradient,
    "shapes": _shapes,
    "text": _text,
    "scrambled film": _scrambled,
}
"""Images that are no chest, made in the place of a film: its padding stays, and cannot give them away."""

TURNED, LATERAL = "film turned by 90°", "lateral film"


def outside(films: Films, kind: str, seed: int = 0) -> np.ndarray:
    """Images in the place of films that a model for frontal radiographs should not take for one.

    Args:
        films: a batch, from `predict_changed`.
        kind: one of `NON_CHEST`, or `TURNED`: the square turned by 90°, its padding with it.
        seed: an image depends on the seed and the film's row, and on the film where it is made of it.

    Returns:
        float32 `[batch, size, size, 1]`, 0-255.
    """
    if kind == TURNED:
        return np.ascontiguousarray(np.rot90(films.images, axes=(1, 2)))
    return on_films(films.images, films, NON_CHEST[kind], seed)


def mahalanobis(training: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Distance from the mean of training features, in units of their spread (Ledoit & Wolf's shrunk covariance).

    Args:
        training: `[n, channels]`.
        features: `[m, channels]`.

    Returns:
        float64 `[m]`, 0 and above; larger = less like the training films.
    """
    spread = LedoitWolf().fit(np.asarray(training, np.float64))
    return np.sqrt(np.maximum(spread.mahalanobis(np.asarray(features, np.float64)), 0))


def energy(logits: np.ndarray, task: Task) -> np.ndarray:
    """-logsumexp of the logits (multi-class), or -sum of log(1 + exp(logit)) (multi-label).

    Args:
        logits: `[n, classes]`.
        task: "multiclass" or "multilabel".

    Returns:
        float64 `[n]`; larger = less like the training films.
    """
    z = np.asarray(logits, np.float64)
    return -logsumexp(z, axis=1) if task == "multiclass" else -np.logaddexp(0, z).sum(1)


def _told_apart(
    scores: Mapping[str, np.ndarray], kind: np.ndarray, patients: np.ndarray, draws: Mapping[str, Any]
) -> dict[str, Any]:
    """AUROC of each score `[images]` for telling each kind `[images]` from the films as they are."""
    groups = {"non_chest": list(NON_CHEST), **{name: [name] for name in (*NON_CHEST, TURNED, LATERAL)}}
    truth = {
        group: np.where(np.isin(kind, names), 1.0, np.where(kind == AS_IT_IS, 0.0, np.nan))
        for group, names in groups.items()
    }
    ordered = {(score, group): Ordered(each, y) for score, each in scores.items() for group, y in truth.items()}

    def statistic(weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
        columns = np.ascontiguousarray(weights.T)
        return {key: images.auroc(columns) for key, images in ordered.items()}

    made = bootstrap(
        statistic,
        patients,
        used={(score, group): ~np.isnan(y) for score in scores for group, y in truth.items()},
        **draws,
    )
    if not (kind == LATERAL).any():
        made |= {(s, LATERAL): replace(made[s, LATERAL], note=f"not measurable: {_NO_LATERALS}") for s in scores}
    return {
        score: {
            "non_chest": made[score, "non_chest"].to_json(),
            "kinds": {group: made[score, group].to_json() for group in groups if group != "non_chest"},
        }
        for score in scores
    }


# --- a model ----------------------------------------------------------------------------------------------------------


def uncertainty(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    training: np.ndarray,
    operating: Mapping[str, Any],
    *,
    batch_size: int,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    update: Update = silent,
) -> dict[str, Any]:
    """Judges whether a model's doubt can be relied on.

    Args:
        model: with or without classes.
        shards: where the films are.
        keys: integer `[n]`, which films: those that are reported.
        training: integer `[m]`, the films that the model was trained on.
        operating: a run's `operating.json`: classes, task, size, temperature, thresholds.
        batch_size: films at a time.
        replicates: draws of patients.
        seed: of the draws and of the generated images.
        level: of the intervals.
        update: shows progress.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        PipelineError: for keys that are not there, or films that cannot be read.
        BootstrapError: for settings out of range.

    Example:
        >>> found = uncertainty(model, shards, test, train, run.operating(), batch_size=16)  # doctest: +SKIP
        >>> found["selective"]["error_at_80"]["value"], found["out_of_distribution"]["auroc"]["value"]  # doctest: +SKIP
        (0.12, 0.97)
    """
    table, keys, training = shards.manifest, np.asarray(keys), np.asarray(training)
    is_lateral = (table["view"] == "LATERAL").to_numpy()
    new = not is_lateral[training].any()
    laterals = np.setdiff1d(np.flatnonzero(is_lateral), training) if new else np.array([], np.int64)
    reader = _reader(model)
    fitted = np.sort(np.random.default_rng(seed).permutation(training)[:_ENOUGH])
    total = len(keys) + len(fitted) + len(laterals)

    def read(wanted: np.ndarray, changes: Mapping[str, Change], before: int) -> dict[str, np.ndarray]:
        return predict_changed(
            reader,
            shards,
            wanted,
            changes,
            classes=list(operating["classes"]),
            size=operating["size"],
            batch_size=batch_size,
            output="said",
            update=lambda done, _, note="": update(before + done, total, note),
        )

    plain: dict[str, Change] = {AS_IT_IS: lambda films: films.images}
    mild: dict[str, Change] = {name: partial(_changed, change=change, seed=seed) for name, change in MILD.items()}
    others: dict[str, Change] = {kind: partial(outside, kind=kind, seed=seed) for kind in (*NON_CHEST, TURNED)}
    said = read(keys, plain | mild | others, 0)
    trained = read(fitted, plain, len(keys))[AS_IT_IS]

    films, task = table.loc[keys], operating["task"]
    patients = films["patient_key"].to_numpy()
    draws: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    classes = len(operating["classes"]) if "logits" in model.output else 0
    channels = trained.shape[1] - classes
    found: dict[str, Any] = {}
    if classes:
        cuts = np.array(list(operating["thresholds"].values()))
        logits = {name: said[name][:, channels:] for name in (AS_IT_IS, *MILD)}
        confidence, error = certainty(
            logits[AS_IT_IS], labels(films, operating["classes"]), task, operating["temperature"], cuts
        )
        found["selective"] = _selective(confidence, error, patients, draws)
        calls = {name: _calls(each, task, operating["temperature"], cuts) for name, each in logits.items()}
        found["agreement"] = _agreement(calls, error, patients, draws)

    # Laterals among the reported films are other images, too, unless the model has learned from some.
    usual = ~is_lateral[keys] if new else np.ones(len(keys), bool)
    images = {kind: said[kind][usual] for kind in (AS_IT_IS, *others)}
    whose = [patients[usual]] * len(images)
    if len(laterals):
        images[LATERAL] = read(laterals, plain, len(keys) + len(fitted))[AS_IT_IS]
        whose.append(table["patient_key"].to_numpy()[laterals])
    every = np.concatenate(list(images.values()))
    scores = {"mahalanobis": mahalanobis(trained[:, :channels], every[:, :channels])}
    if classes:
        scores["energy"] = energy(every[:, channels:], task)
    kind = np.repeat(list(images), [len(each) for each in images.values()])
    told = _told_apart(scores, kind, np.concatenate(whose), draws)
    found["out_of_distribution"] = {
        "auroc": told["mahalanobis"]["non_chest"],
        **told,
        "fitted_on": len(fitted),
        "note": f"The other images are made: {', '.join(NON_CHEST)}. {_of_laterals(new, len(laterals))}",
    }
    return found


def _of_laterals(new: bool, count: int) -> str:
    if not new:
        return "The model was trained on lateral films, so they are nothing new to it and are not tried."
    if count:
        return f"{count:,} real lateral films were tried."
    return (
        f"Real laterals were not available: {_NO_LATERALS}. The film turned by 90° stands in for them, and says little "
        "about them."
    )


def _reader(model: MultiTask) -> keras.Model:
    """Image -> "said": pooled features and, behind them, logits; one pass through the encoder gives both."""
    features = pooled_features(model.encoder).output["features"]
    if "logits" not in model.output:
        return keras.Model(model.input, {"said": features})
    said = keras.layers.Concatenate(dtype="float32")([features, model.output["logits"]])
    return keras.Model(model.input, {"said": said})


def _changed(films: Films, change: Pixels, seed: int) -> np.ndarray:
    return on_films(films.images, films, change, seed)


def _calls(logits: np.ndarray, task: Task, temperature: float, thresholds: np.ndarray) -> np.ndarray:
    """What the model says of each film: its most probable class `[n, 1]`, or every call `[n, classes]`."""
    p = probabilities_of(logits, task, temperature)
    return p.argmax(1)[:, None] if task == "multiclass" else p >= thresholds
