"""The proof: every exported form and the Keras model on the same test films, side by side.

`parity.json` beside the forms:

    {"notice", "name", "model": checksum of model.keras, "films": in the comparison,
     "machine": {"system", "processor", "cores"},
     "forms": {"keras": row, "savedmodel": row, "litert-int8": row, ...}}

The row of a form:

    file        of the form, relative to parity.json (not of Keras)
    bytes       its size
    films       it was compared on
    difference  from the Keras model: {"logits": {"max", "mean"}, "mask": {"max", "mean"}}, absolute (not of Keras)
    figures     {"auroc", "average_precision", "ece", "dice"} on these films: macro means over classes, mean over films
                with a finding; without those the model or the films cannot give
    seconds     {"import", "load", "first", "batch_1", "batch_16"}: in a fresh process, Python's import of what runs the
                form, opening it, its first answer; then medians of a call with 1 and with 16 films, forms in turn
    tolerance   what was allowed (not of Keras)

"Keras" is the model in float32: a mixed-precision run is rebuilt in float32 before anything is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cxr_tf.errors import nearest
from cxr_tf.progress import Update, silent
from cxr_tf.run import Run
from export.about import NOTICE
from export.errors import ExportError
from export.forms import Process, cores

FIGURES = {"auroc": "AUROC", "average_precision": "AP", "ece": "ECE", "dice": "Dice"}
LIMITS = {"logits": "largest error of a logit", "mask": "largest error of a mask", **FIGURES}

# Of logits and masks the largest error; of figures the change, either way.
_EXACT = {"logits": 1e-3, "mask": 1e-3, "auroc": 1e-3, "average_precision": 1e-3, "ece": 1e-3, "dice": 1e-3}
TOLERANCES: dict[str, dict[str, float]] = {
    "savedmodel": _EXACT,
    "litert-float32": _EXACT,
    "litert-float16": {
        "logits": 0.1,
        "mask": 0.1,
        "auroc": 0.003,
        "average_precision": 0.003,
        "ece": 0.01,
        "dice": 0.003,
    },
    "litert-dynamic": {
        "logits": 1.0,
        "mask": 0.5,
        "auroc": 0.01,
        "average_precision": 0.02,
        "ece": 0.03,
        "dice": 0.01,
    },
    "litert-int8": {"logits": 2.0, "mask": 1.0, "auroc": 0.02, "average_precision": 0.04, "ece": 0.05, "dice": 0.03},
    "onnx": _EXACT,
}

_BATCH = 16
_LEAST_ROUNDS = 5


def tolerances(settings: Iterable[str] = ()) -> dict[str, dict[str, float]]:
    """The tolerances of every form, with some set from outside.

    Args:
        settings: "form.figure=value" each, as "litert-int8.auroc=0.02".

    Raises:
        ExportError: for a form, a figure or a value that is not accepted.

    Example:
        >>> tolerances(["litert-int8.auroc=0.02"])["litert-int8"]["auroc"]
        0.02
    """
    made = {form: dict(limits) for form, limits in TOLERANCES.items()}
    for setting in settings:
        key, equals, value = setting.partition("=")
        form, _, figure = key.partition(".")
        if not equals or form not in made or figure not in LIMITS:
            near = nearest(form, made) if form not in made else nearest(figure, LIMITS)
            raise ExportError(
                f"--tolerance takes FORM.FIGURE=VALUE; forms are {', '.join(made)}; figures are {', '.join(LIMITS)}."
                f'{near} Received: "{setting}".'
            )
        try:
            made[form][figure] = float(value)
        except ValueError:
            made[form][figure] = float("nan")
        if not 0 <= made[form][figure] < float("inf"):
            raise ExportError(f'--tolerance takes a finite number that is not negative. Received: "{setting}".')
    return made


def compare(
    run: Run,
    forms: Mapping[str, Path],
    *,
    allowed: Mapping[str, Mapping[str, float]] | None = None,
    films: int = 500,
    seconds: float = 10.0,
    update: Update = silent,
) -> dict[str, Any]:
    """Runs test films through every form and the Keras model, each in a process of its own.

    Args:
        run: a finished run.
        forms: name -> the form: folder of a SavedModel, a .tflite, a .onnx.
        allowed: as `tolerances` gives them.
        films: at most so many of the test films, drawn by the run's seed.
        seconds: for which calls with one film are timed in turn, and again those with 16; at least five rounds each.
        update: shows progress.

    Returns:
        What `parity.json` holds (see the module's text), without "file" in its rows.

    Raises:
        ExportError: when there is no film, or a form cannot be opened or fails.
        PipelineError: when a film cannot be read.
    """
    from cxr_tf.data.pipeline import batches, read_batches

    allowed = tolerances() if allowed is None else allowed
    operating, shards = run.operating(), run.shards()
    keys, size = compared_films(run, films), operating["size"]
    classes = run.experiment.data.classes or shards.classes
    dataset = batches(shards, keys, size=size, batch_size=_BATCH, shuffle=False, classes=classes, content_boxes=True)
    steps, done = -(-len(keys) // _BATCH) + len(forms) + 3, 0

    def step(note: str) -> None:
        nonlocal done
        update(done, steps, note)
        done += 1

    tallies: dict[str, _Tally] = {}
    with contextlib.ExitStack() as stack:
        processes: dict[str, Process] = {}
        first = np.zeros((1, size, size, 1), np.float32)
        for name, path in {"keras": run.folder, **forms}.items():  # one after the other: loading is timed
            step(f"loading {name}")
            processes[name] = Process(name, path, first)
            stack.callback(processes[name].close)
            tallies[name] = _Tally(name, operating)
        shown = np.zeros((0, size, size, 1), np.float32)
        for images, truth in read_batches(dataset):
            step("comparing")
            given = images.numpy()
            shown = given if len(given) > len(shown) else shown
            wanted = processes["keras"](given)
            for name, process in processes.items():
                tallies[name].add(wanted if name == "keras" else process(given), wanted, truth)
        timed = np.resize(shown, (_BATCH, *shown.shape[1:]))
        medians: dict[str, dict[str, float]] = {name: {} for name in processes}
        for count in (1, _BATCH):
            step(f"timing with {count}")
            for name, median in _in_turn(processes, timed[:count], seconds).items():
                medians[name][f"batch_{count}"] = median
        update(steps, steps)
    rows: dict[str, Any] = {}
    for name, tally in tallies.items():
        path = run.folder / "model.keras" if name == "keras" else forms[name]
        rows[name] = {"bytes": _bytes(path), "films": len(keys), **tally.row()}
        rows[name]["seconds"] = processes[name].seconds | medians[name]
        if name != "keras":
            rows[name]["tolerance"] = dict(allowed[name])
    return {
        "notice": NOTICE,
        "name": run.experiment.name,
        "model": model_checksum(run),
        "films": len(keys),
        "machine": {"system": platform.system(), "processor": _processor(), "cores": cores()},
        "forms": rows,
    }


def failures(parity: Mapping[str, Any]) -> list[str]:
    """A sentence for each figure of a form that is beyond its tolerance; empty when all is well."""
    said = []
    keras = parity["forms"]["keras"]["figures"]
    for name, row in parity["forms"].items():
        for figure, limit in row.get("tolerance", {}).items():
            if figure in FIGURES:
                before, after = keras.get(figure), row["figures"].get(figure)
                if before is None:  # nothing to compare with
                    continue
                told = f"{FIGURES[figure]} is {_number(after)}, and {_number(before)} with Keras"
                error = float("nan") if after is None else abs(after - before)
            else:
                if figure not in row["difference"]:
                    continue
                error = row["difference"][figure]["max"]
                error = float("nan") if error is None else error
                told = f"the {LIMITS[figure]} is {error:.2g}"
            if not error <= limit:  # NaN, which is not at most anything, is beyond it too
                said.append(f"{name}: {told}; {limit:g} is allowed (--tolerance {name}.{figure}=...)")
    return said


def table(parity: Mapping[str, Any]) -> str:
    """The rows as a table for a terminal: figures of Keras, and how the forms differ from them."""
    forms = parity["forms"]
    keras = forms["keras"]["figures"]
    kept = [figure for figure in FIGURES if figure in keras]
    errors = [what for what in ("logits", "mask") if any(what in row.get("difference", {}) for row in forms.values())]
    head = [("form", ""), ("", "MB")]
    head += [(what, kind) for what in errors for kind in ("max", "mean")]
    head += [("", FIGURES[figure]) for figure in kept]
    head += [("import", "s"), ("load", "s"), ("1 film", "ms"), (f"{_BATCH} films", "films/s")]
    lines = [[top for top, _ in head], [bottom for _, bottom in head]]
    for name, row in forms.items():
        line = [name, f"{row['bytes'] / 1e6:.2f}"]
        for what in errors:
            found = row.get("difference", {}).get(what, {})
            line += [_small(found[kind]) if kind in found else "" for kind in ("max", "mean")]
        for figure in kept:
            value, before = row["figures"].get(figure), keras[figure]
            alone = name == "keras" or value is None or before is None
            line.append(_number(value) if alone else f"{value - before:+.4f}")
        spent = row["seconds"]
        line += [f"{spent['import']:.2f}", f"{spent['load']:.2f}", f"{1e3 * spent['batch_1']:.1f}"]
        line.append(f"{_BATCH / spent[f'batch_{_BATCH}']:.1f}")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        line[0].ljust(widths[0])
        + "".join(f"  {text:>{width}}" for text, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def parity_rows(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a folder's `parity.json` for a page: one a form, Keras first.

    Each is {"form", "megabytes", "logits_max", "logits_mean", "mask_max", "mask_mean", "auroc", "average_precision",
    "ece", "dice", "auroc_change", ..., "import", "load", "first" (seconds), "latency" (ms of one film), "throughput"
    (films a second, 16 at a time), "films", "passed"}; `None` stands for what there is not.

    Args:
        folder: where `cxr-tf export` wrote the forms.

    Raises:
        ExportError: when there is no `parity.json`, or it is damaged.
    """
    parity = read_parity(Path(folder))
    if parity is None:
        raise ExportError(f"{folder}: has no parity.json; `cxr-tf export` writes it.")
    keras = parity["forms"]["keras"]["figures"]
    beyond = {said.partition(":")[0] for said in failures(parity)}
    rows = []
    for name, row in parity["forms"].items():
        found: dict[str, Any] = {"form": name, "films": row["films"], "megabytes": row["bytes"] / 1e6}
        for what in ("logits", "mask"):
            for kind in ("max", "mean"):
                found[f"{what}_{kind}"] = row.get("difference", {}).get(what, {}).get(kind)
        for figure in FIGURES:
            before, after = keras.get(figure), row["figures"].get(figure)
            found[figure] = after
            found[f"{figure}_change"] = None if name == "keras" or after is None or before is None else after - before
        spent = row["seconds"]
        found |= {key: spent[key] for key in ("import", "load", "first")}
        found |= {"latency": 1e3 * spent["batch_1"], "throughput": _BATCH / spent[f"batch_{_BATCH}"]}
        rows.append(found | {"passed": name not in beyond})
    return rows


def read_parity(folder: Path) -> dict[str, Any] | None:
    """`parity.json` of a folder, or None where there is none.

    Raises:
        ExportError: when it is damaged.
    """
    path = folder / "parity.json"
    if not path.is_file():
        return None
    try:
        parity = json.loads(path.read_text(encoding="utf-8"))
        parity["forms"]["keras"]["figures"], parity["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path}: is damaged. Delete it, and export again.") from error
    return parity


def model_checksum(run: Run) -> str:
    """SHA-256 of a run's `model.keras`."""
    with (run.folder / "model.keras").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Tally:
    """What one form said of the films so far, and how far it is from what was wanted."""

    def __init__(self, name: str, operating: Mapping[str, Any]):
        self.name, self.operating = name, operating
        self._largest: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._count: dict[str, int] = {}
        self._probabilities: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._dice: list[np.ndarray] = []

    def add(self, said: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], truth: Mapping[str, Any]) -> None:
        from cxr_tf.evaluate.metrics import mask_scores

        if missing := set(wanted) - set(said):
            raise ExportError(f"{self.name}: gives no {', '.join(sorted(missing))}.")
        for what in {"logits", "mask"} & set(wanted):
            if said[what].shape != wanted[what].shape:
                raise ExportError(f"{self.name}: {what} has the shape {said[what].shape}, not {wanted[what].shape}.")
            error = np.abs(said[what].astype(np.float64) - wanted[what])
            self._largest[what] = float(np.maximum(self._largest.get(what, 0.0), error.max()))  # NaN stays NaN
            self._total[what] = self._total.get(what, 0.0) + float(error.sum())
            self._count[what] = self._count.get(what, 0) + error.size
        if "probabilities" in wanted:
            self._probabilities.append(said["probabilities"])
            self._labels.append(truth["logits"].numpy())
        if "mask" in wanted:
            predicted = said["mask"] >= self.operating["mask_threshold"]
            content = np.zeros(predicted.shape, bool)
            for film, (top, left, height, width) in zip(content, truth["content_box"].numpy(), strict=True):
                film[top : top + height, left : left + width] = True
            self._dice.append(mask_scores(predicted, truth["mask_logits"].numpy(), content).dice)

    def row(self) -> dict[str, Any]:
        difference = {
            what: {"max": _known(largest), "mean": _known(self._total[what] / self._count[what])}
            for what, largest in sorted(self._largest.items())
        }
        return {"figures": self._figures()} | ({} if self.name == "keras" else {"difference": difference})

    def _figures(self) -> dict[str, float | None]:
        from cxr_tf.evaluate import metrics
        from cxr_tf.evaluate.calibration import calibration_error

        found: dict[str, float] = {}
        if self._probabilities:
            p, y = np.concatenate(self._probabilities).astype(np.float64), np.concatenate(self._labels)
            if np.isfinite(p).all():
                p = p.clip(0, 1)
                found["auroc"] = metrics.macro(metrics.auroc(p, y))
                found["average_precision"] = metrics.macro(metrics.average_precision(p, y))
                found["ece"] = calibration_error(p, y, self.operating["task"])
            else:
                found |= dict.fromkeys(("auroc", "average_precision", "ece"), float("nan"))
        if self._dice:
            found["dice"] = metrics.macro(np.concatenate(self._dice))
        return {name: _known(value) for name, value in found.items()}


def compared_films(run: Run, most: int) -> np.ndarray:
    """Keys of the test films that forms are compared on, drawn by the run's seed where there are more than `most`.

    Raises:
        ExportError: when there is none.
    """
    parts = run.parts()
    keys = parts.index[parts["part"] == "test"].to_numpy()
    if not len(keys):
        raise ExportError(f"{run.folder}: has no test film to compare the forms on.")
    if len(keys) > most:
        keys = np.sort(np.random.default_rng(run.experiment.seed).choice(keys, most, replace=False))
    return keys


def _in_turn(processes: Mapping[str, Process], images: np.ndarray, seconds: float) -> dict[str, float]:
    """Median seconds of a call of each form; a round is one call of each, so that a busy moment hits all."""
    taken: dict[str, list[float]] = {name: [] for name in processes}
    end = time.perf_counter() + seconds
    while len(taken["keras"]) < _LEAST_ROUNDS or time.perf_counter() < end:
        for name, process in processes.items():
            taken[name].append(process.time(images))
            time.sleep(0.005)  # until the threads of the last one have stopped spinning
    return {name: float(np.median(each)) for name, each in taken.items()}


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _processor() -> str:
    """The processor's name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.1e}"
