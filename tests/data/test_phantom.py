"""Generated films: what is drawn is what is said to be drawn, and the data set is SIIM's, byte for byte repeatable."""

from __future__ import annotations

import ast
import csv
import hashlib
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cxr_tf.data.phantom import CLASSES, PhantomError, phantom, write_siim
from cxr_tf.data.radiograph import read_header, read_radiograph

NEGATIVE, TYPICAL, INDETERMINATE, ATYPICAL = CLASSES


def draw(label: str, seed: int, size: int = 96):
    return phantom(label, np.random.default_rng([seed, CLASSES.index(label)]), size)


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("size", [32, 97, 256])
def test_a_film(label, size):
    film = draw(label, 0, size)
    assert film.pixels.shape == film.lungs.shape == film.opacity.shape == (size, size)
    assert (film.pixels.dtype, film.lungs.dtype, film.opacity.dtype) == (np.uint16, bool, bool)
    assert film.pixels.max() <= 4095
    assert not (film.opacity & ~film.lungs).any()
    assert film.opacity.any() == bool(film.boxes) == (label != NEGATIVE)
    for x, y, width, height in film.boxes:
        assert 0 <= x < x + width <= size
        assert 0 <= y < y + height <= size


@pytest.mark.parametrize("seed", range(12))
def test_anatomy(seed):
    film = draw(NEGATIVE, seed, 128)
    values, lungs = film.pixels.astype(float), film.lungs
    assert 0.15 < lungs.mean() < 0.5
    left, right = lungs[:, :64].sum(), lungs[:, 64:].sum()
    assert 0.6 < left / right < 1.8
    middle = np.nonzero(lungs.any(1))[0]
    rows = slice(middle[len(middle) // 4], middle[len(middle) // 2])
    gaps = []
    for row, inside in zip(values[rows], lungs[rows], strict=True):
        first, *_, last = np.nonzero(inside)[0]
        gaps.append(row[first:last][~inside[first:last]])
    assert np.median(np.concatenate(gaps)) > np.median(values[lungs]) + 300  # mediastinum bright, lungs dark
    below = values[middle[-1] + 2 : middle[-1] + 6, 50:78]
    assert below.size == 0 or np.median(below) > np.median(values[lungs]) + 300  # abdomen bright


def opacity_places(label: str, films: int = 40) -> list[tuple[float, float, float]]:
    """Of each film: the share of opacity in the left half, the mean height (0 apex, 1 base), the mean distance."""
    places = []
    for seed in range(films):
        film = draw(label, seed)
        rows, columns = np.nonzero(film.opacity)
        lung_rows, lung_columns = np.nonzero(film.lungs)
        middle = lung_columns.mean()
        height = (rows.mean() - lung_rows.min()) / np.ptp(lung_rows)
        outward = np.abs(columns - middle).mean() / np.abs(lung_columns - middle).max()
        places.append(((columns < middle).mean(), height, outward))
    return places


def test_typical_is_bilateral_peripheral_and_low():
    share, height, outward = np.array(opacity_places(TYPICAL)).T
    assert ((share > 0.05) & (share < 0.95)).all()
    assert np.median(height) > 0.6
    assert np.median(outward) > 0.65


def test_indeterminate_is_not():
    share, height, outward = np.array(opacity_places(INDETERMINATE)).T
    one_sided = (share < 0.02) | (share > 0.98)
    typical = ~one_sided & (height > 0.55) & (outward > 0.6)
    assert one_sided.mean() > 0.3
    assert typical.mean() < 0.1


def test_every_class_varies():
    for label in CLASSES:
        films = [draw(label, seed, 64).pixels for seed in range(6)]
        assert len({film.tobytes() for film in films}) == 6
        assert np.std([film.mean() for film in films]) > 20


def test_the_same_seed_gives_the_same_film_and_state_moves_on():
    first, second = draw(TYPICAL, 5, 128), draw(TYPICAL, 5, 128)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.opacity, second.opacity)
    assert first.boxes == second.boxes
    rng = np.random.default_rng(0)
    assert (phantom(TYPICAL, rng, 64).pixels != phantom(TYPICAL, rng, 64).pixels).any()


def test_anatomy_does_not_depend_on_the_size():
    small, large = draw(TYPICAL, 3, 128), draw(TYPICAL, 3, 256)
    assert (small.lungs != large.lungs[::2, ::2]).mean() < 0.02
    assert (small.opacity != large.opacity[::2, ::2]).mean() < 0.02


def test_speed():
    draw(TYPICAL, 0, 256)
    started = time.process_time()
    for seed in range(4):
        draw(CLASSES[seed], seed, 256)
    assert (time.process_time() - started) / 4 < 0.4  # about 0.05 s on an idle core


def test_brightness_does_not_give_the_class_away():
    """Logistic regression on 8 x 8 thumbnails stays well below what the drawings tell (a small network: about .95)."""
    thumbnails, labels = [], []
    for seed in range(260):
        label = CLASSES[seed % 2]
        film = draw(label, seed, 64).pixels.astype(float)
        low, high = np.percentile(film, (0.5, 99.5))
        thumbnails.append(np.clip((film - low) / (high - low), 0, 1).reshape(8, 8, 8, 8).mean((1, 3)).ravel())
        labels.append(seed % 2)
    features, truth = np.array(thumbnails), np.array(labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features[:180], truth[:180])
    assert roc_auc_score(truth[180:], model.decision_function(features[180:])) < 0.93
    assert 0.3 < roc_auc_score(truth, features.mean(1)) < 0.7


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda path: phantom("Typical", np.random.default_rng(0)), 'Did you mean "Typical Appearance".*Received'),
        (lambda path: phantom(TYPICAL, np.random.default_rng(0), 8), "Received: 8"),
        (lambda path: write_siim(path / "new", studies=0), "Received: 0"),
        (lambda path: write_siim(path / "new", size=8), "Received: 8"),
        (lambda path: write_siim(path / "new", seed=-1), "Received: -1"),
        (lambda path: write_siim(path, studies=1), "already holds something"),
        (lambda path: write_siim(path / "file", studies=1), "already holds something"),
    ],
)
def test_refused(call, match, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PhantomError, match=match):
        call(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- SIIM's layout --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siim(tmp_path_factory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return write_siim(tmp_path_factory.mktemp("generated") / "siim", studies=80, size=64, seed=3)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_study_table(siim):
    table = rows(siim / "train_study_level.csv")
    assert list(table[0]) == ["id", *CLASSES]
    assert len({row["id"] for row in table}) == len(table) == 80
    assert all(row["id"].endswith("_study") and len(row["id"]) == 18 for row in table)
    assert all(sorted(row[name] for name in CLASSES) == ["0", "0", "0", "1"] for row in table)
    counts = Counter(next(name for name in CLASSES if row[name] == "1") for row in table)
    assert [counts[name] for name in CLASSES] == [22, 38, 14, 6]  # the challenge's .274 .475 .175 .076


def test_image_table_and_files(siim):
    table = rows(siim / "train_image_level.csv")
    assert list(table[0]) == ["id", "boxes", "label", "StudyInstanceUID"]
    files = {path.stem: path for path in siim.glob("train/*/*/*.dcm")}
    assert {row["id"].removesuffix("_image") for row in table} == set(files)
    for path in files.values():
        ids = path.relative_to(siim / "train").with_suffix("").parts
        assert len(ids) == 3
        assert all(len(part) == 12 and int(part, 16) >= 0 for part in ids)
    assert {path.name for path in siim.iterdir()} == {"train", "train_study_level.csv", "train_image_level.csv"}
    labels = {row["id"].removesuffix("_study"): row for row in rows(siim / "train_study_level.csv")}
    for row in table:
        path = files[row["id"].removesuffix("_image")]
        assert path.parent.parent.name == row["StudyInstanceUID"]
        header = read_header(path)
        if not row["boxes"]:
            assert row["label"] == "none 1 0 0 1 1"
            continue
        assert labels[row["StudyInstanceUID"]][NEGATIVE] == "0"
        boxes = ast.literal_eval(row["boxes"])
        assert all(list(box) == ["x", "y", "width", "height"] for box in boxes)
        parts = row["label"].split()
        assert parts[::6] == ["opacity"] * len(boxes)
        for number, box in enumerate(boxes):
            confidence, *corners = map(float, parts[6 * number + 1 : 6 * number + 6])
            assert confidence == 1
            assert corners == [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]]
            assert 0 <= corners[0] < corners[2] <= header.width
            assert 0 <= corners[1] < corners[3] <= header.height


