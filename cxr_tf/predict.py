"""Films and a model -> probabilities, masks in the films' own pixels, pictures, and DICOM Segmentations.

What runs a model is loaded with it: a .tflite or a .onnx loads no TensorFlow, and a .tflite needs NumPy, Pillow,
pydicom and ai-edge-litert alone (`export.edge`).
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cxr_tf import preprocess
from cxr_tf.data.appearance import oddities
from cxr_tf.data.radiograph import RadiographError, read_header, read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.evaluate.overlay import overlay
from cxr_tf.files import replacing, writable_folder
from cxr_tf.progress import Update, silent

Call = Callable[[np.ndarray], dict[str, np.ndarray]]

_FAST = 1  # zlib's level
MASK, _OVERLAY, _SEGMENTATION = _WRITTEN = ".mask.png", ".overlay.png", ".seg.dcm"
_LONGEST = 180  # bytes of a name, that what is added to it still fits into the 255 of a file system


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
        path: a finished run folder, or what `cxr-tf export` wrote: a SavedModel, a .tflite or a .onnx.
        threads: that a .tflite or a .onnx uses; all cores by default.

    Attributes:
        path: as given.
        operating: what the model says of itself: `classes`, `size`, `thresholds`, `mask_threshold`, `name` and more.

    Raises:
        PredictError: when it is none of these.
        ExportError: when it is damaged, not ours, or what runs it is not installed.
        RunError: when the run is not finished, or damaged.

    Example:
        >>> predictor = Predictor("runs/demo/export/litert/int8.tflite")  # doctest: +SKIP
        >>> predictor(cxr_tf.read_radiograph("film.dcm")).probabilities  # doctest: +SKIP
        {'Negative for Pneumonia': 0.93, ...}
    """

    def __init__(self, path: str | Path, *, threads: int | None = None):
        self.path = Path(path)
        self.operating, self._call = _load(self.path, threads)

    def __call__(self, pixels: np.ndarray) -> Prediction:
        """Predicts one film: uint8 `[height, width]`, as `read_radiograph` gives it.

        Raises:
            PredictError: when the model is not what it says of itself.
        """
        stored, size = preprocess.to_storage(pixels, self.operating["storage_size"]), self.operating["size"]
        image = preprocess.to_input(stored, size)[None]
        try:
            outputs = self._call(image)
        except Exception as error:  # each runtime has its own
            raise self._other(f"it fails on such a film ({type(error).__name__})") from error
        said = outputs.get("probabilities", np.zeros((1, 0)))[0]
        if len(said) != len(self.operating["classes"]):
            raise self._other(f"it gives {len(said)} probabilities")
        mask = None
        if "mask" in outputs:
            if outputs["mask"].shape[1:] != (size, size, 1):
                raise self._other(f"it gives masks {outputs['mask'].shape[1:]}")
            (stored_height, stored_width), (height, width) = stored.shape, pixels.shape
            box = preprocess.content_box(stored_height, stored_width, size)
            mask = preprocess.mask_to_original(outputs["mask"][0], box, height, width).clip(0.0, 1.0)
        return Prediction(dict(zip(self.operating["classes"], map(float, said), strict=True)), mask)

    def _other(self, found: str) -> PredictError:
        said = self.operating
        return PredictError(
            f"{self.path}: says of itself that it takes films of {said['size']} pixels and knows "
            f"{len(said['classes'])} classes, but {found}. It is damaged: export it again."
        )


@dataclass(frozen=True)
class Predictions:
    """What `predict_files` did.

    Attributes:
        rows: one a film that could be read: "film" (its path), the classes, "mask_area", the share of the film that is
            at or above the mask threshold, "mask", the name of the file that it was written to, and "noted", what a
            person should look at: see `cxr_tf.data.appearance.oddities`.
        failed: films that could not be read, with the reason.
        unsegmented: DICOM films that no Segmentation could be made for, with the reason.
        notes: what else is to be said.
    """

    rows: list[dict[str, Any]]
    failed: list[tuple[Path, str]]
    unsegmented: list[tuple[Path, str]]
    notes: list[str]


