"""An exported form as a function of images; and as one in a process of its own, where what it costs can be measured.

What runs a form is loaded with it: for a .tflite or a .onnx that is not TensorFlow.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cxr_tf.errors import innermost
from export.about import read_about
from export.errors import ExportError, imported

Call = Callable[[np.ndarray], dict[str, np.ndarray]]


def open_form(path: str | Path, *, threads: int = 1) -> Call:
    """Opens an exported form.

    Args:
        path: folder of a SavedModel, a .tflite, a .onnx, or a finished run folder, for its Keras model in float32.
        threads: that a .tflite or a .onnx uses; TensorFlow has its own settings.

    Returns:
        A function from images, float32 `[n, S, S, 1]`, 0-255, to a dictionary of "logits" and "probabilities"
        `[n, classes]` and/or "mask" `[n, S, S, 1]`, all float32.

    Raises:
        ExportError: when it is none of these, or damaged, or what runs it is not installed.

    Example:
        >>> call = open_form("export/litert/int8.tflite")  # doctest: +SKIP
        >>> call(images)["probabilities"]  # doctest: +SKIP
    """
    path = Path(path)
    opened = _OPENERS[_kind(path)](path, threads)

    def call(images: np.ndarray) -> dict[str, np.ndarray]:
        made = opened(np.ascontiguousarray(images, np.float32))
        return {name: made[name] for name in ("logits", "probabilities", "mask") if name in made}

    return call


def _kind(path: Path) -> str:
    if (path / "config.toml").is_file():
        return "keras"
    return path.suffix.lower() if path.suffix.lower() in (".tflite", ".onnx") else "savedmodel"


def _open_keras(path: Path, threads: int) -> Call:
    import tensorflow as tf

    from cxr_tf.models.outputs import calibrated, float32_model, load_model
    from cxr_tf.run import read_operating

    operating = read_operating(path / "operating.json")
    model = float32_model(load_model(path / "model.keras"))

    @tf.function(input_signature=[tf.TensorSpec(model.input.shape, tf.float32)])
    def run(images: Any) -> dict[str, Any]:
        raw = model(images, training=False)
        return raw | calibrated(raw, operating)

    return lambda images: {name: value.numpy() for name, value in run(images).items()}


def _open_savedmodel(path: Path, threads: int) -> Call:
    tf = imported("tensorflow")
    read_about(path)
    try:
        loaded = tf.saved_model.load(str(path))
        predict = loaded.signatures["predict"]
    except (OSError, ValueError, KeyError, IndexError, tf.errors.OpError) as error:
        raise ExportError(f"{path}: cannot be loaded ({innermost(error)}). Export it again.") from error

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        made = predict(image=tf.constant(images))
        return {name: value.numpy() for name, value in made.items()}

    run.loaded = loaded  # type: ignore[attr-defined]  # its variables live as long as it does
    return run


def _open_litert(path: Path, threads: int) -> Call:
    litert = imported("ai_edge_litert.interpreter")
    read_about(path)
    try:
        interpreter = litert.Interpreter(str(path), num_threads=threads)
        run = interpreter.get_signature_runner("predict")
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"{path}: cannot be loaded ({innermost(error)}). Export it again.") from error
    if interpreter.get_input_details()[0]["shape_signature"][0] == -1:
        return lambda images: run(image=images)

    def one_by_one(images: np.ndarray) -> dict[str, np.ndarray]:
        made = [run(image=images[i : i + 1]) for i in range(len(images))]
        return {name: np.concatenate([one[name] for one in made]) for name in made[0]}

    return one_by_one


def _open_onnx(path: Path, threads: int) -> Call:
    runtime = imported("onnxruntime")
    read_about(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own, which share no base
        raise ExportError(f"{path}: cannot be loaded ({innermost(error)}). Export it again.") from error
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(None, {"image": images}), strict=True))


_OPENERS = {".tflite": _open_litert, ".onnx": _open_onnx, "savedmodel": _open_savedmodel, "keras": _open_keras}
_RUNTIMES = {
    ".tflite": ("ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated"),
    ".onnx": ("onnxruntime",),
    "savedmodel": ("tensorflow",),
    "keras": ("cxr_tf.models.outputs",),
}


class Process:
    """A form in a fresh process: what it says, and how long things take there.

    Args:
        name: of the form, for errors.
        path: as `open_form` takes it.
        image: float32 `[1, S, S, 1]`: a first one to answer.

    Attributes:
        seconds: "import" (Python's, of what runs the form), "load" (opening the form) and "first" (its first answer).

    Raises:
        ExportError: when the form cannot be opened or fails, or its process is ended from outside.
    """

    def __init__(self, name: str, path: Path, image: np.ndarray):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(path)), daemon=True)
        self._process.start()
        theirs.close()
        try:
            # Not among the arguments: `start` would wait without end to hand a large one to a process that has died.
            self.seconds: dict[str, float] = self._ask(image)
        except ExportError:
            self.close()
            raise

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What the form says of images (see `open_form`)."""
        return self._ask(("call", images))

    def time(self, images: np.ndarray) -> float:
        """Seconds of one call, after one that is not counted."""
        return self._ask(("time", images))

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, what: Any) -> Any:
        try:
            self._pipe.send(what)
            right, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            raise ExportError(
                f"{self.name}: its process ended with code {code}: its runtime gave up, or memory ran out."
            ) from error
        if not right:
            raise ExportError(f"{self.name}: {answer}")
        return answer


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _serve(pipe: Any, path: str) -> None:
    """The other end of `Process`: it answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(EOFError, OSError):
        try:
            image = pipe.recv()
            clock = time.perf_counter
            marks = [clock()]
            for module in _RUNTIMES[_kind(Path(path))]:
                imported(module)
            marks.append(clock())
            call = open_form(path, threads=cores())
            marks.append(clock())
            call(image)
            marks.append(clock())
            names = ("import", "load", "first")
            pipe.send((True, {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}))
            while True:
                wanted, images = pipe.recv()
                if wanted == "time":
                    call(images)
                    start = clock()
                    call(images)
                    pipe.send((True, clock() - start))
                else:
                    pipe.send((True, call(images)))
        except (EOFError, OSError):
            raise
        except Exception as error:  # whatever it is, the parent says it
            pipe.send((False, str(error) if isinstance(error, ExportError) else innermost(error)))
