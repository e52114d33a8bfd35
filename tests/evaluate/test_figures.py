"""Figures are written whole and say what they should; overlays color the right pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_tf.errors import CxrError
from cxr_tf.evaluate import figures
from cxr_tf.evaluate.figures import PREDICTED, TRUE, FigureError, contact_sheet, film_picture, heat, overlay
from cxr_tf.evaluate.judge import curves, judge
from cxr_tf.evaluate.metrics import MaskScores

CLASSES = ["Negative for Pneumonia", "Typical Appearance", "Absent Class"]


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=80)
    y = np.eye(3)[truth]
    z = rng.normal(size=(80, 3)) + 2 * y
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    nan, known = np.full(80, np.nan), np.ones(80, bool)
    masks = MaskScores(rng.random(80), rng.random(80), nan, known, ~known, nan, nan, nan)
    patients = np.arange(80) // 2
    result = judge(
        labels=y, probabilities=p, classes=CLASSES, patients=patients, studies=np.arange(80), task="multiclass",
        thresholds=[0.5] * 3, masks=masks, replicates=30,
    )  # fmt: skip
    return {**result, "curves": curves(p, y, CLASSES, patients, points=21, replicates=30), "scores": masks.dice}


def drawers(judged: dict[str, Any]) -> dict[str, Any]:
    image = judged["image"]
    rows = [{"step": s, "loss": 1 / s, "lr": 1e-4, "note": "x", **({"val_loss": 2 / s} if s % 2 else {})}
            for s in range(1, 9)]  # fmt: skip
    return {
        "roc": lambda path: figures.roc(judged["curves"], path, level=image),
        "pr": lambda path: figures.precision_recall(judged["curves"], path, level=image),
        "confusion": lambda path: figures.confusion(image["confusion"], CLASSES, path),
        "confusion of two": lambda path: figures.confusion([[5, 1], [200, 3]], ["No finding", "Sick"], path),
        "reliability": lambda path: figures.reliability(image["reliability"], path, ece=image["macro"]["ece"]),
        "forest": lambda path: figures.forest(image, path),
        "dice": lambda path: figures.dice_histogram(judged["scores"], path, mean=judged["segmentation"]["dice"]),
        "training": lambda path: figures.training_curves(rows, path),
    }


@pytest.mark.parametrize(
    "name", ["roc", "pr", "confusion", "confusion of two", "reliability", "forest", "dice", "training"]
)
def test_every_figure_is_a_whole_picture(name: str, judged: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{name}.png"
    assert drawers(judged)[name](path) == path
    with Image.open(path) as picture:
        picture.load()
        assert min(picture.size) > 400
        pixels = np.asarray(picture.convert("L"))
    assert (pixels[0] > 250).all(), "something is cut off at the top"
    assert (pixels[-1] > 250).all(), "something is cut off at the bottom"
    assert (pixels[:, 0] > 250).all(), "something is cut off on the left"
    assert (pixels[:, -1] > 250).all(), "something is cut off on the right"
    assert pixels.min() < 60
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_svg_says_the_figures_in_words_and_is_the_same_twice(judged: dict[str, Any], tmp_path: Path) -> None:
    first = drawers(judged)["roc"](tmp_path / "a.svg").read_text()
    value = judged["image"]["classes"]["Typical Appearance"]["auroc"]["value"]
    assert f"Typical Appearance  {value:.3f} (" in first
    assert "Absent Class" not in first
    forest = drawers(judged)["forest"](tmp_path / "b.svg").read_text()
    assert "not measurable" in forest
    assert "Macro mean" in forest
    training = drawers(judged)["training"](tmp_path / "c.svg").read_text()
    assert "validation" in training
    assert "Step" in training
    assert drawers(judged)["roc"](tmp_path / "d.svg").read_text() == first


def test_no_display_state_is_touched(judged: dict[str, Any], tmp_path: Path) -> None:
    import matplotlib

    before = matplotlib.rcParams.copy()
    drawers(judged)["dice"](tmp_path / "a.png")
    assert matplotlib.rcParams == before


def test_figures_without_intervals_are_drawn(judged: dict[str, Any], tmp_path: Path) -> None:
    bare = {"x": [0, 1], "prevalence": 0.5}
    line = {"y": [0, 1], "low": [None, None], "high": [None, None]}
    figures.roc({"a": bare | {"roc": line}}, tmp_path / "a.png")
    figures.forest({"macro": {"auroc": None}, "classes": {"a": {}}}, tmp_path / "b.png", figures=["auroc"])
    figures.confusion(np.zeros((2, 2), int), ["a", "b"], tmp_path / "c.png")
    figures.training_curves([{"step": 1, "loss": float("nan")}], tmp_path / "d.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_what_cannot_be_drawn_is_named(judged: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for call, text in [
        (lambda: figures.roc({}, path), "no curve"),
        (lambda: figures.confusion(np.zeros((2, 3)), ["a", "b"], path), r"\[2, 2\]. Received: \(2, 3\)"),
        (lambda: figures.reliability([], path), "no label"),
        (lambda: figures.forest(judged["image"], path, figures=["auc"]), "Received: auc"),
        (lambda: figures.dice_histogram(np.array([np.nan]), path), "no film"),
        (lambda: figures.training_curves([{"step": 1}], path), "no row"),
        (lambda: figures.dice_histogram(np.ones(3), tmp_path / "a.gif"), "Received: a.gif"),
        (lambda: contact_sheet([], path), "no film"),
        (lambda: contact_sheet([{"film": np.zeros((4, 4), np.uint8)}], tmp_path / "a.jpg"), r"end in .png"),
        (lambda: contact_sheet([{"film": np.zeros((4, 4))}], path), "uint8"),
        (lambda: overlay(np.zeros((4, 4, 3), np.uint8)), "uint8"),
        (lambda: overlay(np.zeros((4, 4), np.uint8), np.zeros((4, 5))), "Received: \\(4, 5\\)"),
        (lambda: overlay(np.zeros((4, 4), np.uint8), np.full((4, 4), -3.0)), "logits"),
        (lambda: overlay(np.zeros((4, 4), np.uint8), None, np.zeros((2, 2))), "Received: \\(2, 2\\)"),
        (lambda: heat(np.zeros((4, 4), np.uint8), np.zeros((4, 5))), "Received: \\(4, 5\\)"),
        (lambda: heat(np.zeros((4, 4), np.uint8), np.full((4, 4), 7.0)), "normalized"),
        (lambda: heat(np.zeros((4, 4), np.uint8), np.zeros((4, 4)), np.zeros((2, 2))), "Received: \\(2, 2\\)"),
        (lambda: film_picture({"film": np.zeros((4, 4), np.uint8)}, tmp_path / "a.png"), "end in .jpg"),
    ]:
        with pytest.raises(FigureError, match=text):
            call()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(CxrError, match="cannot be written"):
        figures.dice_histogram(np.ones(3), tmp_path / "a.png")


def test_overlay_colors_prediction_and_truth() -> None:
    film = np.full((60, 80), 100, np.uint8)
    mask = np.zeros((60, 80), np.float32)
    mask[10:30, 10:30] = 1
    mask[40:50, 10:20] = 0.2  # under half the threshold: not shown
    truth = np.zeros((60, 80), bool)
    truth[10:30, 40:60] = True
    got = overlay(film, mask, truth, boxes=[[65.0, 10.0, 10.0, 20.0]])
    assert got.dtype == np.uint8
    assert got.shape == (60, 80, 3)
    assert tuple(got[10, 15]) == PREDICTED
    assert tuple(got[10, 45]) == TRUE
    assert tuple(got[20, 65]) == tuple(got[20, 74]) == tuple(got[10, 70]) == tuple(got[29, 70]) == TRUE
    inside = got[20, 20].astype(int)
    assert inside[0] > inside[1] > inside[2]  # warm, and the film shows through
    for untouched in ((45, 15), (20, 50), (20, 70), (55, 75)):
        assert tuple(got[untouched]) == (100, 100, 100)
    assert (film == 100).all()
    np.testing.assert_array_equal(overlay(film)[:, :, 1], film)


def test_contact_sheet_holds_films_of_any_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    films: list[dict[str, Any]] = []
    for height, width in ((200, 300), (512, 400), (31, 1000)):
        film = rng.integers(0, 255, (height, width), dtype=np.uint8)
        mask = np.zeros((height, width), np.float32)
        mask[: height // 2] = 0.9
        films.append({"film": film, "mask": mask, "truth": mask > 0, "title": "long " * 40, "caption": "a\nb"})
    films.append({"film": np.zeros((1, 1), np.uint8), "boxes": [[0, 0, 1, 1]]})
    path = contact_sheet(films, tmp_path / "sheet.png", columns=2, side=200, title="Films")
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] < 2 * 200 + 60
    assert (pixels == PREDICTED).all(-1).any()
    assert (pixels == TRUE).all(-1).any()
    assert (pixels[:, -3:] == 255).all()


def test_heat_is_stronger_where_the_evidence_is() -> None:
    film = np.full((40, 50), 100, np.uint8)
    saliency = np.zeros((40, 50), np.float32)
    saliency[:20, :25], saliency[20:, :25] = 1, 0.5
    truth = np.zeros((40, 50), bool)
    truth[5:15, 30:45] = True
    got = heat(film, saliency, truth).astype(int)
    assert got.shape == (40, 50, 3)
    assert tuple(got[30, 40]) == tuple(got[10, 37]) == (100, 100, 100)  # no evidence, and inside the outline
    assert tuple(got[5, 37]) == tuple(got[10, 30]) == TRUE
    strongest, middle = got[10, 10], got[30, 10]
    assert strongest.sum() > middle.sum() > 0  # lighter, so that it is read without color
    assert strongest[0] > strongest[2] and middle[0] > middle[2]


def test_a_film_is_shown_with_its_mask_and_beside_with_its_evidence(tmp_path: Path) -> None:
    film = np.full((100, 60), 90, np.uint8)
    mask, saliency = np.zeros((2, 100, 60), np.float32)
    mask[:50] = 1
    saliency[50:] = 1
    shown = {"film": film, "mask": mask, "truth": mask > 0}
    with Image.open(film_picture(shown, tmp_path / "one.jpg", side=200)) as picture:
        assert picture.size == (200, 200)
    path = film_picture(shown | {"saliency": saliency}, tmp_path / "two.jpg", side=200)
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.height == 200 and 400 <= picture.width < 420
        left, right = (np.asarray(picture, int)[:, side].copy() for side in (np.s_[:200], np.s_[-200:]))
    for view, marked, plain in ((left, 50, 150), (right, 150, 50)):
        assert view[marked, 100, 0] - view[marked, 100, 2] > 30  # warm
        assert abs(view[plain, 100] - 90).max() < 6
        assert view[100, 10].max() < 20  # beside the film


def test_a_sheet_has_room_for_both_views(tmp_path: Path) -> None:
    film = {"film": np.full((64, 64), 90, np.uint8), "title": "a"}
    both = film | {"saliency": np.ones((64, 64), np.float32)}
    widths = []
    for i, films in enumerate(([film] * 2, [film, both])):
        with Image.open(contact_sheet(films, tmp_path / f"{i}.png", columns=2, side=100)) as picture:
            widths.append(picture.width)
    assert 2 * 100 <= widths[0] < 2 * 100 + 40 and 4 * 100 <= widths[1] < 4 * 100 + 60
