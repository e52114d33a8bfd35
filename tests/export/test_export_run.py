from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import tensorflow as tf

from cxr_tf.files import WriteError
from cxr_tf.run import RunError, open_run
from export.about import read_about
from export.errors import ExportError
from export.forms import open_form
from export.run import FORMS, ParityError, export_run

LOOSE = [f"{form}.{figure}=9" for form in FORMS for figure in ("auroc", "average_precision", "ece", "dice", "logits")]


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def exported(tiny_run, run_cli, tmp_path_factory):
    """All forms by the command line; figures of 20 films and a model trained for a moment may move."""
    out = tmp_path_factory.mktemp("export") / "dist"
    loose = [word for setting in LOOSE if "litert-" in setting for word in ("--tolerance", setting)]
    done = run_cli("export", tiny_run.folder, "--format", "all", "--out", out, *loose)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_all_forms_the_card_and_the_figures_have_their_places(exported, tiny_run):
    out, _ = exported
    files = set(_files(out))
    assert {place for place, _ in FORMS.values()} - {"savedmodel/1"} <= files
    assert {"parity.json", "MODEL_CARD.md", "savedmodel/1/saved_model.pb"} <= files
    assert (out / "MODEL_CARD.md").read_text() == (tiny_run.folder / "MODEL_CARD.md").read_text()
    parity = json.loads((out / "parity.json").read_text())
    assert list(parity["forms"]) == ["keras", *FORMS]
    assert {name: row["file"] for name, row in parity["forms"].items() if name != "keras"} == {
        name: place for name, (place, _) in FORMS.items()
    }
    assert [path.name for path in out.parent.iterdir()] == ["dist"]  # nothing is left of the way there


def test_every_form_says_the_same_of_itself_and_names_no_path(exported, tiny_run):
    out, _ = exported
    said = [read_about(out / place) for place, _ in FORMS.values()]
    assert all(each == said[0] for each in said)
    assert said[0]["name"] == "tiny"
    assert {key: said[0][key] for key in tiny_run.operating()} == tiny_run.operating()
    for text in (json.dumps(said[0]), (out / "parity.json").read_text()):
        assert str(tiny_run.folder) not in text
        assert "/" not in json.dumps(said[0]["thresholds"])


def test_exact_forms_are_exact(exported):
    forms = json.loads((exported[0] / "parity.json").read_text())["forms"]
    for name in ("savedmodel", "litert-float32", "onnx"):
        assert forms[name]["difference"]["logits"]["max"] < 1e-4
        assert forms[name]["difference"]["mask"]["max"] < 1e-4
    for name in ("litert-float16", "litert-dynamic", "litert-int8"):
        assert 0 < forms[name]["difference"]["logits"]["max"] < 3


def test_the_terminal_shows_the_table(exported):
    out, done = exported
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:9]] == ["keras", *FORMS]
    assert "AUROC" in lines[1]
    assert str(out) in lines[-1]


def test_a_form_that_exists_is_not_written_over(exported, tiny_run, run_cli):
    out, _ = exported
    before = (out / "onnx" / "model.onnx").read_bytes()
    done = run_cli("export", tiny_run.folder, "--format", "onnx", "--out", out)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "onnx" / "model.onnx").read_bytes() == before


@pytest.mark.slow
def test_beyond_tolerance_it_fails_and_nothing_is_left(tiny_run, run_cli, tmp_path):
    done = run_cli(
        "export", tiny_run.folder, "--format", "litert-float16", "--out", tmp_path / "dist",
        "--tolerance", "litert-float16.logits=1e-9",
    )  # fmt: skip
    assert done.returncode == 1
    assert "litert-float16: the largest error of a logit is" in done.stderr
    assert "1e-09 is allowed (--tolerance litert-float16.logits=...)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "litert-float16" in done.stdout  # the table is shown all the same
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def earlier(tiny_run, tmp_path_factory):
    """A folder that holds the ONNX form alone."""
    out = tmp_path_factory.mktemp("earlier") / "dist"
    export_run(tiny_run, "onnx", out, films=8, seconds=0.0, tolerances=LOOSE)
    return out


@pytest.mark.slow
def test_beyond_tolerance_what_was_there_stays(tiny_run, earlier, tmp_path):
    out = shutil.copytree(earlier, tmp_path / "dist")
    with pytest.raises(ParityError, match="litert-dynamic: "):
        export_run(tiny_run, "litert-dynamic", out, films=8, seconds=0.0, tolerances=["litert-dynamic.logits=0"])
    assert _files(tmp_path) == [f"dist/{name}" for name in _files(earlier)]
    assert all((out / name).read_bytes() == (earlier / name).read_bytes() for name in _files(earlier))


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True])
def test_a_later_form_joins_the_figures_of_earlier_ones_that_are_still_there(tiny_run, earlier, tmp_path, gone):
    out = shutil.copytree(earlier, tmp_path / "dist")
    if gone:
        (out / "onnx" / "model.onnx").unlink()
    export_run(tiny_run, "litert-float32", out, films=8, seconds=0.0, tolerances=LOOSE)
    expected = {"keras", "litert-float32"} | (set() if gone else {"onnx"})
    assert set(json.loads((out / "parity.json").read_text())["forms"]) == expected


