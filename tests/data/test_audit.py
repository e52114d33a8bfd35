"""Audit: each kind of twin is found and nothing else, leaks and torn patients fail it, and no identifier gets out."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_tf.data.audit import AuditError, audit
from cxr_tf.data.manifest import ManifestError, make_manifest, save_manifest
from cxr_tf.data.phantom import CLASSES, phantom
from cxr_tf.data.shards import ShardError, prepare
from cxr_tf.errors import CxrError

PATIENT = "Doe-Jane-19700102"
STUDY = "1.2.840.99999.7"


def film(number: int, size: int = 160) -> np.ndarray:
    pixels = phantom(CLASSES[number % len(CLASSES)], np.random.default_rng(number), size).pixels
    return (pixels >> 4).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(pixels: np.ndarray, part: float) -> np.ndarray:
    size = [round(side * part) for side in pixels.shape[::-1]]
    return np.asarray(Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BICUBIC))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    return np.rint(np.clip(128 + (pixels - 128.0) * factor, 0, 255)).astype(np.uint8)


def cropped(pixels: np.ndarray, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    height, width = pixels.shape
    return pixels[round(top * height) : round((1 - bottom) * height), round(left * width) : round((1 - right) * width)]


KINDS = {
    "same": lambda x: x,
    "jpeg": lambda x: jpeg(x, 50),
    "half": lambda x: resized(x, 0.5),
    "stronger": lambda x: contrast(x, 1.1),
    "weaker": lambda x: contrast(x, 0.9),
    "all sides": lambda x: cropped(x, 0.05, 0.05, 0.05, 0.05),
    "one side": lambda x: cropped(x, 0, 0, 0.05, 0),
    "corner": lambda x: cropped(x, 0.05, 0, 0.05, 0),
    "squeezed": lambda x: np.asarray(Image.fromarray(x).resize((128, 96))),
    "everything": lambda x: jpeg(resized(contrast(cropped(x, 0.05, 0, 0.02, 0.04), 1.1), 0.5), 50),
    "mirrored": lambda x: np.ascontiguousarray(x[:, ::-1]),
    "inverted": lambda x: 255 - x,
    "both": lambda x: np.ascontiguousarray(255 - x[:, ::-1]),
}


def write(folder: Path, films: list[np.ndarray], name: str = "manifest.csv", **columns) -> Path:
    """A manifest of films under names that must not get out; every film has a patient of its own by default."""
    root = folder / f"{PATIENT}-{Path(name).stem}"
    root.mkdir(parents=True, exist_ok=True)
    count = len(films)
    paths = [root / f"{STUDY}.{i}.png" for i in range(count)]
    for path, pixels in zip(paths, films, strict=True):
        Image.fromarray(pixels).save(path)
    table = {
        "image": [str(path) for path in paths],
        "source": [f"hospital <{Path(name).stem}>"] * count,
        "patient_id": [f"{PATIENT}-{name}-{i}" for i in range(count)],
        "study_id": [f"{STUDY}.{name}.{i}" for i in range(count)],
        **{column: [None] * count for column in ("view", "sex", "mask", "split")},
        "age": [float("nan")] * count,
        "label:Opacity": [float("nan")] * count,
        "boxes": [[]] * count,
        "mask_known": [False] * count,
    }
    save_manifest(make_manifest(table | columns), folder / name)
    return folder / name


def rows(found) -> list[tuple[int, int]]:
    return sorted(zip(found.pairs["first_row"], found.pairs["second_row"], strict=True))


@pytest.fixture(scope="module")
def originals() -> list[np.ndarray]:
    return [film(number) for number in range(40)]


def test_finds_every_kind_of_twin_and_nothing_else(originals, tmp_path):
    twins = [change(originals[i]) for i, change in enumerate(KINDS.values())]
    split = ["train"] * len(originals) + ["test"] * len(twins)
    found = audit([write(tmp_path, originals + twins, split=split)], workers=1)
    assert rows(found) == [(i, len(originals) + i) for i in range(len(KINDS))]
    pairs = found.pairs.set_index("first_row")
    turned = {"mirrored", "inverted", "both"}
    assert pairs["kind"].to_dict() == {i: name if name in turned else "copy" for i, name in enumerate(KINDS)}
    assert (pairs["correlation"] > 0.92).all() and (pairs["correlation"] <= 1).all()
    assert pairs["leak"].all() and not pairs["same_patient"].any()
    assert set(pairs["first_split"]) == {"train"} and set(pairs["second_split"]) == {"test"}
    assert found.failed and "13 pairs" in found.failures[0] and "FAILED" in found.summary()


def test_all_changes_at_once(tmp_path):
    """Nearly all are found (99.9 % of 2,000: experiments/benchmarks/audit.py), and nothing else."""
    random, films = np.random.default_rng(0), [film(number) for number in range(30)]
    for pixels in films[:30]:
        changed = contrast(cropped(pixels, *random.uniform(0, 0.05, 4)), random.uniform(0.9, 1.1))
        films.append(jpeg(resized(changed, random.uniform(0.5, 1)), int(random.integers(50, 96))))
    found = rows(audit([write(tmp_path, films)], workers=1))
    assert set(found) <= {(i, i + 30) for i in range(30)} and len(found) >= 28


def test_different_films_of_one_body_are_no_twins(tmp_path):
    """The same anatomy, exposed again: another position, another breath."""
    from cxr_tf.data.phantom import _film

    def exposed(number: int) -> np.ndarray:
        body, disease = np.random.default_rng(1), np.random.default_rng(2)
        film = _film(CLASSES[0], body, disease, np.random.default_rng(number), 160, view="PA", sex="F")
        return (film.pixels >> 4).astype(np.uint8)

    assert rows(audit([write(tmp_path, [exposed(3), exposed(4), exposed(5)])], workers=1)) == []


def test_real_films_have_no_twins_but_planted_ones(cxr_data, tmp_path):
    paths = sorted((cxr_data / "images").rglob("*.jpg"))[::40]
    films = [np.asarray(Image.open(path).convert("L")) for path in paths]
    twins = [jpeg(resized(contrast(cropped(x, 0.03, 0.05, 0, 0.04), 0.92), 0.6), 60) for x in films[:10]]
    found = audit([write(tmp_path, films + twins)], workers=1)
    assert rows(found) == [(i, len(films) + i) for i in range(10)]


def test_shards_and_manifests_give_the_same(originals, tmp_path):
    films = [*originals[:10], KINDS["everything"](originals[3])]
    path = write(tmp_path, films, split=["train"] * 10 + ["test"])
    from cxr_tf.data.manifest import load_manifest

    prepare(load_manifest(path), tmp_path / "shards", storage_size=128, shard_size=4, workers=1)
    one, other = audit([path], workers=1), audit([tmp_path / "shards"], workers=1)
    assert rows(one) == rows(other) == [(3, 10)]
    assert one.failed and other.failed and one.sets.equals(other.sets)


def test_several_processes_give_the_same(originals, tmp_path):
    films = [*originals, *(jpeg(x, 60) for x in originals[:30])]
    path = write(tmp_path, films)
    one, two = audit([path], workers=1), audit([path], workers=2)
    assert len(one.pairs) == 30 and one.pairs.equals(two.pairs)


def test_across_data_sets_what_has_no_split_is_learned_from(originals, tmp_path):
    labeled = write(tmp_path, originals[:6], "labeled.csv", split=["train", "validation", "test", "test", "test", None])
    plain = write(tmp_path, [originals[10], originals[3], originals[0]], "plain.csv")
    found = audit([labeled, plain], workers=1)
    ends = found.pairs[["first_set", "first_row", "second_set", "second_row", "leak"]].to_numpy().tolist()
    assert ends == [[1, 3, 2, 1, True], [1, 0, 2, 2, False]]  # what leaks comes first
    assert found.failed and found.sets["splits"].tolist() == ["train 1, validation 1, test 3", ""]
    assert not audit([labeled], workers=1).failed and not audit([plain], workers=1).failed
    assert "cannot be seen" in audit([plain], workers=1).summary()


@pytest.mark.parametrize(
    "split, leak",
    [
        (("train", "test"), True),
        (("test", "validation"), True),
        (("train", "validation"), False),
        (("test", "test"), False),
        (("test", None), False),  # no split in a set that has some: nobody uses it
    ],
)
def test_which_twins_leak(originals, tmp_path, split, leak):
    films = [originals[0], originals[0], originals[1], originals[2]]
    found = audit([write(tmp_path, films, split=[*split, "train", "test"])], workers=1)
    assert rows(found) == [(0, 1)] and found.pairs["leak"].tolist() == [leak] and found.failed == leak


def test_patients_and_studies_on_several_sides(originals, tmp_path):
    who = {
        "patient_id": ["a", "a", "b", "b", "c", "d"],
        "study_id": ["a1", "a1", "b1", "b2", "c1", "d1"],
        "split": ["train", "test", "validation", "train", "test", None],
    }
    found = audit([write(tmp_path, originals[:6], **who)], workers=1)
    sides = found.sides[["what", "number", "set", "row"]].to_numpy().tolist()
    assert sides == [
        ["patient", 1, 1, 0],
        ["patient", 1, 1, 1],
        ["patient", 2, 1, 2],
        ["patient", 2, 1, 3],
        ["study", 1, 1, 0],
        ["study", 1, 1, 1],
    ]
    assert found.failures == ["2 patients on several sides", "1 study on several sides"]


def test_patients_across_data_sets(originals, tmp_path):
    def pair(source: str, splits: tuple[list, list], name: str):
        who = {"patient_id": ["7", "8"], "study_id": ["7", "8"]}
        one = write(tmp_path, originals[:2], f"{name}1.csv", **who, source=["here"] * 2, split=splits[0])
        other = write(tmp_path, originals[2:4], f"{name}2.csv", **who, source=[source] * 2, split=splits[1])
        return audit([one, other], workers=1)

    torn = pair("here", (["test", "train"], [None, None]), "a")
    assert torn.failed and torn.sides["row"].tolist() == [0, 0] * 2  # of the training patient nothing is wrong
    assert not pair("there", (["test", "train"], [None, None]), "b").failed  # other people, by chance the same number
    assert not pair("here", (["test", "train"], ["test", "train"]), "c").failed


def test_nothing_that_identifies_gets_out(originals, tmp_path):
    films = [originals[0], jpeg(originals[0], 70), originals[1], originals[2]]
    split = ["train", "test", "train", "test"]
    path = write(tmp_path, films, split=split, patient_id=[PATIENT] * 4, study_id=[STUDY] * 4)
    (tmp_path / f"{PATIENT}-manifest" / f"{STUDY}.3.png").write_bytes(b"\x89PNG\r\n\x1a\n")  # cannot be read
    found = audit([path], tmp_path / "out", workers=1)
    assert len(found.pairs) == len(found.unread) == 1 and len(found.sides) == 4
    texts = [file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir()]
    assert len(texts) == 4
    for text in [*texts, found.summary(), repr(found)]:
        for secret in (PATIENT, "Doe", STUDY, str(tmp_path)):
            assert secret not in text


def test_the_page_shows_both_films_and_escapes(originals, tmp_path):
    films = [np.ascontiguousarray(originals[0][:120]), jpeg(originals[0][:120], 70), originals[1]]
    path = write(tmp_path, films, source=["<script>"] * 3, split=["train", "test", "train & more"])
    audit([path], tmp_path / "out", workers=1)
    page = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "train &amp; more" in page
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall('base64,([^"]*)', page)]
    assert [image.size for image in shown] == [(160, 120)] * 2
    np.testing.assert_array_equal(np.asarray(shown[0]), films[0])
    assert '<h1 class="bad">Failed' in page and "data set 1, row 1" in page
    pairs = pd.read_csv(tmp_path / "out" / "pairs.csv")
    assert pairs[["first_row", "second_row", "leak"]].to_numpy().tolist() == [[0, 1, True]]


def test_films_that_cannot_be_read_are_listed_and_fail_it(originals, tmp_path):
    path = write(tmp_path, originals[:4])
    folder = tmp_path / f"{PATIENT}-manifest"
    (folder / f"{STUDY}.1.png").unlink()
    (folder / f"{STUDY}.2.png").write_bytes(b"text")
    found = audit([path], workers=1)
    assert found.failed and found.unread[["set", "row"]].to_numpy().tolist() == [[1, 1], [1, 2]]
    assert "2 films could not be read" in found.failures[0] and "row 1" in found.summary()
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(AuditError, match="none of the 4 films"):
        audit([path], workers=1)


def test_damaged_shards(originals, tmp_path):
    from cxr_tf.data.manifest import load_manifest

    shards = prepare(load_manifest(write(tmp_path, originals[:4])), tmp_path / "shards", shard_size=4, workers=1)
    index = json.loads((tmp_path / "shards" / "shards.json").read_text())
    file = tmp_path / "shards" / index["shards"][0]["file"]
    whole = file.read_bytes()
    length = index["shards"][0]["lengths"][0]
    file.write_bytes(whole[:12] + b"\xff" * length + whole[12 + length :])
    found = audit([shards.folder], workers=1)
    assert found.unread[["row", "reason"]].to_numpy().tolist() == [[0, "its record is damaged"]] and found.failed
    file.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match="another size"):
        audit([shards.folder], workers=1)


def test_blank_films_are_counted_not_compared(originals, tmp_path):
    blank = np.full((160, 160), 7, np.uint8)
    found = audit([write(tmp_path, [blank, originals[0], blank])], workers=1)
    assert found.blank == 2 and rows(found) == [] and not found.failed and "2 films without content" in found.summary()
    assert audit([write(tmp_path, [blank, blank], "blank.csv")], workers=1).blank == 2


def test_one_film_tiny_films_and_long_ones(originals, tmp_path):
    found = audit([write(tmp_path, originals[:1])], tmp_path / "out", workers=1)
    assert len(found.pairs) == len(found.sides) == 0 and not found.failed and found.summary().endswith("passed")
    assert pd.read_csv(tmp_path / "out" / "pairs.csv").empty
    rng = np.random.default_rng(0)
    odd = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((1, 1), (1, 300), (300, 2), (5, 7), (96, 96))]
    assert rows(audit([write(tmp_path, odd, "odd.csv")], workers=1)) == []


@pytest.mark.parametrize(
    "paths, error, message",
    [
        ([], AuditError, "one or more manifests"),
        (["nowhere"], AuditError, "no such file or folder"),
        (["."], ShardError, "no shards"),
        (["text.csv"], ManifestError, "missing"),
        (["manifest.csv", "./manifest.csv"], AuditError, "given twice"),
    ],
)
def test_bad_input(originals, tmp_path, monkeypatch, paths, error, message):
    write(tmp_path, originals[:2])
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        audit(paths, workers=1)


def test_an_output_folder_that_cannot_be_written_is_said_before_any_film_is_read(originals, tmp_path):
    path = write(tmp_path, originals[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(CxrError, match="cannot be written"):
        audit([path], tmp_path / "file", workers=1, progress=lambda done, total: pytest.fail("films were read"))


def test_progress_ends_at_its_total(originals, tmp_path):
    calls = []
    blank = np.zeros((20, 20), np.uint8)
    audit([write(tmp_path, [*originals[:3], blank])], workers=1, progress=lambda *call: calls.append(call))
    assert calls[-1] == (8, 8) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_memory_holds_hashes_and_no_films(tmp_path, monkeypatch):
    import tracemalloc

    from cxr_tf.data import audit as module

    def read(self, film: int) -> np.ndarray:
        return np.random.default_rng(film).integers(0, 256, (1024, 1024), dtype=np.uint8)

    monkeypatch.setattr(module._Films, "read", read)
    path = write(tmp_path, [np.zeros((2, 2), np.uint8)] * 96)
    tracemalloc.start()
    try:
        assert rows(audit([path], workers=1)) == []
        assert tracemalloc.get_traced_memory()[1] < 20e6  # the films are 100 MB
    finally:
        tracemalloc.stop()
