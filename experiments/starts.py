"""Does pre-training help? Starts of one encoder compared out of fold on real films, beside thumbnails.

COMMAND  cxr-tf prepare table "$CXR_DATA" --config experiments/cxr/multitask.toml --out shards/cxr
         cxr-tf prepare table "$CXR_DATA" --config experiments/cxr/lungs.toml --out shards/cxr-lungs
         python -m experiments.starts --out runs/starts
COST     about two and a half hours on two busy cores
RESULT   experiments/cxr/starts.md

For each of the folds 0 to 3 an encoder is pre-trained without the patients of that fold (all sources, no labels), read
by linear probes or fine-tuned on the other folds, and predicts that fold; figures are over the films of all four, with
intervals over patients. What a probe's strength and a fine-tuning's epoch are chosen on is 15 % of the training
patients. Given again it goes on where it was stopped; several at once with --folds share the work.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from cxr_tf.config import Experiment, Pretraining, load_experiment
from cxr_tf.data.manifest import labels
from cxr_tf.data.shards import ShardFolder, open_shards
from cxr_tf.data.split import carve
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap
from cxr_tf.evaluate.calibration import probabilities_of
from cxr_tf.evaluate.inference import predict_films
from cxr_tf.evaluate.paired import paired_auroc
from cxr_tf.files import replacing
from cxr_tf.models.encoders import encoder
from cxr_tf.models.outputs import load_model
from cxr_tf.pretrain.features import features, linear_probe, reader, thumbnails
from cxr_tf.pretrain.recipe import pretrain
from cxr_tf.run import write_json
from cxr_tf.train.finetune import finetune

HERE = Path(__file__).parent / "cxr"
FOLDS = (0, 1, 2, 3)
STARTS = ("random", "moco", "inpainting", "joint")
THUMBNAILS = {"8x8": 8, "32x32": 32}
NIH, KERMANY, IEEE = "NIH ChestX-ray14", "ai-pneumonia-detection", "covid-chestxray-dataset"
FRACTIONS = (0.1, 1.0)
DRAWS = 5


def tasks(manifest: pd.DataFrame, classes: list[str]) -> dict[str, np.ndarray]:
    """Name -> 1, 0, or NaN where a film is not of the task, `[films]`."""
    truth = dict(zip(classes, labels(manifest, classes).T == 1, strict=True))
    source, age = manifest["source"], pd.to_numeric(manifest["age"], errors="coerce")
    adult = source.str.contains(NIH, regex=False) & (age >= 18)
    hannover = manifest["patient_id"].str.startswith("hannover")

    def task(where: Any, one: Any, zero: Any) -> np.ndarray:
        return np.where(where & one, 1.0, np.where(where & zero, 0.0, np.nan))

    return {
        "NIH: pneumonia": task(source.str.contains(NIH, regex=False), truth["Pneumonia"], truth["No finding"]),
        "NIH adults: sex": task(adult, manifest["sex"] == "M", manifest["sex"] == "F"),
        "Kermany: bacterial": task(source.str.contains(KERMANY, regex=False), truth["Bacterial"], truth["Other viral"]),
        "ieee8023: COVID-19": task(
            source.str.contains(IEEE, regex=False) & ~hannover,
            truth["COVID-19"],
            truth["Bacterial"] | truth["Other viral"] | truth["Pneumonia"] | truth["Other"],
        ),
    }


def started(start: str, fold: int, out: Path, overrides: list[str]) -> Path | None:
    """The pre-trained encoder of a start, or None for random weights."""
    if start == "random":
        return None
    settings = [f"data.holdout.fold=[{fold}]", f"seed={fold}", f"name={start}-{fold}", *overrides]
    run = pretrain(load_experiment(HERE / f"{start}.toml", settings, Pretraining), out / f"{start}-{fold}")
    return run.folder / "encoder.keras"


def inputs(start: str, fold: int, shards: ShardFolder, out: Path, overrides: list[str]) -> np.ndarray:
    """What a probe reads of every film: pooled features, or pixels of thumbnails."""
    path = out / "features" / f"{start}-{fold}.npy"
    if not path.is_file():
        keys = np.arange(len(shards))
        if start in THUMBNAILS:
            found = thumbnails(shards, keys, size=THUMBNAILS[start])
        else:
            model = load_experiment(HERE / "moco.toml", kind=Pretraining).model
            keras.utils.set_random_seed(fold)
            made = encoder(model.encoder, (model.size, model.size, 1), weights=started(start, fold, out, overrides))
            found = features(reader(made), shards, keys, size=model.size, batch_size=64)
        with replacing(path) as temporary:
            np.save(temporary, found)
    return np.load(path)


def probed(
    x: np.ndarray, truth: np.ndarray, manifest: pd.DataFrame, fold: int, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Films of the fold, and what linear probes fitted on the others say of them, `[draws, films]`."""
    films = manifest.assign(row=np.arange(len(manifest)))[~np.isnan(truth)]
    folds = films["fold"].astype(str)
    test = films.loc[folds == str(fold), "row"].to_numpy()
    rest = carve(films[folds != str(fold)].assign(split="train"), 0.15, 0, stratify=False)
    validation = rest.loc[rest["split"] == "validation", "row"].to_numpy()
    y = np.stack([1 - truth, truth], axis=1)
    said = []
    for draw in range(1 if fraction == 1.0 else DRAWS):
        used = rest[rest["split"] == "train"].assign(split="train")
        if fraction < 1.0:
            used = carve(used, 1 - fraction, 100 + draw, name="unused", stratify=False)
        rows = used.loc[used["split"] == "train", "row"].to_numpy()
        fitted = linear_probe(x[rows], y[rows], x[validation], y[validation], "multiclass")
        said.append(fitted(x[test])[:, 1])
    return test, np.stack(said)


