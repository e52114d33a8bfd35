"""Films to look at: those that the model was most right, most wrong and least certain about, and some at random.

    {kind: [{"film": its number in predictions.csv, "picture": a file in `figures/`, "truth", "says", "text"}]}

Kinds are "best", "worst", "uncertain" and "films" (at random, of every class). "truth" and "says" are a few words each,
and "text" is for those who do not see the picture. A model that only segments is certain of nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder
from cxr_tf.evaluate.figures import contact_sheet, film_picture
from cxr_tf.evaluate.inference import Predictions
from cxr_tf.evaluate.saliency import TOP, grad_cam, normalized
from cxr_tf.models.multitask import MultiTask
from cxr_tf.models.outputs import calibrated

AT_RANDOM = 12
EXTREMES = 6  # films of each other kind

_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "center", "right")


def gallery(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    found: Predictions,
    probabilities: np.ndarray | None,
    operating: dict[str, Any],
    out: Path,
    *,
    classes: list[str],
    batch_size: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Draws films with what the model marks, what annotators drew, and where the evidence for the class it says lies.

    Args:
        model: with either head, or both.
        shards: where the films are.
        keys: integer `[n]`, the films that are reported.
        found: what the model says of them.
        probabilities: `[n, classes]`, calibrated, 0-1; None for a model that only segments.
        operating: a run's `operating.json`.
        out: folder of pictures. A sheet of each kind, `best.png`, and each film by itself, `films/best-1.jpg`.
        classes: of the labels, in the model's order.
        batch_size: films at a time.
        seed: of those at random.

    Returns:
        The dict that the module's text describes; `json.dumps` takes it.

    Raises:
        PipelineError: for keys that are not there, or films that cannot be read.
        WriteError: when a picture cannot be written.
    """
    chosen = {**_extremes(found, probabilities, operating["task"]), "films": _of_each_kind(found.labels, seed)}
    rows = np.unique(np.concatenate(list(chosen.values())))
    films = dict(zip(rows.tolist(), _films(model, shards, keys[rows], operating, classes, batch_size), strict=True))
    cut = operating["mask_threshold"]
    shown: dict[str, list[dict[str, Any]]] = {}
    for kind, positions in chosen.items():
        of_kind = [films[int(row)] for row in positions]
        contact_sheet(of_kind, out / f"{kind}.png", columns=3, threshold=cut)
        shown[kind] = []
        for i, (row, film) in enumerate(zip(positions, of_kind, strict=True), start=1):
            picture = film_picture(film, out / "films" / f"{kind}-{i}.jpg", threshold=cut)
            overlap = None if found.masks is None else float(found.masks.dice[row])
            shown[kind].append(
                {
                    "film": int(keys[row]),
                    "picture": f"films/{picture.name}",
                    "truth": film["title"],
                    "says": film["caption"],
                    "text": _in_words(film, int(keys[row]), cut, overlap),
                }
            )
    return shown


def _extremes(found: Predictions, probabilities: np.ndarray | None, task: str) -> dict[str, np.ndarray]:
    """Positions of the films that the model was most right, most wrong and least certain about."""
    if probabilities is not None:
        known = ~np.isnan(found.labels).any(axis=1)
        right = np.where(found.labels == 1, probabilities, 1 - probabilities)
        # Multi-class: the probability of the true class; multi-label: of the worst call.
        right = (probabilities * (found.labels == 1)).sum(axis=1) if task == "multiclass" else right.min(axis=1)
        unsure = 1 - probabilities.max(axis=1) if task == "multiclass" else (0.5 - abs(probabilities - 0.5)).max(axis=1)
        least = np.argsort(-unsure, kind="stable")[:EXTREMES]
    elif found.masks is not None:
        known, right, least = ~np.isnan(found.masks.dice), found.masks.dice, np.empty(0, np.int64)
    else:
        return {}
    rows = np.flatnonzero(known)
    order = rows[np.argsort(right[rows], kind="stable")]
    chosen = {"best": order[::-1][:EXTREMES], "worst": order[:EXTREMES], "uncertain": least}
    return {name: films for name, films in chosen.items() if len(films)}


