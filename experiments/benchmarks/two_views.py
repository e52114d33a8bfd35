"""How fast shards become two views of each film, beside torchvision and lightly.

COMMAND  python -m experiments.benchmarks.two_views FOLDER --peer-python PYTHON
COST     about six minutes on two cores
RESULT   832 films of 512 pixels, pairs of 224 pixels, on two quiet virtual cores; medians of three rounds:
             moco_cxr   shards 1,141 pairs/s, 1.62 ms of processor a pair; torchvision 471, 4.22   2.38 times as fast
             moco_v2    shards 1,205 pairs/s, 1.53 ms;                     lightly     188, 10.57  6.40 times
         ratio in each round: 2.37, 2.38, 2.49 and 7.12, 4.91, 6.40; of processor time 2.56 and 6.92. The aims were 2.5
         and 5 times.

FOLDER holds films as JPEG files. They are first prepared as shards (once, as for training; the time is not counted).
Then both sides take turns: ours reads shards, the other decodes the files, each on all cores, with the same ranges of
MoCo-CXR's views (torchvision) and with MoCo v2's (lightly, which also changes colors). PYTHON is the interpreter of an
environment with the peers, which must not share ours:

    python -m venv peers && peers/bin/pip install torch==2.14.1 torchvision==0.29.1 lightly==1.6.0
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import cxr_tf  # noqa: F401  (switches oneDNN on before TensorFlow is imported)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.pipeline import pretext_batches
from cxr_tf.data.shards import ShardFolder, prepare
from cxr_tf.data.views import MOCO_CXR, MOCO_V2
from experiments.benchmarks.input_pipeline import throughput

_PEER = Path(__file__).with_name("peer_two_views.py")
_CASES = {"moco_cxr": (MOCO_CXR, "torchvision"), "moco_v2": (MOCO_V2, "lightly")}


def shards_of(folder: Path, out: Path, storage_size: int) -> ShardFolder:
    """A folder of JPEG files as shards without labels."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    count = len(files)
    manifest = make_manifest(
        {
            "image": [str(path.resolve()) for path in files],
            "source": ["folder"] * count,
            **{name: [path.stem for path in files] for name in ("patient_id", "study_id")},
            **{name: [None] * count for name in ("view", "sex", "mask", "split")},
            "age": [float("nan")] * count,
            "label:none": [float("nan")] * count,
            "boxes": [[]] * count,
            "mask_known": [False] * count,
        }
    )
    return prepare(manifest, out, storage_size=storage_size)


def peer(python: str, folder: Path, views: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Pairs a second, and milliseconds of processor time a pair, of the other side."""
    settings = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in ("size", "batch_size", "seconds")]
    workers = f"--workers={os.cpu_count()}"
    ended = subprocess.run(
        [python, _PEER, folder, views, workers, *settings], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"the peer failed:\n{ended.stderr}")
    found = json.loads(ended.stdout.splitlines()[-1])
    return found["pairs_per_second"], found["processor_ms"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of JPEG files")
    parser.add_argument("--peer-python", required=True, help="interpreter that has torch, torchvision and lightly")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--storage-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shards = shards_of(arguments.folder, Path(scratch) / "shards", arguments.storage_size)
        print(f"{len(shards)} films of up to {shards.storage_size} pixels, pairs of {arguments.size} pixels")
        print(f"{'':22} {'pairs/s':>9} {'CPU ms a pair':>14}")
        for name, (views, other) in _CASES.items():
            ours, theirs = [], []
            for _ in range(arguments.rounds):
                pairs = pretext_batches(
                    shards, range(len(shards)), size=arguments.size, batch_size=arguments.batch_size, make=views
                )
                ours.append(throughput(pairs, arguments.batch_size, arguments.seconds))
                theirs.append(peer(arguments.peer_python, arguments.folder, name, arguments))
            for side, rounds in (("shards", ours), (other, theirs)):
                rate, cost = (statistics.median(values) for values in zip(*rounds, strict=True))
                print(f"{name + ', ' + side:22} {rate:9,.0f} {cost:14.2f}")
            faster = [mine[0] / other_[0] for mine, other_ in zip(ours, theirs, strict=True)]
            cheaper = [other_[1] / mine[1] for mine, other_ in zip(ours, theirs, strict=True)]
            print(
                f"{name + ', ratio':22} {statistics.median(faster):9.2f} {statistics.median(cheaper):14.2f}"
                f"   (pairs/s in each round: {', '.join(f'{ratio:.2f}' for ratio in faster)})",
                flush=True,
            )


if __name__ == "__main__":
    main()
