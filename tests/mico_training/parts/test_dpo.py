"""Pairs in each of TRL's forms are read; the answer that fits the picture becomes likelier."""

import json
import shutil
from math import log
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.cli.main import main
from mico_chat.errors import ConfigError
from mico_chat.model.processing import MicoChatProcessor
from mico_training.build_model import Chat
from mico_training.data.batches import ChatCollator
from mico_training.data.examples import ChatExample
from mico_training.data.media import MediaLoader
from mico_training.data.sources.readers import ManifestSource
from mico_training.parts.dpo import PreferencePairs, preference_loss
from mico_training.recipe import DpoRecipe, Stage3Run, load_recipe
from mico_training.stages import train_stage3
from tests.mico_training.scenes import COLOURS, picture
from tests.mico_training.test_parallel import run, train
from tests.mico_training.test_runs import logged, losses, write_recipe

# PEFT asks transformers for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}
PLAIN = {"role": "user", "content": "Which colour?"}
RED, BLUE = ([{"role": "assistant", "content": colour}] for colour in ("red", "blue"))
IMAGES = {"images": ["red.png"]}


def written(folder: Path, *records: dict[str, Any]) -> Path:
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pair(shown: str, chosen: str, rejected: str) -> dict[str, Any]:
    said = {"chosen": chosen, "rejected": rejected}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in said.items()}
    return {"images": [f"{shown}.png"], "prompt": [ASKED], **turns}


PAIRS = [(one, other) for one in COLOURS for other in COLOURS if one != other]


@pytest.mark.parametrize(
    "record",
    [
        {"image": "red.png", "prompt": "Which colour?", "chosen": " red", "rejected": " blue"},
        {**IMAGES, "chosen": "Which colour? red", "rejected": "Which colour? blue"},
        {**IMAGES, "prompt": [ASKED], "chosen": RED, "rejected": BLUE},
        {**IMAGES, "prompt": [PLAIN], "chosen": RED, "rejected": BLUE},
        {**IMAGES, "chosen": [ASKED, *RED], "rejected": [ASKED, *BLUE]},
    ],
    ids=["standard", "standard-implicit", "conversational", "no-marker", "conversational-implicit"],
)
def test_pairs_are_read_in_each_form(tmp_path: Path, record: dict[str, Any]) -> None:
    sample = ManifestSource(written(tmp_path, {"image": "red.png", "caption": "x"}, record),
                            "preference")[0]  # fmt: skip
    talks = [[m.text.strip() for m in talk] for talk in (sample.conversation, sample.rejected)]
    assert talks == [["Which colour?", "red"], ["Which colour?", "blue"]]
    for talk in (sample.conversation, sample.rejected):
        assert [file.name for message in talk for file in message.files] == ["red.png"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "not two texts or two lists"),
        ({"prompt": "a", "chosen": "b", "rejected": BLUE}, "not two texts or two lists"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "are the same"),
        ({"chosen": "bread", "rejected": "blue"}, "lacks a 'prompt'"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is int"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": RED}, "has both 'messages'"),
        ({**IMAGES, "prompt": "a", "chosen": "<image>", "rejected": "c <image>"}, "shows a medium"),
        ({"chosen": [PLAIN, *RED], "rejected": [PLAIN]}, "must be user, assistant"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    (error,) = ManifestSource(written(tmp_path, record), "preference").bad.errors
    assert "pairs.jsonl:1: " in str(error)
    assert reason in str(error)


@pytest.mark.parametrize(
    ("stage3", "reason"),
    [
        ({"given": 0.5, "simulate": 0.1}, "as they are; leave out simulate, given"),
        ({"dpo": {"loss_type": "ipo", "label_smoothing": 0.1}}, "sigmoid, not with ipo"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, stage3: dict[str, Any], reason: str) -> None:
    path = write_recipe(tmp_path, tmp_path, tmp_path, stage3={"dpo": {}} | stage3)
    with pytest.raises(ConfigError, match=reason):
        load_recipe(Stage3Run, path)
    with pytest.raises(ConfigError, match=r"stage3\.dpo needs train\.parallel ddp or fsdp"):
        load_recipe(Stage3Run, path, ["stage3={dpo: {}}", "train.parallel=zero2"])


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({}, log(1 + 2.718281828459045**-1.5)),
        ({"label_smoothing": 0.1}, log(1 + 2.718281828459045**-1.5) + 0.15),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "ipo"}, (2 / 2 + 1 / 4 - 1 / 1.0) ** 2),
        ({"loss_type": "hinge", "sft": 0.5}, 0.5 * 3.0 / 2),
    ],
)
def test_the_loss_is_that_of_the_formula(options: dict[str, Any], loss: float) -> None:
    """The chosen answer of 2 tokens gained 2, the rejected one of 4 tokens lost 1; beta is 0.5."""
    likely, reference = torch.tensor([-3.0, -6.0]), torch.tensor([-5.0, -5.0])
    found = preference_loss(likely, reference, torch.tensor([2, 4]), DpoRecipe(beta=0.5, **options))
    assert found["loss"].item() == pytest.approx(loss, abs=1e-6)
    rewards = [found[f"rewards_{x}"].item() for x in ("chosen", "rejected", "margin", "accuracy")]
    assert rewards == [1.0, -0.5, 1.5, 1.0]


