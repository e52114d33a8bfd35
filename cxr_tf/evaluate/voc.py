"""The figure of the SIIM-FISABIO-RSNA COVID-19 challenge: PASCAL VOC 2010 average precision of studies.

The challenge gave every study a dummy box (`negative 1 0 0 1 1`, `typical 1 0 0 1 1`, ...), so that a detection metric
could judge a classification: each class of each study is one detection, right if the study has the class, ranked by its
confidence. No threshold takes part.

VOC 2010 replaced the eleven recall levels of earlier years by all points: precision is made to fall monotonically (at
each recall, the highest precision at that recall or beyond), and the area under those steps is the average precision
(`VOCevaldet.m` of the VOC 2010 development kit: `mpre(i)=max(mpre(i),mpre(i+1))`, then
`ap=sum((mrec(i)-mrec(i-1)).*mpre(i))`; Everingham et al., "The PASCAL Visual Object Classes Challenge: A
Retrospective", IJCV 2015). It is never below the step-wise average precision of `metrics.average_precision`.

Two things to know before comparing. The challenge's leaderboard averaged six classes (these four, and "none" and
"opacity" of images); the study-level figures of .53 to .60 that public solutions report are the mean over the four
study classes, with a study's score the mean over its images: this module. The first-place solution's own script read
the same envelope at 101 recall levels (0, .01, ..., 1) rather than at all points, which makes the mean about .001
higher on a fold of the challenge's size.

The development kit leaves the order of equal confidences to the sort. Here they are one step, so that the order of the
files changes nothing.
"""

from __future__ import annotations

import numpy as np

from cxr_tf.evaluate.metrics import Ranked, check_predictions, ratio, where_defined


def voc_average_precision(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """VOC-2010 average precision of each class; the challenge's study-level figure is the mean over the classes.

    Args:
        probabilities: `[studies, classes]`, 0-1: the mean over a study's images.
        labels: the same shape; 1, 0, or NaN = unknown, left out.

    Returns:
        float64 `[classes]`; NaN for a class without both outcomes.

    Raises:
        MetricError: for shapes or values that do not fit.

    Example:
        >>> voc_average_precision(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 1, 0])).round(3)
        array([0.667])
    """
    p, y = check_predictions(probabilities, labels)
    weights = np.ones((1, len(p)))
    return np.concatenate(
        [voc_average_precision_of(*Ranked(p[:, c], y[:, c]).counts(weights)) for c in range(p.shape[1])]
    )


def voc_average_precision_of(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """VOC-2010 average precision from `Ranked.counts`: `[replicates]`, NaN for one without both outcomes."""
    precision = ratio(true, true + false)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = np.einsum("rk,rk->r", np.diff(true, axis=1, prepend=0), envelope)
    return where_defined(ratio(area, true[:, -1:].sum(1)), true, false)
