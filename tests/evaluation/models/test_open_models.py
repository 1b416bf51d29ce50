"""Other projects' models, asked by the same commands: replicas, whose answers mean nothing."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.adapters.base import segments_of
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.cli.evaluate import main
from mico_chat.engine.base import Prompt
from mico_chat.errors import ConfigError, ModelError, RequestError
from mico_chat.evaluation.chat import language_model, log_likelihoods
from mico_chat.evaluation.store import PREDICTIONS, read_store
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Audio, Image, MediaDecoder, Medium, Video
from mico_chat.messages import Message
from tests.evaluation.lmms.drawn import drawn_items
from tests.support import replicas
from tests.support.replicas.gguf_pairs import REPLICAS, built

Evaluate = Callable[..., dict[str, Any]]
SKILLS = ("colour", "sound", "clip", "how far")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and items of a picture, a sound, a clip with sound and a depth map."""
    folder = tmp_path_factory.mktemp("open-models")
    drawn_items(folder / "items", n=2)
    for name in ("qwen2_5_omni", "llava_onevision"):
        replicas.build(name, folder / name)
    return folder


@pytest.fixture
def evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Ask a model the items; returns the report's row, and what was printed as ``printed``."""

    def run(name: str, *more: str, model: Path | None = None) -> dict[str, Any]:
        arguments = [str(folder / "items/items.jsonl"), "--model", str(model or folder / name)]
        arguments += ["--output", str(tmp_path / name), "--dtype", "float32", "--workers", "1"]
        assert main([*arguments, "--max-tokens", "3", "--batch-size", "4", *more]) == 0
        report = json.loads((tmp_path / name / "results.json").read_text())
        return {**report["skills"]["items"], "printed": capsys.readouterr().out}

    return run


@pytest.mark.parametrize("name", ["qwen2_5_omni", "llava_onevision"])
def test_every_medium_is_asked_about_or_refused(name: str, evaluate: Evaluate) -> None:
    row = evaluate(name)
    assert row["controls"] == ["full", "withheld", "swapped"]
    assert row["run"]["how"] == "transformers float32, at most 8 frames of a video"
    figures = {skill: row["skills"][skill]["controls"] for skill in SKILLS}
    deaf = "audio" not in replicas.reads(name)
    for skill, of_skill in figures.items():
        refused = 2 if skill == "sound" and deaf else 0
        for control in ("full", "swapped"):
            n = (of_skill[control]["n"], of_skill[control]["refused"])
            assert n == (2 - refused, refused), (skill, control)
        assert of_skill["withheld"]["n"] == 2
    said = "sound-0.wav: this model cannot read a sound; it reads pictures, videos"
    assert (said in row["printed"]) is deaf
    assert ("4 refused and not counted" in row["printed"]) is deaf


def test_a_run_goes_on_and_other_weights_are_refused(
    folder: Path, evaluate: Evaluate, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(folder / "llava_onevision", tmp_path / "model"))
    kept = tmp_path / "here/items"

    def answers() -> list[tuple[str, ...]]:
        keys = ("control", "number", "kind", "answer", "reason")
        found = [record for record in read_store(kept)[1] if "number" in record]
        return sorted(tuple(str(record.get(key)) for key in keys) for record in found)

    evaluate("here", model=model)
    whole, lines = answers(), (kept / PREDICTIONS).read_text().splitlines(keepends=True)
    (kept / PREDICTIONS).write_text("".join(lines[:12]))
    evaluate("here", model=model)
    assert answers() == whole
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(ConfigError, match="made with weights"):
        evaluate("here", model=model)


def test_controls_of_parts_that_a_model_lacks_are_refused(folder: Path, evaluate: Evaluate) -> None:
    with pytest.raises(
        ConfigError,
        match=r"the control without-grid, base-llm is of parts of MiCo-Chat, but for .*omni "
        "there are full, withheld, swapped",
    ):
        evaluate("qwen2_5_omni", "--controls", "full", "without-grid", "base-llm")


