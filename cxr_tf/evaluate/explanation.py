"""Whether a model's reasons lie where the finding is: saliency maps against the opacities that somebody annotated.

    {"size", "tolerance", "randomizations", "replicates", "seed", "level",
     "n":        {"films", "annotated", "explained"},
     "overall":  {"grad_cam":     figures of the saliency map (cxr_tf.evaluate.saliency),
                  "segmentation": figures of the segmentation head's probability map,
                  "randomized":   figures of the saliency map of the same network with random weights, and
                                  "rank_correlation" and "absolute_rank_correlation",
                  "chance":       figures of a map that is the same everywhere},
     "classes":  {class: the same as "overall", of the films of that class; a class without any is left out}}

Figures are means over films, each an `Estimate` (`cxr_tf.evaluate.bootstrap`). They are of the film alone: what lies on
the padding around it is left out.

    pointing_game     how often the map's highest point lies on an annotated opacity
    iou_at_area       overlap (IoU) of the annotation with as many of the map's highest pixels as it has itself
    share_in_lungs    share of the whole map that lies inside the lungs, on films whose lungs are known

and for each but those of "chance", `<figure>_above_chance`: the difference from chance on the same films. A map without
any evidence does not say where, so it points and overlaps as chance does; it has no share in the lungs.

`rank_correlation` is Spearman's, between the model's map and that of the network with random weights, over the film's
pixels: the map must change when what was learned is gone (Adebayo et al., "Sanity checks for saliency maps", NeurIPS
2018). `absolute_rank_correlation` is the same without its sign, and the one to go by: random weights may turn a map
that edges or the architecture draw into its opposite, and over several networks the two signs cancel out. At 1 a map
explains nothing. Unrelated maps do not reach 0 but .2 to .4, because they are smooth. All figures of "randomized" are
means over several networks, as any one of them may point anywhere.

The class that is explained is the film's true one, not the predicted one: where the model looks for a finding is one
question, and whether it names it another. A film of several classes is in once for each. Masks do not say which class
they are of; in a set with findings that nobody outlined, only the classes that were outlined are to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from scipy import ndimage
from scipy.special import expit
from scipy.stats import rankdata

from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.metrics import MetricError, ratio
from cxr_tf.evaluate.saliency import grad_cam, randomized
from cxr_tf.models.multitask import MultiTask
from cxr_tf.progress import Update, silent

RANDOMIZATIONS = 3  # networks with random weights

_UNKNOWN = -1  # stands where a class number would: none is known to be true, so only the segmentation is judged
_FIGURES = ("pointing_game", "iou_at_area", "share_in_lungs")
_MAPS = ("grad_cam", "segmentation", "randomized")
_KEYS = (
    *((name, figure) for name in ("chance", *_MAPS) for figure in _FIGURES),
    *((name, f"{figure}_above_chance") for name in _MAPS for figure in _FIGURES),
    ("randomized", "rank_correlation"),
    ("randomized", "absolute_rank_correlation"),
)

Maps = dict[str, list[np.ndarray]]  # float [h, w] by kind: several of "randomized", none of what there is no head for
Scores = dict[tuple[str, str], float]  # by kind of map and figure; NaN where the film cannot give it


def explain_films(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    *,
    classes: list[str],
    size: int,
    batch_size: int,
    patients: np.ndarray,
    lungs: np.ndarray | None = None,
    tolerance: float = 0.0,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    update: Update = silent,
) -> dict[str, Any]:
    """Judges explanations on the films with an annotated opacity; all others are left out.

    Args:
        model: with either head, or both.
        shards: where the films are.
        keys: integer `[n]`, which films.
        classes: the model's classes, in its order.
        size: side of the model's input.
        batch_size: films at a time.
        patients: whole numbers `[n]`: whose film it is.
        lungs: bool `[n, size, size]`, the lungs in the model's square; False all over for a film whose lungs are not
            known. None where those of no film are.
        tolerance: how far from the annotation the highest point may lie and still count, in pixels of the model's
            square (Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018, allow 15 on photographs
            of about 500).
        replicates: draws of patients.
        seed: of the draws, and of the random weights.
        level: of the intervals.
        update: shows progress.

    Returns:
        The dict that the module's text describes. What films or model cannot give is an `Estimate` without a value,
        whose note says why.

    Raises:
        MetricError: for arrays that do not fit the keys or the size, or a negative tolerance.
        PipelineError: for keys or classes that are not in the shards.
        BootstrapError: for settings out of range.

    Example:
        >>> found = explain_films(
        ...     model, shards, keys, classes=shards.classes, size=320, batch_size=16, patients=patients
        ... )  # doctest: +SKIP
        >>> found["overall"]["grad_cam"]["pointing_game_above_chance"]["low"] > 0  # doctest: +SKIP
        True
    """
    patients = np.asarray(patients)
    if patients.shape != (len(keys),):
        raise MetricError(f"Patients must be [{len(keys)}], one a film. Received: {patients.shape}.")
    if lungs is not None and (lungs.shape != (len(keys), size, size) or lungs.dtype != bool):
        raise MetricError(f"Lungs must be bool [{len(keys)}, {size}, {size}]. Received: {lungs.dtype} {lungs.shape}.")
    if not tolerance >= 0:
        raise MetricError(f"The tolerance must be 0 pixels or more. Received: {tolerance}.")

    draw = _drawing(model, seed)
    rows: list[_Row] = []
    annotated = done = 0
    dataset = batches(
        shards, keys, size=size, batch_size=batch_size, shuffle=False, classes=classes, content_boxes=True
    )
    for images, truth in read_batches(dataset):
        labels, masks = truth["logits"].numpy(), truth["mask_logits"].numpy()[..., 0] == 1
        films = np.flatnonzero(masks.any(axis=(1, 2)))
        annotated += len(films)
        pairs = [(int(i), c) for i in films for c in _explained(labels[i])]
        drawn = draw(tf.gather(images, [i for i, _ in pairs]), [c for _, c in pairs]) if pairs else []
        for (i, c), maps in zip(pairs, drawn, strict=True):
            top, left, height, width = truth["content_box"][i].numpy()
            film = np.s_[top : top + height, left : left + width]
            inside = None if lungs is None else lungs[done + i][film]
            on_film = {name: [one[film] for one in each] for name, each in maps.items()}
            rows.append(_Row(done + i, c, _scores(on_film, masks[i][film], inside, tolerance)))
        done += len(images)
        update(done, len(keys))

    def why(name: str, figure: str) -> str:
        """Why a figure has no value."""
        if not rows:
            return "no film has an annotated opacity"
        if name in ("grad_cam", "randomized") and "logits" not in model.heads:
            return "the model has no classification head"
        if name == "segmentation" and "mask_logits" not in model.heads:
            return "the model has no segmentation head"
        if figure.startswith("share_in_lungs") and lungs is None:
            return "no lung masks were given"
        return "no annotated film can give it"

    draws: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    found: dict[str | None, dict[str, dict[str, Any]]] = {}
    for (group, name, figure), estimate in _estimates(rows, classes, patients, draws).items():
        if estimate.value is None:
            estimate = replace(estimate, note=f"not measurable: {why(name, figure)}")
        found.setdefault(group, {}).setdefault(name, {})[figure] = estimate.to_json()
    explained = {row.film for row in rows if row.explained != _UNKNOWN}
    return {
        "size": size,
        "tolerance": tolerance,
        "randomizations": RANDOMIZATIONS,
        **draws,
        "n": {"films": len(keys), "annotated": annotated, "explained": len(explained)},
        "overall": found.pop(None),
        "classes": found,
    }


# --- one map on one film ----------------------------------------------------------------------------------------------


def pointing_game(saliency: np.ndarray, mask: np.ndarray, tolerance: float = 0.0) -> float:
    """Whether a map's highest point lies on a mask: 1 or 0, or between the two where several points are the highest.

    Of points that are equally high, the share on the mask counts, which is what one drawn from among them hits on
    average. A map that is the same everywhere so gets the mask's share of the film: chance.

    Args:
        saliency: float `[h, w]`, of the film without its padding.
        mask: bool `[h, w]`, not empty.
        tolerance: how far from the mask the point may lie and still count, in pixels.

    Example:
        >>> pointing_game(np.array([[0.1, 0.9], [0.2, 0.9]]), np.array([[False, True], [False, False]]))
        0.5
    """
    near = ndimage.distance_transform_edt(~mask) <= tolerance if tolerance else mask
    return float(near[saliency == saliency.max()].mean())


def iou_at_area(saliency: np.ndarray, mask: np.ndarray) -> float:
    """IoU of a mask with as many of a map's highest pixels as it has itself: 0-1, whatever the map's scale.

    Of pixels that are equally high at the edge of the choice, as many are in as there is room for: what so many drawn
    from among them have in common with the mask on average counts.

    Args:
        saliency: float `[h, w]`, of the film without its padding.
        mask: bool `[h, w]`, not empty.

    Example:
        >>> iou_at_area(np.array([[0.1, 0.9], [0.2, 0.8]]), np.array([[False, True], [True, False]]))
        0.3333333333333333
    """
    area = int(mask.sum())
    cut = np.partition(saliency, -area, axis=None)[-area]
    above, tied = saliency > cut, saliency == cut
    both = (above & mask).sum() + (area - above.sum()) * mask[tied].mean()
    return float(both / (2 * area - both))


def share_inside(saliency: np.ndarray, region: np.ndarray) -> float:
    """Share of a map's sum that lies inside a region, 0-1; NaN where the map is 0 all over or the region is empty.

    Args:
        saliency: float `[h, w]`, 0 or more.
        region: bool `[h, w]`.
    """
    total = saliency.sum(dtype=np.float64)
    if not (total > 0 and region.any()):
        return float("nan")
    return float(saliency[region].sum(dtype=np.float64) / total)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two maps `[h, w]`, -1 to 1; NaN where one of them is the same everywhere.

    Example:
        >>> rank_correlation(np.array([[1.0, 2.0, 30.0]]), np.array([[0.1, 0.2, 0.3]]))
        1.0
    """
    # Half of the pixels may be 0 in a saliency map: ties have their mean rank.
    x, y = (rankdata(each) - (each.size + 1) / 2 for each in (one, other))
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else float("nan")


