"""What a model loses on films that are worse than those it was tested on: eight corruptions, each at five strengths.

The plan is that of Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations" (ICLR 2019), with changes that radiographs go through (`CORRUPTIONS`). The same films are judged as they
are and under each of the forty changes, on the same draws of patients, so that differences have paired intervals.

    {"kept": Estimate,
     "n": {"images", "patients", "annotated"},
     "unchanged":   {"auroc": Estimate, "dice": Estimate},
     "corruptions": {name: {"title", "unit", "values": five numbers,
                            "classification": {"auroc", "difference", "kept", "same_call": five Estimates each,
                                               "mean_kept": Estimate},
                            "segmentation":   {"dice", "difference", "kept": five Estimates each,
                                               "mean_kept": Estimate}}}}

    auroc       mean over the classes that show both outcomes here
    difference  from the films as they are: below 0 is a loss
    kept        (AUROC - 0.5) / (AUROC of the films as they are - 0.5); of Dice, the quotient. 1 = nothing lost, 0 = no
                skill left; it may lie outside of 0-1
    same_call   share of films of which the model says the same as of the film as it is: the most probable class, or
                (multi-label) every call at the thresholds
    mean_kept   mean of "kept" over the five strengths; the "kept" on top is the mean of these over all corruptions, of
                the classification, or of the segmentation where the model only segments

A head that the model does not have is left out. Dice is over the films with an annotated opacity; where things move on
the film, what was annotated moves with them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
from PIL import Image
from scipy import ndimage

from cxr_tf.data.manifest import labels
from cxr_tf.data.shards import ShardFolder
from cxr_tf.errors import CxrError, nearest
from cxr_tf.evaluate import metrics
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.inference import Films, predict_changed
from cxr_tf.evaluate.metrics import mask_scores, ratio
from cxr_tf.progress import Update, silent

STRENGTHS = (1, 2, 3, 4, 5)

Case = tuple[str, int]  # a corruption and its strength
Key = tuple[str, str, int]  # a figure in a case

AS_IT_IS: Case = ("", 0)

_MAIN = {"classification": "auroc", "segmentation": "dice"}
_NO_SKILL = "not measurable: there is no skill on the films as they are, so none can be kept"


class RobustnessError(CxrError):
    """A corruption that there is not."""


class Corruption(NamedTuple):
    """One way in which films get worse.

    Attributes:
        title: its name, for readers.
        unit: what the values are, to be read after them.
        values: one a strength, mildest first.
        change: film float32 `[height, width]`, 0-255, value and a random generator -> the film, changed.
        moves: whether things move on the film, so that a mask must move with it.
    """

    title: str
    unit: str
    values: tuple[float, float, float, float, float]
    change: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]
    moves: bool = False


def contrast(film: np.ndarray, factor: float) -> np.ndarray:
    """Gray levels drawn together around the film's mean (factor below 1), or apart."""
    return film * factor + film.mean(dtype=np.float64).astype(np.float32) * (1 - factor)


def rotated(film: np.ndarray, degrees: float) -> np.ndarray:
    """The film turned about its middle, counter-clockwise, bilinear; black comes in at the corners."""
    return np.asarray(Image.fromarray(film).rotate(degrees, Image.Resampling.BILINEAR))


def _noisy(film: np.ndarray, part: float, rng: np.random.Generator) -> np.ndarray:
    return film + 255 * part * rng.standard_normal(film.shape, np.float32)


def _blurred(film: np.ndarray, part: float) -> np.ndarray:
    return ndimage.gaussian_filter(film, part * max(film.shape), mode="nearest")


def _shifted(film: np.ndarray, part: float, rng: np.random.Generator) -> np.ndarray:
    """By whole pixels, up, down, left or right."""
    axis, forward = rng.integers(2, size=2)
    by = min(round(part * max(film.shape)), film.shape[axis])
    here, there = [slice(None)] * 2, [slice(None)] * 2
    here[axis], there[axis] = slice(by, None), slice(None, film.shape[axis] - by)
    if not forward:
        here, there = there, here
    moved = np.zeros_like(film)
    moved[tuple(here)] = film[tuple(there)]
    return moved