def _of_each_kind(labels: np.ndarray, seed: int) -> np.ndarray:
    """Positions of films at random, as many of each class as there is room for, class by class."""
    with_none = np.concatenate([np.nan_to_num(labels), np.full((len(labels), 1), 0.5)], axis=1)
    kind = with_none.argmax(axis=1)  # its first class, or the one after the last for films of none
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    turn = pd.Series(kind[shuffled]).groupby(kind[shuffled]).cumcount().to_numpy()  # 0 for the first of each kind
    chosen = shuffled[np.lexsort((kind[shuffled], turn))][:AT_RANDOM]
    return chosen[np.argsort(kind[chosen], kind="stable")]


def _films(
    model: MultiTask,
    shards: ShardFolder,
    keys: np.ndarray,
    operating: dict[str, Any],
    classes: list[str],
    batch_size: int,
) -> list[dict[str, Any]]:
    """What `contact_sheet` draws of films: pixels, what the model says and why, what annotators said."""
    explain = grad_cam(model) if "logits" in model.heads else None
    dataset = batches(
        shards,
        keys,
        size=operating["size"],
        batch_size=batch_size,
        shuffle=False,
        classes=classes,
        content_boxes=True,
    )
    films = []
    for images, truth in read_batches(dataset):
        said = {name: value.numpy() for name, value in calibrated(model(images, training=False), operating).items()}
        maps = None if explain is None else normalized(explain(images, [TOP] * len(images))).numpy()
        for i in range(len(images)):
            top, left, height, width = truth["content_box"][i].numpy()
            on_film = np.s_[i, top : top + height, left : left + width]
            annotated = truth["mask_logits"].numpy()[..., 0][on_film]
            names = zip(classes, truth["logits"][i].numpy(), strict=True)
            film = {
                "film": images.numpy()[..., 0][on_film].round().clip(0, 255).astype(np.uint8),
                "mask": said["mask"][..., 0][on_film] if "mask" in said else None,
                "truth": None if np.isnan(annotated).any() else annotated,
                "saliency": None if maps is None else maps[on_film],
                "title": ", ".join(name for name, label in names if label == 1) or "no known finding",
                "caption": "",
            }
            if "probabilities" in said:
                best = int(said["probabilities"][i].argmax())
                film["caption"] = f"says {classes[best]}: {said['probabilities'][i, best]:.2f}"
            films.append(film)
    return films


def _in_words(film: dict[str, Any], number: int, cut: float, overlap: float | None) -> str:
    """The picture for those who do not see it."""
    sentences = [f"Film {number}: {film['title']}."]
    if film["caption"]:
        sentences.append(f"The model {film['caption']}.")
    if film["mask"] is not None:
        marked = float((film["mask"] >= cut).mean())
        sentences.append(f"It marks {100 * marked:.0f} % of the film." if marked else "It marks nothing.")
    if film["truth"] is not None:
        drawn = float((film["truth"] != 0).mean())
        sentences.append(f"Annotators drew {100 * drawn:.0f} %." if drawn else "Annotators drew nothing.")
    if overlap is not None and not np.isnan(overlap):
        sentences.append(f"The Dice of the two is {overlap:.2f}.")
    if (map_ := film["saliency"]) is not None:
        hottest = np.unravel_index(map_.argmax(), map_.shape)
        row, column = (3 * int(at) // side for at, side in zip(hottest, map_.shape, strict=True))
        sentences.append(
            f"At the right: the evidence is strongest in the {_ROWS[row]} {_COLUMNS[column]} of the picture."
            if map_.any()
            else "At the right: no evidence anywhere."
        )
    return " ".join(sentences)
