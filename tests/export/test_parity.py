from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_tf.data.pipeline import batches
from cxr_tf.evaluate.calibration import calibration_error, probabilities_of
from cxr_tf.evaluate.inference import predict_films
from cxr_tf.models.outputs import load_model
from export import parity
from export.about import about
from export.errors import ExportError
from export.forms import Process, open_form
from export.frozen import Frozen
from export.litert import write_litert
from export.onnx_form import write_onnx
from export.parity import TOLERANCES, compare, failures, parity_rows, table, tolerances


def _row(**changes):
    made = {
        "bytes": 4_000_000,
        "films": 40,
        "figures": {"auroc": 0.9, "average_precision": 0.8, "ece": 0.05, "dice": 0.7},
        "seconds": {"import": 0.1, "load": 0.2, "first": 0.3, "batch_1": 0.01, "batch_16": 0.08},
    }
    return made | changes


def _parity(**changes):
    """A folder of Keras and int8, which differs from it by nothing but what is given."""
    exact = {"logits": {"max": 0.1, "mean": 0.01}, "mask": {"max": 0.1, "mean": 0.01}}
    int8 = _row(difference=exact, tolerance=TOLERANCES["litert-int8"], file="litert/int8.tflite") | changes
    return {"notice": "", "name": "x", "model": "0", "films": 40, "forms": {"keras": _row(), "litert-int8": int8}}


def _figures(**changes):
    return _row()["figures"] | changes


def test_what_is_within_tolerance_passes():
    limits = TOLERANCES["litert-int8"]
    assert failures(_parity()) == []
    assert failures(_parity(figures=_figures(auroc=0.9 - 0.99 * limits["auroc"]))) == []


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("figure", "name"), [("auroc", "AUROC"), ("average_precision", "AP"), ("ece", "ECE"), ("dice", "Dice")]
)
def test_a_figure_beyond_tolerance_is_named_with_both_values(figure, name, sign):
    before = _figures()[figure]
    after = before + sign * 1.01 * TOLERANCES["litert-int8"][figure]
    (said,) = failures(_parity(figures=_figures(**{figure: after})))
    assert said.startswith(f"litert-int8: {name} is {after:.4f}, and {before:.4f} with Keras; ")
    assert f"--tolerance litert-int8.{figure}=" in said


@pytest.mark.parametrize(
    ("what", "value", "told"), [("logits", 2.5, "2.5"), ("mask", None, "nan"), ("logits", None, "nan")]
)
def test_an_error_beyond_tolerance_or_nan_is_named(what, value, told):
    difference = copy.deepcopy(_parity()["forms"]["litert-int8"]["difference"])
    difference[what]["max"] = value
    (said,) = failures(_parity(difference=difference))
    assert said.startswith(f"litert-int8: the largest error of a {what.removesuffix('s')} is {told}; ")


def test_a_figure_that_got_lost_is_beyond_it_and_one_that_never_was_is_not():
    (said,) = failures(_parity(figures=_figures(auroc=None)))
    assert "AUROC is -, and 0.9000 with Keras" in said
    without = _parity(figures=_figures(auroc=None))
    without["forms"]["keras"]["figures"]["auroc"] = None
    assert failures(without) == []


def test_tolerances_are_set_one_by_one():
    made = tolerances(["litert-int8.auroc=0.5", "onnx.logits=1e-6"])
    assert made["litert-int8"] == TOLERANCES["litert-int8"] | {"auroc": 0.5}
    assert made["onnx"]["logits"] == 1e-6
    assert {form for form in made if made[form] != TOLERANCES[form]} == {"litert-int8", "onnx"}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("litert-int9.auroc=1", 'Did you mean "litert-int8"'),
        ("litert-int8.auc=1", 'Did you mean "auroc"'),
        ("litert-int8", "FORM.FIGURE=VALUE"),
        ("litert-int8.auroc=much", "not negative"),
        ("litert-int8.auroc=-1", "not negative"),
        ("litert-int8.auroc=nan", "not negative"),
        ("litert-int8.auroc=inf", "finite"),
    ],
)
def test_other_tolerances_are_refused_in_words(setting, told):
    with pytest.raises(ExportError, match=told) as error:
        tolerances([setting])
    assert f'Received: "{setting}"' in str(error.value)