def _compressed(film: np.ndarray, quality: float) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(np.rint(film).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file), np.float32)


def _coarse(film: np.ndarray, factor: float) -> np.ndarray:
    height, width = film.shape
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    image = Image.fromarray(film).resize(small, Image.Resampling.BILINEAR)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def _solarized(film: np.ndarray, part: float) -> np.ndarray:
    """A tone curve like a V, stretched to the full range: its left arm falls, its right one rises."""
    lowest = 255 * part
    return np.abs(film - lowest) * (255 / max(lowest, 255 - lowest))


CORRUPTIONS: dict[str, Corruption] = {
    "contrast": Corruption(
        "Less contrast",
        "of the contrast around the film's mean",
        (0.9, 0.75, 0.6, 0.45, 0.3),
        lambda film, factor, rng: contrast(film, factor),
    ),
    "noise": Corruption(
        "Noise",
        "of the range from black to white: standard deviation of white noise",
        (0.01, 0.02, 0.04, 0.08, 0.16),
        _noisy,
    ),
    "blur": Corruption(
        "Blur",
        "of the film's longer side: standard deviation of a Gaussian (0.01 of 43 cm is 4 mm)",
        (0.005, 0.008, 0.0125, 0.02, 0.03),
        lambda film, part, rng: _blurred(film, part),
    ),
    "rotation": Corruption(
        "Rotation",
        "degrees about the film's middle, to the one side or the other",
        (3, 7, 12, 20, 30),
        lambda film, degrees, rng: rotated(film, degrees if rng.integers(2) else -degrees),
        moves=True,
    ),
    "shift": Corruption(
        "Shift",
        "of the film's longer side, up, down, left or right",
        (0.02, 0.05, 0.1, 0.15, 0.2),
        _shifted,
        moves=True,
    ),
    "jpeg": Corruption(
        "JPEG compression",
        "of 100: quality, at the model's size",
        (80, 60, 40, 20, 10),
        lambda film, quality, rng: _compressed(film, quality),
    ),
    "resolution": Corruption(
        "Lower resolution",
        "times fewer pixels a side than the model takes, enlarged again",
        (2, 3, 4, 8, 16),
        lambda film, factor, rng: _coarse(film, factor),
    ),
    "polarity": Corruption(
        "Polarity",
        "of the gray levels in negative, the darkest first, as where film is overexposed; 1 is the full negative",
        (0.2, 0.4, 0.6, 0.8, 1.0),
        lambda film, part, rng: _solarized(film, part),
    ),
}
"""What films go through, by name.

Which way a film is turned or moved, and its noise, are the same at every strength.
"""

CASES: tuple[Case, ...] = (AS_IT_IS, *((name, strength) for name in CORRUPTIONS for strength in STRENGTHS))


