"""How fast one network answers in every form that it is exported to, beside itself in PyTorch.

COMMAND  python -m venv peers && peers/bin/pip install torch==2.14.1 torchvision==0.29.1
         python -m experiments.benchmarks.inference --peer-python peers/bin/python
COST     15 minutes on two cores, most of them DenseNet-121 with 16 films at once
RESULT   two quiet cores (x86, AVX2); times as multiples of ONNX Runtime's, one film / 16 films at once

                           small_resnet, 96    MobileNetV3Small, 256    DenseNet-121, 256
         Keras predict     12.59 / 2.42         2.86 / 2.13              2.44 / 1.50
         tf.function        2.09 / 1.40         1.42 / 1.70              1.28 / 1.50
         SavedModel         1.41 /  .95         1.08 /  .95              1.08 /  .96
         LiteRT float32      .86 /  .89          .83 /  .89               .90 /  .89
         LiteRT float16      .86 /  .89          .84 /  .89               .90 /  .90
         LiteRT dynamic      .83 /  .87          .87 /  .91               .88 /  .91
         LiteRT int8         .85 /  .90          .96 /  .99               .85 /  .83
         ONNX Runtime       4.6 / 70.6 ms       34.6 / 527 ms            107 / 1,780 ms
         PyTorch            1.63 / 1.24         1.20 / 1.57              1.19 / 1.30

         As multiples of PyTorch's time LiteRT float32 takes .53 / .72, .67 / .57 and .76 / .69, the SavedModel .87 /
         .75, .90 / .61 and .87 / .72. With one film the SavedModel is over 1.05 times ONNX Runtime. On one thread
         `small_resnet` takes 10.9 ms to its 9.3, on two 8.0 to 5.0: TensorFlow's threads sleep between the primitives
         of oneDNN, ONNX Runtime's wait for work. XLA (8.0 to 8.9 ms), a fixed batch (8.4), one thread between ops (7.3)
         and TF_ONEDNN_THREADPOOL_USE_CALLER_THREAD (8.1) leave it beyond 1.5 times ONNX Runtime in that hour.

Networks with both heads and drawn weights, exported by `export`'s own functions into a scratch folder: `small_resnet`
at 96 pixels, DenseNet-121 and MobileNetV3Small at 256. Every side is a process of its own with as many threads as there
are cores, takes and gives NumPy arrays, and is called in turn with the others; a time is the median over the rounds of
the median call, a ratio the median over the rounds of that round's ratio.

"SavedModel" is the signature "predict", which does more than the others: it checks the shape of its input, and gives
class names and content boxes too. PyTorch's network is made of torchvision's parts, with random weights and, which is
checked, as many of them; it runs in `inference_mode`, channels first and channels last; the faster counts. One thing
is not the same, and costs no time: TensorFlow pads strided convolutions on one side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEER = Path(__file__).with_name("peer_inference.py")
NETWORKS = ("small_resnet:96", "mobilenetv3small:256", "densenet121:256")
BATCHES = (1, 16)
KINDS = ("float32", "float16", "dynamic", "int8")
# Name of a row -> the file that is opened.
FORMS = {
    "Keras predict": "model.keras",
    "tf.function": "model.keras",
    "SavedModel": "savedmodel/1",
    **{f"LiteRT {kind}": f"{kind}.tflite" for kind in KINDS},
    "ONNX Runtime": "model.onnx",
}
CLASSES = ("a", "b", "c", "d")


def write(network: str, folder: Path) -> None:
    """Writes a network with drawn weights in every form."""
    import keras
    import numpy as np

    import cxr_tf
    from export.about import about
    from export.frozen import Frozen
    from export.litert import write_litert
    from export.onnx_form import write_onnx
    from export.savedmodel import write_savedmodel

    encoder, _, side = network.partition(":")
    size = int(side)
    keras.utils.set_random_seed(0)
    model = cxr_tf.multitask(encoder, (size, size, 1), classes=CLASSES)
    drawn = np.random.default_rng(0)
    for layer in model.layers:
        # The zeros and ones of new batch-norms and biases would be left out of a graph.
        fresh = layer.weights if isinstance(layer, keras.layers.BatchNormalization) else [getattr(layer, "bias", None)]
        for weight in fresh:
            if weight is not None:
                weight.assign(drawn.uniform(0.5, 1.0, weight.shape))
    model.save(folder / "model.keras")
    operating = {
        "classes": list(CLASSES),
        "task": "multiclass",
        "size": size,
        "storage_size": 2 * size,
        "temperature": 1.3,
        "thresholds": dict.fromkeys(CLASSES, 0.5),
        "mask_threshold": 0.5,
    }
    films = drawn.uniform(0, 255, (8, size, size, 1)).astype(np.float32)
    said = about(operating, name=network, heads=model.heads)
    write_savedmodel(model, folder / "savedmodel" / "1", said)
    for kind in KINDS:
        write_litert(lambda batch: Frozen(model, operating, batch), kind, folder / f"{kind}.tflite", said, films)
    write_onnx(Frozen(model, operating), folder / "model.onnx", said)
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    (folder / "network.json").write_text(json.dumps({"size": size, "parameters": trained}))


def opened(form: str, folder: Path, threads: int) -> Callable[[Any], Any]:
    """A form as a function from NumPy arrays to NumPy arrays."""
    if not form.startswith(("Keras", "tf.function")):
        from export.forms import open_form

        return open_form(folder / FORMS[form], threads=threads)
    import tensorflow as tf

    from cxr_tf.models.outputs import calibrated, load_model

    model = load_model(folder / FORMS[form])
    if form == "Keras predict":
        return lambda films: model.predict(films, batch_size=len(films), verbose=0)

    @tf.function(input_signature=[tf.TensorSpec(model.input.shape, tf.float32)])
    def run(image: Any) -> dict[str, Any]:
        raw = model(image, training=False)
        return raw | calibrated(raw, {"temperature": 1.3, "task": "multiclass"})

    return lambda films: {name: value.numpy() for name, value in run(films).items()}


def answer(form: str, folder: Path, threads: int) -> None:
    """For each line "BATCH SECONDS" of standard input, one of JSON with the median milliseconds of a call."""
    import numpy as np

    call = opened(form, folder, threads)
    size = json.loads((folder / "network.json").read_text())["size"]
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        batch, seconds = int(line.split()[0]), float(line.split()[1])
        films = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 1)).astype(np.float32)
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            call(films)
            taken.append(1e3 * (time.perf_counter() - start))
        print(json.dumps({"ms": statistics.median(taken[1:])}), flush=True)


class Side:
    """One row of the table: a process that is asked for times."""

    def __init__(self, command: list[str], threads: int):
        environment = os.environ | {
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "TF_NUM_INTRAOP_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.said = self._answer()

    def ms(self, batch: int, seconds: float) -> float:
        """Milliseconds of a call, of the fastest way that the process knows."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batch} {seconds}\n")
        self._process.stdin.flush()
        return float(min(self._answer().values()))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # other lines are what libraries print
                found = json.loads(line)
                assert isinstance(found, dict)
                return found
        raise SystemExit(f"{' '.join(map(str, self._process.args))}: ended with code {self._process.wait()}")  # type: ignore[arg-type]


