"""Predicts films with a .tflite; needs NumPy, Pillow, pydicom and ai-edge-litert, and no TensorFlow.

python -m export.edge int8.tflite film.dcm folder/ --out out/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cxr_tf.errors import CxrError
from cxr_tf.predict import predict_files, table
from cxr_tf.terminal import command
from export.edge.predictor import edge_predictor

_MOST_THREADS = 256  # beyond some tens of thousands the runtime ends the process


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prints a table or JSON; the exit code is 0 when every film was predicted."""
    parser = argparse.ArgumentParser(
        prog="cxr-tf-edge", description="Predicts films with a .tflite. Research use, not a medical device."
    )
    parser.add_argument("model", type=Path, metavar="MODEL.tflite")
    parser.add_argument("films", nargs="+", type=Path, metavar="FILM", help="DICOM, PNG or JPEG files, or folders")
    parser.add_argument("--out", type=Path, help="folder for predictions.csv, masks and pictures (default: none)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--threads", type=int, help="that the model runs on (default: all cores)")
    parser.add_argument(
        "--max-megapixels", type=float, default=100.0, help="larger films are refused unread (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    if options.threads is not None and not 1 <= options.threads <= _MOST_THREADS:
        parser.error(f"--threads is 1 to {_MOST_THREADS}. Received: {options.threads}")
    return command(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    try:
        found = predict_files(
            edge_predictor(options.model, threads=options.threads),
            options.films,
            options.out,
            max_megapixels=options.max_megapixels,
        )
    except CxrError as error:
        if options.json:
            print(json.dumps({"films": [], "failed": [], "error": str(error)}, indent=2, ensure_ascii=False))
        raise
    if options.json:
        failed = [{"film": str(path), "error": reason} for path, reason in found.failed]
        print(json.dumps({"films": found.rows, "failed": failed}, indent=2, ensure_ascii=False))
    else:
        print(table(found.rows))
    for text in [*found.notes, *(f"not read: {reason}" for _, reason in found.failed)]:
        print(text, file=sys.stderr)
    print("Research use, not a medical device.", file=sys.stderr)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
