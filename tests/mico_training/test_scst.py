"""Self-critical training: the likelihood is that of writing, CIDEr is COCO's, reward is learnt."""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.evaluation.metrics.captions import _cider
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import backwards, log_likelihood
from mico_training import stages
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.scst import Cider
from mico_training.stages import train_stage1
from tests.mico_training.scenes import COLOURS, picture
from tests.mico_training.test_runs import write_recipe
from tests.support.tiny import captions, pretraining_model

pytest.importorskip("pycocoevalcap")

OTHERS = ("contrastive", "matching", "tagging", "region", "concept")


@torch.no_grad()
def step_by_step(
    model: MicoForPretraining, ids: torch.Tensor, context: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Each word's log-probability at a mask behind the words before it, as captions are written."""
    found = []
    for t in range(1, ids.shape[1]):
        mask = torch.full_like(ids[:, :1], model.config.text_config.mask_token_id)
        asked = torch.cat([ids[:, :t], mask], 1)
        hidden = model.text(asked, backwards(mask[:, :0], t + 1), context, seen)
        words = model.text.logits(hidden[:, -1]).log_softmax(-1)
        found.append(words.gather(1, ids[:, t : t + 1]))
    return torch.cat(found, 1)


def test_the_likelihood_is_that_of_writing_word_by_word() -> None:
    model = pretraining_model(concepts=False)
    model.text.bert.embeddings.position_embeddings.weight.data.mul_(20)
    ids, mask = captions(3, length=7)
    mask[1, 5:] = 0
    context, seen = torch.randn(3, 4, 32), torch.ones(3, 4, dtype=torch.bool)
    seen[2, 2:] = False
    found = log_likelihood(model, ids, mask, context, seen)
    expected = step_by_step(model, ids, context, seen) * mask[:, 1:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.requires_grad
    assert found[1, 4:].tolist() == [0.0, 0.0]


SAID = {"a": "a man rides a horse", "b": "a dog", "c": "two cats sleep on a sofa"}
RIGHT = {
    "a": ["a man rides a brown horse", "a person on a horse"],
    "b": ["a dog runs in the grass", "the dog is brown"],
    "c": ["two cats on a sofa", "cats sleep on the couch"],
}


def test_the_reward_is_cocos_cider_where_the_documents_are_its_own() -> None:
    """Each caption has the same end mark, as if it were a word of both."""
    expected = _cider(
        {key: f"{text} ." for key, text in SAID.items()},
        {key: [f"{text} ." for text in texts] for key, texts in RIGHT.items()},
    )
    cider = Cider(RIGHT.values())
    found = cider([text.upper() + "!" for text in SAID.values()], list(RIGHT.values()))
    assert found == pytest.approx(list(expected.values()))
    # Another batch leaves the frequencies as they are, and an empty caption is worth nothing.
    assert cider(["a man", ""], [RIGHT["a"], RIGHT["b"]])[1] == pytest.approx(0.0, abs=0.2)
    assert cider(list(SAID.values()), list(RIGHT.values())) == pytest.approx(found)


def test_a_caption_that_breaks_off_scores_less() -> None:
    cider = Cider([*RIGHT.values(), ["a bird"], ["a boat with a sail"]])
    whole, broken = cider(["two cats on a sofa", "two cats on a"], [RIGHT["c"]] * 2)
    assert whole > broken


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(MissingExtraError, match=r"CIDEr.*mico-chat\[eval\]"):
        Cider([])


def recipe(folder: Path, model: Path, **sections: Any) -> Path:
    """Squares of three colours, each with three ways to say so."""
    lines = []
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        said = [f"a {colour} square", f"a square, {colour}", f"the {colour} square"]
        lines.append({"image": f"{colour}.png", "captions": said})
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    content: dict[str, Any] = {
        "data": [{"path": str(path), "kind": "jsonl"}],
        "train": {"lr": 1e-2, "steps": 30, "batch_size": 12, "save_steps": 30, "log_steps": 30},
        "stage1": {"weights": dict.fromkeys(OTHERS, 0.0), "caption_length": 10},
    }
    for key, value in sections.items():
        content[key] |= value
    return write_recipe(folder, folder, model, **content)


@pytest.fixture(scope="module")
def beginner(tmp_path_factory: pytest.TempPathFactory, tiny_pretraining: Path) -> Path:
    """A model that writes captions, and does not know yet which colour is meant."""
    folder = tmp_path_factory.mktemp("beginner")
    train_stage1(recipe(folder, tiny_pretraining))
    return folder / "out"


def rewards(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    return [row["reward"] for row in rows if "reward" in row]


SCST = {
    "train": {"lr": 2e-3, "steps": 160, "save_steps": 160, "log_steps": 20, "schedule": "constant"},
    "stage1": {"scst": True},
}


def test_the_reward_rises_and_a_shuffled_one_teaches_nothing(
    tmp_path: Path, beginner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("real", "shuffled"):
        (tmp_path / name).mkdir()
    train_stage1(recipe(tmp_path / "real", beginner, **SCST))
    order = random.Random(0)

    class Shuffled(Cider):
        """The captions' scores in another order; their mean is the true one."""

        def __call__(self, said: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
            scores = super().__call__(said, references)
            return order.sample(scores, len(scores))

    monkeypatch.setattr(stages, "Cider", Shuffled)
    train_stage1(recipe(tmp_path / "shuffled", beginner, **SCST))
    real, shuffled = rewards(tmp_path / "real"), rewards(tmp_path / "shuffled")
    assert fmean(real[-2:]) > 1.2 * real[0]
    assert fmean(shuffled[-2:]) < 0.75 * fmean(real[-2:])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stage1.weights.matching=1",
            "scst: true trains only the objective caption; give matching",
        ),
        ("stage1.questions=true", "works without questions"),
        ("stage1.cross_corpus=0.1", "works without questions, cross_corpus"),
        ("train.parallel=fsdp", "stage1.scst needs train.parallel ddp, not fsdp"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path, override: str, said: str) -> None:
    path = (
        Path(__file__).resolve().parents[2] / "training/recipes/finetune-coco-captioning-scst.yaml"
    )
    with pytest.raises(ConfigError, match=said):
        load_recipe(Stage1Run, path, [override])