def corrupted(films: Films, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """The films' images, corrupted; what a film becomes depends on itself, its row, name, strength and seed alone.

    Args:
        films: a batch, from `predict_changed`.
        name: one of `CORRUPTIONS`.
        strength: 1 (mildest) to 5, or 0 for the films as they are.
        seed: of what is random.

    Returns:
        float32 `[batch, size, size, 1]`, 0-255; padding is as it was.

    Raises:
        RobustnessError: for another name or strength.

    Example:
        >>> blank = np.zeros([1, 64, 64, 1], np.float32)
        >>> films = Films(blank, np.array([0]), blank == 0, blank)
        >>> corrupted(films, "polarity", 5).mean()
        np.float32(255.0)
    """
    _check(name, strength)
    if not strength:
        return films.images
    change, value = CORRUPTIONS[name].change, CORRUPTIONS[name].values[strength - 1]
    return on_films(films.images, films, lambda film, rng: change(film, value, rng), seed)


def moved_truth(films: Films, name: str, strength: int, seed: int = 0) -> np.ndarray:
    """The annotated masks of films that `corrupted` changed: moved where things move on the film, and else as they are.

    Arguments and errors as `corrupted`.

    Returns:
        float32 `[batch, size, size, 1]` of 0 and 1; NaN all over = no annotation.
    """
    _check(name, strength)
    if not strength or not CORRUPTIONS[name].moves:
        return films.truth
    change, value = CORRUPTIONS[name].change, CORRUPTIONS[name].values[strength - 1]
    moved = on_films(films.truth, films, lambda mask, rng: change(mask, value, rng), seed) >= 0.5
    return np.where(np.isnan(films.truth), films.truth, moved.astype(np.float32))


def _check(name: str, strength: int) -> None:
    if name not in CORRUPTIONS and (name, strength) != AS_IT_IS:
        accepted = ", ".join(CORRUPTIONS)
        raise RobustnessError(
            f"A corruption is one of {accepted}.{nearest(str(name), CORRUPTIONS)} Received: {name!r}."
        )
    if strength not in (0, *STRENGTHS):
        raise RobustnessError(f"A strength is 1 (mildest) to 5, or 0 for no change. Received: {strength!r}.")


def on_films(
    pixels: np.ndarray, films: Films, change: Callable[[np.ndarray, np.random.Generator], np.ndarray], seed: int
) -> np.ndarray:
    """Changes each film where it lies in its square, one by one, each with a generator made of the seed and its row.

    Args:
        pixels: float32 `[batch, size, size, 1]`: the films' images, or their masks.
        films: which films they are of.
        change: float32 `[height, width]` and a generator -> the same shape. What it leaves the range 0-255 is clipped.
        seed: of the generators.

    Returns:
        float32 `[batch, size, size, 1]`; padding is as it was.
    """
    changed = pixels.copy()
    for i, (row, content) in enumerate(zip(films.rows, films.content[..., 0], strict=True)):
        rows, columns = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
        box = np.s_[i, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 0]
        film = change(np.ascontiguousarray(pixels[box]), np.random.default_rng([seed, int(row)]))
        changed[box] = np.clip(film, 0, 255)
    return changed


class Ordered:
    """One class's films, ready for the AUROC under many draws: `Ranked` gives the same, in three times the time.

    Args:
        scores: `[n]`, higher = more likely positive.
        labels: `[n]`; 1, 0, or NaN = unknown, left out.
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray) -> None:
        self._positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        self._negative = negative[np.argsort(scores[negative], kind="stable")]
        rising = scores[self._negative]
        self._below, self._level = (np.searchsorted(rising, scores[self._positive], side) for side in ("left", "right"))

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """The share of pairs of a positive and a negative film that are in order; ties count half.

        Args:
            weights: float64 `[n, replicates]`, a column a draw: films that follow one another lie together then.

        Returns:
            `[replicates]`, NaN for one without both outcomes.
        """
        counted = np.cumsum(weights[self._negative], axis=0)
        counted = np.concatenate([np.zeros((1, weights.shape[1])), counted])
        positive = weights[self._positive]
        wins = np.einsum("nr,nr->r", positive, counted[self._below] + counted[self._level]) / 2
        pairs = positive.sum(0) * counted[-1]
        return np.where(pairs > 0, ratio(wins, pairs), np.nan)


def robustness(
    model: keras.Model,
    shards: ShardFolder,
    keys: np.ndarray,
    operating: Mapping[str, Any],
    *,
    batch_size: int,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    update: Update = silent,
) -> dict[str, Any]:
    """Judges a model under every corruption, at every strength.

    Args:
        model: functional, with outputs "logits" and/or "mask_logits".
        shards: where the films are.
        keys: integer `[n]`, which films: those that are reported.
        operating: a run's `operating.json`: classes, task, size, temperature, thresholds, mask_threshold.
        batch_size: films at a time.
        replicates: draws of patients.
        seed: of the draws, and of noise and directions.
        level: of the intervals.
        update: shows progress.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        PipelineError: for keys that are not there, or films that cannot be read.
        BootstrapError: for settings out of range.

    Example:
        >>> found = robustness(model, shards, keys, run.operating(), batch_size=16)  # doctest: +SKIP
        >>> found["corruptions"]["noise"]["classification"]["kept"][4]["value"]  # doctest: +SKIP
        0.31
    """
    films = shards.manifest.loc[keys]
    patients = films["patient_key"].to_numpy()
    annotated = np.flatnonzero(films["mask_known"] & (films["mask"].notna() | films["boxes"].map(bool)))
    passes = {"logits": len(films), "mask_logits": len(annotated)}
    total = sum(films for head, films in passes.items() if head in model.output)
    draws: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    heads: dict[str, dict[Key, Estimate]] = {}
    done = 0
    if "logits" in model.output:
        said = predict_changed(
            model,
            shards,
            keys,
            {str(case): partial(corrupted, name=case[0], strength=case[1], seed=seed) for case in CASES},
            classes=list(operating["classes"]),
            size=operating["size"],
            batch_size=batch_size,
            update=lambda films, _, note="": update(films, total, note),
        )
        logits = {case: said[str(case)] for case in CASES}
        heads["classification"] = _classification(
            logits, labels(films, operating["classes"]), patients, operating, draws
        )
        done = len(films)
    if "mask_logits" in model.output:
        dice = {case: np.full(len(films), np.nan) for case in CASES}
        reader = keras.Model(model.input, {"mask_logits": model.output["mask_logits"]})  # once, for all batches
        for start in range(0, len(annotated), batch_size):
            rows = annotated[start : start + batch_size]
            for case, scores in _dice(reader, shards, np.asarray(keys)[rows], rows, operating, seed).items():
                dice[case][rows] = scores
            update(done + start + len(rows), total)
        heads["segmentation"] = _segmentation(dice, patients, draws)
    return {
        "kept": next(iter(heads.values()))["mean_kept", *AS_IT_IS].to_json(),
        "n": {"images": len(films), "patients": len(np.unique(patients)), "annotated": len(annotated)},
        "unchanged": {_MAIN[head]: estimates[_MAIN[head], *AS_IT_IS].to_json() for head, estimates in heads.items()},
        "corruptions": {
            name: {
                "title": corruption.title,
                "unit": corruption.unit,
                "values": list(corruption.values),
                **{head: _by_strength(estimates, name) for head, estimates in heads.items()},
            }
            for name, corruption in CORRUPTIONS.items()
        },
    }


def _by_strength(estimates: Mapping[Key, Estimate], name: str) -> dict[str, Any]:
    """One corruption's figures: a list over the strengths of each, but for its mean."""
    figures: dict[str, Any] = {}
    for (figure, which, strength), estimate in estimates.items():
        if which == name and strength:
            figures.setdefault(figure, []).append(estimate.to_json())
        elif which == name:
            figures[figure] = estimate.to_json()
    return figures


def _classification(
    logits: Mapping[Case, np.ndarray],
    labels: np.ndarray,
    patients: np.ndarray,
    operating: Mapping[str, Any],
    draws: Mapping[str, Any],
) -> dict[Key, Estimate]:
    """AUROC under every change, and on how many films the model says the same."""
    task, y = operating["task"], labels.astype(np.float64)
    said = {case: probabilities_of(each, task, operating["temperature"]) for case, each in logits.items()}
    if task == "multiclass":
        y = np.where((metrics.one_hot_rows(y) < 0)[:, None], np.nan, y)
        calls = {case: p.argmax(1)[:, None] for case, p in said.items()}
    else:
        calls = {case: p >= list(operating["thresholds"].values()) for case, p in said.items()}
    same = {case: (call == calls[AS_IT_IS]).all(1).astype(np.float64) for case, call in calls.items()}
    judged = np.flatnonzero(metrics.both_outcomes(y))
    if task == "multiclass" and y.shape[1] == 2:
        judged = judged[:1]  # the other class is the same, the other way around
    ordered = {case: [Ordered(p[:, c], y[:, c]) for c in judged] for case, p in said.items()}

    def statistic(weights: np.ndarray) -> dict[Key, np.ndarray]:
        columns, none = np.ascontiguousarray(weights.T), np.full(len(weights), np.nan)
        found = {
            case: np.mean([one.auroc(columns) for one in each], axis=0) if each else none
            for case, each in ordered.items()
        }
        figures = _compared("auroc", found, dict.fromkeys(CASES, found[AS_IT_IS]), 0.5)
        return figures | {("same_call", *case): weights @ same[case] / weights.sum(1) for case in CASES[1:]}

    known: np.ndarray = np.any(~np.isnan(y[:, judged]), axis=1)
    used = _used("auroc", dict.fromkeys(CASES, known))
    return _explained(bootstrap(statistic, patients, used=used, **draws), "auroc")


def _segmentation(
    dice: Mapping[Case, np.ndarray], patients: np.ndarray, draws: Mapping[str, Any]
) -> dict[Key, Estimate]:
    """Mean Dice under every change, against that of the same films as they are."""
    # An opacity that was moved off the film has no Dice any more.
    known = {case: ~np.isnan(scores) & ~np.isnan(dice[AS_IT_IS]) for case, scores in dice.items()}

    def mean(scores: np.ndarray, films: np.ndarray, weights: np.ndarray) -> np.ndarray:
        total = weights @ films.astype(np.float64)
        return np.where(total > 0, ratio(weights @ np.where(films, scores, 0), total), np.nan)

    def statistic(weights: np.ndarray) -> dict[Key, np.ndarray]:
        found = {case: mean(scores, known[case], weights) for case, scores in dice.items()}
        base = {case: mean(dice[AS_IT_IS], films, weights) for case, films in known.items()}
        return _compared("dice", found, base, 0.0)

    used = _used("dice", known)
    return _explained(bootstrap(statistic, patients, used=used, **draws), "dice")


def _dice(
    reader: keras.Model,
    shards: ShardFolder,
    keys: np.ndarray,
    rows: np.ndarray,
    operating: Mapping[str, Any],
    seed: int,
) -> dict[Case, np.ndarray]:
    """Dice of a batch under every change; masks of more films at a time would not fit into memory."""
    seen: list[Films] = []

    def change(films: Films, case: Case) -> np.ndarray:
        films = films._replace(rows=rows[films.rows])
        if case == AS_IT_IS:
            seen.append(films)
        return corrupted(films, *case, seed)

    said = predict_changed(
        reader,
        shards,
        keys,
        {str(case): partial(change, case=case) for case in CASES},
        classes=list(operating["classes"]),
        size=operating["size"],
        batch_size=len(keys),
        output="mask_logits",
    )
    cut = float(np.log(operating["mask_threshold"] / (1 - operating["mask_threshold"])))
    (films,) = seen
    return {
        case: mask_scores(said[str(case)] >= cut, moved_truth(films, *case, seed), films.content).dice for case in CASES
    }


def _compared(
    figure: str, found: Mapping[Case, np.ndarray], base: Mapping[Case, np.ndarray], chance: float
) -> dict[Key, np.ndarray]:
    """The figure in every case, its difference from the films as they are (`base`), and how much skill is kept."""
    figures = {(figure, *case): value for case, value in found.items()}
    for case in CASES[1:]:
        skill = base[case] - chance
        kept = np.divide(found[case] - chance, skill, out=np.full(skill.shape, np.nan), where=skill > 0)
        figures |= {("difference", *case): found[case] - base[case], ("kept", *case): kept}
    for name in CORRUPTIONS:
        figures["mean_kept", name, 0] = np.mean([figures["kept", name, strength] for strength in STRENGTHS], axis=0)
    figures["mean_kept", *AS_IT_IS] = np.mean([figures["mean_kept", name, 0] for name in CORRUPTIONS], axis=0)
    return figures


def _used(figure: str, known: Mapping[Case, np.ndarray]) -> dict[Key, np.ndarray]:
    """The films that the figures of `_compared` are over."""
    each = {(name, *case): films for name in (figure, "difference", "kept") for case, films in known.items()}
    return each | {("mean_kept", name, 0): known[AS_IT_IS] for name in ("", *CORRUPTIONS)}


def _explained(estimates: dict[Key, Estimate], figure: str) -> dict[Key, Estimate]:
    """Where a share of skill is not measurable though the skill is, says why."""
    measurable = estimates[figure, *AS_IT_IS].measurable
    return {
        key: replace(one, note=_NO_SKILL) if measurable and "kept" in key[0] and not one.measurable else one
        for key, one in estimates.items()
    }