# --- all maps on all films --------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A film, the class that was explained on it, and its figures."""

    film: int
    explained: int
    scores: Scores


def _explained(labels: np.ndarray) -> list[int]:
    """The classes to explain on a film with these labels `[classes]`."""
    return np.flatnonzero(labels == 1).tolist() or [_UNKNOWN]


def _drawing(model: MultiTask, seed: int) -> Callable[[Any, Sequence[int]], list[Maps]]:
    """A function from films and the class to explain on each to the maps of each."""
    makers: dict[str, list[Callable[[Any, Any], Any]]] = {name: [] for name in _MAPS}
    if "logits" in model.heads:
        makers["grad_cam"] = [grad_cam(model)]
        makers["randomized"] = [grad_cam(randomized(model, seed + i)) for i in range(RANDOMIZATIONS)]
    if "mask_logits" in model.heads:
        inner = keras.Model(model.input, model.output["mask_logits"])
        shape = tf.TensorSpec(model.input.shape, tf.float32)
        segment = tf.function(lambda images: inner(images, training=False)[..., 0], input_signature=[shape])
        # In float64, probabilities near 1 can still be told apart.
        makers["segmentation"] = [lambda images, explained: expit(segment(images).numpy().astype(np.float64))]

    def draw(images: Any, explained: Sequence[int]) -> list[Maps]:
        classes = tf.constant(explained, tf.int32)
        made = {name: [np.asarray(make(images, classes)) for make in each] for name, each in makers.items()}
        return [
            {
                name: [batch[row] for batch in each] if c != _UNKNOWN or name == "segmentation" else []
                for name, each in made.items()
            }
            for row, c in enumerate(explained)
        ]

    return draw