def test_the_table_has_a_line_a_form_and_signed_changes():
    lines = table(_parity(figures=_figures(auroc=0.895))).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 4
    assert "AUROC" in lines[1]
    assert "0.9000" in lines[2]
    assert "-0.0050" in lines[3]
    assert "10.0" in lines[3]  # ms
    assert "200.0" in lines[3]  # films a second


def test_rows_for_a_page(tmp_path):
    (tmp_path / "parity.json").write_text(json.dumps(_parity(figures=_figures(auroc=0.8))))
    keras, int8 = parity_rows(tmp_path)
    assert (keras["form"], keras["passed"], keras["auroc_change"], keras["logits_max"]) == ("keras", True, None, None)
    assert (int8["form"], int8["passed"]) == ("litert-int8", False)
    assert int8["auroc_change"] == pytest.approx(-0.1)
    assert int8["throughput"] == pytest.approx(200)
    assert set(keras) == set(int8)
    for text in (None, "{", "[]", '{"forms": {}}'):
        if text is None:
            (tmp_path / "parity.json").unlink()
        else:
            (tmp_path / "parity.json").write_text(text)
        with pytest.raises(ExportError, match=r"parity\.json"):
            parity_rows(tmp_path)


@pytest.fixture(scope="module")
def forms(tiny_run, tmp_path_factory):
    """An exact form, and one of a model whose last layer is off by 0.05."""
    folder = tmp_path_factory.mktemp("forms")
    model, operating = load_model(tiny_run.folder / "model.keras"), tiny_run.operating()
    said = about(operating, name="tiny", heads=model.heads)
    write_onnx(Frozen(model, operating), folder / "model.onnx", said)
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel, bias + np.array([0.05, 0, 0, 0], np.float32)])
    none = np.zeros((0, 64, 64, 1), np.float32)
    write_litert(lambda batch: Frozen(model, operating, batch), "float32", folder / "off.tflite", said, none)
    return folder


@pytest.fixture(scope="module")
def compared(tiny_run, forms):
    given = {"onnx": forms / "model.onnx", "litert-float32": forms / "off.tflite"}
    return compare(tiny_run, given, seconds=0.1)


def test_errors_are_measured_and_only_the_form_that_is_off_fails(compared):
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared
    difference = {name: row["difference"] for name, row in compared["forms"].items() if name != "keras"}
    assert difference["onnx"]["logits"]["max"] < 1e-4
    assert difference["litert-float32"]["logits"]["max"] == pytest.approx(0.05, abs=1e-4)
    assert difference["litert-float32"]["logits"]["mean"] == pytest.approx(0.05 / 4, abs=1e-4)
    assert difference["litert-float32"]["mask"]["max"] < 1e-4
    assert failures(compared)
    assert all(said.startswith("litert-float32: ") for said in failures(compared))


def test_figures_are_those_of_the_evaluation(tiny_run, compared):
    operating, shards, parts = tiny_run.operating(), tiny_run.shards(), tiny_run.parts()
    keys = parts.index[parts["part"] == "test"].to_numpy()
    model = load_model(tiny_run.folder / "model.keras")
    found = predict_films(model, shards, keys, classes=operating["classes"], size=64, batch_size=8)
    p = probabilities_of(found.logits, operating["task"], operating["temperature"])
    judged = [c for c in range(4) if 0 < found.labels[:, c].sum() < len(keys)]
    figures = compared["forms"]["keras"]["figures"]
    assert compared["films"] == len(keys)
    for name, score in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
        expected = np.mean([score(found.labels[:, c], p[:, c]) for c in judged])
        assert figures[name] == pytest.approx(expected, abs=1e-6)
    assert figures["ece"] == pytest.approx(calibration_error(p, found.labels, operating["task"]), abs=1e-6)
    assert figures["dice"] == pytest.approx(np.nanmean(found.masks.dice), abs=1e-6)