def compared(network: str, peer: Path | None, rounds: int, seconds: float, threads: int) -> None:
    """Prints the table of one network."""
    here = [sys.executable, "-m", "experiments.benchmarks.inference"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*here, "--write", network, scratch], check=True, stdout=subprocess.DEVNULL)
        commands = {form: [*here, "--own", form, scratch, str(threads)] for form in FORMS}
        if peer is not None:
            commands["PyTorch"] = [str(peer), str(PEER), *network.split(":"), str(threads)]
        sides = {name: Side(command, threads) for name, command in commands.items()}
        if peer is not None:
            parameters = json.loads((Path(scratch) / "network.json").read_text())["parameters"]
            assert sides["PyTorch"].said["parameters"] == parameters, (sides["PyTorch"].said, parameters)
        taken: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in sides for batch in BATCHES}
        for round_ in range(rounds):
            for batch in BATCHES:
                for name, side in sides.items():
                    taken[name, batch].append(side.ms(batch, seconds))
                    print(
                        f"round {round_ + 1}: {name}, {batch} at once: {taken[name, batch][-1]:.2f} ms",
                        file=sys.stderr,
                        flush=True,
                    )
        for side in sides.values():
            side.close()

    print(f"{network.replace(':', ', ')} pixels")
    print(f"{'':18}" + "".join(f"{f'{batch} at once':>12} {'x ONNX':>7} {'x torch':>7}" for batch in BATCHES))
    for name in sides:
        row = f"{name:18}"
        for batch in BATCHES:
            mine = taken[name, batch]
            row += f"{statistics.median(mine):9.1f} ms"
            for other in ("ONNX Runtime", "PyTorch"):
                theirs = taken.get((other, batch))
                row += (
                    f" {statistics.median(m / t for m, t in zip(mine, theirs, strict=True)):7.2f}"
                    if theirs
                    else " " * 8
                )
        print(row, flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="encoder:pixels")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with torch and torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of calls of one side in a round; at least three calls"
    )
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--own", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write[0], Path(arguments.write[1]))
    elif arguments.own:
        answer(arguments.own[0], Path(arguments.own[1]), int(arguments.own[2]))
    else:
        for network in arguments.networks:
            compared(network, arguments.peer_python, arguments.rounds, arguments.seconds, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