def _scores(maps: Maps, mask: np.ndarray, lungs: np.ndarray | None, tolerance: float) -> Scores:
    """All figures of one film."""

    def figures(saliency: np.ndarray) -> list[float]:
        inside = float("nan") if lungs is None else share_inside(saliency, lungs)
        return [pointing_game(saliency, mask, tolerance), iou_at_area(saliency, mask), inside]

    scores: Scores = {}
    chance = figures(np.ones(mask.shape))
    for figure, value in zip(_FIGURES, chance, strict=True):
        scores["chance", figure] = value
    for name in _MAPS:
        columns = zip(*map(figures, maps[name]), strict=True) if maps[name] else ([] for _ in _FIGURES)
        for figure, values, level in zip(_FIGURES, columns, chance, strict=True):
            scores[name, figure] = _mean(values)
            scores[name, f"{figure}_above_chance"] = scores[name, figure] - level
    correlations = [rank_correlation(*pair) for pair in product(maps["grad_cam"], maps["randomized"])]
    scores["randomized", "rank_correlation"] = _mean(correlations)
    scores["randomized", "absolute_rank_correlation"] = _mean(map(abs, correlations))
    return scores


def _mean(values: Iterable[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is left."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _estimates(
    rows: Sequence[_Row], classes: Sequence[str], patients: np.ndarray, draws: Mapping[str, Any]
) -> dict[tuple[str | None, str, str], Estimate]:
    """Means over films by class (None: over all), kind of map and figure."""
    if not rows:
        nothing = Estimate(None, None, None, draws["level"], 0, 0, 0, 0)
        return {(None, *key): nothing for key in _KEYS}
    explained = np.array([row.explained for row in rows])
    groups: dict[str | None, np.ndarray] = {None: np.ones(len(rows), bool)}
    groups |= {name: explained == c for c, name in enumerate(classes) if (explained == c).any()}
    columns = {key: np.array([row.scores[key] for row in rows]) for key in _KEYS}
    used = {(group, *key): among & ~np.isnan(columns[key]) for group, among in groups.items() for key in _KEYS}
    counted = np.stack(list(used.values()), axis=1).astype(np.float64)
    summed = counted * np.nan_to_num(np.stack([columns[name, figure] for _, name, figure in used], axis=1))

    def statistic(weights: np.ndarray) -> dict[tuple[str | None, str, str], np.ndarray]:
        total = weights @ counted
        means = np.where(total > 0, ratio(weights @ summed, total), np.nan)
        return dict(zip(used, means.T, strict=True))

    return bootstrap(statistic, patients[[row.film for row in rows]], used=used, **draws)