def tuned(
    start: str, fold: int, fraction: float, name: str, out: Path, own: list[str], overrides: list[str]
) -> dict[str, list[float]]:
    """Test films of a fold, and what a fine-tuned network says of them, or how its masks fit (Dice)."""
    folder = out / "tuned" / f"{name}-{start}-{fold}-{fraction:g}"
    done = folder / "said.json"
    if done.is_file():
        return json.loads(done.read_text())
    settings = [
        f"data.split.train={[f for f in FOLDS if f != fold]}",
        f"data.split.test=[{fold}]",
        f"seed={fold}",
        f"data.label_fraction={fraction}",
        *own,
    ]
    if fraction < 1.0:
        settings += ["train.steps=150", "train.validate_every=30", "train.batch_size=16", "train.warmup_steps=20"]
    if (weights := started(start, fold, out, overrides)) is not None:
        settings.append(f"model.weights={weights}")
    experiment = load_experiment(HERE / f"{name}.toml", settings, Experiment)
    run = finetune(experiment, folder)
    shards, parts = run.shards(), run.parts()
    keys = parts.index[parts["part"] == "test"].to_numpy()
    classes = experiment.data.classes or shards.classes
    found = predict_films(
        load_model(folder / "model.keras"), shards, keys, classes=classes, size=experiment.model.size, batch_size=64
    )
    if found.logits is not None:
        values = probabilities_of(found.logits, "multiclass")[:, 1]
    else:
        assert found.masks is not None
        values = found.masks.dice
    said = {"films": keys.tolist(), "said": [None if np.isnan(v) else float(v) for v in values]}
    write_json(done, said)
    return said


def row(name: str, estimate: Estimate, differences: dict[str, Estimate]) -> str:
    """One line of a table: a figure, and what it is more than others'."""
    text = f"    {name:12} {estimate}"
    for other, difference in differences.items():
        if difference.low is not None and difference.high is not None:
            beats = "*" if difference.low > 0 or difference.high < 0 else " "
            text += f"   - {other} {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}){beats}"
    return text.rstrip()


def chosen_on(manifest: pd.DataFrame) -> np.ndarray:
    """The films that MoCo's recipe was chosen on: those of 15 % of the patients of folds 0 to 2."""
    films = carve(manifest[manifest["fold"] != "3"].assign(split="train"), 0.15, 0)
    return films.index[films["split"] == "validation"].to_numpy()


def report_probes(
    starts: list[str],
    manifest: pd.DataFrame,
    truths: dict[str, np.ndarray],
    chosen: np.ndarray,
    read: Callable[[str, int], np.ndarray],
) -> None:
    """Prints linear probes of all tasks; `chosen` are the films that MoCo's recipe was chosen on."""
    for task, truth in truths.items():
        for fraction in FRACTIONS:
            films: list[np.ndarray] = []
            scores: dict[str, list[np.ndarray]] = {}
            for name in (*starts, *THUMBNAILS):
                parts = [probed(read(name, fold), truth, manifest, fold, fraction) for fold in FOLDS]
                films = [rows for rows, _ in parts]
                scores[name] = [said for _, said in parts]
            rows = np.concatenate(films)
            pooled = {name: np.concatenate(said, axis=1)[..., None] for name, said in scores.items()}
            subsets = {"all": np.ones(len(rows), bool)}
            if task.startswith("NIH"):
                subsets["without the patients that MoCo was chosen on"] = ~np.isin(rows, chosen)
                subsets["fold 3 alone"] = manifest["fold"].to_numpy()[rows] == "3"
            for subset, inside in subsets.items():
                here = rows[inside]
                each = {name: said[:, inside] for name, said in pooled.items()}
                y, patients = truth[here][:, None], manifest["patient_key"].to_numpy()[here]
                against = {name: paired_auroc(each, y, patients, against=name) for name in ("random", *THUMBNAILS)}
                where = "" if subset == "all" else f", {subset}"
                title = f"linear probe, {task}, {fraction:.0%} of the labels{where}"
                print(f"\n**{title}: {len(here)} films, {int(y.sum())} positive**\n")
                for name, estimate in against["random"][0].items():
                    others = [other for other in against if other != name and name not in THUMBNAILS]
                    print(row(name, estimate, {other: against[other][1][name] for other in others}))


