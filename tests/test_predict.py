"""Prediction by a model whose answers are known: its mask is the film, its probabilities are the film's mean."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image

from cxr_tf.data.phantom import phantom
from cxr_tf.data.radiograph import read_radiograph
from cxr_tf.errors import CxrError
from cxr_tf.predict import Predictor, predict_files, table
from export.about import about, litert_with_about

SIZE = 32
OPERATING = {
    "classes": ["bright", "dark"],
    "task": "multiclass",
    "size": SIZE,
    "storage_size": 48,
    "temperature": 1.0,
    "thresholds": {"bright": 0.5, "dark": 0.5},
    "mask_threshold": 0.5,
}
FORMS = ("savedmodel", "one.tflite", "any.tflite", "model.onnx")


def write_forms(folder, heads=("logits", "mask_logits")):
    """The known model as a SavedModel, a .tflite for one film and for any number, and a .onnx."""
    import onnx
    import tensorflow as tf
    import tf2onnx

    said = about(OPERATING, name="known", heads=heads)

    def module(batch):
        known = tf.Module()

        @tf.function(input_signature=[tf.TensorSpec([batch, SIZE, SIZE, 1], tf.float32, name="image")])
        def predict(image):
            bright = tf.reduce_mean(image, axis=(1, 2)) / 255
            outputs = {"logits": bright, "probabilities": tf.concat([bright, 1 - bright], axis=1)}
            return outputs | ({"mask": image / 255} if "mask_logits" in heads else {})

        known.predict = predict
        return known

    for batch, name in ((None, "savedmodel"), (1, "one")):
        known = module(batch)
        tf.saved_model.save(known, folder / name, signatures={"predict": known.predict})
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / name), signature_keys=["predict"])
        path = folder / ("any.tflite" if batch is None else "one.tflite")
        path.write_bytes(litert_with_about(converter.convert(), said))
    (folder / "savedmodel" / "assets" / "cxr_tf.json").write_text(json.dumps(said))
    known = module(None)
    graph, _ = tf2onnx.convert.from_function(known.predict, input_signature=known.predict.input_signature, opset=18)
    onnx.helper.set_model_props(graph, {"cxr_tf": json.dumps(said)})
    onnx.save_model(graph, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    return write_forms(tmp_path_factory.mktemp("forms"))


def smooth(height, width):
    """A film without detail that resizing could lose: dark at the left, bright at the right."""
    return np.tile(np.linspace(20, 235, width).round().astype(np.uint8), (height, 1))


def write_dicom(path, pixels):
    """A film as a CR object."""
    film = pydicom.Dataset()
    film.SOPClassUID, film.SOPInstanceUID = pydicom.uid.ComputedRadiographyImageStorage, "1.2.3.4.1"
    film.StudyInstanceUID, film.SeriesInstanceUID, film.Modality = "1.2.3", "1.2.3.4", "CR"
    film.PatientName, film.PatientID = "Quastelhuber^Zenobia", "ZQ1"
    film.Rows, film.Columns = pixels.shape
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated = film.BitsStored = 8
    film.HighBit, film.PixelRepresentation = 7, 0
    film.WindowCenter, film.WindowWidth, film.VOILUTFunction = 127.5, 255, "LINEAR_EXACT"
    film.PixelData = pixels.tobytes()
    film["PixelData"].VR = "OW"
    film.file_meta = pydicom.dataset.FileMetaDataset()
    film.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite(path, film, enforce_file_format=True)
    return path


@pytest.fixture
def films(tmp_path):
    """A folder with a DICOM and a PNG film of other sizes, and what is no film."""
    folder = tmp_path / "films"
    folder.mkdir()
    write_dicom(folder / "a.dcm", smooth(64, 50))
    Image.fromarray(smooth(40, 60)).save(folder / "b.png")
    (folder / "notes.txt").write_text("no film")
    return folder


def rows_of(path):
    with (path / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(64, 50), (50, 64), (20, 31), (7, 7), (300, 33)], ids=str)
def test_every_form_gives_the_known_answer_in_the_films_own_pixels(forms, form, shape):
    pixels = smooth(*shape)
    said = Predictor(forms / form, threads=1)(pixels)
    assert said.mask.shape == shape and said.mask.dtype == np.float32
    edge = -(-shape[1] // 8)
    inner = (slice(None), slice(edge, -edge))  # at the edges a wide filter sees less
    shrunk = max(shape) / SIZE
    assert np.abs(said.mask * 255 - pixels)[inner].max() < 2 + 2 * shrunk * 215 / shape[1]
    share = min(shape) / max(shape)  # the rest of the square is black
    assert said.probabilities["bright"] == pytest.approx(share * 127.5 / 255, abs=0.02)
    assert sum(said.probabilities.values()) == pytest.approx(1)


def test_all_forms_say_the_same(forms):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 45), np.uint8)
    first, *others = (Predictor(forms / form)(pixels) for form in FORMS)
    for other in others:
        np.testing.assert_allclose(other.mask, first.mask, atol=1e-6)
        assert other.probabilities == pytest.approx(first.probabilities, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_files_and_folders_become_a_table_masks_and_pictures(forms, films, tmp_path, form):
    out = tmp_path / "out"
    found = predict_files(forms / form, [films, films / "b.png"], out)
    assert [row["film"] for row in found.rows] == [str(films / "a.dcm"), str(films / "b.png")]
    assert (found.failed, found.unsegmented) == ([], [])
    made = {f"{name}.{kind}.png" for name in "ab" for kind in ("mask", "overlay")}
    assert {file.name for file in out.iterdir()} == made | {"predictions.csv"}
    for row, read in zip(found.rows, rows_of(out), strict=True):
        assert list(row) == list(read) == ["film", "bright", "dark", "mask_area", "mask", "noted"]
        assert (out / read["mask"]).is_file()
        assert float(read["mask_area"]) == pytest.approx(row["mask_area"], rel=1e-5)
    for name, shape in (("a", (64, 50)), ("b", (40, 60))):
        with Image.open(out / f"{name}.mask.png") as mask, Image.open(out / f"{name}.overlay.png") as overlay:
            assert mask.size == overlay.size == shape[::-1] and overlay.mode == "RGB"
            half = np.asarray(mask)
        assert set(np.unique(half)) == {0, 255} and not half[:, : shape[1] * 2 // 5].any()
        assert half[:, -shape[1] * 2 // 5 :].all()
    assert str(films / "a.dcm") in table(found.rows) and f"{found.rows[0]['bright']:.4f}" in table(found.rows)
    assert predict_files(forms / form, [films, out], tmp_path / "again").rows == found.rows  # its pictures are no films


def test_without_a_folder_nothing_is_written(forms, films, tmp_path):
    assert len(predict_files(forms / "any.tflite", [films], None).rows) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["films"]


@pytest.mark.parametrize("model", ["any.tflite", "model.onnx"])
def test_the_command_loads_no_tensorflow(forms, films, tmp_path, model):
    script = (
        "import sys; from cxr_tf.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "predict", forms / model, films / "a.dcm", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "a.dcm" in done.stdout and "not a medical device" in done.stdout
    loaded = done.stderr[done.stderr.index("['") :]
    assert "'pydicom'" in loaded
    for package in ("tensorflow", "keras", "pandas", "scipy", "matplotlib", "sklearn", "highdicom"):
        assert f"'{package}'" not in loaded, package


def test_dicom_segmentations_of_dicom_films(forms, films, tmp_path, run_cli):
    pytest.importorskip("highdicom")
    before = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in films.iterdir()}
    done = run_cli("predict", forms / "any.tflite", films, "--dicom", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "b.png: is no DICOM film" in done.stdout and "a.dcm: is no" not in done.stdout
    assert [file.name for file in (tmp_path / "out").glob("*.dcm")] == ["a.seg.dcm"]
    seg = pydicom.dcmread(tmp_path / "out" / "a.seg.dcm")
    with Image.open(tmp_path / "out" / "a.mask.png") as mask:
        np.testing.assert_array_equal(seg.pixel_array != 0, np.asarray(mask) == 255)
    assert seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.1"
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    digest = hashlib.sha256((forms / "any.tflite").read_bytes()).hexdigest()
    assert algorithm.AlgorithmName == "cxr_tf known" and algorithm.AlgorithmVersion.split()[1] in digest
    assert {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in films.iterdir()} == before
    if shutil.which("dciodvfy"):
        judged = subprocess.run(["dciodvfy", "-new", tmp_path / "out" / "a.seg.dcm"], capture_output=True, text=True)
        assert "Error" not in judged.stdout + judged.stderr


def test_a_dicom_film_that_nothing_can_point_to_has_all_but_its_segmentation(forms, films, tmp_path, run_cli):
    pytest.importorskip("highdicom")
    film = pydicom.dcmread(films / "a.dcm")
    del film.StudyInstanceUID
    film.save_as(films / "a.dcm")
    done = run_cli("predict", forms / "any.tflite", films / "a.dcm", "--dicom", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "no Segmentation: " in done.stderr and "a.dcm: has no StudyInstanceUID" in done.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"predictions.csv", "a.mask.png", "a.overlay.png"}


def test_a_model_without_a_mask_has_no_segmentation_to_write(tmp_path, films):
    forms = write_forms(tmp_path, heads=("logits",))
    with pytest.raises(CxrError, match="no segmentation head"):
        predict_files(forms / "any.tflite", [films], tmp_path / "out", dicom="opacity")
    assert not (tmp_path / "out").exists()
    found = predict_files(forms / "model.onnx", [films], tmp_path / "out")
    assert list(found.rows[0]) == ["film", "bright", "dark", "noted"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["predictions.csv"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_broken_films_are_named_and_the_others_go_on(forms, films, tmp_path):
    good = films / "b.png"
    content = bytearray(good.read_bytes())
    bad = {
        "bytes.dcm": b"\x00" * 500,
        "empty.png": b"",
        "none.png": bytes(content[:16]) + bytes(8) + bytes(content[24:]),  # 0 x 0 pixels
        "cut.png": bytes(content[: len(content) // 2]),
        "cut.dcm": (films / "a.dcm").read_bytes()[:-900],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    color = write_dicom(tmp_path / "color.dcm", smooth(64, 50))
    film = pydicom.dcmread(color)
    film.SamplesPerPixel, film.PhotometricInterpretation, film.PlanarConfiguration = 3, "RGB", 0
    film.PixelData = film.PixelData * 3
    film.save_as(color)
    given = [good, *(tmp_path / name for name in bad), color, films / "a.dcm"]
    found = predict_files(forms / "any.tflite", given, tmp_path / "out")
    assert [row["film"] for row in found.rows] == [str(good), str(films / "a.dcm")]
    assert [path.name for path, _ in found.failed] == [*bad, "color.dcm"]
    assert all(str(path) in reason for path, reason in found.failed)
    assert len(rows_of(tmp_path / "out")) == 2


def test_odd_films_are_films(forms, tmp_path):
    Image.fromarray(np.full((1, 1), 200, np.uint8)).save(tmp_path / "one.png")
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "red.png")
    found = predict_files(forms / "any.tflite", [tmp_path / "one.png", tmp_path / "red.png"], tmp_path / "out")
    one, red = found.rows
    assert one["bright"] == pytest.approx(200 / 255, abs=1e-3) and one["mask_area"] == 1
    assert red["bright"] == pytest.approx(20 / 30 * 76 / 255, abs=0.01)  # luminance of red
    for name, size in (("one", (1, 1)), ("red", (30, 20))):
        with Image.open(tmp_path / "out" / f"{name}.overlay.png") as picture:
            assert picture.size == size


def test_what_a_person_should_look_at_is_noted(forms, tmp_path):
    chest = (phantom("Negative for Pneumonia", np.random.default_rng(0), 256).pixels / 16).astype(np.uint8)
    Image.fromarray(chest).save(tmp_path / "as it is.png")
    Image.fromarray(255 - chest).save(tmp_path / "inverted.png")
    found = predict_files(forms / "any.tflite", [tmp_path], tmp_path / "out")
    plain, inverted = rows_of(tmp_path / "out")
    assert plain["noted"] == "" and inverted["noted"].startswith("looks inverted")
    assert [note.partition(": ")[0] for note in found.notes] == [str(tmp_path / "inverted.png")]


def test_films_of_one_name_and_of_very_long_ones_have_masks_of_their_own(forms, tmp_path):
    long = "ß" * 120 + ".png"
    for place in ("1/x.png", "2/x.png", "3/x-2.png", f"4/{long}", f"5/{long}"):
        (tmp_path / "in" / place).parent.mkdir(parents=True)
        Image.fromarray(smooth(40, 60 + int(place[0]))).save(tmp_path / "in" / place)
    found = predict_files(forms / "any.tflite", [tmp_path / "in"], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == len({row["mask"] for row in rows}) == len(found.rows) == 5
    for row in rows:
        with Image.open(tmp_path / "out" / row["mask"]) as mask, Image.open(row["film"]) as film:
            assert mask.size == film.size


def test_what_was_predicted_before_an_interruption_is_kept(forms, films, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(forms / "any.tflite", [films], tmp_path / "out", progress=stop)
    assert [row["film"] for row in rows_of(tmp_path / "out")] == [str(films / "a.dcm")]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"predictions.csv", "a.mask.png", "a.overlay.png"}


def test_the_case_of_an_ending_does_not_matter(forms, films, tmp_path):
    for name, other in (("any.tflite", "ANY.TFLITE"), ("model.onnx", "Model.ONNX")):
        model = Predictor(_renamed(forms / name, tmp_path / other))
        assert model(smooth(64, 50)).probabilities == Predictor(forms / name)(smooth(64, 50)).probabilities


def _foreign(folder):
    (folder / "saved_model.pb").parent.mkdir(exist_ok=True)
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda forms, path: path / "none.tflite", "cannot be read"),
        (lambda forms, path: path / "none", "there is no such file or folder"),
        (lambda forms, path: _served(forms / "savedmodel", path), r"Did you mean .*given/savedmodel/1\?"),
        (lambda forms, path: _lying(forms, path, classes=["a"]), "knows 1 classes, but it gives 2 probabilities"),
        (lambda forms, path: _lying(forms, path, size="32"), "size is missing or makes no sense"),
        (lambda forms, path: _lying(forms, path, mask_threshold=None), "mask_threshold is missing or makes no sense"),
        (lambda forms, path: path, "neither a run folder"),
        (lambda forms, path: _foreign(path / "theirs"), "is not one of ours"),
        (lambda forms, path: _cut(forms / "any.tflite", path), "cut off"),
        (lambda forms, path: _cut(forms / "model.onnx", path), "cut off"),
        (lambda forms, path: _renamed(forms / "model.onnx", path / "m.tflite"), "is no LiteRT model"),
        (lambda forms, path: _renamed(forms / "any.tflite", path / "film.png"), "neither a run folder"),
    ],
)
def test_a_model_that_is_none_of_ours_is_named(forms, films, tmp_path, make, words):
    given = tmp_path / "given"
    given.mkdir()
    model = make(forms, given)
    with pytest.raises(CxrError, match=words) as raised:
        predict_files(model, [films], tmp_path / "out")
    assert str(model) in str(raised.value)
    assert not (tmp_path / "out").exists()


def _served(model, folder):
    shutil.copytree(model, folder / "savedmodel" / "1")
    return folder


def _lying(forms, folder, **changes):
    shutil.copytree(forms / "savedmodel", folder / "savedmodel")
    said = folder / "savedmodel" / "assets" / "cxr_tf.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | changes))
    return folder / "savedmodel"


def _cut(model, folder):
    content = model.read_bytes()
    (folder / model.name).write_bytes(content[: len(content) // 2])
    return folder / model.name


def _renamed(model, to):
    shutil.copy(model, to)
    return to


@pytest.mark.parametrize(
    ("missing", "given", "line"),
    [
        ("ai_edge_litert.interpreter", {"form": "any.tflite"}, "pip install ai-edge-litert"),
        ("onnxruntime", {"form": "model.onnx"}, "pip install onnxruntime"),
        ("highdicom", {"form": "any.tflite", "dicom": "opacity"}, r'pip install "cxr-tf\[dicom\]"'),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(forms, films, tmp_path, monkeypatch, missing, given, line):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(CxrError, match=line):
        predict_files(forms / given["form"], [films], tmp_path / "out", dicom=given.get("dicom"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_word_for_the_mask_is_refused(forms, films, tmp_path, run_cli):
    pytest.importorskip("highdicom")
    done = run_cli(
        "predict", forms / "any.tflite", films, "--out", tmp_path / "out", "--dicom", "--mask-of", "opacities"
    )
    assert done.returncode == 1 and 'Did you mean "opacity"?' in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_films_are_read_before_anything_is_overwritten(forms, films, tmp_path):
    before = {file.name: file.read_bytes() for file in films.iterdir()}
    with pytest.raises(CxrError, match="holds files already"):
        predict_files(forms / "any.tflite", [films], films)
    assert {file.name: file.read_bytes() for file in films.iterdir()} == before
    (tmp_path / "pipe.png").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(CxrError, match=r"pipe\.png: is neither a file nor a folder"):
        predict_files(forms / "any.tflite", [tmp_path / "pipe.png"], tmp_path / "out")
    for most in (0, -1, float("inf"), float("nan")):
        with pytest.raises(CxrError, match="--max-megapixels is a number above 0"):
            predict_files(forms / "any.tflite", [films], tmp_path / "out", max_megapixels=most)
    with pytest.raises(CxrError, match="cannot be written"):
        predict_files(forms / "any.tflite", [films], films / "notes.txt")
    with pytest.raises(CxrError, match="no DICOM, PNG or JPEG file"):
        predict_files(forms / "any.tflite", [_empty(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in films.iterdir()} == before
    assert read_radiograph(films / "b.png").shape == (40, 60)


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"