def test_the_traps_are_in(siim):
    table = rows(siim / "train_image_level.csv")
    negatives = {
        row["id"].removesuffix("_study") for row in rows(siim / "train_study_level.csv") if row[NEGATIVE] == "1"
    }
    images = Counter(row["StudyInstanceUID"] for row in table)
    assert sum(count > 1 for count in images.values()) >= 3
    unboxed = [row for row in table if not row["boxes"] and row["StudyInstanceUID"] not in negatives]
    assert unboxed
    assert all(images[row["StudyInstanceUID"]] > 1 for row in unboxed)
    headers = {path: read_header(path) for path in siim.glob("train/*/*/*.dcm")}
    patients = {}
    for path, header in headers.items():
        patients.setdefault(path.parent.parent.name, set()).add(header.patient_id)
    assert all(len(ids) == 1 for ids in patients.values())  # a study is one patient's
    assert len({next(iter(ids)) for ids in patients.values()}) < len(patients)  # some have several
    kinds = Counter((header.transfer_syntax, header.photometric) for header in headers.values())
    assert {syntax for syntax, _ in kinds} >= {uid.ExplicitVRLittleEndian, uid.RLELossless}
    assert {photometric for _, photometric in kinds} == {"MONOCHROME1", "MONOCHROME2"}
    assert {header.view for header in headers.values()} == {"PA", "AP"}
    assert {header.sex for header in headers.values()} == {"M", "F"}
    assert all(12 <= header.age <= 90 for header in headers.values())
    assert len({(header.height, header.width) for header in headers.values()}) > 3


