"""Manifest -> shards: what is kept, what is rejected, what a killed run leaves, and what never gets into a record."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from PIL import Image

from cxr_tf import preprocess
from cxr_tf.data import shards as shards_module
from cxr_tf.data.manifest import make_manifest
from cxr_tf.data.phantom import phantom
from cxr_tf.data.shards import ShardError, merge, open_shards, prepare, prepare_part
from cxr_tf.errors import CxrError

UID = "1.2.840.99999"
PATIENT = "Doe-Jane-19700102"


def make_films(root: Path, count: int = 10) -> pd.DataFrame:
    """Small films of several shapes, under names that must not get out."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        folder = root / f"{UID}.{i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 40 + 3 * i, 64 - 2 * i
        path = folder / f"{UID}.{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(path)
        mask = None
        if i == 2:
            mask = folder / f"{UID}.{i}.mask.png"
            pixels = np.zeros((height, width), np.uint8)
            pixels[5:20, 8:30] = 255
            Image.fromarray(pixels).save(mask)
        rows.append(
            {
                "image": str(path),
                "source": "here",
                "patient_id": f"{PATIENT}-{i // 3}",
                "study_id": f"{UID}.{i // 2}.{i // 3}",
                "view": "PA" if i % 2 else None,
                "sex": "F",
                "age": float("nan") if i == 1 else 40.0 + i,
                "label:Opacity": float(i % 2),
                "label:Effusion": float("nan") if i % 4 == 0 else 1.0,
                "boxes": [[4.0, 6.0, 10.0, 12.0]] if i % 3 == 0 else [],
                "mask": None if mask is None else str(mask),
                "mask_known": i % 5 != 4,
                "split": None,
                "fold": str(i % 2),
            }
        )
    return make_manifest({name: [row[name] for row in rows] for name in rows[0]})


@pytest.fixture
def manifest(tmp_path) -> pd.DataFrame:
    return make_films(tmp_path / "films")


def examples(shards) -> list[dict]:
    found = []
    for record in shards.read(range(len(shards))):
        features = tf.train.Example.FromString(record).features.feature
        row = {}
        for name, feature in features.items():
            row[name] = list(getattr(feature, feature.WhichOneof("kind")).value) if feature.WhichOneof("kind") else []
        found.append(row)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small(manifest, out, **changes):
    return prepare(manifest, out, **({"storage_size": 48, "shard_size": 4, "workers": 0} | changes))


def test_every_film_comes_back_as_preprocessing_gives_it(manifest, tmp_path):
    shards = small(manifest, tmp_path / "out")
    assert len(shards) == 10 and shards.classes == ["Opacity", "Effusion"] and shards.storage_size == 48
    assert shards.rejected == 0
    for key, row in enumerate(examples(shards)):
        pixels = np.asarray(Image.open(manifest["image"][key]))
        stored = preprocess.to_storage(pixels, 48)
        assert (row["height"], row["width"]) == ([stored.shape[0]], [stored.shape[1]])
        assert row["image"] == [stored.tobytes()]
        np.testing.assert_array_equal(row["labels"], [key % 2, np.nan if key % 4 == 0 else 1])
        assert row["view"] == [b"PA" if key % 2 else b""] and row["sex"] == [b"F"] and row["source"] == [b"here"]
        np.testing.assert_array_equal(row["age"], [np.nan if key == 1 else 40 + key])
        assert row["image_key"] == [key] and row["patient_key"] == [key // 3]
    assert [row["study_key"][0] for row in examples(shards)] == list(pd.factorize(manifest["study_id"])[0])


def test_masks_tell_unknown_from_empty(manifest, tmp_path):
    for key, row in enumerate(examples(small(manifest, tmp_path / "out"))):
        if key % 5 == 4:
            assert row["mask"] == [b""] and row["mask_pixels"] == [0]
            continue
        bits = np.unpackbits(np.frombuffer(zlib.decompress(row["mask"][0]), np.uint8))
        mask = bits[: row["height"][0] * row["width"][0]].reshape(row["height"][0], row["width"][0])
        assert mask.sum() == row["mask_pixels"][0]
        height, width = np.asarray(Image.open(manifest["image"][key])).shape
        truth = np.zeros((height, width), np.uint8)
        if key == 2:
            truth[5:20, 8:30] = 1
        elif key % 3 == 0:
            truth[6:18, 4:14] = 1
        np.testing.assert_array_equal(mask, preprocess.mask_to_storage(truth, 48))


def test_tensorflow_reads_the_files(manifest, tmp_path):
    """TFRecord as TensorFlow means it, checksums and all, in the order of the keys."""
    shards = small(manifest, tmp_path / "out")
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tfrecord"))]
    assert [Path(path).name for path in paths] == [f"shard-{i:05}-of-00003.tfrecord" for i in range(3)]
    assert list(tf.data.TFRecordDataset(paths).as_numpy_iterator()) == shards.read(range(10))


def test_records_hold_no_identifier(manifest, tmp_path):
    small(manifest, tmp_path / "out")
    identifiers = [*manifest["image"], *manifest["patient_id"], *manifest["study_id"]]
    hashes = [hash(text.encode()) for text in identifiers for hash in (hashlib.md5, hashlib.sha1, hashlib.sha256)]
    planted = [UID.encode(), PATIENT.encode(), b"Doe", b"1970", b".png", str(tmp_path).encode()]
    planted += [h.digest() for h in hashes] + [h.hexdigest().encode() for h in hashes]
    for name, content in files(tmp_path / "out").items():
        if name in ("manifest.csv", "noted.csv"):  # which stay here
            assert UID.encode() in content
            continue
        for secret in planted:
            assert secret not in content, name


def test_reasons_hold_no_identifier(manifest, tmp_path):
    Path(manifest["image"][1]).write_bytes(b"no film at all")
    Path(manifest["mask"][2]).write_bytes(b"")
    shards = small(manifest, tmp_path / "out")
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{UID}.{i // 2}/{UID}.{i}.png" for i in (1, 2)]
    assert rows[0]["reason"] == "is no DICOM, PNG or JPEG file" and "mask" in rows[1]["reason"]
    for row in rows:
        assert UID not in row["reason"] and "Doe" not in row["reason"] and str(tmp_path) not in row["reason"]
    assert shards.rejected == 2
    for sidecar in (tmp_path / "out").glob("shard-*.json"):
        assert UID not in sidecar.read_text()


def test_a_broken_film_is_left_out_and_the_rest_kept(manifest, tmp_path):
    Path(manifest["image"][3]).write_bytes(b"")
    Path(manifest["image"][6]).unlink()  # gone between listing and reading
    progress = []
    shards = small(manifest, tmp_path / "out", progress=lambda done, total: progress.append((done, total)))
    assert progress == [(i, 10) for i in range(1, 11)]
    kept = [0, 1, 2, 4, 5, 7, 8, 9]
    assert shards.manifest["image"].tolist() == manifest["image"][kept].tolist()
    assert shards.manifest.index.tolist() == list(range(8)) and shards.manifest["image_key"].tolist() == kept
    assert shards.manifest["fold"].tolist() == manifest["fold"][kept].tolist()
    assert [row["image_key"][0] for row in examples(shards)] == kept


def test_what_should_be_looked_at_is_noted_and_kept(manifest, tmp_path):
    manifest = manifest.assign(mask=None, mask_known=False)
    upright = Path(manifest["image"][0])
    film = (phantom("Negative for Pneumonia", np.random.default_rng(1), 128).pixels >> 4).astype(np.uint8)
    Image.fromarray(film).save(upright)
    Image.fromarray(255 - film).save(manifest["image"][1])
    faint = np.full((64, 64), 3 << 8, np.uint16)
    faint[:32] = 9
    Image.fromarray(faint).save(manifest["image"][2])
    shards = small(manifest, tmp_path / "out")
    with (tmp_path / "out" / "noted.csv").open(newline="") as file:
        notes = {row["image"]: row["note"] for row in csv.DictReader(file)}
    paths = [os.path.relpath(path, upright.parents[1]) for path in manifest["image"]]
    assert paths[0] not in notes
    assert notes[paths[1]].startswith("looks inverted")
    assert len(shards) == 10 and shards.noted == len(notes)
    assert examples(shards)[1]["image"][0] == preprocess.to_storage(255 - film, 48).tobytes()
    # Again, nothing is read, and what was noted stays.
    before = files(tmp_path / "out")
    small(manifest, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert not any(secret in note for note in notes.values() for secret in (UID, PATIENT))


def test_a_film_above_the_bound_is_left_out(manifest, tmp_path):
    Image.fromarray(np.zeros((1200, 1000), np.uint8)).save(manifest["image"][0])
    assert small(manifest, tmp_path / "out", max_megapixels=1.0).rejected == 1
    assert "megapixels" in (tmp_path / "out" / "rejected.csv").read_text()


def test_strict_ends_at_the_first_broken_film(manifest, tmp_path):
    Path(manifest["image"][5]).write_bytes(b"")
    with pytest.raises(ShardError, match=rf"{UID}\.5\.png cannot be prepared: is empty"):
        small(manifest, tmp_path / "out", strict=True)
    names = set(files(tmp_path / "out"))
    assert names == {"shard-00000-of-00003.tfrecord", "shard-00000-of-00003.json"}  # whole, and nothing of the next
    assert small(manifest, tmp_path / "out").rejected == 1
    with pytest.raises(ShardError, match="cannot be prepared: is empty"):
        small(manifest, tmp_path / "out", strict=True)


def test_no_film_at_all(manifest, tmp_path):
    for path in manifest["image"]:
        Path(path).write_bytes(b"")
    with pytest.raises(ShardError, match="none of the 10 films can be prepared: is empty"):
        small(manifest, tmp_path / "out")
    assert not files(tmp_path / "out")


def test_the_same_bytes_whatever_the_number_of_processes(manifest, tmp_path):
    Path(manifest["image"][3]).write_bytes(b"")
    alone = small(manifest, tmp_path / "alone")
    two = small(manifest, tmp_path / "two", workers=2)
    assert files(tmp_path / "alone") == files(tmp_path / "two")
    assert alone.data_hash == two.data_hash


def part(manifest, out, worker, **changes):
    settings = {"storage_size": 48, "shard_size": 4, "workers": 0} | changes
    return prepare_part(manifest, out, worker, **settings)


def test_machines_that_share_the_work_make_the_same_files_as_one(manifest, tmp_path):
    Path(manifest["image"][3]).write_bytes(b"")
    alone = small(manifest, tmp_path / "alone")
    done = []
    assert part(manifest, tmp_path / "shared", (1, 2), progress=lambda d, t: done.append((d, t))) == (1, 3)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    with pytest.raises(ShardError, match=r"not finished"):
        open_shards(tmp_path / "shared")
    with pytest.raises(ShardError, match=r"2 of 3 shards are missing.*00000-of-00003\.tfrecord, shard-00002.*modulo n"):
        merge(manifest, tmp_path / "shared", storage_size=48, shard_size=4)
    # The other machine has a folder of its own, whose files are copied.
    assert part(manifest, tmp_path / "other", (0, 2)) == (2, 3)
    for path in (tmp_path / "other").glob("shard-*"):
        shutil.copy(path, tmp_path / "shared")
    merged = merge(manifest, tmp_path / "shared", storage_size=48, shard_size=4)
    assert files(tmp_path / "shared") == files(tmp_path / "alone") and merged.data_hash == alone.data_hash


def test_merging_finds_what_a_copy_damaged(manifest, tmp_path):
    small(manifest, tmp_path / "out")
    bad = tmp_path / "out" / "shard-00001-of-00003.tfrecord"
    content = bytearray(bad.read_bytes())
    content[100] ^= 1
    bad.write_bytes(content)
    with pytest.raises(ShardError, match=r"1 of 3 shards are missing or damaged: shard-00001-of-00003\.tfrecord"):
        merge(manifest, tmp_path / "out", storage_size=48, shard_size=4)
    with pytest.raises(ShardError, match="storage size: 48 there, 64 now"):
        merge(manifest, tmp_path / "out", storage_size=64, shard_size=4)


def test_workers_share_a_folder_but_not_a_part(manifest, tmp_path):
    said = []

    def meanwhile(done: int, total: int) -> None:
        if done > 1:
            return
        for other in (lambda: part(manifest, tmp_path / "out", (0, 2)), lambda: small(manifest, tmp_path / "out")):
            with pytest.raises(ShardError, match="another process"):
                other()
        said.append(part(manifest, tmp_path / "out", (1, 2)))

    part(manifest, tmp_path / "out", (0, 2), progress=meanwhile)
    assert said == [(1, 3)]
    assert len(merge(manifest, tmp_path / "out", storage_size=48, shard_size=4)) == 10


@pytest.mark.parametrize("worker", [(2, 2), (-1, 2), (0, 0)])
def test_a_worker_that_is_none_of_n(manifest, tmp_path, worker):
    with pytest.raises(ShardError, match=f"0 to n - 1. Received: {worker[0]}/{worker[1]}"):
        part(manifest, tmp_path / "out", worker)
    assert not (tmp_path / "out").exists()


def test_more_machines_than_shards(manifest, tmp_path):
    assert [part(manifest, tmp_path / "out", (i, 5))[0] for i in range(5)] == [1, 1, 1, 0, 0]
    assert len(merge(manifest, tmp_path / "out", storage_size=48, shard_size=4)) == 10


def test_other_films_other_hash(manifest, tmp_path):
    before = small(manifest, tmp_path / "a").data_hash
    Image.fromarray(np.zeros((40, 64), np.uint8)).save(manifest["image"][0])
    assert small(manifest, tmp_path / "b").data_hash != before


def test_again_does_nothing(manifest, tmp_path, monkeypatch):
    small(manifest, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    monkeypatch.setattr(shards_module, "_read_film", None)
    small(manifest, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")} == before


def test_again_makes_what_is_missing(manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small(manifest, out)
    whole = files(out)
    (out / "shard-00001-of-00003.tfrecord").unlink()
    (out / "shards.json").unlink()
    read = []
    original = shards_module._read_film
    monkeypatch.setattr(shards_module, "_read_film", lambda job: read.append(job["image"]) or original(job))
    progress = []
    small(manifest, out, progress=lambda done, total: progress.append(done))
    assert read == manifest["image"].tolist()[4:8]
    assert progress == [4, 6, 7, 8, 9, 10]
    assert files(out) == whole


@pytest.mark.parametrize("rejected", [3, {}, [3], [[0]], [["0", "why"]], [[99, "why"]], [[0, None]]])
def test_a_sidecar_with_a_damaged_list_of_rejected_films_is_made_anew(manifest, tmp_path, rejected):
    whole = small(manifest, tmp_path / "out")
    sidecar = sorted((tmp_path / "out").glob("shard-*.json"))[0]
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"rejected": rejected}))
    mended = small(manifest, tmp_path / "out")
    assert (mended.data_hash, mended.rejected) == (whole.data_hash, whole.rejected)
    assert json.loads(sidecar.read_text())["rejected"] == []


def test_a_film_that_was_mended_is_taken_in(manifest, tmp_path, monkeypatch):
    out = tmp_path / "out"
    good = Path(manifest["image"][5]).read_bytes()
    for i in (1, 5):
        Path(manifest["image"][i]).write_bytes(b"")
    assert small(manifest, out).rejected == 2
    Path(manifest["image"][5]).write_bytes(good)
    before = (out / "shard-00000-of-00003.tfrecord").stat().st_mtime_ns
    shards = small(manifest, out)
    assert shards.rejected == 1 and shards.manifest["image_key"].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (out / "shard-00000-of-00003.tfrecord").stat().st_mtime_ns == before
    small(manifest, tmp_path / "fresh")
    assert files(tmp_path / "fresh") == files(out)


def test_a_split_may_change_without_new_shards(manifest, tmp_path):
    before = small(manifest, tmp_path / "out").data_hash
    shards = small(manifest.assign(split="train", fold="7"), tmp_path / "out")
    assert shards.data_hash == before and set(shards.manifest["fold"]) == {"7"}
    assert set(shards.manifest["split"]) == {"train"}


def test_a_data_set_may_move_as_a_whole(manifest, tmp_path):
    before = small(manifest, tmp_path / "out").data_hash
    (tmp_path / "films").rename(tmp_path / "elsewhere")
    for name in ("image", "mask"):
        manifest[name] = [p and p.replace("/films/", "/elsewhere/") for p in manifest[name]]
    shards = small(manifest, tmp_path / "out")
    assert shards.data_hash == before and "/elsewhere/" in shards.manifest["image"][0]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"storage_size": 32}, {}, "storage size: 48 there, 32 now"),
        ({"shard_size": 5}, {}, "shard size: 4 there, 5 now"),
        ({}, {"label:Effusion": 0.0}, r"content of the manifest"),
        ({}, {"mask_known": False}, r"content of the manifest"),
        ({}, {"patient_id": "another"}, r"content of the manifest"),
        ({}, {"label:Third": 1.0}, r"classes: \['Opacity', 'Effusion'\] there, \['Opacity', 'Effusion', 'Third'\] now"),
    ],
)
def test_other_settings_on_the_same_folder_are_refused(manifest, tmp_path, settings, change, said, whole):
    out = tmp_path / "out"
    small(manifest, out)
    if not whole:
        (out / "shards.json").unlink()
        (out / "shard-00002-of-00003.json").unlink()
    before = files(out)
    with pytest.raises(ShardError, match=said) as caught:
        small(manifest.assign(**change), out, **settings)
    assert "another folder" in str(caught.value)
    assert files(out) == before


