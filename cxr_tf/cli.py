"""The command line: parse, call one function, print. Each command imports what it needs, and no more."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from cxr_tf.data.readers import DATASETS
from cxr_tf.errors import CxrError
from cxr_tf.terminal import STOPPED, lost_output, speak_plainly

app = typer.Typer(
    name="cxr-tf",
    help="Train, judge and deploy chest-radiograph models. Research use, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment file.")]
Dataset = Annotated[
    str, typer.Argument(metavar="DATASET", help=f"{', '.join(DATASETS[:-1])}, or {DATASETS[-1]} for any CSV.")
]
DatasetRoot = Annotated[Path, typer.Argument(metavar="ROOT", help="The data set's folder, as published.")]
DatasetConfig = Annotated[
    Path | None,
    typer.Option(
        metavar="EXPERIMENT.toml",
        help="Its [dataset] section has options of the reader; for table, its [table] section maps the columns.",
    ),
]
MaxMegapixels = Annotated[float, typer.Option(min=0.1, max=1e6, help="Larger films are refused unread.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `cxr-tf train` made.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: train.steps=500. Repeatable.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for all that it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the generated radiographs and the training.")] = 0,
) -> None:
    """The whole journey on generated radiographs: prepare, pre-train, train, evaluate, export, predict."""
    from cxr_tf.demo import demo as run_demo

    run_demo(out, seed=seed)


@app.command()
def prepare(
    dataset: Dataset,
    root: DatasetRoot,
    out: Annotated[Path, typer.Option(help="Folder of the shards to write.")],
    config: DatasetConfig = None,
    storage_size: Annotated[int, typer.Option(min=32, max=4096, help="Longer side that films are kept at.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on the first film that cannot be read.")] = False,
    max_megapixels: MaxMegapixels = 100.0,
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make the part of machine I of N, counted from 0; then --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Make one folder of the parts of all machines.")] = False,
) -> None:
    """Read a data set and write it as shards. Given again, it goes on where it was stopped."""
    from cxr_tf.data.prepare import parse_worker, prepare_dataset

    shards = prepare_dataset(
        dataset,
        root,
        out,
        config=config,
        storage_size=storage_size,
        workers=workers,
        strict=strict,
        max_megapixels=max_megapixels,
        worker=parse_worker(worker),
        merge=merge,
    )
    if shards is None:
        typer.echo(f"{out}: part {worker} is done; when all are, --merge makes one folder of them")
        return
    typer.echo(f"{out}: {len(shards):,} films, {shards.rejected:,} rejected{_see(out, 'rejected', shards.rejected)}")
    if shards.noted:
        typer.echo(f"{shards.noted:,} films should be looked at{_see(out, 'noted', shards.noted)}")


def _see(folder: Path, name: str, films: int) -> str:
    return f" (see {folder / f'{name}.csv'})" if films else ""


@app.command()
def inspect(
    dataset: Dataset,
    root: DatasetRoot,
    config: DatasetConfig = None,
    sheet: Annotated[Path | None, typer.Option(help="PNG to draw some films on; DATASET.png by default.")] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Read the pixels of all films: finds all that prepare would reject.")
    ] = False,
    max_megapixels: MaxMegapixels = 100.0,
) -> None:
    """Say what a data set holds before anything is prepared, and draw some of its films."""
    from cxr_tf.data.prepare import inspect_dataset

    sheet = sheet or Path(f"{dataset}.png")
    found = inspect_dataset(dataset, root, sheet, config=config, decode=decode, max_megapixels=max_megapixels)
    typer.echo(found)
    if found.drawn:
        typer.echo(f"{sheet}: {found.drawn} of the films")


@app.command()
def audit(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Manifests (CSV), folders of shards, run folders.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page and the tables; they show films.")] = Path("audit"),
    max_megapixels: MaxMegapixels = 100.0,
) -> None:
    """Find patients, studies and near-identical films on several sides of a split, or in several data sets."""
    from cxr_tf.data.audit import audit as audit_films
    from cxr_tf.progress import progress

    with progress("auditing") as update:
        found = audit_films(data, out, progress=update, max_megapixels=max_megapixels)
    typer.echo(found.summary())
    typer.echo(f"{out}: audit.html and its tables")
    if found.failed:
        raise typer.Exit(1)


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Override = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
) -> None:
    """Train a multi-task model. Given again, it goes on where it was stopped."""
    from cxr_tf.config import load_experiment

    settings = load_experiment(experiment, overrides or [])
    from cxr_tf.train.finetune import finetune

    run = finetune(settings, out or Path("runs") / settings.name)
    typer.echo(f"{run.folder}: trained; `cxr-tf evaluate {run.folder}` judges it")


@app.command()
def pretrain(
    experiment: ExperimentFile,
    overrides: Override = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/<name> by default.")] = None,
) -> None:
    """Pre-train an encoder on films without labels. Given again, it goes on where it was stopped."""
    from cxr_tf.config import Pretraining, load_experiment

    settings = load_experiment(experiment, overrides or [], Pretraining)
    from cxr_tf.pretrain.recipe import pretrain as pretrain_encoder

    run = pretrain_encoder(settings, out or Path("runs") / settings.name)
    encoder = run.folder / "encoder.keras"
    typer.echo(f"{encoder}: pre-trained; `cxr-tf train EXPERIMENT.toml --set model.weights={encoder}` goes on from it")


@app.command()
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `cxr-tf pretrain` made.")],
    data: Annotated[Path | None, typer.Option(help="Folder of labeled shards; the run's own by default.")] = None,
    experiment: Annotated[
        Path | None, typer.Option(metavar="EXPERIMENT.toml", help="Its [data] says which films, classes and patients.")
    ] = None,
    fractions: Annotated[str, typer.Option(help="Parts of the labels to fit on.")] = "0.01,0.1,1.0",
) -> None:
    """Judge a pre-trained encoder by linear probes with few labels and with many."""
    from cxr_tf.config import Pretraining
    from cxr_tf.run import open_run

    opened = open_run(run, kind=Pretraining)
    from cxr_tf.pretrain.probe import parse_fractions, table
    from cxr_tf.pretrain.probe import probe as probe_run

    found = probe_run(opened, shards=data, experiment=experiment, fractions=parse_fractions(fractions))
    typer.echo(table(found))
    typer.echo(f"{run / 'probe'}: probe.json and probe.png")


@app.command()
def evaluate(
    run: RunFolder,
    overrides: Override = None,
    criteria: Annotated[
        Path | None, typer.Option(metavar="CRITERIA.toml", help="What it must reach; the package's own by default.")
    ] = None,
    readers: Annotated[Path | None, typer.Option(metavar="READERS.csv", help="Labels of human readers.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="End with 1 unless every criterion is met.")] = False,
) -> None:
    """Judge a run on its test patients: may it be deployed? Figures with intervals, and a page for people."""
    from cxr_tf.run import open_run

    opened = open_run(run, overrides or [])
    from cxr_tf.evaluate.evaluation import evaluate as evaluate_run
    from cxr_tf.evaluate.summary import summary

    found = evaluate_run(opened, criteria=criteria, readers=readers)
    from export.run import report_forms

    report_forms(opened, run / "export")
    typer.echo(summary(found))
    typer.echo(f"{run / 'evaluation'}: report.html, metrics.json, predictions.csv and figures; {run / 'MODEL_CARD.md'}")
    if gate and not found["readiness"]["ready"]:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Evaluated run folders; all are compared with the first.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("comparison"),
) -> None:
    """Compare runs on the same test films: figures and paired differences, as tables for a paper."""
    from cxr_tf.run import open_run

    opened = [open_run(run) for run in runs]
    from cxr_tf.evaluate.compare import compare as compare_runs
    from cxr_tf.evaluate.compare import summary, write_comparison

    found = compare_runs(opened)
    write_comparison(found, out)
    typer.echo(summary(found))
    typer.echo(f"{out}: comparison.json, comparison.csv and comparison.tex")


@app.command()
def export(
    run: RunFolder,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="all, savedmodel, onnx, litert, or one of it: litert-float32, -float16, -dynamic, -int8.",
        ),
    ] = "savedmodel",
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN/export by default.")] = None,
    films: Annotated[int, typer.Option(min=1, help="At most so many test films are compared.")] = 500,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(metavar="FORM.FIGURE=VALUE", help="What is allowed: litert-int8.auroc=0.02. Repeatable."),
    ] = None,
    overrides: Override = None,
) -> None:
    """Export a run's model, and prove on its test films that nothing changed on the way."""
    from cxr_tf.run import open_run

    opened = open_run(run, overrides or [])
    from export.parity import table
    from export.run import ParityError, export_run, report_forms

    try:
        found = export_run(opened, form, out or run / "export", films=films, tolerances=tolerance or [])
        reported = report_forms(opened, out or run / "export")
    except ParityError as error:
        typer.echo(table(error.parity))
        raise
    typer.echo(table(found))
    typer.echo(f"{out or run / 'export'}: compared on {found['films']} test films; parity.json has all figures")
    if reported:
        typer.echo(f"{run / 'evaluation' / 'report.html'}: has them, too")


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run folder, or a SavedModel, .tflite or .onnx that we exported.")
    ],
    films: Annotated[list[Path], typer.Argument(metavar="FILM...", help="DICOM, PNG or JPEG files, or folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the table, masks and pictures.")],
    dicom: Annotated[
        bool, typer.Option("--dicom", help="Write a DICOM Segmentation for each DICOM film; it names the patient.")
    ] = False,
    mask_of: Annotated[str, typer.Option(help="What the mask shows, for --dicom: opacity or lung.")] = "opacity",
    max_megapixels: MaxMegapixels = 100.0,
) -> None:
    """Predict films: a table of probabilities, masks in the films' own pixels, pictures."""
    from cxr_tf.predict import predict_files, table
    from cxr_tf.progress import progress

    with progress("predicting") as update:
        found = predict_files(
            model, films, out, dicom=mask_of if dicom else None, max_megapixels=max_megapixels, progress=update
        )
    typer.echo(table(found.rows))
    typer.echo(f"{out}: predictions.csv, masks and pictures. Research use, not a medical device.")
    for note in found.notes:
        typer.echo(note)
    for _, reason in found.failed:
        typer.echo(f"not read: {reason}", err=True)
    for _, reason in found.unsegmented:
        typer.echo(f"no Segmentation: {reason}", err=True)
    if found.failed or found.unsegmented:
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; bad input ends in one message on standard error and exit code 1."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("MPLBACKEND", "Agg")
    speak_plainly()
    code: int | str | None = 1
    try:
        app()
    except CxrError as error:
        typer.echo(f"error: {error}", err=True)
    except SystemExit as error:
        code = error.code
        if code == STOPPED:  # typer's answer to Ctrl-C
            goes_on = {"demo", "prepare", "pretrain", "train"} & set(sys.argv[1:2])
            typer.echo("stopped; it goes on where it was when given again" if goes_on else "stopped", err=True)
    except BaseException as error:
        if not lost_output(error):
            if not _one_of_several_workers():
                raise
            traceback.print_exc()
    if _one_of_several_workers():
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _one_of_several_workers() -> bool:
    """Whether training has joined other processes: a normal exit may then wait for them."""
    distribute = sys.modules.get("cxr_tf.train.distribute")  # this one must not load TensorFlow
    return distribute is not None and distribute.one_of_several
