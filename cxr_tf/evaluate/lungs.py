"""Where the lungs are: drawn by annotators, or found by a segmentation model.

The two kinds of mask differ, above all behind the heart, and figures on them cannot be compared. So the masks of one
call are all of one kind, and the kind goes with them into every figure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.special import expit

from cxr_tf.data.pipeline import batches, read_batches
from cxr_tf.data.shards import ShardFolder, open_shards
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.inference import predict_changed
from cxr_tf.models.outputs import load_model
from cxr_tf.preprocess import mask_to_original
from cxr_tf.progress import Update, silent
from cxr_tf.run import open_run

_FILMS = 256  # predicted before they are made smaller: a mask's logits take four bytes a pixel


class LungError(CxrError):
    """A folder that says nothing of where lungs are."""


class Lungs(NamedTuple):
    """The lung fields of n films, in the model's square.

    Attributes:
        masks: bool `[n, size, size]`; empty where they are not known.
        known: bool `[n]`.
        kind: "annotated", or "predicted by" and the name of the run: where all of them are from.
    """

    masks: np.ndarray
    known: np.ndarray
    kind: str


def lung_masks(
    source: str | os.PathLike[str],
    shards: ShardFolder,
    keys: np.ndarray,
    size: int,
    *,
    batch_size: int = 32,
    update: Update = silent,
) -> Lungs:
    """The lung fields of films.

    Args:
        source: a folder of shards whose masks are lungs, prepared from the same films: a film is found there by the
            path of its image. Or the folder of a finished run of `cxr-tf train` that segments lungs; it predicts the
            masks, at its own size and threshold. That the masks of either are lungs cannot be checked here.
        shards: where the films are.
        keys: integer `[n]`, which films.
        size: side of the masks, that of the model that is judged.
        batch_size: films at a time.
        update: shows progress.

    Returns:
        `Lungs` in the order of the keys. Lungs are unknown where no mask is there, or an empty one: every chest has
        some.

    Raises:
        LungError: the folder is neither, or the run has no segmentation head.
        ShardError, RunError, ModelError: it is one of them, and damaged or not finished.

    Example:
        >>> lung_masks("shards/cxr-lungs", shards, keys, 320).kind  # doctest: +SKIP
        'annotated'
        >>> lung_masks("runs/cxr-lungs", shards, keys, 320).kind  # doctest: +SKIP
        'predicted by cxr-lungs'
    """
    folder, keys = Path(source), np.asarray(keys, np.int64)
    if (folder / "shards.json").is_file():
        masks, kind = _annotated(open_shards(folder), shards, keys, size, batch_size, update), "annotated"
    elif (folder / "config.toml").is_file():
        masks, kind = _predicted(folder, shards, keys, size, batch_size, update)
    else:
        raise LungError(
            f"{folder}: lungs are read from a folder that `cxr-tf prepare` wrote with lungs as masks (it has a "
            "shards.json), or predicted by a run of `cxr-tf train` that segments lungs (it has a config.toml). "
            f"Received: {'a folder with neither' if folder.is_dir() else 'no folder'}."
        )
    return Lungs(masks, np.any(masks, axis=(1, 2)), kind)


def _annotated(
    theirs: ShardFolder, shards: ShardFolder, keys: np.ndarray, size: int, batch_size: int, update: Update
) -> np.ndarray:
    """The masks of another folder of shards for these films: bool `[n, size, size]`."""
    masks = np.zeros((len(keys), size, size), bool)
    annotated = theirs.manifest[theirs.manifest["mask_known"].astype(bool)]
    key_there = dict(zip(annotated["image"], annotated.index, strict=True))
    found = np.array([key_there.get(path, -1) for path in shards.manifest["image"].loc[keys]], np.int64)
    rows = np.flatnonzero(found >= 0)
    if not len(rows):
        return masks
    done = 0
    for _, truth in read_batches(batches(theirs, found[rows], size=size, batch_size=batch_size, shuffle=False)):
        drawn = truth["mask_logits"].numpy()[..., 0] == 1
        masks[rows[done : done + len(drawn)]] = drawn
        done += len(drawn)
        update(done, len(rows))
    return masks


def _predicted(
    folder: Path, shards: ShardFolder, keys: np.ndarray, size: int, batch_size: int, update: Update
) -> tuple[np.ndarray, str]:
    """What a run's segmentation head calls lungs, bool `[n, size, size]`, and the kind of mask that this is."""
    run = open_run(folder)
    operating, model = run.operating(), load_model(folder / "model.keras")
    if "mask_logits" not in model.heads:
        raise LungError(f"{folder}: this run has no segmentation head. Give a run that segments lungs.")
    own = operating["size"]
    masks = np.zeros((len(keys), size, size), bool)
    for start in range(0, len(keys), _FILMS):
        some = keys[start : start + _FILMS]
        said = predict_changed(
            model,
            shards,
            some,
            {"as they are": lambda films: films.images},
            classes=[],
            size=own,
            batch_size=batch_size,
            output="mask_logits",
        )["as they are"]
        for i, logits in enumerate(said, start):
            probability = mask_to_original(expit(logits), (0, 0, own, own), size, size)
            masks[i] = probability >= operating["mask_threshold"]
        update(start + len(some), len(keys))
    return masks, f"predicted by {run.experiment.name}"


def dilated(masks: np.ndarray, part: float = 0.05) -> np.ndarray:
    """Masks grown on all sides, so that no rim of the lungs, or pleura, is left outside.

    Args:
        masks: bool `[n, size, size]`.
        part: by how much, as part of the side.

    Returns:
        bool `[n, size, size]`: the pixels no farther than that from the mask; an empty mask stays empty.
    """
    grown = np.zeros(masks.shape, bool)
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        grown[i] = ndimage.distance_transform_edt(~masks[i]) <= part * masks.shape[-1]
    return grown