def test_chat_tasks_but_not_those_of_stage_1(
    folder: Path, msvd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(folder / "qwen2_5_omni"), "--data", str(msvd), "--limit", "2"]
    given += ["--output", str(tmp_path), "--max-tokens", "3", "--workers", "1"]
    assert main(["msvd-qa-chat", *given]) == 0
    assert "| msvd-qa-chat | accuracy | - | 73.7 | 2 | unknown | 0 |" in capsys.readouterr().out
    with pytest.raises(ModelError, match="qwen2_5_omni"):
        main(["msvd-qa", *given])


@pytest.mark.skipif(not built(), reason="llama.cpp lacks libmtmd")
def test_a_gguf_model_and_its_projector(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "pair").mkdir()
    pair = REPLICAS["qwen_omni"](tmp_path / "pair")
    row = evaluate("gguf", model=pair.model)
    assert row["controls"] == ["full", "withheld", "swapped"]
    assert row["run"]["how"].startswith("llamacpp ")
    assert {row["skills"][skill]["controls"]["full"]["n"] for skill in SKILLS} == {2}
    pair.mmproj.write_bytes(pair.mmproj.read_bytes()[:-4] + bytes(4))
    with pytest.raises(ConfigError, match="made with weights"):
        evaluate("gguf", model=pair.model)
    with pytest.raises(ConfigError, match="there are full, withheld, swapped"):
        evaluate("gguf", "--controls", "without-grid", model=pair.model)


# --- likelihoods ----------------------------------------------------------------------------------


def media(name: str) -> list[Medium]:
    rng = np.random.default_rng(7)
    frames = rng.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    sound = rng.uniform(-0.5, 0.5, 16_000).astype(np.float32)
    of_kind: dict[str, Medium] = {
        "image": Image(frames[0]),
        "audio": Audio(sound),
        "video": Video(frames, np.arange(4) / 2),
    }
    return [of_kind[kind] for kind in replicas.reads(name)]


@pytest.fixture(params=replicas.NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Assistant]]:
    name: str = request.param
    try:
        folder = replicas.build(name, tmp_path / name)
    except ImportError as error:  # SmolVLM's processor says with num2words how many frames it has.
        pytest.skip(str(error).strip())
    options = EngineOptions(dtype="float32", device="cpu")
    with (
        MediaDecoder(workers=1) as decoder,
        closing(load_assistant(folder, decoder, options)) as assistant,
    ):
        yield name, assistant


def test_a_batch_of_likelihoods_is_the_models_own(loaded: tuple[str, Assistant]) -> None:
    """Media of every kind, and none, beside each other: positions and wide rows are theirs."""
    name, assistant = loaded
    adapter: Any = assistant.adapter
    asked = [Message.user("What is new?"), *(Message.user(m, "Describe it.") for m in media(name))]
    ids = [[41, 42, 43], *([50 + n, 60, 61, 62] for n in range(len(asked) - 1))]

    async def prompts() -> list[Any]:
        return [(await assistant.prepare(Ask([message])))[0] for message in asked]

    pairs = list(zip(asyncio.run(prompts()), ids, strict=True))
    found = log_likelihoods(language_model(adapter), pairs, assistant.engine.max_position)
    for (prompt, more), (logprobs, _), message in zip(pairs, found, asked, strict=True):
        adapter.encodes = False  # the inputs of the whole prompt, by the model's own processor
        prepared = [adapter.prepare(medium, [medium.kind]) for medium in message.media]
        blocks = zip(prepared, adapter.encode(prepared), strict=True)
        layout = adapter.layout([message], [replace(one, block=block) for one, block in blocks])
        given = adapter.whole_inputs(Prompt(segments_of(layout)))
        given["input_ids"] = torch.cat([given["input_ids"], torch.tensor([more])], 1)
        if "mm_token_type_ids" in given:
            text = torch.zeros(1, len(more), dtype=torch.long)
            given["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], text], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        with torch.inference_mode():
            logits = adapter.model(**given).logits[0].float().log_softmax(-1)
        expected = [logits[len(prompt) - 1 + n, token] for n, token in enumerate(more)]
        torch.testing.assert_close(logprobs, torch.stack(expected), atol=1e-4, rtol=1e-3)


def test_a_model_that_runs_alone_has_no_likelihoods(folder: Path) -> None:
    adapter = TransformersAdapter(*replicas.load(folder / "llava_onevision"), "llava")
    adapter.encodes = False
    with pytest.raises(RequestError, match="this model runs alone"):
        language_model(adapter)