def report_tuned(
    name: str,
    starts: list[str],
    manifest: pd.DataFrame,
    truth: np.ndarray | None,
    said: Callable[..., dict],
    read: Callable[[str, int], np.ndarray],
) -> None:
    """Prints fine-tunings of one task: AUROC, beside it that of thumbnails, or mean Dice where there is no truth."""
    for fraction in FRACTIONS:
        each = {start: [said(start, fold, fraction, name) for fold in FOLDS] for start in starts}
        rows = np.concatenate([part["films"] for part in each[starts[0]]])
        values = {start: np.array([v for part in parts for v in part["said"]], float) for start, parts in each.items()}
        patients = manifest["patient_key"].to_numpy()[rows]
        if truth is not None:
            pooled = {start: v[None, :, None] for start, v in values.items()}
            found, differences = paired_auroc(pooled, truth[rows][:, None], patients, against="random")
        else:
            estimates = bootstrap(functools.partial(_mean_dice, values), patients, replicates=2000)
            found = {start: estimates["dice", start] for start in starts}
            differences = {start: estimates["difference", start] for start in starts}
        what = "AUROC" if truth is not None else "Dice"
        print(f"\n**fine-tuned, {name}, {fraction:.0%} of the labels: {len(rows)} films, {what}**\n")
        for start in starts:
            print(row(start, found[start], {} if start == "random" else {"random": differences[start]}))
        if truth is not None:
            report_thumbnails(manifest, truth, fraction, read)


def report_thumbnails(
    manifest: pd.DataFrame, truth: np.ndarray, fraction: float, read: Callable[[str, int], np.ndarray]
) -> None:
    """Prints what linear probes of thumbnails reach, a line each."""
    for name in THUMBNAILS:
        parts = [probed(read(name, fold), truth, manifest, fold, fraction) for fold in FOLDS]
        rows = np.concatenate([films for films, _ in parts])
        scores = {name: np.concatenate([said for _, said in parts], axis=1)[..., None]}
        patients = manifest["patient_key"].to_numpy()[rows]
        print(row(name, paired_auroc(scores, truth[rows][:, None], patients, against=name)[0][name], {}))


def _mean_dice(values: dict[str, np.ndarray], weights: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    known = ~np.isnan(values["random"])
    means = {start: weights[:, known] @ v[known] / weights[:, known].sum(1) for start, v in values.items()}
    differences = {("difference", start): mean - means["random"] for start, mean in means.items()}
    return {("dice", start): mean for start, mean in means.items()} | differences


def main() -> None:
    """Runs what has not been run, and prints the tables when all folds are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/starts"))
    parser.add_argument("--shards", type=Path, default=Path("shards/cxr"))
    parser.add_argument("--folds", default="0,1,2,3", help="run these alone, and print nothing")
    parser.add_argument("--starts", default=",".join(STARTS))
    parser.add_argument("--only", choices=("probe", "nih", "lungs"), help="this part alone")
    arguments = parser.parse_args()
    folds = [int(fold) for fold in arguments.folds.split(",")]
    starts = arguments.starts.split(",")
    overrides = [f"data.shards={arguments.shards}"]
    shards, lungs = open_shards(arguments.shards), open_shards(f"{arguments.shards}-lungs")
    truths = tasks(shards.manifest, shards.classes)

    def read(name: str, fold: int) -> np.ndarray:
        return inputs(name, fold, shards, arguments.out, overrides)

    def said(start: str, fold: int, fraction: float, name: str) -> dict[str, list[float]]:
        where = arguments.shards if name == "nih" else f"{arguments.shards}-lungs"
        return tuned(start, fold, fraction, name, arguments.out, [f"data.shards={where}"], overrides)

    parts = [arguments.only] if arguments.only else ["probe", "nih", "lungs"]
    for start in starts:
        for fold in folds:
            read(start, fold)
    for name in parts:
        for start in starts if name != "probe" else ():
            for fold in folds:
                for fraction in FRACTIONS:
                    said(start, fold, fraction, name)
    if folds != list(FOLDS):
        return
    if "probe" in parts:
        report_probes(starts, shards.manifest, truths, chosen_on(shards.manifest), read)
    if "nih" in parts:
        report_tuned("nih", starts, shards.manifest, truths["NIH: pneumonia"], said, read)
    if "lungs" in parts:
        report_tuned("lungs", starts, lungs.manifest, None, said, read)


if __name__ == "__main__":
    main()
