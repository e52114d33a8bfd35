"""The run folder: what a training run leaves behind, and how the other commands find it.

config.toml        the resolved experiment        environment.json   versions, commit, hash of the data
metrics.jsonl      figures while training         operating.json     class order, temperature, thresholds
parts.csv          which film went where          model.keras        the trained model
checkpoints/       to go on from                  encoder.keras      its encoder
figures/           pictures                       evaluation/ export/

A pre-training run has `pretraining.json` and, for inpainting, `reconstruction.keras` instead of the model.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from cxr_tf.config import Experiment, Pretraining, Root, differences, load_experiment, parse_experiment, to_toml
from cxr_tf.errors import CxrError
from cxr_tf.files import replacing, writable_folder
from cxr_tf.operating import wrong_keys

if TYPE_CHECKING:
    import pandas as pd

    from cxr_tf.data.shards import ShardFolder

PACKAGES = ("cxr-tf", "tensorflow", "keras", "numpy", "pandas", "pydicom", "pillow", "scikit-learn")


class RunError(CxrError):
    """A run folder that is not there, not ours, not finished, or made by other settings."""


@dataclass(frozen=True)
class Run(Generic[Root]):
    """A run folder and the experiment that made it."""

    folder: Path
    experiment: Root

    @property
    def finished(self) -> bool:
        """Whether training came to its end: `operating.json`, or `pretraining.json`, is written last."""
        last = "pretraining.json" if isinstance(self.experiment, Pretraining) else "operating.json"
        return (self.folder / last).is_file()

    def operating(self) -> dict[str, Any]:
        """`operating.json`: class order, task, sizes, temperature and thresholds, all chosen on validation patients.

        Raises:
            RunError: when training has not come to its end, or the file is damaged.
        """
        if not self.finished:
            raise RunError(f"{self.folder}: the run is not finished; give its `cxr-tf train` command again to go on.")
        return read_operating(self.folder / "operating.json")

    def parts(self) -> pd.DataFrame:
        """`parts.csv`: which film trained, chose or is reported (see `cxr_tf.train.parts.choose_parts`).

        Raises:
            RunError: when it is missing or damaged.
        """
        import pandas as pd

        path = self.folder / "parts.csv"
        try:
            parts = pd.read_csv(path).set_index("film")
            return parts[["part", "patient_key", "study_key"]]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{path}: is missing or damaged. Train again in another folder.") from error

    def shards(self) -> ShardFolder:
        """The shards that the run was trained on.

        Raises:
            ShardError: when they are not there.
            RunError: when what is there is other data.
        """
        from cxr_tf.data.shards import open_shards

        shards = open_shards(self.experiment.data.shards)
        trained_on = self.data_hash()
        if trained_on is not None and shards.data_hash != trained_on:
            raise RunError(
                f"{shards.folder}: is not what {self.folder} was trained on: its checksum is {shards.data_hash[:12]}, "
                f"not {trained_on[:12]}. Prepare the same data again, or train in another folder."
            )
        return shards

    def data_hash(self) -> str | None:
        """Checksum of the shards that training began with, or `None` before it began."""
        path = self.folder / "environment.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))["data_hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: is damaged. Train again in another folder.") from error


def read_operating(path: Path) -> dict[str, Any]:
    """Reads an `operating.json`, or the copy of it that an export carries.

    Raises:
        RunError: when it is missing, damaged, or lacks a key.
    """
    try:
        operating = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is damaged ({error}). Train or export again.") from error
    if wrong := wrong_keys(operating):
        raise RunError(
            f"{path}: is damaged, or of another version: {', '.join(wrong)} is missing or makes no sense. Train or "
            "export again."
        )
    return operating


def claim_run(folder: Path, experiment: Root) -> Run[Root]:
    """A run folder that is new, or that the same experiment made; writes nothing.

    Raises:
        RunError: when other settings made it (the text lists them), or it holds other files.
    """
    settings = folder / "config.toml"
    if settings.is_file():
        if changed := differences(load_experiment(settings, kind=type(experiment)), experiment):
            raise RunError(
                f"{folder} was made by other settings:\n  "
                + "\n  ".join(changed[:10])
                + "\nGive another folder with --out, the old settings, or delete the folder."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} holds files but no config.toml, so no run of ours. Give another folder with --out.")
    return Run(folder, experiment)


def create_run(run: Run[Any]) -> None:
    """Makes the folder of a claimed run and writes its `config.toml`.

    Raises:
        WriteError: when it cannot be written.
    """
    writable_folder(run.folder)
    write_text(run.folder / "config.toml", to_toml(run.experiment.model_dump(mode="json")))


def open_run(
    folder: Path,
    overrides: list[str] | tuple[str, ...] = (),
    kind: type[Root] = Experiment,  # type: ignore[assignment]
) -> Run[Root]:
    """Opens a run folder.

    Args:
        folder: the folder.
        kind: `Experiment` or `Pretraining`: which command made it.
        overrides: `section.key=value` for what does not touch the training: `evaluate.replicates=5000`, or
            `data.shards=...` where the shards have moved.

    Raises:
        RunError: when it is no run folder of ours, or an override would touch the training.
    """
    settings = folder / "config.toml"
    if not settings.is_file():
        made_by = "pretrain" if kind is Pretraining else "train"
        raise RunError(f"{folder}: is no run folder: it has no config.toml. `cxr-tf {made_by}` makes run folders.")
    trained = load_experiment(settings, kind=kind)
    experiment = parse_experiment(
        trained.model_dump(mode="json", exclude_none=True), overrides, where=str(settings), kind=kind
    )
    if changed := differences(trained, experiment):
        raise RunError(f"{folder} is trained already; --set cannot change that now:\n  " + "\n  ".join(changed))
    return Run(folder, experiment)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a killed process leaves the old one or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `write_text` does; NaN is refused, since JSON has no word for it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def environment(data_hash: str) -> dict[str, Any]:
    """What figures depend on besides settings: versions, commit and the hash of the data."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "data_hash": data_hash,
    }


def _commit() -> str | None:
    """The commit of the source tree that this file is tracked in, if it is; "+" marks uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        for command in (["ls-files", "--error-unmatch", Path(__file__).name], ["describe", "--always", "--dirty=+"]):
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
