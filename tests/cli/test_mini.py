"""The shipped mini itself: its folder, its base LLM, one answer of each sort."""

import asyncio
import json
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from PIL import ImageDraw

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.folders import MODELS
from mico_chat.checkpoints.load import load_chat, load_pretraining
from mico_chat.cli.ask import with_taught
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import GenerationOptions
from mico_chat.engines.transformers_models import torch_engine
from mico_chat.errors import RequestError
from mico_chat.load import EngineOptions
from mico_chat.media import Audio, Depth, Image, Medium, Video
from mico_chat.media.taught import TaughtName
from mico_chat.messages import Message
from mico_chat.similarity import Similarity
from mico_server.store.database import Database
from mico_server.store.taught import TaughtStore
from mico_world.mini.__main__ import GENERATION
from tests.server.support.sent import square
from tests.support.fakes import FakeDecoder


@pytest.fixture(scope="module")
def mini(base_llm_folder: Path) -> tuple[Any, Any]:
    return load_chat("mini")


def test_weights_stay_small() -> None:
    files = (MODELS / "mini").rglob("*.safetensors")
    sizes = {file.parent.name: file.stat().st_size for file in files}
    assert sizes.keys() == {"mini", "lora", "pretraining", "depth"}
    assert sizes.pop("depth") <= 2_000_000
    assert sum(sizes.values()) <= 60_000_000


def test_what_the_folder_says_is_what_pack_writes() -> None:
    folder = MODELS / "mini"
    options = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert options == GENERATION


def test_it_chats_as_an_assistant(mini: tuple[Any, Any]) -> None:
    model, processor = mini
    engine = torch_engine(model.llm, processor.tokenizer, EngineOptions())
    encoder = MediaEncoder(MicoAdapter(model, processor), FakeDecoder())
    with closing(Assistant(engine, encoder, name="mini")) as assistant:
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        questions = [
            Message.user("What is the capital of France?"),
            Message.user(Image(pixels), "What is this?"),
        ]
        options = GenerationOptions(max_tokens=12)
        about_france, about_noise = assistant.answer_all([[q] for q in questions], options)
    assert "Paris" in about_france.text
    assert about_noise.text
    assert about_noise.usage.media_tokens == processor.still_tokens


