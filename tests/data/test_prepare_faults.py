"""What happens to `prepare` from outside: kills at any moment, a full disk, folders and films that cannot be read."""

from __future__ import annotations

import contextlib
import csv
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from cxr_tf.data import radiograph
from cxr_tf.data.audit import audit
from cxr_tf.data.manifest import ManifestError, save_manifest
from cxr_tf.data.phantom import write_siim
from cxr_tf.data.prepare import read_dataset
from cxr_tf.data.readers import DATASETS, headers
from cxr_tf.data.shards import ShardError, open_shards, prepare
from cxr_tf.errors import CxrError
from cxr_tf.files import WriteError

SIZE, FILMS_A_SHARD = 96, 2
KILLS = 20

# `cxr-tf` as it is, but for the films of a shard: 256 would take a data set too large for a test.
CLI = f"""
import functools
from cxr_tf.data import shards
shards.prepare = functools.partial(shards.prepare, shard_size={FILMS_A_SHARD})
from cxr_tf.cli import main
main()
"""


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", CLI, *map(str, args)]


def prepare_siim(films: Path, out: Path, workers: int) -> list[str]:
    return command("prepare", "siim", films, "--out", out, "--storage-size", SIZE, "--workers", workers)


def run(args: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, check=False, timeout=240, **options)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one error that a command ended with: its own, or that of the command line, which looks at paths first."""
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    _, *errors = ("\n" + done.stderr).split("\nerror: " if done.returncode == 1 else "\nError: Invalid value for ")
    assert len(errors) == 1, done.stderr
    return errors[0].rstrip("\n")


def is_of_permission(error: str, path: Path | str) -> bool:
    """Whether an error of one line names a path that may not be used."""
    return str(path) in error and ("Permission denied" in error or "is not readable" in error) and "\n" not in error


def files(folder: Path) -> dict[str, bytes]:
    """All files, the hidden ones among them."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def table(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


# --- data sets ------------------------------------------------------------------------------------------------------

ROWS = {"a": "1", "b": "2", "c": "3"}  # film -> patient of the data sets that are written here