def likely(folder: Path, source: ManifestSource) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihoods (B, 2) of chosen and rejected answers: as pairs, and each row alone."""
    chat = MicoChatForConditionalGeneration.from_pretrained(folder)
    processor = MicoChatProcessor.from_pretrained(folder)
    samples = [source[n] for n in range(len(source))]
    examples = [ChatExample(s.id, s.conversation, rejected=s.rejected) for s in samples]
    loader = MediaLoader(processor.preprocessing)
    batch: dict[str, Any] = ChatCollator(processor, loader, 200, pairs=True)(examples)
    assert len(batch["media_kind"]) == len(samples)
    alone = []
    with torch.no_grad():
        found = PreferencePairs(chat, DpoRecipe())(**batch)["likely"]
        for talk in [s.conversation for s in samples] + [s.rejected for s in samples]:
            one: dict[str, Any] = ChatCollator(processor, loader, 200)([ChatExample("", talk)])
            labels = one.pop("labels")[0, 1:]
            words = chat(**one).logits[0, :-1].log_softmax(-1)
            alone.append(words[torch.arange(len(labels)), labels.clamp(min=0)][labels >= 0].sum())
    return found.view(2, -1).T, torch.stack(alone).view(2, -1).T


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, tiny_chat: Path) -> Path:
    """The tiny chat model with larger token vectors: its own say nearly the same of all words."""
    chat = MicoChatForConditionalGeneration.from_pretrained(tiny_chat)
    cast(Any, chat.get_input_embeddings()).weight.data.mul_(10)
    folder = tmp_path_factory.mktemp("models") / "sharp"
    Chat(chat, MicoChatProcessor.from_pretrained(tiny_chat)).save(folder)
    return folder


def right(margins: torch.Tensor) -> float:
    return (margins[:, 0] > margins[:, 1]).float().mean().item()


@pytest.mark.parametrize("way", [{"lora": {"r": 8, "dropout": 0.1}}, {"full": True}])
def test_the_answer_that_fits_the_picture_is_learnt(
    tmp_path: Path, chat_folder: Path, way: dict[str, Any]
) -> None:
    data = [{"path": str(written(tmp_path, *(pair(a, a, b) for a, b in PAIRS))), "kind": "jsonl"}]
    settings = {"steps": 30, "batch_size": 6, "lr": 1e-2, "save_steps": 15}
    sections: dict[str, Any] = {"data": data, "train": settings, "stage3": {"dpo": {}} | way}
    sections["eval"] = {"data": data, "every": 15, "metric": "accuracy"}
    recipe = write_recipe(tmp_path, tmp_path, chat_folder, **sections)
    train_stage3(recipe)
    whole = logged(tmp_path)
    log_of = [entry for entry in whole if "loss" in entry]
    assert max(entry.get("eval_accuracy", 0) for entry in whole) == 100.0
    assert log_of[0]["loss"] == pytest.approx(log(2), abs=1e-6)
    assert log_of[-1]["rewards_accuracy"] == 1.0
    assert log_of[-1]["rewards_margin"] == pytest.approx(
        log_of[-1]["rewards_chosen"] - log_of[-1]["rewards_rejected"], abs=1e-5
    )
    pairs = ManifestSource(tmp_path / "pairs.jsonl", "preference")
    start, alone = likely(chat_folder, pairs)
    torch.testing.assert_close(start, alone, atol=1e-4, rtol=0)
    assert right(start) == 0.5
    assert right(likely(tmp_path / "out", pairs)[0] - start) == 1.0
    (tmp_path / "swapped").mkdir()
    next_colour = dict(zip(COLOURS, [*COLOURS, *COLOURS][1:], strict=False))
    other = [pair(next_colour[chosen], chosen, rejected) for chosen, rejected in PAIRS]
    swapped = ManifestSource(written(tmp_path / "swapped", *other), "preference")
    start, _ = likely(chat_folder, swapped)
    assert right(likely(tmp_path / "out", swapped)[0] - start) <= 0.5
    # A run that goes on from the middle has the same reference.
    shutil.rmtree(tmp_path / "out/checkpoint-30")
    train_stage3(recipe)
    again = [entry for entry in logged(tmp_path) if "loss" in entry]
    assert [e["rewards_chosen"] for e in again] == [e["rewards_chosen"] for e in log_of]


def test_a_recipe_for_pairs_is_written_and_what_is_dropped_is_dropped_for_the_reference_too(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(written(tmp_path, *(pair(a, a, b) for a, b in PAIRS)))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["train", "init", "--stage=3", f"--data={data}", f"--model={chat_folder}"])
    recipe = load_recipe(Stage3Run, tmp_path / "stage3.yaml")
    assert recipe.stage3.dpo == DpoRecipe(beta=0.1)
    options = ["output=out", "train.steps=1", "train.warmup_steps=0", "train.drop={path: 0.5}"]
    options += ["train.arguments={use_cpu: true}", "train.save_steps=1", "train.log_steps=1"]
    train_stage3(tmp_path / "stage3.yaml", [*options, "train.workers=0", "train.bf16=false"])
    assert losses(tmp_path) == [pytest.approx(log(2), abs=1e-6)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_learn_as_one(tmp_path: Path, chat_folder: Path, parallel: str) -> None:
    """Rank 1 has pairs without a picture in some steps."""
    text = {"prompt": "Which?", "chosen": "red", "rejected": "blue"}
    data = [
        {
            "path": str(written(tmp_path, *(pair(a, a, b) for a, b in PAIRS), *[text] * 6)),
            "kind": "jsonl",
        }
    ]

    def recipe(name: str, ways: str, size: int) -> Path:
        settings = {"batch_size": size, "parallel": ways, "steps": 6, "save_steps": 6}
        sections: dict[str, Any] = {"data": data, "train": settings, "stage3": {"dpo": {"beta": 1}}}
        return write_recipe(tmp_path / name, tmp_path, chat_folder, **sections)

    train_stage3(recipe("one", "ddp", 4))
    run(2, train, 3, recipe("two", parallel, 2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert losses(tmp_path / "two")[0] == pytest.approx(log(2), abs=1e-6)