def test_fewer_films_are_other_settings(manifest, tmp_path):
    small(manifest, tmp_path / "out")
    with pytest.raises(ShardError, match="number of films: 10 there, 9 now"):
        small(manifest.iloc[:9], tmp_path / "out")


@pytest.mark.parametrize("settings", [{"storage_size": 0}, {"shard_size": 0}])
def test_sizes_below_one_are_refused(manifest, tmp_path, settings):
    with pytest.raises(ShardError, match=r"must be 1 or more\. Received: 0"):
        small(manifest, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_an_error(manifest, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CxrError, match="cannot be written"):
        small(manifest, tmp_path / "out")


def test_two_at_once_are_refused(manifest, tmp_path):
    def second(done: int, total: int) -> None:
        with pytest.raises(ShardError, match="another process"):
            small(manifest, tmp_path / "out")

    small(manifest, tmp_path / "out", progress=second)


KILLED = """
    import os, sys, signal
    from cxr_tf.data.manifest import load_manifest
    from cxr_tf.data.shards import prepare

    def progress(done, total):
        print(done, flush=True)
        if done == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        prepare(load_manifest(sys.argv[1]), sys.argv[2], storage_size=48, shard_size=4, workers=2, progress=progress)
"""


def test_killed_and_started_again(manifest, tmp_path):
    from cxr_tf.data.manifest import save_manifest

    script, table, out = tmp_path / "script.py", tmp_path / "table.csv", tmp_path / "out"
    script.write_text(textwrap.dedent(KILLED))
    save_manifest(manifest, table)
    command = [sys.executable, script, table, out]
    # The pipes close when the last process of the pool has ended, too.
    ended = subprocess.run(command, capture_output=True, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "shards.json" not in files(out) and (out / "shard-00000-of-00003.json").is_file()
    with pytest.raises(ShardError, match="not finished"):
        open_shards(out)
    progress = []
    small(manifest, out, progress=lambda done, total: progress.append(done))
    assert progress[0] == 4  # the first shard was there
    small(manifest, tmp_path / "fresh")
    assert files(out) == files(tmp_path / "fresh")


def test_no_shards_there(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ShardError, match=r"there are no shards \(shards.json is missing\). `cxr-tf prepare`"):
            open_shards(folder)


def test_keys_that_are_not_there(manifest, tmp_path):
    shards = small(manifest, tmp_path / "out")
    for key in (-1, 10):
        with pytest.raises(ShardError, match=f"films 0 to 9. Received: {key}"):
            shards.read([0, key])
    assert shards.read([]) == []


def test_any_order_many_threads_few_files(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 2)
    shards = small(manifest, tmp_path / "out", shard_size=1)
    expected = shards.read(range(10))
    assert shards.read([7, 3, 3, 0]) == [expected[i] for i in (7, 3, 3, 0)]
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else None
    keys = np.random.default_rng(0).integers(0, 10, 2000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda key: shards.read([key])[0], keys))
    assert found == [expected[key] for key in keys]
    if before is not None:
        assert len(list(descriptors.iterdir())) <= before + 3


def test_a_copy_reads_the_same(manifest, tmp_path):
    shards = small(manifest, tmp_path / "out")
    copy = pickle.loads(pickle.dumps(shards))  # noqa: S301
    assert copy.read([3]) == shards.read([3]) and copy.data_hash == shards.data_hash


def test_a_damaged_shard_is_named_and_mended_alone(manifest, tmp_path):
    out = tmp_path / "out"
    shards = small(manifest, out)
    shown = []
    shards.verify(lambda done, total: shown.append((done, total)))
    assert shown == [(1, 3), (2, 3), (3, 3)]
    whole = files(out)
    bad = out / "shard-00001-of-00003.tfrecord"
    content = bytearray(bad.read_bytes())
    content[100] ^= 1
    bad.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-00001-of-00003.tfrecord is damaged.*To mend it, give the same"):
        shards.verify()
    small(manifest, out)  # of the same size, so that its checksum alone tells
    assert files(out) == whole
    bad.write_bytes(content[:-7])
    with pytest.raises(ShardError, match="another size"):
        open_shards(out)
    bad.unlink()
    with pytest.raises(ShardError, match="is missing"):
        open_shards(out)
    with pytest.raises(ShardError, match="is missing"):
        shards.verify()
    small(manifest, out).verify()
    assert files(out) == whole


def test_the_index_says_how_it_was_made(manifest, tmp_path):
    small(manifest, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert index["films"] == 10 and index["rejected"] == 0
    assert index["settings"]["storage_size"] == 48 and index["versions"]["numpy"] == np.__version__
    assert [len(shard["lengths"]) for shard in index["shards"]] == [4, 4, 2]


def test_shards_of_another_format_are_refused(manifest, tmp_path):
    out = tmp_path / "out"
    small(manifest, out)
    index = json.loads((out / "shards.json").read_text())
    index["settings"]["format"] = 99
    (out / "shards.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match=r"format 1\. Received: 99"):
        open_shards(out)


def test_half_an_index_is_mended(manifest, tmp_path):
    out = tmp_path / "out"
    small(manifest, out)
    whole = files(out)
    for name in ("shards.json", "shard-00000-of-00003.json"):
        (out / name).write_bytes(whole[name][: len(whole[name]) // 2])
    with pytest.raises(ShardError, match=r"shards\.json is damaged, or not from.*Delete it and give.*are kept"):
        open_shards(out)
    small(manifest, out)
    assert files(out) == whole


SETTINGS = {"format": 1, "storage_size": 48, "shard_size": 4, "classes": ["Opacity"]}


@pytest.mark.parametrize(
    "content",
    [
        {"settings": 3, "shards": [], "rejected": 0},
        {},
        {"settings": {}},
        [],
        None,
        {"settings": {}, "shards": [], "rejected": 0},
        {"settings": SETTINGS, "shards": [], "rejected": 0},
        {"settings": SETTINGS, "shards": [{}], "rejected": 0},
        {"settings": SETTINGS, "shards": ["a"], "rejected": 0},
        {"settings": SETTINGS, "shards": 3, "rejected": 0},
    ],
)
def test_an_index_that_is_not_ours(tmp_path, content):
    (tmp_path / "shards.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=r"shards\.json is damaged, or not from `cxr-tf prepare`. Give a folder"):
        open_shards(tmp_path)


def places(content, path=()):
    """The path of every value in nested JSON."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def test_a_wrong_value_anywhere_in_the_index_is_no_foreign_error(manifest, tmp_path):
    out = tmp_path / "out"
    small(manifest, out)
    whole = (out / "shards.json").read_text()
    for path in places(json.loads(whole)):
        for wrong in (None, 3.5, -1, 10**30, "../x\ud800", [], {}, [None]):
            index = {"": json.loads(whole)}
            inside = index
            for key in ("", *path)[:-1]:
                inside = inside[key]
            inside[("", *path)[-1]] = wrong
            (out / "shards.json").write_text(json.dumps(index[""]))
            try:
                open_shards(out)
            except ShardError:
                continue
            assert path[0] in ("versions", "films") or path in [("settings", "films"), ("settings", "manifest")], path


@pytest.mark.parametrize("kind", ["foreign", "binary", "empty", "missing", "fewer", "shuffled", "other", "no key"])
def test_a_manifest_of_other_shards_is_refused_and_mended(manifest, tmp_path, kind):
    out = tmp_path / "out"
    small(manifest, out)
    whole = files(out)
    table = out / "manifest.csv"
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    if kind == "foreign":
        table.write_text("name,amount\napples,3\npears,4,5\n")
    elif kind == "binary":
        table.write_bytes(bytes(range(256)))
    elif kind == "empty":
        table.write_bytes(b"")
    elif kind == "missing":
        table.unlink()
    elif kind == "fewer":
        frame.iloc[:9].to_csv(table, index=False)
    elif kind == "shuffled":
        frame.iloc[::-1].to_csv(table, index=False)
    elif kind == "other":
        frame.rename(columns={"label:Opacity": "label:Mass"}).to_csv(table, index=False)
    else:
        frame.assign(image_key="x").to_csv(table, index=False)
    said = "is missing" if kind == "missing" else "is not the manifest of these shards; prepare again"
    with pytest.raises(ShardError, match=f"manifest.csv {said}") as caught:
        open_shards(out)
    assert "again" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    small(manifest, out)
    assert files(out) == whole


@pytest.mark.parametrize(
    "names",
    [
        ["manifest.csv"],
        ["rejected.csv", "notes.txt"],
        ["shards.json"],
        ["shard-00000-of-00003.tfrecord"],
        ["shard-mine.json"],
        ["films/a.png"],
    ],
)
def test_a_folder_of_other_files_is_left_alone(manifest, tmp_path, names):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": 1}')
    before = [(path, path.stat().st_mtime_ns) for path in (out, *sorted(out.rglob("*")))]
    with pytest.raises(ShardError, match=r"is not empty, and its files are not from.*Give a new or empty") as caught:
        small(manifest, out)
    assert str(out) in str(caught.value) and Path(names[0]).parts[0] in str(caught.value)
    assert [(path, path.stat().st_mtime_ns) for path in (out, *sorted(out.rglob("*")))] == before
    assert all((out / name).read_text() == '{"mine": 1}' for name in names)


def test_an_empty_folder_and_what_a_killed_run_leaves_are_taken(manifest, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", ".writable", ".partial-1-shard-00000-of-00003.tfrecord"):
        (out / name).write_text("")
    assert len(small(manifest, out)) == 10
    assert not list(out.glob(".partial-*"))


def test_all_films_lost_leaves_a_folder_that_can_be_used_again(manifest, tmp_path):
    out = tmp_path / "out"
    small(manifest, out)
    contents = {path: Path(path).read_bytes() for path in manifest["image"]}
    for path in [*contents, *out.glob("*.tfrecord")]:
        Path(path).write_bytes(b"")
    with pytest.raises(ShardError, match="none of the 10 films"):
        small(manifest, out)
    assert not files(out)
    for path, content in contents.items():
        Path(path).write_bytes(content)
    assert len(small(manifest, out)) == 10


@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_cut_off_while_it_is_read(manifest, tmp_path, opened):
    shards = small(manifest, tmp_path / "out")
    bad = tmp_path / "out" / "shard-00001-of-00003.tfrecord"
    if opened:
        shards.read([4])
    os.truncate(bad, bad.stat().st_size - 7)
    assert len(shards.read([4, 5, 6])) == 3
    with pytest.raises(ShardError, match=r"shard-00001-of-00003\.tfrecord is shorter than it was.*To mend it, give"):
        shards.read([7])


def test_a_shard_that_vanishes_while_it_is_read(manifest, tmp_path):
    shards = small(manifest, tmp_path / "out")
    (tmp_path / "out" / "shard-00001-of-00003.tfrecord").unlink()
    with pytest.raises(ShardError, match=r"shard-00001-of-00003\.tfrecord is missing.*give the same `cxr-tf prepare`"):
        shards.read([7])
    small(manifest, tmp_path / "out")
    assert len(shards.read([7])) == 1


def test_a_shard_that_cannot_be_read(manifest, tmp_path):
    shards = small(manifest, tmp_path / "out")
    path = tmp_path / "out" / "shard-00001-of-00003.tfrecord"
    path.unlink()
    path.mkdir()
    with pytest.raises(ShardError, match=r"shard-00001-of-00003\.tfrecord cannot be read \(Is a directory\).*sound"):
        shards.read([7])


def test_the_module_loads_without_tensorflow():
    code = "import sys, cxr_tf.data.shards; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_real_films(cxr_data, tmp_path):
    paths = sorted((cxr_data / "dicom").glob("*.dcm")) + sorted((cxr_data / "images" / "kermany").glob("*.jpg"))[:5]
    count = len(paths)
    manifest = make_manifest(
        {
            "image": [str(path.resolve()) for path in paths],
            "source": ["real"] * count,
            "patient_id": [str(i) for i in range(count)],
            "study_id": [str(i) for i in range(count)],
            **{name: [None] * count for name in ("view", "sex", "mask", "split")},
            "age": [float("nan")] * count,
            "label:Opacity": [1.0] * count,
            "boxes": [[]] * count,
            "mask_known": [False] * count,
        }
    )
    shards = prepare(manifest, tmp_path / "out", storage_size=256)
    assert len(shards) == count
    shutil.rmtree(tmp_path / "out")
