"""Films and a model -> probabilities, masks in the films' own pixels, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cxr_tf import preprocess
from cxr_tf.data.radiograph import RadiographError, read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.files import replacing, writable_folder
from cxr_tf.progress import progress
from cxr_tf.run import open_run, read_operating

if TYPE_CHECKING:
    import pandas as pd


class PredictError(CxrError):
    """A model that is not ours, or films that are not there."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one film.

    Attributes:
        probabilities: class name -> 0-1, calibrated; empty without a classification head.
        mask: float32 `[height, width]`, 0-1, in the film's own pixels; `None` without a segmentation head.
    """

    probabilities: dict[str, float]
    mask: np.ndarray | None


class Predictor:
    """A trained model, wherever it comes from, as a function of one film.

    Args:
        path: a finished run folder, or a SavedModel that `cxr-tf export` wrote.

    Raises:
        PredictError: when it is neither.

    Example:
        >>> predictor = Predictor("runs/demo/export/savedmodel/1")  # doctest: +SKIP
        >>> predictor(cxr_tf.read_radiograph("film.dcm")).probabilities  # doctest: +SKIP
        {'Negative for Pneumonia': 0.93, ...}
    """

    def __init__(self, path: str | Path):
        self.operating, self._call = _load(Path(path))

    def __call__(self, pixels: np.ndarray) -> Prediction:
        """Predicts one film: uint8 `[height, width]`, as `read_radiograph` gives it."""
        stored = preprocess.to_storage(pixels, self.operating["storage_size"])
        outputs = self._call(preprocess.to_input(stored, self.operating["size"])[None])
        said = outputs.get("probabilities", np.zeros((1, 0)))[0]
        mask = None
        if "mask" in outputs:
            (stored_height, stored_width), (height, width) = stored.shape, pixels.shape
            box = preprocess.content_box(stored_height, stored_width, self.operating["size"])
            mask = preprocess.mask_to_original(outputs["mask"][0], box, height, width).clip(0.0, 1.0)
        return Prediction(dict(zip(self.operating["classes"], map(float, said), strict=True)), mask)


def predict_files(
    model: Path, films: list[Path], out: Path, *, max_megapixels: float = 100.0
) -> tuple[pd.DataFrame, list[tuple[Path, str]]]:
    """Predicts files and folders of films; writes `predictions.csv`, `<name>.mask.png` and `<name>.overlay.png`.

    Args:
        model: a finished run folder or an exported SavedModel.
        films: DICOM, PNG or JPEG files; a folder stands for the files in it and below that look like films.
        out: folder to write to; files of an earlier prediction in it are replaced. It must not hold the films.
        max_megapixels: larger films are refused unread.

    Returns:
        The table (a row a film that could be read), and the films that could not be, with the reason.

    Raises:
        PredictError: when the model is not ours, or no film could be read; nothing is written then.
        WriteError: when `out` cannot be written.
    """
    import pandas as pd

    from cxr_tf.evaluate.figures import overlay

    files = _films(films)
    if inside := [path for _, path in files if path.resolve().parent == out.resolve()]:
        raise PredictError(f"{out}: holds films to predict ({inside[0].name}). Give another folder with --out.")
    predictor = Predictor(model)
    rows: list[dict[str, Any]] = []
    failed: list[tuple[Path, str]] = []
    with progress("predicting") as update:
        for done, (name, path) in enumerate(files, 1):
            try:
                pixels = read_radiograph(path, max_megapixels=max_megapixels)
            except RadiographError as error:
                failed.append((path, str(error)))
                update(done, len(files))
                continue
            if not rows:
                writable_folder(out)
            said = predictor(pixels)
            row: dict[str, Any] = {"film": str(path), **said.probabilities}
            if said.mask is not None:
                threshold = predictor.operating["mask_threshold"]
                found = said.mask >= threshold
                row["mask_area"] = float(found.mean())
                _save_png(out / f"{name}.mask.png", found.astype(np.uint8) * 255)
                _save_png(out / f"{name}.overlay.png", overlay(pixels, said.mask, threshold=threshold))
            rows.append(row)
            update(done, len(files))
    if not rows:
        raise PredictError("none of the films could be read:\n  " + "\n  ".join(reason for _, reason in failed[:10]))
    table = pd.DataFrame(rows)
    with replacing(out / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table, failed


def _save_png(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def _films(paths: list[Path]) -> list[tuple[str, Path]]:
    """The films, each with a name of its own for what is written about it."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.is_file() and _looks_like_film(f))
        elif path.exists():
            files.append(path)
        else:
            raise PredictError(f"{path}: there is no such file or folder.")
    if not files:
        raise PredictError(f"{', '.join(map(str, paths))}: no DICOM, PNG or JPEG file in there.")
    named: dict[str, Path] = {}
    for file in dict.fromkeys(files):
        name, count = file.stem, 1
        while name in named:
            count += 1
            name = f"{file.stem}-{count}"
        named[name] = file
    return list(named.items())


def _looks_like_film(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(132)
    return head.startswith((b"\x89PNG", b"\xff\xd8\xff")) or head[128:] == b"DICM"


def _load(path: Path) -> tuple[dict[str, Any], Callable[[np.ndarray], dict[str, np.ndarray]]]:
    if (path / "saved_model.pb").is_file():
        return _load_savedmodel(path)
    if (path / "config.toml").is_file():
        return _load_run(path)
    raise PredictError(
        f"{path}: is neither a run folder (config.toml) nor a SavedModel (saved_model.pb) of ours. "
        "`cxr-tf train` makes the first, `cxr-tf export` the second."
    )


def _load_run(path: Path) -> tuple[dict[str, Any], Callable[[np.ndarray], dict[str, np.ndarray]]]:
    from cxr_tf.models.outputs import calibrated, load_model

    operating = open_run(path).operating()
    model = load_model(path / "model.keras")

    def call(image: np.ndarray) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in calibrated(model(image, training=False), operating).items()}

    return operating, call


def _load_savedmodel(path: Path) -> tuple[dict[str, Any], Callable[[np.ndarray], dict[str, np.ndarray]]]:
    about = path / "assets" / "cxr_tf.json"
    if not about.is_file():
        raise PredictError(f"{path}: is a SavedModel, but not one of ours: it has no assets/cxr_tf.json.")
    import tensorflow as tf

    operating = read_operating(about)
    try:
        loaded = tf.saved_model.load(str(path))
        predict = loaded.signatures["predict"]
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise PredictError(f"{path}: cannot be loaded ({str(error).splitlines()[0]}). Export it again.") from error

    def call(image: np.ndarray) -> dict[str, np.ndarray]:
        return {k: v.numpy() for k, v in predict(image=tf.constant(image)).items()}

    call.loaded = loaded  # type: ignore[attr-defined]  # its variables live as long as it does
    return operating, call
