"""The report and the card: one file, nothing from outside, nothing that could run, words for everything."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cxr_tf.evaluate.card import write_card
from cxr_tf.evaluate.readiness import load_criteria, readiness, readiness_json
from cxr_tf.evaluate.report import write_report


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
def page(reported) -> tuple[str, Page]:
    text = reported.path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def verdict(reported) -> dict[str, Any]:
    return reported.verdict


def test_it_asks_nothing_of_the_network_and_runs_nothing(page):
    text, parsed = page
    assert parsed.open == []
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "form"}
    for tag, given in parsed.tags:
        assert all(
            str(given[name]).startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#"))
            for name in ("src", "href")
            if name in given
        )
        assert not [name for name in given if name.startswith("on")], tag
    assert not re.search(r"@import|url\(|https?:", text)


def test_names_are_escaped(page, reported):
    text, parsed = page
    assert "<script" not in text
    for name in (*reported.metrics["classes"], "run <1>"):
        assert name in parsed.words
    pictures = [given for tag, given in parsed.tags if tag == "img"]
    assert not any("onerror" in given for given in pictures)


def test_every_picture_has_words_and_every_link_a_place(page):
    _, parsed = page
    pictures = [given for tag, given in parsed.tags if tag == "img"]
    assert len(pictures) == 12 and all(len(str(given["alt"])) > 10 for given in pictures)
    assert "Film 7: worst. It marks 25 % of the film." in [given["alt"] for given in pictures]
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


def test_calibration_is_said_before_and_after_the_temperature(page, reported):
    words = " ".join(page[1].words.split())
    assert "before temperature scaling 0.310 (0.290 to 0.330): fail" in words  # beside the criterion
    after = reported.metrics["image"]["macro"]["ece"]
    row = (
        "Expected calibration error (ECE), 15 bins of equal width 0.310 (0.290 to 0.330) "
        f"{after['value']:.3f} ({after['low']:.3f} to {after['high']:.3f})"
    )
    assert row.replace(" ", "") in words.replace(" ", "")
    assert "The temperature, 2.50, was fitted on validation patients" in words


TERMS = [
    *("AUROC", "Average precision", "Challenge's AP", "F1", "Brier score", "Kappa", "Quadratic kappa", "Accuracy"),
    *("Sensitivity", "Specificity", "Expected calibration error (ECE)", "temperature scaling", "Dice", "IoU"),
    *("Saliency map", "Grad-CAM", "pointing game", "Rank correlation", "Skill kept", "blanked", "thumbnail"),
    *("selective risk", "out-of-distribution", "interval", "not measurable", "validation patients", "Threshold"),
]


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_explained(page, term):
    """In the list of words, by one sentence; and each of these is a term that the page uses."""
    words = " ".join(page[1].words.split())
    used, explained = words.split("What the words mean", 2)[1:]  # the first is the link
    assert term.lower() in used.lower()
    assert term.lower() in explained.lower()


def test_an_explanation_is_one_plain_sentence(page):
    text, _ = page
    explained = re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", text)
    assert len(explained) > 25
    for term, meaning in explained:
        assert meaning.endswith(".") and len(re.findall(r"[.!?](?:\s|$)", meaning)) == 1, term
        assert len(meaning) < 260, term


def test_a_model_that_only_segments_has_a_report_too(reported, tmp_path):
    parts = ("task", "classes", "level", "segmentation", "robustness")
    metrics = {name: reported.metrics[name] for name in parts}
    metrics |= {"n": {"images": 90, "studies": 90, "patients": 45}, "gallery": {"worst": [], "best": []}}
    verdict = readiness_json(readiness(metrics, load_criteria()))
    write_report(metrics, verdict, tmp_path, tmp_path / "report.html", name="run", facts=[])
    words = " ".join(Page((tmp_path / "report.html").read_text(encoding="utf-8")).words.split())
    assert "evidence for the class" not in words and "Does it find where the finding is?" in words


def test_the_card_has_the_fields_and_the_same_figures(reported, tmp_path):
    metrics, verdict = reported.metrics, reported.verdict
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