def test_the_files_are_valid_dicom(siim):
    windows, seen = 0, set()
    for path in siim.glob("train/*/*/*.dcm"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dataset = pydicom.dcmread(path)
            for element in dataset.iterall():
                assert element.VR
            stored = dataset.pixel_array
        assert (dataset.BitsStored, dataset.HighBit, dataset.BitsAllocated) == (12, 11, 16)
        assert stored.max() <= 4095
        assert dataset.Modality in ("DX", "CR")
        needed = (
            "PatientName PatientID PatientBirthDate PatientSex PatientAge StudyDate StudyTime StudyID AccessionNumber "
            "ViewPosition StudyInstanceUID SeriesInstanceUID SOPInstanceUID SOPClassUID"
        )
        for keyword in needed.split():
            assert str(dataset[keyword].value), keyword
        assert str(dataset.PatientName).startswith("Phantom^")
        for found in (dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID):
            assert found.is_valid
        assert dataset.SOPInstanceUID not in seen
        seen.add(dataset.SOPInstanceUID)
        windows += "WindowWidth" in dataset
    assert 0 < windows < len(seen)


def test_every_film_reads_with_air_dark(siim):
    for path in siim.glob("train/*/*/*.dcm"):
        pixels = read_radiograph(path)
        height, width = pixels.shape
        spine = np.median(pixels[int(0.55 * height) : int(0.75 * height), int(0.45 * width) : int(0.55 * width)])
        assert spine > np.percentile(pixels, 40)


def digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_byte_for_byte(tmp_path):
    arguments = {"studies": 10, "size": 48}
    first, again, other = (
        write_siim(tmp_path / name, seed=seed, **arguments) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert digest(first) == digest(again)
    assert not set(digest(first).values()) & set(digest(other).values())


def test_progress_and_an_empty_folder(tmp_path):
    (tmp_path / "made").mkdir()
    seen: list[tuple[int, int]] = []
    root = write_siim(
        str(tmp_path / "made"), studies=4, size=32, progress=lambda done, total: seen.append((done, total))
    )
    files = len(list(root.glob("train/*/*/*.dcm")))
    assert root == tmp_path / "made"
    assert seen == [(done, files) for done in range(1, files + 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_nothing_half_written(tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_siim(tmp_path / "data", studies=4, size=32, progress=stop)
    assert not (tmp_path / "data").exists()
    whole = write_siim(tmp_path / "data", studies=4, size=32)
    assert digest(whole) == digest(write_siim(tmp_path / "again", studies=4, size=32))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "again"}


def test_the_marker_goes_with_the_label(tmp_path):
    plain = write_siim(tmp_path / "plain", studies=24, size=128, seed=5)
    marked = write_siim(tmp_path / "marked", studies=24, size=128, seed=5, marker=True)
    labels = {row["id"][:12]: [row[name] for name in CLASSES] for row in rows(marked / "train_study_level.csv")}
    shapes: dict[tuple[str, ...], set[bytes]] = {}
    for path in marked.glob("train/*/*/*.dcm"):
        one, two = (pydicom.dcmread(p).pixel_array.astype(int) for p in (path, plain / path.relative_to(marked)))
        changed = one != two
        where_rows, where_columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
        assert where_rows[-1] < 0.2 * one.shape[0]
        assert where_columns[-1] < 0.2 * one.shape[1]
        letter = changed[where_rows[0] : where_rows[-1] + 1, where_columns[0] : where_columns[-1] + 1]
        shapes.setdefault(tuple(labels[path.parent.parent.name]), set()).add(letter.tobytes())
    assert len(shapes) == 4
    assert all(len(letters) == 1 for letters in shapes.values())
    assert len(set.union(*shapes.values())) == 4
    assert rows(plain / "train_image_level.csv") == rows(marked / "train_image_level.csv")