@pytest.mark.slow
def test_figures_on_other_films_do_not_join(tiny_run, earlier):
    before = _files(earlier)
    with pytest.raises(ExportError, match=r"compared on 8 films, and figures on 6 .* Give --films 8"):
        export_run(tiny_run, "litert-float32", earlier, films=6)
    assert _files(earlier) == before


@pytest.mark.slow
def test_forms_without_their_proof_are_not_joined(tiny_run, earlier, tmp_path):
    out = shutil.copytree(earlier, tmp_path / "dist")
    (out / "parity.json").unlink()
    with pytest.raises(ExportError, match=r"holds onnx/model\.onnx and no parity\.json"):
        export_run(tiny_run, "litert-float32", out, films=8)
    assert not (out / "litert").exists()


@pytest.mark.slow
def test_what_cannot_be_put_in_its_place_leaves_nothing(tiny_run, earlier, tmp_path, monkeypatch):
    """The last file of all, the proof, cannot be moved: as on a disk that has filled up."""
    out = shutil.copytree(earlier, tmp_path / "dist")
    replace = Path.replace

    def full(self, target):
        if self.name == "parity.json" and Path(target).parent == out:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(WriteError, match="No space left"):
        export_run(tiny_run, "litert-float32", out, films=8, seconds=0.0, tolerances=LOOSE)
    assert [name for name in _files(tmp_path) if "tflite" in name or "partial" in name] == []
    assert all((out / name).read_bytes() == (earlier / name).read_bytes() for name in _files(earlier))


@pytest.mark.slow
def test_a_link_to_another_disk_is_a_folder_like_any(tiny_run, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as other:
        (tmp_path / "dist").symlink_to(other)
        export_run(tiny_run, "litert-float32", tmp_path / "dist", films=8, seconds=0.0, tolerances=LOOSE)
        assert set(_files(Path(other))) - {"MODEL_CARD.md"} == {"litert/float32.tflite", "parity.json"}


@pytest.mark.slow
def test_forms_of_two_models_do_not_share_a_folder(earlier, run_of, small_model):
    before = _files(earlier)
    with pytest.raises(ExportError, match="another model"):
        export_run(run_of(small_model()), "litert-float32", earlier)
    assert _files(earlier) == before


@pytest.mark.parametrize(
    ("form", "told"), [("onx", 'Did you mean "onnx"'), ("int8", "litert-int8"), ("", "--format takes all, litert")]
)
def test_an_unknown_form_is_refused_before_anything_is_done(tiny_run, tmp_path, form, told):
    with pytest.raises(ExportError, match=told):
        export_run(tiny_run, form, tmp_path / "dist")
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_refused(tiny_run, tmp_path):
    shutil.copytree(tiny_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("operating.json"))
    with pytest.raises(RunError, match="not finished"):
        export_run(open_run(tmp_path / "run"), "all", tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_a_missing_package_is_said_before_anything_is_done(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ExportError, match="pip install tf2onnx"):
        export_run(tiny_run, "onnx", tmp_path / "dist")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "dist"):
        with pytest.raises(WriteError, match="cannot be written"):
            export_run(tiny_run, "litert-float32", out)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_run_of_mixed_precision_goes_the_same_way(run_of, small_model, tmp_path):
    run = run_of(small_model(policy="mixed_bfloat16"))
    found = export_run(run, "litert-float32", tmp_path / "dist", films=8, seconds=0.0)
    assert found["forms"]["litert-float32"]["difference"]["logits"]["max"] < 1e-4


@pytest.mark.slow
def test_a_backbone_of_keras_cv_or_keras_hub_goes_the_same_way(run_of, foreign_model, tmp_path, images):
    export_run(run_of(foreign_model), "all", tmp_path / "dist", films=8, seconds=0.0, tolerances=LOOSE)
    expected = {name: value.numpy() for name, value in foreign_model(images, training=False).items()}
    for place in ("litert/float32.tflite", "onnx/model.onnx", "savedmodel/1"):
        made = open_form(tmp_path / "dist" / place)(images)
        tf.debugging.assert_near(made["logits"], expected["logits"], atol=1e-3)