def write_lines(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_picture(path: Path, gray: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((48, 40)).point(lambda value: max(value, gray)).save(path)
    return path


def siim(root: Path) -> Path:
    return sorted(write_siim(root, studies=8, size=64).glob("train/*/*/*.dcm"))[3]


def rsna(root: Path) -> Path:
    source = write_siim(root.with_name("source"), studies=8, size=64)
    images = root / "stage_2_train_images"
    images.mkdir(parents=True)
    paths = sorted(source.glob("train/*/*/*.dcm"))[: len(ROWS)]
    for name, path in zip(ROWS, paths, strict=True):
        shutil.copyfile(path, images / f"{name}.dcm")
    labels = [f"{name},4,5,20,10,1" if name == "b" else f"{name},,,,,0" for name in ROWS]
    write_lines(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *labels)
    kinds = [f"{name},{'Lung Opacity' if name == 'b' else 'Normal'}" for name in ROWS]
    write_lines(root / "stage_2_detailed_class_info.csv", "patientId,class", *kinds)
    return images / "b.dcm"


def nih(root: Path) -> Path:
    names = [f"{patient:0>8}_000.png" for patient in ROWS.values()]
    for number, name in enumerate(names, start=1):
        write_picture(root / f"images_{number:03}" / "images" / name)
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name},Pneumonia,0,{patient},50,M,PA" for name, patient in zip(names, ROWS.values(), strict=True)]
    write_lines(root / "Data_Entry_2017.csv", header, *rows)
    boxes = f"{names[1]},Pneumonia,1,2,3,4"
    write_lines(root / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", boxes)
    return root / "images_002" / "images" / names[1]


def chexpert(root: Path) -> Path:
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"
    header += "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
    header += "Fracture,Support Devices"
    names = [f"train/patient0000{patient}/study1/view1_frontal.jpg" for patient in ROWS.values()]
    for name in names:
        write_picture(root / name)
    rows = [f"CheXpert-v1.0-small/{name},Male,50,Frontal,AP" + "," * 6 + "1.0" + "," * 8 for name in names]
    write_lines(root / "train.csv", header, *rows)
    return root / names[1]


def covid19(root: Path) -> Path:
    for name in ROWS:
        write_picture(root / "images" / f"{name}.png")
    rows = [f"{patient},0,M,50,Pneumonia/Viral/COVID-19,PA,{name}.png,CC BY" for name, patient in ROWS.items()]
    write_lines(root / "metadata.csv", "patientid,offset,sex,age,finding,view,filename,license", *rows)
    return root / "images" / "b.png"


def table_of_films(root: Path) -> Path:
    for name in ROWS:
        write_picture(root / "films" / name / "film.png")
    write_picture(root / "masks" / "b.png", 0)
    rows = [f"films/{name}/film.png,{p},{'masks/b.png' if name == 'b' else ''},1" for name, p in ROWS.items()]
    write_lines(root / "films.csv", "image,patient_id,mask,Opacity", *rows)
    return root / "films" / "b" / "film.png"


WRITERS = {"siim": siim, "rsna": rsna, "chexpert": chexpert, "nih": nih, "covid19": covid19, "table": table_of_films}
TABLE = '[table]\ncsv = "films.csv"\nmask = "mask"\nlabel_columns = { Opacity = "Opacity" }'


def experiment(path: Path, section: str) -> Path:
    write_lines(path, "name = 'x'", "[data]", "shards = 'shards'", section)
    return path


def config_of(dataset: str, folder: Path) -> Path | None:
    return experiment(folder / "experiment.toml", TABLE) if dataset == "table" else None


def test_every_data_set_is_written_here():
    assert sorted(WRITERS) == sorted(DATASETS)


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_twenty_moments_and_still_the_same_bytes(tmp_path):
    """SIGKILL to the command, in its start, amid its films and at its end; its other processes end by themselves."""
    films = write_siim(tmp_path / "films", studies=60, size=512)
    whole, start, work = undisturbed(films, tmp_path / "whole")
    shards = sum(name.endswith(".tfrecord") for name in whole)
    draw = random.Random(20)
    finished: list[int] = []  # shards that were there at each kill
    halves = 0
    out = tmp_path / "killed"
    while len(finished) < KILLS:
        left = KILLS - len(finished)
        with subprocess.Popen(prepare_siim(films, out, 2), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            if left % 5 == 0:
                wait = draw.uniform(0.1, start)
            elif left > 1:
                until(has_begun, out, process)
                # So that the kills that are left spread over the work that is left.
                wait = draw.uniform(0, 2 / (left + 1)) * work * (1 - count(out) / shards)
            else:
                until(lambda out, _: count(out) == shards, out, process)
                wait = draw.uniform(0, 0.05)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait)
            process.kill()
            # The pipes end when the last process that holds them has: none outlives the one that was killed.
            process.communicate(timeout=60)
        if process.returncode == 0:  # done before its time; the kills that are left go on in another folder
            assert files(out) == whole
            out = tmp_path / f"killed-{len(finished)}"
            continue
        assert process.returncode < 0
        there = files(out) if out.exists() else {}
        named = {name: content for name, content in there.items() if name.startswith("shard-")}
        assert named.items() <= whole.items()  # whole or not at all
        halves += any(name.startswith(".partial-") for name in there)
        finished.append(count(out))
    print(f"shards at the kills: {finished} of {shards}, {halves} of them in the midst of a file")
    # How far the work is at a moment depends on the machine; that kills struck it all along must show all the same.
    assert min(finished) < shards / 3 and len(set(finished)) >= 4 and halves >= 3, (finished, halves)
    assert sum(0 < number < shards for number in finished) >= 4, finished
    done = run(prepare_siim(films, out, 2))
    assert done.returncode == 0, done.stderr
    assert files(out) == whole
    open_shards(out).verify()


def undisturbed(films: Path, out: Path) -> tuple[dict[str, bytes], float, float]:
    """The files of a run that nobody kills, its seconds to the first film's record, and from there to its end."""
    begun = time.monotonic()
    with subprocess.Popen(prepare_siim(films, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until(has_begun, out, process)
        first = time.monotonic()
        assert process.wait(240) == 0
    return files(out), first - begun, time.monotonic() - first


def until(arrived: Callable[[Path, int], bool], out: Path, process: subprocess.Popen) -> None:
    """Waits for something that a process does in a folder, or for its end."""
    latest = time.monotonic() + 240
    while not arrived(out, process.pid) and process.poll() is None:
        assert time.monotonic() < latest
        time.sleep(0.002)


def has_begun(out: Path, pid: int) -> bool:
    """Whether this process has written a film's record, not one before it."""
    try:
        return any(path.stat().st_size for path in out.glob(f".partial-{pid}-*"))
    except FileNotFoundError:  # it has got its name
        return True


def count(out: Path) -> int:
    return len(list(out.glob("shard-*.tfrecord")))


def test_what_kills_leave_of_any_file_is_cleared_away(tmp_path):
    """The tables' temporary files as well as those of the shards."""
    siim(tmp_path / "films")
    manifest = read_dataset("siim", tmp_path / "films")
    prepare(manifest, tmp_path / "whole", storage_size=SIZE, shard_size=FILMS_A_SHARD, workers=0)
    whole = files(tmp_path / "whole")
    out = tmp_path / "out"
    out.mkdir()
    for name, content in whole.items():
        (out / f".partial-1-{name}").write_bytes(content[:10])
    (out / ".writable").touch()
    prepare(manifest, out, storage_size=SIZE, shard_size=FILMS_A_SHARD, workers=0)
    assert files(out) == whole


# --- a full disk ----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system in memory, mounted where only one process sees it, and seen from here through that process.

    Nothing is left of it when the process has ended, however this one ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for rights in ([], ["--user", "--map-root-user"]):
            script = 'mount -t tmpfs -o size=1m tmpfs "$0" && echo mounted && exec cat'
            try:
                self.process = subprocess.Popen(
                    ["unshare", *rights, "--mount", "sh", "-c", script, folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except FileNotFoundError:
                break
            enter = ["--user", "--preserve-credentials"] if rights else []
            self.enter = ["nsenter", f"--target={self.process.pid}", *enter, "--mount"]
            assert self.process.stdout is not None
            if self.process.stdout.readline() == "mounted\n":
                self.path = Path(f"/proc/{self.process.pid}/root{folder}")
                return
            self.process.communicate()
        pytest.skip("nothing may be mounted here")

    def resize(self, kilobytes: int) -> None:
        subprocess.run([*self.enter, "mount", "-o", f"remount,size={kilobytes}k", self.folder], check=True)

    def fill(self, leave: int) -> None:
        """Leaves so many bytes; what filled it before goes."""
        filler = self.path / "filler"
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(self.path).free - leave))

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    small = SmallDisk(tmp_path / "disk")
    yield small
    small.close()


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return write_siim(tmp_path_factory.mktemp("faults") / "films", studies=16, size=128)


@pytest.fixture(scope="module")
def shards(films) -> Path:
    folder = films.with_name("shards")
    prepare(read_dataset("siim", films), folder, storage_size=SIZE, shard_size=FILMS_A_SHARD, workers=0)
    return folder


def pages(folder: Path, pattern: str) -> int:
    """Kilobytes that files take on a disk of pages of 4."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.glob(pattern))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_nothing_finished_is_lost(disk, films, shards, workers):
    out, whole = disk.path / "out", files(shards)
    disk.resize(pages(shards, "shard-00000-*") + pages(shards, "shard-00001-*") + 12)
    error = said(run(prepare_siim(films, out, workers)))
    number = len(list(shards.glob("*.tfrecord")))
    name = f"shard-00002-of-{number:05}.tfrecord"
    assert error == f"{out / name}: cannot be written (No space left on device)."
    kept = files(out)
    assert len(kept) == 4 and kept.items() <= whole.items()
    disk.resize(pages(shards, "shard-*"))  # for the shards, not for the tables
    assert said(run(prepare_siim(films, out, workers))).endswith(".csv: cannot be written (No space left on device).")
    assert files(out) == {name: content for name, content in whole.items() if name.startswith("shard-")}
    disk.resize(pages(shards, "*") + 4)
    done = run(prepare_siim(films, out, workers))
    assert done.returncode == 0, done.stderr
    assert files(out) == whole


def test_a_disk_that_is_full_at_any_place(disk, films, shards):
    """A page more each time: the same error at every place, no half file, and in the end the same folder."""
    manifest, out, whole = read_dataset("siim", films), disk.path / "out", files(shards)
    room, places, kept = 4, set(), 0
    while True:
        disk.resize(room)
        try:
            prepare(manifest, out, storage_size=SIZE, shard_size=FILMS_A_SHARD, workers=0)
            break
        except WriteError as error:
            assert str(error).endswith(": cannot be written (No space left on device).")
            places.add(Path(str(error).split(":")[0]).name)
        there = files(out)
        assert there.items() <= whole.items() and len(there) >= kept
        kept, room = len(there), room + 4
        assert room <= pages(shards, "*") + 4
    assert files(out) == whole
    assert places >= {"rejected.csv", "noted.csv", "manifest.csv", "shards.json"}
    assert len([name for name in places if name.endswith(".tfrecord")]) == len(list(shards.glob("*.tfrecord")))


def test_a_sheet_on_a_full_disk(disk, films):
    disk.fill(8192)
    sheet = disk.path / "sheet.png"
    error = said(run(command("inspect", "siim", films, "--sheet", sheet)))
    assert error == f"{sheet}: cannot be written (No space left on device)."
    assert os.listdir(disk.path) == ["filler"]  # noqa: PTH208


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_an_audit_on_a_full_disk(disk, shards, share):
    """No room for anything, or for the small pictures of half of the films."""
    disk.fill(int(share * len(open_shards(shards)) * 12_288))
    out = disk.path / "audit"
    error = said(run(command("audit", shards, "--out", out)))
    assert str(out) in error and "No space left on device" in error and "\n" not in error
    assert files(out) == {}


def test_a_page_on_a_full_disk(disk, shards, tmp_path):
    """Room for the tables, but not for a page that shows twins."""

    def fill(done: int, total: int) -> None:
        if done == total:
            disk.fill(4 * 4096)

    out = disk.path / "audit"
    again = shutil.copytree(shards, tmp_path / "again")
    with pytest.raises(WriteError) as caught:
        audit([shards, again], out, workers=1, progress=fill)
    assert str(caught.value) == f"{out / 'audit.html'}: cannot be written (No space left on device)."
    assert set(files(out)) == {"pairs.csv", "sides.csv", "unread.csv"}


# --- folders that cannot be read ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_back(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command as somebody whom permissions hold back: root without the right to read and write everything."""
    rights = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    shut = tmp_path_factory.mktemp("shut")
    shut.chmod(0)
    try:
        if run([*drop, "ls", str(shut)]).returncode == 0:
            pytest.skip("permissions hold nobody back here")
    except FileNotFoundError:
        pytest.skip("needs setpriv where tests are run by root")
    return lambda *args: run([*drop, *command(*args)])


@contextlib.contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:  # so that it can be deleted
        path.chmod(before)


def options_of(config: Path | None) -> list[object]:
    return [] if config is None else ["--config", config]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize(("shut", "mode"), [("data", 0o000), ("data", 0o444), ("", 0o000)])
def test_a_data_set_that_cannot_be_opened(held_back, tmp_path, dataset, shut, mode):
    """It, or the folder that it is in."""
    root = tmp_path / "disk" / "data"
    WRITERS[dataset](root)
    config = config_of(dataset, tmp_path)
    with closed(tmp_path / "disk" / shut, mode):
        error = said(held_back("prepare", dataset, root, "--out", tmp_path / "out", *options_of(config)))
    assert is_of_permission(error, root)
    assert not (tmp_path / "out").exists()


UNREADABLE = [
    ("siim", "parent", "", "prepare"),
    ("siim", "grandparent", "", "prepare"),
    ("siim", "parent", "[dataset]\nsplit = 'test'", "prepare"),
    ("siim", "grandparent", "[dataset]\nsplit = 'test'", "inspect"),
    ("rsna", "parent", "", "prepare"),
    ("nih", "parent", "", "prepare"),
    ("nih", "parent", "[dataset]\nmissing = 'skip'", "inspect"),
    ("nih", "grandparent", "[dataset]\nmissing = 'skip'", "prepare"),
    ("chexpert", "parent", "", "prepare"),
    ("chexpert", "grandparent", "", "inspect"),
    ("covid19", "parent", "", "prepare"),
    ("table", "parent", TABLE, "prepare"),
    ("table", "grandparent", TABLE, "inspect"),
]


@pytest.mark.parametrize(("dataset", "which", "section", "verb"), UNREADABLE)
def test_a_folder_within_that_cannot_be_read_is_told(held_back, tmp_path, dataset, which, section, verb):
    """Its films are not silently left out."""
    film = WRITERS[dataset](tmp_path / "data")
    if "test" in section:
        (tmp_path / "data" / "train").rename(tmp_path / "data" / "test")
        film = tmp_path / "data" / "test" / film.relative_to(tmp_path / "data" / "train")
    folder = film.parent if which == "parent" else film.parent.parent
    options = options_of(experiment(tmp_path / "experiment.toml", section) if section else None)
    options += ["--out", tmp_path / "out"] if verb == "prepare" else ["--sheet", tmp_path / "sheet.png"]
    with closed(folder):
        error = said(held_back(verb, dataset, tmp_path / "data", *options))
    assert str(folder.relative_to(tmp_path / "data")) in error and "Permission denied" in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "sheet.png").exists()


def test_a_film_that_cannot_be_read_is_rejected(held_back, tmp_path):
    film = chexpert(tmp_path / "data")
    out = tmp_path / "out"
    with closed(film):
        done = held_back("prepare", "chexpert", tmp_path / "data", "--out", out, "--workers", 1)
    assert done.returncode == 0 and "2 films, 1 rejected" in done.stdout, done.stderr
    assert table(out / "rejected.csv") == [
        [str(film.relative_to(tmp_path / "data" / "train")), "cannot be opened: Permission denied"]
    ]


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o555])
@pytest.mark.parametrize("below", ["", "deeper/out"])
def test_shards_that_cannot_be_written(held_back, tmp_path, mode, below):
    chexpert(tmp_path / "data")
    folder = tmp_path / "out"
    folder.mkdir()
    with closed(folder, mode):
        error = said(held_back("prepare", "chexpert", tmp_path / "data", "--out", folder / below))
    assert is_of_permission(error, folder)
    assert files(folder) == {}


@pytest.mark.parametrize(("shut", "mode"), [("shards", 0o000), ("shards", 0o444), ("", 0o000)])
def test_shards_that_cannot_be_read(held_back, tmp_path, shards, shut, mode):
    folder = shutil.copytree(shards, tmp_path / "disk" / "shards")
    with closed(tmp_path / "disk" / shut, mode):
        error = said(held_back("audit", folder, "--out", tmp_path / "audit"))
    assert is_of_permission(error, folder)


# --- files that vanish ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::cxr_tf.data.manifest.ManifestWarning")
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_film_that_vanishes_after_the_reader(tmp_path, dataset):
    film = WRITERS[dataset](tmp_path / "data")
    manifest = read_dataset(dataset, tmp_path / "data", config_of(dataset, tmp_path))
    film.unlink()
    loses(film, manifest, tmp_path / "out")


def loses(film: Path, manifest, out: Path, reason: str = "cannot be opened: No such file or directory") -> None:
    """Prepares a manifest, of which one film is gone and the others are kept."""
    with pytest.raises(ShardError, match=f"{film.name} cannot be prepared: {reason}. Without `strict`"):
        prepare(manifest, out, storage_size=SIZE, workers=0, strict=True)
    found = prepare(manifest, out, storage_size=SIZE, workers=0)
    assert found.rejected == 1 and len(found) == len(manifest) - 1
    root = os.path.commonpath([Path(path).parent for path in manifest["image"]])
    assert table(out / "rejected.csv") == [[os.path.relpath(film, root), reason]]
    assert str(film) not in found.manifest["image"].tolist()


@pytest.mark.filterwarnings("ignore::cxr_tf.data.manifest.ManifestWarning")
@pytest.mark.parametrize("dataset", ["siim", "rsna", "nih", "table"])
def test_a_film_that_vanishes_before_its_header_is_read(tmp_path, monkeypatch, dataset):
    film = WRITERS[dataset](tmp_path / "data")
    original = radiograph.read_header

    def read_header(path: str):
        if path == str(film):
            film.unlink()
        return original(path)

    monkeypatch.setattr(radiograph, "read_header", read_header)
    manifest = read_dataset(dataset, tmp_path / "data", config_of(dataset, tmp_path))
    assert not film.exists()
    loses(film, manifest, tmp_path / "out")


LISTED = [
    ("siim", 1),
    ("siim", 2),
    ("siim", 3),
    ("rsna", 1),
    ("nih", 1),
    ("nih", 3),
    ("chexpert", 3),
    ("covid19", 1),
]


@pytest.mark.filterwarnings("ignore::cxr_tf.data.manifest.ManifestWarning")
@pytest.mark.parametrize(("dataset", "above"), LISTED)
def test_what_vanishes_while_the_folders_are_listed(tmp_path, monkeypatch, dataset, above):
    """A film, or the folder that it is in, as soon as the folder above has been listed: told, or rejected later."""
    film = WRITERS[dataset](tmp_path / "data")
    parts = [film, *film.parents]
    scandir, listdir = os.scandir, os.listdir

    def vanish(listed: object) -> None:
        if isinstance(listed, str | Path) and Path(listed) == parts[above]:
            shutil.rmtree(parts[above - 1]) if above > 1 else film.unlink(missing_ok=True)

    def scanned(folder="."):
        with scandir(folder) as entries:
            found = list(entries)
        vanish(folder)
        return contextlib.nullcontext(found)

    def listed(folder="."):
        found = listdir(folder)
        vanish(folder)
        return found

    monkeypatch.setattr(os, "scandir", scanned)
    monkeypatch.setattr(os, "listdir", listed)
    try:
        manifest = read_dataset(dataset, tmp_path / "data")
    except ManifestError as error:
        assert "No such file" in str(error) or "there is no" in str(error)
        assert parts[above - 1].name in str(error) or film.name in str(error)
    else:
        assert not film.exists()
        loses(film, manifest, tmp_path / "out")


def test_a_mask_that_vanishes(tmp_path, monkeypatch):
    """After the reader its film is rejected, and in its midst it is told."""
    film = table_of_films(tmp_path / "data")
    mask, config = tmp_path / "data" / "masks" / "b.png", config_of("table", tmp_path)
    manifest = read_dataset("table", tmp_path / "data", config)
    content = mask.read_bytes()
    mask.unlink()
    loses(film, manifest, tmp_path / "out", "its mask cannot be read: No such file or directory")
    mask.write_bytes(content)
    original = headers.check_mask

    def check_mask(path: str, *size: int) -> None:
        mask.unlink()
        original(path, *size)

    monkeypatch.setattr(headers, "check_mask", check_mask)
    with pytest.raises(CxrError, match=r"line 3: mask b\.png cannot be read: No such file or directory"):
        read_dataset("table", tmp_path / "data", config)


def test_films_that_vanish_before_an_audit(tmp_path):
    film = chexpert(tmp_path / "data")
    save_manifest(read_dataset("chexpert", tmp_path / "data"), tmp_path / "films.csv")
    film.unlink()
    found = audit([tmp_path / "films.csv"], tmp_path / "audit", workers=1)
    assert found.unread["row"].tolist() == [1]
    assert found.unread["reason"].tolist() == ["cannot be opened: No such file or directory"]
