"""The report and the card: one file, nothing from outside, nothing that could run, words for everything."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cxr_tf.evaluate.card import write_card
from cxr_tf.evaluate.judge import judge
from cxr_tf.evaluate.readiness import load_criteria, readiness, readiness_json
from cxr_tf.evaluate.report import write_report

CLASSES = ["No finding", "<script>alert(1)</script>", "A|B & 'C'"]


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    truth = rng.integers(3, size=90)
    y = np.eye(3)[truth]
    z = rng.normal(size=(90, 3)) + y
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return judge(
        labels=y, probabilities=p, classes=CLASSES, patients=np.arange(90) // 2, studies=np.arange(90),
        task="multiclass", thresholds=[0.4] * 3, specific_thresholds=[0.6] * 3, replicates=30,
    )  # fmt: skip


@pytest.fixture(scope="module")
def verdict(metrics) -> dict[str, Any]:
    return readiness_json(readiness(metrics, load_criteria()))


class Page(HTMLParser):
    """Tags that were opened and what they are given; every tag that must be closed is."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})
    LEFT_OPEN = frozenset({"th", "td", "tr", "dt", "dd", "li", "p"})  # HTML lets them be

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID | self.LEFT_OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID | self.LEFT_OPEN:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words += data


@pytest.fixture(scope="module")
def page(metrics, verdict, tmp_path_factory) -> tuple[str, Page]:
    folder = tmp_path_factory.mktemp("report")
    for name in ("roc", "reliability"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    write_report(metrics, verdict, folder, folder / "report.html", name="run <1>", facts=["A model."])
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_it_asks_nothing_of_the_network_and_runs_nothing(page):
    text, parsed = page
    assert parsed.open == []
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "form"}
    for tag, given in parsed.tags:
        assert all(
            str(given[name]).startswith(("data:image/png;base64,", "#")) for name in ("src", "href") if name in given
        )
        assert not [name for name in given if name.startswith("on")], tag
    assert not re.search(r"@import|url\(|https?:", text)


def test_names_are_escaped(page):
    text, parsed = page
    assert "<script" not in text
    assert CLASSES[1] in parsed.words and "run <1>" in parsed.words


def test_every_picture_has_words_and_every_link_a_place(page):
    _, parsed = page
    pictures = [given for tag, given in parsed.tags if tag == "img"]
    assert len(pictures) == 2 and all(len(str(given["alt"])) > 10 for given in pictures)
    places = {given["id"] for _, given in parsed.tags if "id" in given}
    assert {str(given["href"])[1:] for tag, given in parsed.tags if tag == "a"} <= places


def test_the_verdict_comes_first_in_words_and_not_in_color_alone(page, verdict):
    _, parsed = page
    words = " ".join(parsed.words.split())
    assert words.index("The verdict") < words.index("What was tested")
    for criterion in verdict["criteria"]:
        assert criterion["title"] in words and criterion["threshold"] in words
    assert words.count("✓ pass") == sum(c["outcome"] == "pass" for c in verdict["criteria"])
    assert words.count("Research use, not a medical device.") == 2


def test_the_card_has_the_fields_and_the_same_figures(metrics, verdict, tmp_path):
    details = {"Model": "A small_resnet encoder."}
    write_card(metrics, verdict, tmp_path / "MODEL_CARD.md", name="run", details=details, training=["On 9 films."])
    text = Path(tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == [
        *("Model details", "Intended use", "Factors", "Metrics", "Evaluation data", "Training data"),
        *("Quantitative analyses", "Ethical considerations", "Caveats and recommendations"),
    ]
    auroc = metrics["study"]["macro"]["auroc"]
    assert f"{auroc['value']:.3f} ({auroc['low']:.3f} to {auroc['high']:.3f})" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
