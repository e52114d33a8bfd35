"""What a data set holds, said before anything is prepared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from cxr_tf.data.inspection import inspect_films
from cxr_tf.data.phantom import write_siim
from cxr_tf.data.readers.siim import read_siim
from cxr_tf.data.shards import prepare


@pytest.fixture(scope="module")
def siim(tmp_path_factory) -> Path:
    """A generated folder with a film that is inverted, one that is cut off and one that does not say its view."""
    root = tmp_path_factory.mktemp("siim")
    write_siim(root, studies=12, size=96, seed=1)
    inverted, cut, silent = sorted(root.glob("train/*/*/*.dcm"))[:3]
    film = pydicom.dcmread(inverted)
    film.PhotometricInterpretation = "MONOCHROME1" if film.PhotometricInterpretation == "MONOCHROME2" else "MONOCHROME2"
    film.save_as(inverted)
    cut.write_bytes(cut.read_bytes()[:-2000])
    film = pydicom.dcmread(silent)
    film.ViewPosition = ""
    film.save_as(silent)
    return root


def test_a_page_and_a_sheet(siim, tmp_path):
    manifest = read_siim(siim)
    found = inspect_films(manifest, tmp_path / "sheet.png")
    page = str(found)
    studies, patients = manifest["study_id"].nunique(), manifest["patient_id"].nunique()
    assert page.startswith(f"{len(manifest)} films, {studies} studies, {patients} patients")
    for name in ("Negative for Pneumonia", "Typical Appearance"):
        assert f"{name} {int(manifest[f'label:{name}'].sum())}" in page
    films = [pydicom.dcmread(path, stop_before_pixels=True) for path in siim.glob("train/*/*/*.dcm")]
    largest = max(films, key=lambda film: film.Rows * film.Columns)
    assert f"to {largest.Rows} x {largest.Columns} pixels" in page and "DICOM, " in page
    assert "rejected  1 would be (headers of all were read, and pixels of all)" in page and "truncated" in page
    files = {Path(path).name: row for row, path in enumerate(manifest["image"])}
    inverted, cut, silent = (files[path.name] for path in sorted(siim.glob("train/*/*/*.dcm"))[:3])
    assert list(found.rejected) == [cut]
    assert "looks inverted" in found.noted[inverted] and "does not say its view" in found.noted[silent]
    assert len(found.noted) == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
    # Paths help to find a film; patients and studies as such are not named.
    for secret in (*manifest["patient_id"], str(siim)):
        assert secret not in page


def test_a_view_that_file_and_table_disagree_on(siim, tmp_path):
    manifest = read_siim(siim)
    there = manifest["view"].notna()
    row = int(np.flatnonzero(there)[0])
    manifest.loc[row, "view"] = "LATERAL"
    header = read_siim(siim)["view"][row]
    text = f"is {header} by its header, and LATERAL by the data set's table"
    assert inspect_films(manifest, decode=True).noted[row].count(text) == 1
    prepare(manifest, tmp_path / "shards", workers=1)
    noted = pd.read_csv(tmp_path / "shards" / "noted.csv")
    assert noted["note"][noted["note"].str.contains(text)].size == 1


def test_pixels_of_some_or_of_all(siim):
    manifest = read_siim(siim)
    many = manifest.loc[manifest.index.repeat(4)].reset_index(drop=True)
    some, everything = inspect_films(many), inspect_films(many, decode=True)
    assert some.decoded < 24 + 1 < len(many) and "and pixels of" in str(some)
    assert everything.decoded + len(everything.rejected) == len(many) and len(everything.rejected) == 4
    assert "pixels of all" in str(everything)


def test_films_that_cannot_be_read_at_all(tmp_path, siim):
    manifest = read_siim(siim).iloc[:3].copy()
    for i in range(3):
        path = tmp_path / f"{i}.png"
        path.write_bytes(b"no picture")
        manifest.loc[i, "image"] = str(path)
    found = inspect_films(manifest, tmp_path / "sheet.png")
    assert "3 would be" in str(found) and "0.png: is no DICOM, PNG or JPEG file" in str(found)
    assert not (tmp_path / "sheet.png").exists() and found.drawn == 0


def test_progress_comes_to_its_end(siim):
    manifest, said = read_siim(siim), []
    inspect_films(manifest, progress=lambda done, total: said.append((done, total)))
    assert said[-1][0] == said[-1][1] and np.all(np.diff([done for done, _ in said]) == 1)
