"""Exports a finished run in one form or all of them, each proven on the run's test films before any is kept."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cxr_tf.errors import nearest
from cxr_tf.files import WriteError, writable_folder
from cxr_tf.progress import progress
from cxr_tf.run import Run, write_json
from export import parity
from export.errors import ExportError, imported

# Where each form stands in the folder, and what it takes to write it and to run it.
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "savedmodel": ("savedmodel/1", ()),
    "litert-float32": ("litert/float32.tflite", ("ai_edge_litert.interpreter", "flatbuffers")),
    "litert-float16": ("litert/float16.tflite", ("ai_edge_litert.interpreter", "flatbuffers")),
    "litert-dynamic": ("litert/dynamic.tflite", ("ai_edge_litert.interpreter", "flatbuffers")),
    "litert-int8": ("litert/int8.tflite", ("ai_edge_litert.interpreter", "flatbuffers")),
    "onnx": ("onnx/model.onnx", ("tf2onnx", "onnx", "onnxruntime")),
}
_SERVING = "serving"  # beside a SavedModel: the files that TensorFlow Serving is started with
_CALIBRATION_FILMS = 100


class ParityError(ExportError):
    """Forms that do not do what their model does; `parity` has the figures."""

    def __init__(self, message: str, figures: dict[str, Any]):
        super().__init__(message)
        self.parity = figures


def export_run(
    run: Run,
    form: str,
    out: Path,
    *,
    films: int = 500,
    tolerances: Iterable[str] = (),
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Writes `out/savedmodel/1`, `out/litert/<kind>.tflite` and/or `out/onnx/model.onnx`, and `out/parity.json`.

    Beside a SavedModel stands `out/serving`, with what TensorFlow Serving is started with.
    Everything is written beside `out` and compared with the Keras model on the run's test films; it gets its place only
    if all of it is within tolerance. The run's MODEL_CARD.md goes with it, where there is one.

    Args:
        run: a finished run.
        form: "savedmodel", "litert-float32", "litert-float16", "litert-dynamic", "litert-int8", "onnx", "litert" for
            four of these, or "all".
        out: folder for the forms; others may be in it already, if they are of the same model.
        films: at most so many test films are compared.
        tolerances: as `export.parity.tolerances` takes them.
        seconds: for which calls are timed (see `export.parity.compare`).

    Returns:
        What `parity.json` holds (see `export.parity`).

    Raises:
        ExportError: for another form, one that exists already, a missing package, or a graph that cannot be converted.
        ParityError: for outputs beyond tolerance. As with every other error, nothing is left behind then.
        RunError: when the run is not finished, or its shards are not those that it was trained on.
    """
    asked = _asked(form)
    allowed = parity.tolerances(tolerances)
    operating, shards = run.operating(), run.shards()
    for name in asked:
        for module in FORMS[name][1]:
            imported(module)
        if (target := out / FORMS[name][0]).exists() or (name == "savedmodel" and (target := out / _SERVING).exists()):
            raise ExportError(f"{target}: exists already. Give another folder with --out, or delete it.")
    before = _already_there(run, out, films)
    # On the disk of `out`, also where that is a link or a mount.
    staged = (out if out.is_dir() else out.absolute().parent) / f".partial-{os.getpid()}-{out.name}"
    try:
        if out.exists():
            writable_folder(out)
        staged.mkdir(parents=True)
        _write(run, operating, shards, asked, staged)
        with progress("comparing forms") as update:
            found = parity.compare(
                run,
                {name: staged / FORMS[name][0] for name in asked},
                allowed=allowed,
                films=films,
                seconds=seconds,
                update=update,
            )
        for name in asked:
            found["forms"][name]["file"] = FORMS[name][0]
        if beyond := parity.failures(found):
            raise ParityError("\n  ".join(["beyond tolerance, so nothing was kept:", *beyond]), found)
        kept = {} if before is None else before["forms"]
        found["forms"] |= {
            name: row for name, row in kept.items() if name not in found["forms"] and (out / row["file"]).exists()
        }
        write_json(staged / "parity.json", found)
        card = run.folder / "MODEL_CARD.md"
        if card.is_file():
            shutil.copyfile(card, staged / card.name)
        _put(staged, out, [FORMS[name][0] for name in asked] + [_SERVING] * ("savedmodel" in asked))
    except OSError as error:
        raise WriteError(f"{out}: cannot be written ({error.strerror or error}).") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return found


