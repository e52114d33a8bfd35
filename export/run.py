"""Exports a run in one form, compared on films of its own test patients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cxr_tf.errors import nearest
from cxr_tf.models.outputs import load_model
from cxr_tf.run import Run
from export.savedmodel import ExportError, export_savedmodel

FORMS = ("savedmodel",)
COMPARED_FILMS = 32


def export_run(run: Run, form: str, out: Path) -> tuple[Path, dict[str, Any]]:
    """Writes `out/savedmodel/1` from a finished run.

    Args:
        run: a finished run.
        form: "savedmodel".
        out: folder for the forms.

    Returns:
        The folder that was written, and the figures of the comparison (see `export.savedmodel`).

    Raises:
        ExportError: for another form, an existing folder, or outputs beyond tolerance.
        RunError: when the run is not finished.
    """
    if form not in FORMS:
        raise ExportError(f'--format takes {" or ".join(FORMS)}. Received: "{form}".{nearest(form, FORMS)}')
    operating = run.operating()
    model = load_model(run.folder / "model.keras")
    folder = out / form / "1"
    return folder, export_savedmodel(model, operating, folder, films(run, COMPARED_FILMS))


def films(run: Run, count: int) -> np.ndarray:
    """Model input of the first `count` test films of a run: float32 `[count, S, S, 1]`, 0-255."""
    from cxr_tf.data.pipeline import batches, read_batches

    parts = run.parts()
    keys = parts.index[parts["part"] == "test"].to_numpy()[:count]
    size = run.experiment.model.size
    dataset = batches(run.shards(), keys, size=size, batch_size=8, shuffle=False)
    return np.concatenate([images.numpy() for images, _ in read_batches(dataset)])
