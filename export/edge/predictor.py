"""A .tflite as a function of one film."""

from __future__ import annotations

from pathlib import Path

from cxr_tf.predict import Predictor
from export.errors import ExportError


def edge_predictor(model: str | Path, *, threads: int | None = None) -> Predictor:
    """Opens a .tflite; what it then needs is NumPy, Pillow, pydicom and ai-edge-litert.

    Args:
        model: a .tflite that `cxr-tf export` wrote, of any kind, with a fixed batch or any.
        threads: all cores by default.

    Returns:
        A function from a film, uint8 `[height, width]` as `cxr_tf.read_radiograph` gives it, to its `probabilities`,
        class name -> 0-1, and `mask`, float32 `[height, width]`, 0-1, in the film's own pixels.

    Raises:
        ExportError: when it is none of ours, cut off, another form, or ai-edge-litert is not installed.

    Example:
        >>> predictor = edge_predictor("int8.tflite", threads=4)  # doctest: +SKIP
        >>> said = predictor(cxr_tf.read_radiograph("film.dcm"))  # doctest: +SKIP
        >>> said.probabilities, said.mask.shape  # doctest: +SKIP
        ({'Negative for Pneumonia': 0.93, ...}, (2140, 1760))
    """
    if Path(model).suffix.lower() != ".tflite":
        raise ExportError(
            f"{model}: is no .tflite; `cxr-tf export RUN --format litert` writes some. `cxr-tf predict` takes other "
            "forms, and needs what they run on."
        )
    return Predictor(model, threads=threads)