def predict_files(
    model: Path | Predictor,
    films: Sequence[Path],
    out: Path | None,
    *,
    dicom: str | None = None,
    max_megapixels: float = 100.0,
    progress: Update = silent,
) -> Predictions:
    """Predicts files and folders of films.

    Writes `predictions.csv`, `<name>.mask.png`, `<name>.overlay.png` and, with `dicom`, `<name>.seg.dcm`.

    Args:
        model: a `Predictor`, or the path of what it takes.
        films: DICOM, PNG or JPEG files; a folder stands for the files in it and below that look like films.
        out: folder to write to, new or empty. None writes nothing. What was predicted before an interruption is there.
        dicom: what the mask shows, "opacity" or "lung": writes a DICOM Segmentation for each DICOM film (see
            `cxr_tf.dicom_seg`).
        max_megapixels: larger films are refused unread.
        progress: called after each film.

    Raises:
        PredictError: when the model is not ours, has no mask to write with `dicom`, no film could be read, or `out`
            holds files; nothing is written then.
        SegmentationError: when `dicom` is another word, or highdicom is not installed.
        WriteError: when `out` cannot be written.
    """
    if not 0 < max_megapixels < math.inf:
        raise PredictError(f"--max-megapixels is a number above 0. Received: {max_megapixels}")
    files = named_films(films)
    if out:
        refuse_used(out, "--out")
    predictor = model if isinstance(model, Predictor) else Predictor(model)
    said_of = predictor.operating
    write_segmentation = None
    if out and dicom:
        from cxr_tf.dicom_seg import SegmentationError, SegmentationWriter

        write_segmentation = SegmentationWriter(
            dicom, algorithm=said_of["name"], version=_checksum(predictor.path), threshold=said_of["mask_threshold"]
        )
    done = Predictions([], [], [], [])
    try:
        for count, (name, path) in enumerate(files, 1):
            try:
                pixels = read_radiograph(path, max_megapixels=max_megapixels)
            except RadiographError as error:
                done.failed.append((path, str(error)))
                progress(count, len(files))
                continue
            said = predictor(pixels)
            if dicom and said.mask is None:
                raise PredictError(
                    f"{predictor.path}: has no segmentation head, so there is nothing to write with --dicom."
                )
            if out and not done.rows:
                writable_folder(out)
            row: dict[str, Any] = {"film": str(path), **said.probabilities}
            if said.mask is not None:
                threshold = said_of["mask_threshold"]
                found = said.mask >= threshold
                row["mask_area"] = float(found.mean())
                if out:
                    row["mask"] = f"{name}{MASK}"
                    _save_png(out / row["mask"], found.astype(np.uint8) * 255)
                    _save_png(out / f"{name}{_OVERLAY}", overlay(pixels, said.mask, threshold=threshold))
                if out and write_segmentation and read_header(path, max_megapixels=max_megapixels).format == "dicom":
                    try:
                        write_segmentation(path, found, out / f"{name}{_SEGMENTATION}")
                    except SegmentationError as error:
                        done.unsegmented.append((path, str(error)))
                elif write_segmentation:
                    done.notes.append(f"{path}: is no DICOM film, so that it has an overlay and no DICOM Segmentation")
            row["noted"] = "; ".join(odd := oddities(pixels))
            done.notes.extend(f"{path}: {what}" for what in odd)
            done.rows.append(row)
            progress(count, len(files))
    finally:
        if out and done.rows:
            _save_csv(out / "predictions.csv", done.rows)
    if not done.rows:
        raise PredictError(
            "none of the films could be read:\n  " + "\n  ".join(reason for _, reason in done.failed[:10])
        )
    return done


def refuse_used(folder: Path, option: str) -> None:
    """Raises PredictError for a folder that holds files: what is written there could take the place of one of them."""
    if folder.is_dir() and any(folder.iterdir()):
        raise PredictError(f"{folder}: holds files already. Give another folder with {option}, or empty it.")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `predict_files` as a table for a terminal."""
    names = [name for name in rows[0] if name not in ("mask", "noted")]
    texts = [names] + [[row[name] if name == "film" else f"{row[name]:.4f}" for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = (
        [film.ljust(widths[0]), *(figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))]
        for film, *figures in texts
    )
    return "\n".join("  ".join(line) for line in lines)


def _save_png(path: Path, pixels: np.ndarray) -> None:
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=_FAST)


def _save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    # A path that is no UTF-8 goes out as the bytes it came in.
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as to,
    ):
        writer = csv.writer(to, lineterminator="\n")
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row.values())


def film_files(paths: Sequence[Path]) -> list[Path]:
    """The files to predict, each once: those given, and of folders those in and below them that look like films.

    What `predict_files` wrote into such a folder is no film.

    Raises:
        PredictError: when a path is not there, or nothing is left.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if f.is_file() and _looks_like_film(f))
        elif path.is_file():
            files.append(path)
        else:
            what = "is neither a file nor a folder" if path.exists() else "there is no such file or folder"
            raise PredictError(f"{path}: {what}.")
    if not files:
        raise PredictError(f"{', '.join(map(str, paths))}: no DICOM, PNG or JPEG file in there.")
    return list(dict.fromkeys(files))


def named_films(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """The films of `film_files`, each with a name of its own for what is written about it.

    Raises:
        PredictError: when a path is not there, or nothing is left.
    """
    named: dict[str, Path] = {}
    for file in film_files(paths):
        stem = file.stem if len(os.fsencode(file.stem)) <= _LONGEST else file.stem[: _LONGEST // 4]
        name, count = stem, 1
        while name in named:
            count += 1
            name = f"{stem}-{count}"
        named[name] = file
    return list(named.items())


def _looks_like_film(file: Path) -> bool:
    if file.name.endswith(_WRITTEN):
        return False
    try:
        with file.open("rb") as opened:
            head = opened.read(132)
    except OSError:
        return True  # reading it says why it cannot be read
    return head.startswith((b"\x89PNG", b"\xff\xd8\xff")) or head[128:] == b"DICM"


def _load(path: Path, threads: int | None) -> tuple[dict[str, Any], Call]:
    from export.about import read_about
    from export.forms import cores, open_form

    if (path / "config.toml").is_file():
        from cxr_tf.run import open_run

        run = open_run(path)
        operating = {"name": run.experiment.name, **run.operating()}
    elif path.suffix.lower() in (".tflite", ".onnx") or (path / "saved_model.pb").is_file():
        operating = read_about(path)
    elif not path.exists():
        raise PredictError(f"{path}: there is no such file or folder. Give a run folder or an exported model.")
    else:
        below = [at for at in (path / "1", path / "savedmodel" / "1") if (at / "saved_model.pb").is_file()]
        raise PredictError(
            f"{path}: is neither a run folder (config.toml), nor a SavedModel (saved_model.pb), a .tflite or a .onnx. "
            "`cxr-tf train` makes the first, `cxr-tf export` the others."
            + (f" Did you mean {below[0]}?" if below else "")
        )
    return operating, open_form(path, threads=threads or cores())


def _checksum(model: Path) -> str:
    """The first digits of the SHA-256 of a model's weights."""
    if (model / "config.toml").is_file():
        files = [model / "model.keras"]
    elif model.is_dir():
        files = [model / "saved_model.pb", *sorted((model / "variables").iterdir())]
    else:
        files = [model]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
