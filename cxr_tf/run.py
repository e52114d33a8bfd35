"""The run folder: what a training run leaves behind, and how the other commands find it.

config.toml        the resolved experiment        environment.json   versions, commit, hash of the data
metrics.jsonl      figures while training         operating.json     class order, temperature, thresholds
parts.csv          which film went where          model.keras        the trained model
checkpoints/       to go on from                  encoder.keras      its encoder
figures/           pictures                       evaluation/ export/
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cxr_tf.config import Experiment, differences, load_experiment, to_toml
from cxr_tf.errors import CxrError
from cxr_tf.files import replacing, writable_folder

PACKAGES = ("cxr-tf", "tensorflow", "keras", "numpy", "pandas", "pydicom", "pillow", "scikit-learn")


class RunError(CxrError):
    """A run folder that is not there, not ours, not finished, or made by other settings."""


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment that made it."""

    folder: Path
    experiment: Experiment

    @property
    def finished(self) -> bool:
        """Whether training came to its end: `operating.json` is written last."""
        return (self.folder / "operating.json").is_file()

    def operating(self) -> dict[str, Any]:
        """`operating.json`: class order, task, sizes, temperature and thresholds, all chosen on validation patients.

        Raises:
            RunError: when training has not come to its end.
        """
        if not self.finished:
            raise RunError(f"{self.folder}: the run is not finished; give its `cxr-tf train` command again to go on.")
        return json.loads((self.folder / "operating.json").read_text(encoding="utf-8"))


def claim_run(folder: Path, experiment: Experiment) -> Run:
    """A run folder that is new, or that the same experiment made; writes nothing.

    Raises:
        RunError: when other settings made it (the text lists them), or it holds other files.
    """
    settings = folder / "config.toml"
    if settings.is_file():
        if changed := differences(load_experiment(settings), experiment):
            raise RunError(
                f"{folder} was made by other settings:\n  "
                + "\n  ".join(changed[:10])
                + "\nGive another folder with --out, the old settings, or delete the folder."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise RunError(f"{folder} holds files but no config.toml, so no run of ours. Give another folder with --out.")
    return Run(folder, experiment)


def create_run(run: Run) -> None:
    """Makes the folder of a claimed run and writes its `config.toml`.

    Raises:
        WriteError: when it cannot be written.
    """
    writable_folder(run.folder)
    write_text(run.folder / "config.toml", to_toml(run.experiment.model_dump(mode="json")))


def open_run(folder: Path) -> Run:
    """Opens a run folder.

    Raises:
        RunError: when it is no run folder of ours.
    """
    settings = folder / "config.toml"
    if not settings.is_file():
        raise RunError(f"{folder}: is no run folder: it has no config.toml. `cxr-tf train` makes run folders.")
    return Run(folder, load_experiment(settings))


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