def test_sizes_and_times_are_there_and_more_films_take_longer(forms, compared):
    for name, row in compared["forms"].items():
        assert all(value > 0 for value in row["seconds"].values())
        assert row["seconds"]["batch_16"] > row["seconds"]["batch_1"]
        assert ("tolerance" in row) == (name != "keras")
    assert compared["forms"]["onnx"]["bytes"] == (forms / "model.onnx").stat().st_size
    seconds = {name: row["seconds"]["import"] for name, row in compared["forms"].items()}
    assert seconds["litert-float32"] < seconds["keras"] / 2  # it loads no TensorFlow


def test_no_more_films_than_asked_for_and_the_same_each_time(tiny_run, monkeypatch):
    first, second = (parity.compared_films(tiny_run, 5) for _ in range(2))
    parts = tiny_run.parts()
    assert len(first) == 5
    assert first.tolist() == second.tolist()
    assert set(parts.loc[first, "part"]) == {"test"}
    assert len(parity.compared_films(tiny_run, 10**6)) == (parts["part"] == "test").sum()


@pytest.mark.slow
def test_a_model_of_one_head_has_its_figures_alone(run_of, small_model, tmp_path):
    run = run_of(small_model(classification=False))
    operating = run.operating()
    model = load_model(run.folder / "model.keras")
    said = about(operating, name="tiny", heads=model.heads)
    write_onnx(Frozen(model, operating), tmp_path / "m.onnx", said)
    found = compare(run, {"onnx": tmp_path / "m.onnx"}, seconds=0.0)
    assert set(found["forms"]["onnx"]["figures"]) == {"dice"}
    assert set(found["forms"]["onnx"]["difference"]) == {"mask"}
    assert failures(found) == []
    assert "AUROC" not in table(found)


def test_a_form_that_says_nan_fails_with_every_figure(tiny_run, forms, compared):
    """Not of a process: what one form said is replaced on the way."""
    operating = tiny_run.operating()
    keys = parity.compared_films(tiny_run, 16)
    tally = parity._Tally("onnx", operating)
    call = open_form(forms / "model.onnx")
    dataset = batches(tiny_run.shards(), keys, size=64, batch_size=8, shuffle=False, content_boxes=True)
    for images, truth in dataset:
        wanted = call(images.numpy())
        said = {name: value.copy() for name, value in wanted.items()}
        said["logits"][0, 0] = said["probabilities"][0, 0] = np.nan
        tally.add(said, wanted, truth)
    row = json.loads(json.dumps(tally.row(), allow_nan=False))
    broken = {"forms": {"keras": compared["forms"]["keras"], "onnx": row | {"tolerance": TOLERANCES["onnx"]}}}
    told = "\n".join(failures(broken))
    for name in ("logit is nan", "AUROC is -", "AP is -", "ECE is -"):
        assert name in told


def test_a_form_of_other_outputs_is_named(tiny_run, forms):
    tally = parity._Tally("onnx", tiny_run.operating())
    wanted = {"logits": np.zeros((2, 4)), "probabilities": np.zeros((2, 4))}
    truth = {"logits": tf.zeros((2, 4))}
    with pytest.raises(ExportError, match="onnx: gives no logits"):
        tally.add({"probabilities": np.zeros((2, 4))}, wanted, truth)
    with pytest.raises(ExportError, match="onnx: logits has the shape"):
        tally.add({"probabilities": np.zeros((2, 4)), "logits": np.zeros((2, 1))}, wanted, truth)


def test_a_process_answers_as_the_form_does_and_its_end_is_told(forms, images):
    process = Process("onnx", forms / "model.onnx", images[:1])
    try:
        expected = open_form(forms / "model.onnx")(images)
        for name, value in process(images).items():
            np.testing.assert_allclose(value, expected[name], atol=1e-6)
        assert process.time(images) > 0
        with pytest.raises(ExportError, match="onnx: "):
            process(images[:, :32])  # a wrong shape
        process._process.kill()
        with pytest.raises(ExportError, match="onnx: its process ended with code -9"):
            process(images)
    finally:
        process.close()


def test_a_form_that_cannot_be_opened_is_told_by_its_process(tmp_path, images):
    (tmp_path / "m.tflite").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"litert-int8: .*m\.tflite: is no LiteRT model"):
        Process("litert-int8", tmp_path / "m.tflite", images[:1])
