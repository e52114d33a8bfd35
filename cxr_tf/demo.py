"""The whole journey on generated radiographs: prepare, pre-train, train, evaluate, export, predict one DICOM file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cxr_tf.config import Experiment, Pretraining, parse_experiment, to_toml
from cxr_tf.errors import CxrError
from cxr_tf.files import writable_folder
from cxr_tf.progress import progress
from cxr_tf.run import write_json, write_text

STUDIES = 480
FILM_SIZE = 256


class DemoError(CxrError):
    """A folder that the demo would have to overwrite."""


def demo(out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Makes films, prepares them, pre-trains an encoder without labels, trains a two-headed model from it, judges it,
    exports it and predicts with the export.

    Args:
        out: a folder for all of it; new, empty, or one that an earlier demo was stopped in, which it then goes on in.
        seed: of the films and the training.

    Returns:
        What `out/summary.json` says: figures, paths, seconds of each step.

    Raises:
        DemoError: when `out` holds other files, or a demo with another seed.
        WriteError: when it cannot be written.
    """
    mark = out / "demo.json"
    if mark.is_file():
        begun = json.loads(mark.read_text(encoding="utf-8"))
        if begun != {"seed": seed}:
            raise DemoError(f"{out}: is a demo with seed {begun.get('seed')}. Give that seed, or another folder.")
    elif out.is_dir() and any(out.iterdir()):
        raise DemoError(f"{out}: holds files of something else. Give another folder with --out.")
    writable_folder(out, need_bytes=1_000_000_000)
    write_json(mark, {"seed": seed})
    seconds: dict[str, float] = {}

    with _timed("make films", seconds), progress("making films") as update:
        from cxr_tf.data.phantom import write_siim

        data = out / "siim"
        if not (data / "train_study_level.csv").is_file():
            write_siim(data, studies=STUDIES, size=FILM_SIZE, seed=seed, progress=update)

    with _timed("prepare", seconds):
        from cxr_tf.data.prepare import prepare_dataset

        prepare_dataset("siim", data, out / "shards", storage_size=192)

    experiment = demo_experiment(out / "shards", seed, out / "pretrained" / "encoder.keras")
    write_text(out / "experiment.toml", to_toml(experiment.model_dump(mode="json")))
    with _timed("pre-train", seconds):
        from cxr_tf.pretrain.recipe import pretrain

        pretrained = pretrain(demo_pretraining(out / "shards", seed, out / "experiment.toml"), out / "pretrained")

    with _timed("train", seconds):
        from cxr_tf.train.finetune import finetune

        run = finetune(experiment, out / "run")

    with _timed("evaluate", seconds):
        from cxr_tf.evaluate.evaluation import evaluate
        from cxr_tf.evaluate.summary import headline, summary

        metrics = evaluate(run)
        print(summary(metrics))

    with _timed("export", seconds):
        from export.parity import read_parity, table
        from export.run import export_run, report_forms

        exported = out / "run" / "export"
        parity = read_parity(exported) or export_run(run, "all", exported, seconds=5.0)
        report_forms(run, exported)
        print(table(parity))

    with _timed("predict", seconds):
        from cxr_tf.predict import predict_files
        from cxr_tf.predict import table as predictions

        shutil.rmtree(out / "predicted", ignore_errors=True)  # of a demo that was stopped here
        film = next(iter(sorted((data / "train").rglob("*.dcm"))))
        predicted = predict_files(exported / "savedmodel" / "1", [film], out / "predicted")
        print(predictions(predicted.rows))

    paths = {
        "films": str(data),
        "shards": str(out / "shards"),
        "pre-trained": str(pretrained.folder),
        "run": str(run.folder),
        "report": str(run.folder / "evaluation" / "report.html"),
        "exports": str(exported),
        "prediction": str(out / "predicted"),
    }
    result: dict[str, Any] = {
        "notice": "made on generated films: the figures say that the software works, and nothing about patients",
        "seed": seed,
        "figures": headline(metrics),
        "parity": parity,
        "paths": paths,
        "seconds": {step: round(taken, 1) for step, taken in {**seconds, "all": sum(seconds.values())}.items()},
    }
    write_json(out / "summary.json", result)
    print(f"\nmade in {sum(seconds.values()):.0f} s:")
    for name, path in {**paths, "summary": str(out / "summary.json")}.items():
        print(f"  {name:11} {path}")
    return result


def demo_pretraining(shards: Path, seed: int, test_of: Path) -> Pretraining:
    """The demo's pre-training: MoCo, without labels and without the patients that are tested on, for a minute."""
    return parse_experiment(
        {
            "name": "demo-pretraining",
            "seed": seed,
            "method": "moco",
            "data": {"shards": str(shards), "test_of": str(test_of), "validation": 0.1, "seed": seed},
            "model": {"encoder": "small_resnet", "size": 96},
            "moco": {"queue": 256, "momentum": 0.99},
            "probe": {"classes": ["Negative for Pneumonia", "Typical Appearance", "Atypical Appearance"]},
            "train": {
                "steps": 200,
                "batch_size": 32,
                "learning_rate": 1e-3,
                "warmup_steps": 20,
                "validate_every": 100,
                "checkpoint_every": 100,
            },
        },
        where="demo",
        kind=Pretraining,
    )


def demo_experiment(shards: Path, seed: int, weights: Path) -> Experiment:
    """The demo's experiment: a small residual encoder that two cores train in minutes."""
    return parse_experiment(
        {
            "name": "demo",
            "seed": seed,
            "data": {"shards": str(shards), "split": {"folds": 4, "seed": seed}},
            "model": {
                "encoder": "small_resnet",
                "size": 96,
                "weights": str(weights),
                "hidden": 128,
                "dropout": 0.2,
                "decoder_channels": [64, 32, 24, 16, 8],
            },
            "augment": {"rotation": 5.0, "blur": 0.0, "noise": 0.0},
            "train": {
                "steps": 400,
                "batch_size": 32,
                "learning_rate": 2e-3,
                "warmup_steps": 40,
                "validate_every": 100,
                "checkpoint_every": 100,
            },
            "evaluate": {"challenge": "siim", "replicates": 1000},
        },
        where="demo",
    )


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {step}", flush=True)
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start