def report_forms(run: Run, folder: Path) -> bool:
    """Puts what `parity.json` says of a folder's forms into the report of their run, if both are there.

    Args:
        run: a finished run.
        folder: where `export_run` wrote forms; of those of another model nothing is reported.

    Returns:
        Whether the report has them now.

    Raises:
        ExportError, RunError: when `parity.json` or `evaluation/metrics.json` is damaged.
    """
    found = parity.read_parity(folder)
    if found is None or found["model"] != parity.model_checksum(run):
        return False
    from cxr_tf.evaluate.evaluation import report_exports

    return report_exports(run, parity.parity_rows(folder))


def _already_there(run: Run, out: Path, films: int) -> dict[str, Any] | None:
    """`parity.json` of a folder that more forms of the same model can join; None for one without forms."""
    before = parity.read_parity(out)
    if before is None:
        if there := [place for place, _ in FORMS.values() if (out / place).exists()]:
            raise ExportError(
                f"{out}: holds {there[0]} and no parity.json, so nothing says what it is. Give another folder with "
                "--out, or delete it."
            )
        return None
    if not any((out / row["file"]).exists() for name, row in before["forms"].items() if name != "keras"):
        return None
    if before["model"] != parity.model_checksum(run):
        raise ExportError(f"{out}: holds forms of another model. Give another folder with --out.")
    if before["films"] != (count := len(parity.compared_films(run, films))):
        raise ExportError(
            f"{out}: its forms were compared on {before['films']} films, and figures on {count} cannot stand beside "
            f"theirs. Give --films {before['films']}, or another folder with --out."
        )
    return before


def _put(staged: Path, out: Path, places: list[str]) -> None:
    """Moves what is finished to where it belongs, the proof last; where that fails, takes all of it away again."""
    moved: list[Path] = []
    try:
        for place in places:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            (staged / place).rename(out / place)
            moved.append(out / place)
        for file in ("MODEL_CARD.md", "parity.json"):
            if (staged / file).is_file():
                (staged / file).replace(out / file)
    except BaseException:
        for target in moved:
            shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(missing_ok=True)
        for place in places:
            with contextlib.suppress(OSError):  # it holds other forms
                (out / place).parent.rmdir()
        raise


def _asked(form: str) -> list[str]:
    """Names of the forms that `--format` asks for."""
    groups = {"all": list(FORMS), "litert": [name for name in FORMS if name.startswith("litert-")]}
    accepted = [*groups, *FORMS]
    if form not in accepted:
        raise ExportError(f'--format takes {", ".join(accepted)}.{nearest(form, accepted)} Received: "{form}".')
    return groups.get(form, [form])


def _write(run: Run, operating: dict[str, Any], shards: Any, asked: list[str], out: Path) -> None:
    """Writes the forms, without a proof."""
    from cxr_tf.models.outputs import float32_model, load_model
    from export.about import about
    from export.frozen import Frozen
    from export.litert import write_litert
    from export.onnx_form import write_onnx
    from export.savedmodel import write_savedmodel
    from export.serving.config import write_serving_config

    with progress("exporting") as update:
        update(0, len(asked), "reading the model")
        model = float32_model(load_model(run.folder / "model.keras"))
        said = about(operating, name=run.experiment.name, heads=model.heads)
        freeze = functools.cache(lambda batch: Frozen(model, operating, batch))
        none = np.zeros((0, operating["size"], operating["size"], 1), np.float32)
        calibrating = _calibration_films(run, shards) if "litert-int8" in asked else none
        for done, name in enumerate(asked):
            update(done, len(asked), name)
            target = out / FORMS[name][0]
            if name == "savedmodel":
                write_savedmodel(model, target, said)
                write_serving_config(out)
            elif name == "onnx":
                write_onnx(freeze(None), target, said)
            else:
                write_litert(freeze, name.removeprefix("litert-"), target, said, calibrating)
        update(len(asked), len(asked))


def _calibration_films(run: Run, shards: Any) -> np.ndarray:
    """Model input of training films of a run, drawn by its seed: float32 `[n, S, S, 1]`, 0-255."""
    from cxr_tf.data.pipeline import batches, read_batches

    parts = run.parts()
    keys = parts.index[parts["part"] == "train"].to_numpy()
    keys = np.random.default_rng(run.experiment.seed).permutation(keys)[:_CALIBRATION_FILMS]
    dataset = batches(shards, keys, size=run.operating()["size"], batch_size=16, shuffle=False)
    return np.concatenate([images.numpy() for images, _ in read_batches(dataset)])
