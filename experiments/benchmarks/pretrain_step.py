"""How fast a MoCo step is, beside the same step of lightly's parts in PyTorch, and of what the machine can do at all.

COMMAND  python -m venv peers && peers/bin/pip install torch==2.14.1 torchvision==0.29.1 lightly==1.6.0
         python -m experiments.benchmarks.pretrain_step --peer-python peers/bin/python
COST     15 minutes on two cores with --rounds 5
RESULT   on two quiet virtual cores (AVX2), medians of five rounds:
                                                              images/s  times lightly  of matmul rate
         plain batch-norm, keys in order                          14.4           1.03             62%
         plain batch-norm, keys in order, one thread an op        15.8           1.12             68%
         batch-norm over 4 parts, keys shuffled                   12.6           0.89             54%
         batch-norm over 4 parts, keys shuffled, one thread an op 14.8           1.02             63%
         lightly, PyTorch                                         14.3           1.00

DenseNet-121, films of 128 pixels, 16 a step, one channel, SGD, a queue of 4,096 keys, on the CPU. Each is a process of
its own, in turn; the ratio is the median over the rounds. "One thread an op" is TF_NUM_INTRAOP_THREADS=1 with as many
TF_NUM_INTEROP_THREADS as cores: on two cores, query and key side by side keep both busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEER = Path(__file__).with_name("peer_moco_step.py")
ROWS = {"plain batch-norm, keys in order": (1, False), "batch-norm over 4 parts, keys shuffled": (4, True)}


def ours(batch: int, size: int, queue: int, steps: int, warmup: int, parts: int, shuffle: bool) -> dict[str, Any]:
    """Milliseconds of each step, floating-point operations of one, and the machine's rate of them."""
    import cxr_tf  # switches oneDNN on before TensorFlow is imported

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    encoder = cxr_tf.encoder("densenet121", (size, size, 1))
    moco = cxr_tf.MoCo(encoder, queue_size=queue, parts=parts, shuffle=shuffle)
    moco.compile(keras.optimizers.SGD(0.03, momentum=0.9, weight_decay=1e-4))
    moco.optimizer.build(moco.trainable_variables)
    step = tf.function(moco.train_step)
    films = 255 * tf.random.uniform([2, batch, size, size, 1])
    data = {"query": films[0], "key": films[1]}
    taken = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        float(step(data)["loss"])
        taken.append(1e3 * (time.perf_counter() - start))
    forward = batch * sum(_operations(layer) for layer in moco.query.layers)
    return {"ms": taken[warmup:], "operations": 4 * forward, "rate": _matmul_rate()}


def _operations(layer: object) -> int:
    """Of one film's forward pass: multiplications and additions of convolutions and dense layers."""
    kernel = getattr(layer, "kernel", None)
    if kernel is None:
        return 0
    positions = 1
    for side in layer.output.shape[1:-1]:  # type: ignore[attr-defined]
        positions *= side
    size = 1
    for side in kernel.shape:
        size *= side
    return 2 * positions * size


def _matmul_rate(side: int = 1536, repeats: int = 6) -> float:
    """Floating-point operations a second of large matrix products, the best of some."""
    import tensorflow as tf

    a = tf.random.uniform([side, side])
    product = tf.function(lambda x: tf.matmul(x, x))
    product(a)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(a).numpy()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _run(command: list[str], threads: tuple[int, int] | None = None) -> dict[str, Any]:
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"TF_NUM_INTRAOP_THREADS": str(threads[0]), "TF_NUM_INTEROP_THREADS": str(threads[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return found if isinstance(found, dict) else {"ms": found}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with PyTorch and lightly")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = ("batch", "size", "queue", "steps", "warmup")
    work = {name: getattr(arguments, name) for name in names}
    if arguments.own:
        print(json.dumps(ours(**work, parts=arguments.own[0], shuffle=bool(arguments.own[1]))))
        return

    here = [sys.executable, "-m", "experiments.benchmarks.pretrain_step"]
    for name, value in work.items():
        here += [f"--{name}", str(value)]
    cores = os.cpu_count() or 1
    sides: dict[str, tuple[list[str], tuple[int, int] | None]] = {}
    for row, (parts, shuffle) in ROWS.items():
        command = [*here, "--own", str(parts), str(int(shuffle))]
        sides[row] = command, None
        sides[f"{row}, one thread an op"] = command, (1, cores)
    if arguments.peer_python is not None:
        sides["lightly, PyTorch"] = [str(arguments.peer_python), str(PEER), *map(str, work.values())], None
    medians: dict[str, list[float]] = {side: [] for side in sides}
    rate, operations = 0.0, 0.0  # of the machine, a second, the best that any process found; of one step
    for round_ in range(arguments.rounds):
        for side, (command, threads) in sides.items():
            found = _run(command, threads)
            medians[side].append(statistics.median(found["ms"]))
            if "rate" in found:
                rate, operations = max(rate, found["rate"]), found["operations"]
            print(f"round {round_ + 1}: {side}: {medians[side][-1]:.0f} ms a step", file=sys.stderr, flush=True)

    peer = medians.get("lightly, PyTorch")
    print(f"{'':58} {'images/s':>9} {'times lightly':>14} {'of matmul rate':>15}")
    for side, taken in medians.items():
        seconds = statistics.median(taken) / 1e3
        ratio = "" if peer is None else f"{statistics.median(p / t for p, t in zip(peer, taken, strict=True)):.2f}"
        share = f"{operations / seconds / rate:.0%}" if taken is not peer else ""
        print(f"{side:58} {arguments.batch / seconds:9.1f} {ratio:>14} {share:>15}")


if __name__ == "__main__":
    main()