def test_every_medium_gets_words(mini: tuple[Any, Any]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    tone = np.sin(np.arange(16000) / 8).astype(np.float32)
    media: list[Medium] = [
        Image(frames[0]),
        Audio(tone),
        Video(frames, np.arange(3.0), Audio(tone)),
        Depth(np.linspace(1, 3, 2400, dtype=np.float32).reshape(40, 60)),
    ]
    for medium in media:
        assert _answer(mini, Message.user(medium, "What is this?"))
    assert _answer(mini, Message.user(*media, "What are these?"))


def test_text_branch_scores_captions(mini: tuple[Any, Any]) -> None:
    model, tokenizer = load_pretraining("mini")
    batch = tokenizer(["a red ball", "a dog barks"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        features = model.encode_text(batch["input_ids"], batch["attention_mask"])
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-4)
    assert float(features[0] @ features[1]) < 0.99


def test_pictures_are_nearest_to_their_words(mini: tuple[Any, Any]) -> None:
    chat, processor = mini
    branch, tokenizer = load_pretraining("mini", chat)
    pictures = [drawn(*what) for what in SHAPES.values()]
    with closing(Similarity(lambda: (branch, tokenizer), processor, FakeDecoder())) as similarity:
        scored = asyncio.run(similarity.score(pictures, [*SHAPES, "a dog barks"]))
    for own, row in enumerate(scored.scores):
        found = [score.similarity for score in row]
        assert max(found) in found[own // 2 * 2 : own // 2 * 2 + 2], "the shape"
        assert found[own] > max(found) - 0.05  # colours it hardly tells apart
        assert found[own] > found[-1] + 0.1


def drawn(rgb: tuple[int, int, int], square: bool) -> Image:
    """A disc or a square on white."""
    y, x = np.abs(np.mgrid[:224, :224] - 112)
    inside = np.maximum(x, y) < 60 if square else np.hypot(x, y) < 60
    return Image(np.where(inside[..., None], np.array(rgb), 255).astype(np.uint8))


SHAPES = {
    "a red circle": ((220, 30, 30), False),
    "a blue circle": ((30, 60, 220), False),
    "a red square": ((220, 30, 30), True),
    "a blue square": ((30, 60, 220), True),
}


def _answer(mini: tuple[Any, Any], message: Message) -> str:
    model, processor = mini
    inputs = processor([[message]])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(processor.decode_answer(ids[0]))


def test_its_configs_name_no_folder_of_a_machine() -> None:
    for path in (MODELS / "mini").rglob("*config.json"):
        assert '_path": "/' not in path.read_text(encoding="utf-8"), path


def flower(seed: int) -> Image:
    """A flower of pink leaves around green and yellow rings, which no name means; a view of it."""
    rng = np.random.default_rng(seed)
    size, (x, y) = rng.uniform(70, 90), 112 + rng.uniform(-15, 15, 2)
    canvas = pillow.new("RGB", (224, 224), tuple(int(v) for v in rng.integers(150, 250, 3)))
    draw = ImageDraw.Draw(canvas)
    angles = rng.uniform(-0.3, 0.3) + np.arange(14) * np.pi / 7
    reach = size * np.where(np.arange(14) % 2, 0.45, 1.0)
    edge = zip(x + reach * np.cos(angles), y + reach * np.sin(angles), strict=True)
    draw.polygon([(float(a), float(b)) for a, b in edge], fill=(200, 20, 160))
    for share, colour in ((0.4, (20, 160, 60)), (0.2, (250, 220, 40))):
        r = share * size
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    return Image(np.asarray(canvas).copy())


@pytest.mark.parametrize("name", ["Zorblax", "Captain Whiskers"])
def test_it_says_a_taught_name_of_another_view_and_of_nothing_else(
    mini: tuple[Any, Any], name: str
) -> None:
    model, processor = mini
    engine = torch_engine(model.llm, processor.tokenizer, EngineOptions())
    encoder = MediaEncoder(MicoAdapter(model, processor), FakeDecoder())
    other = Image(square())
    with closing(Assistant(engine, encoder, name="mini")) as assistant:

        def answers() -> list[str]:
            asked = [[Message.user(one, "What is in this picture?")] for one in (flower(7), other)]
            found = assistant.answer_all(asked, GenerationOptions(max_tokens=12))
            return [answer.text for answer in found]

        before, of_other = answers()
        assert name not in before + of_other
        taught = asyncio.run(assistant.taught(name, [flower(seed) for seed in range(3)]))

        async def names(tenant: str, space: str) -> list[TaughtName]:
            return [taught]

        assistant.say(names)
        after, same = answers()
        assert name in after
        assert same == of_other
        with pytest.raises(RequestError, match="tokens, and 8 fit"):
            asyncio.run(assistant.taught("A name of very many words indeed, too many", [flower(0)]))


def test_ask_says_what_was_taught_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MICO_SERVER_DATA_DIR", str(tmp_path))
    encoder = SimpleNamespace(names_of=None)
    assistant: Any = SimpleNamespace(encoder=encoder, space="s")
    assistant.say = partial(Assistant.say, assistant)

    async def told(teach: bool) -> Any:
        database = Database(None, tmp_path)
        await database.start()
        if teach:
            one = TaughtName("Z", "image", np.full((2, 3), 0.5, np.float32), (3, 4))
            await TaughtStore(database).add("local/page", one, "mini", "s")
            await TaughtStore(database).add("key-1", one, "mini", "s")
        await database.close()
        return await with_taught(assistant).encoder.names_of("")

    assert with_taught(assistant).encoder.names_of is None, "nothing was ever kept here"
    assert not asyncio.run(told(False))
    (found,) = asyncio.run(told(True))
    assert (found.name, found.kind, found.ids) == ("Z", "image", (3, 4))
    assert (found.examples == 0.5).all()
    assert found.examples.shape == (2, 3)
