"""Two views of each film, for contrastive pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr_tf.data.augment import Augment


@dataclass(frozen=True)
class Views:
    """Two random views of each film: what `pretext_batches` takes as `make`.

    Each view is one projective warp of the fitted film (flip, rotation, crop and stretch at once) and then its gray
    levels' changes. The views of a film draw from streams of their own, 2p and 2p + 1 for the film at position p, so
    that they differ though their ranges may be the same.

    Attributes:
        query: changes of the view that the trained encoder gets.
        key: changes of the view that the momentum encoder gets.

    Example:
        >>> import tensorflow as tf
        >>> views = Views(query=Augment(rotation=15.0), key=Augment(blur=0.5))
        >>> pair = views(tf.zeros([8, 64, 64, 1]), 0, tf.range(8, dtype=tf.int64))
        >>> pair["query"].shape, pair["key"].shape
        (TensorShape([8, 64, 64, 1]), TensorShape([8, 64, 64, 1]))
    """

    query: Augment
    key: Augment

    def __call__(self, images: Any, seed: Any, positions: Any) -> dict[str, Any]:
        """Makes both views.

        Args:
            images: float32 `[batch, size, size, 1]`, 0-255.
            seed: int64, of the run.
            positions: int64 `[batch]`, of the films in the run's sequence.

        Returns:
            "query" and "key", float32 `[batch, size, size, 1]`, 0-255.
        """
        query, _ = self.query(images, None, seed, 2 * positions)
        key, _ = self.key(images, None, seed, 2 * positions + 1)
        return {"query": query, "key": key}


def _alike(**changes: Any) -> Views:
    """Two views of the same ranges, in which nothing changes but what is named."""
    off: dict[str, Any] = {"scale": (1.0, 1.0)}
    off |= dict.fromkeys(("flip", "rotation", "shift", "brightness", "contrast", "gamma", "noise", "blur"), 0.0)
    augment = Augment(**(off | changes))
    return Views(query=augment, key=augment)


MOCO_CXR = _alike(flip=0.5, rotation=10.0, crop=0.2, aspect=4 / 3)
"""Views of MoCo-CXR (Sowrirajan et al. 2021, arXiv:2010.05352): flip, up to 10° to either side, a crop of 80 to 100 %
of the area, with the sides' ratio of torchvision's `RandomResizedCrop`; no change of gray levels.

There a film's shorter side is resized, and the crop cuts what is left to the square; here films come whole, fitted into
the padded square, and a window turns about its own center. A ratio that a window has no room for is not drawn, where
torchvision draws the area anew as well, so that large windows stay as likely as small ones.
"""

MOCO_V2 = _alike(flip=0.5, crop=0.8, aspect=4 / 3, brightness=0.2, contrast=0.4, blur=0.5)
"""Views of MoCo v2 (Chen et al. 2020, arXiv:2003.04297) without color: a crop of 20 to 100 % of the area, flip,
brightness and contrast, a blur of half the views.

Beside what `MOCO_CXR` says of films and windows: crops are cut from the fitted film, not from the larger file. Gray
levels change in all views, not in 80 %. Brightness is added, where torchvision multiplies by 0.6 to 1.4, which moves
mid-gray by as much; contrast turns about mid-gray, not about the film's mean. The blur has a standard deviation of 0.5
to 1.5 pixels, not 0.1 to 2.
"""
