"""Folders of models that somebody broke on purpose: each is one clear line, and no code runs."""

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mico_chat import chat_template
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import MicoError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.messages import Message
from tests.support import replicas
from tests.support.fakes import FakeDecoder
from tests.support.tiny import command

Break = Callable[[Path], object]
HUGE = 10**18
DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
WEIGHTS, TOKENIZER, PROCESSOR = "model.safetensors", "tokenizer.json", "processor_config.json"
MARK = Path("ran")


class Code:
    """A pickle that runs code where it is loaded."""

    def __reduce__(self) -> Any:
        return MARK.touch, ()


def holds(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def sets(name: str, path: str, value: object) -> Break:
    def change(folder: Path) -> None:
        inner = content = json.loads((folder / name).read_text(encoding="utf-8"))
        *parents, last = path.split("/")
        for key in parents:
            inner = inner[key]
        inner[last] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


def says(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Break:
    """Change the first tensor's entry in the weights' header, or the length of the header."""

    def write(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        said = json.loads(data[8 : 8 + size])
        change(said[min(said.keys() - {"__metadata__"})])
        written = json.dumps(said).encode()
        (folder / WEIGHTS).write_bytes(
            struct.pack("<Q", length or len(written)) + written + data[8 + size :]
        )

    return write


def cut(part: float) -> Break:
    def write(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[: int(len(data) * part)])

    return write


def instead(name: str, write: Break) -> Break:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        write(folder / name)

    return change


def brings_code(folder: Path) -> None:
    (folder / "code.py").write_text(f"open({str(MARK)!r}, 'w')")
    sets("config.json", "auto_map", {"AutoConfig": "code.Config"})(folder)
    sets("config.json", "model_type", "other")(folder)


def larger_vocabulary(folder: Path) -> None:
    vocabulary = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))["model"]["vocab"]
    more = {f"word{number}": 1000 + number for number in range(5)}
    sets(TOKENIZER, "model/vocab", vocabulary | more)(folder)


def split(regex: str) -> Break:
    how = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return sets(TOKENIZER, "pre_tokenizer", how)


OF_CONFIG: dict[str, object] = {
    "text_config/hidden_size": HUGE,
    "text_config/intermediate_size": -4,
    "text_config/num_hidden_layers": "many",
    "text_config/num_attention_heads": 0,
    "text_config": [1],
    "vision_config": 7,
    "model_type": 7,
    "dtype": "float99",
}
BREAKS: dict[str, Break] = {
    **{f"config.json {t[:6]}": holds("config.json", t) for t in ("[]", "3", "", "NaN", "{", DEEP)},
    **{f"config.json {path}": sets("config.json", path, to) for path, to in OF_CONFIG.items()},
    "long header": says(lambda one: None, length=1 << 40),
    "no header": says(lambda one: None, length=(1 << 64) - 1),
    "beyond the file": says(lambda one: one.update(data_offsets=[0, 1 << 40])),
    "backwards": says(lambda one: one.update(data_offsets=[8, 0])),
    "overlapping": says(lambda one: one.update(data_offsets=[4, 8])),
    "negative shape": says(lambda one: one.update(shape=[-1, 4])),
    "huge shape": says(lambda one: one.update(shape=[1 << 62, 1 << 62])),
    "unknown dtype": says(lambda one: one.update(dtype="F99")),
    **{f"{part} of the weights": cut(part) for part in (0, 0.5, 0.99)},
    "pickle": instead("pytorch_model.bin", lambda file: file.write_bytes(pickle.dumps(Code()))),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "no tokenizer": lambda folder: [*map(Path.unlink, folder.glob("tokenizer*"))],
    "another's tokenizer": lambda folder: larger_vocabulary(folder),
    "other sizes": sets("config.json", "text_config/intermediate_size", 48),
    "index": instead(f"{WEIGHTS}.index.json", lambda file: file.write_text("[]")),
    "index of nothing": instead(
        f"{WEIGHTS}.index.json", lambda file: file.write_text('{"weight_map": {"a": "../../x"}}')
    ),
    "link": instead(WEIGHTS, lambda file: file.symlink_to("/etc/hostname")),
    **{f"tokenizer {t[:9]}": holds(TOKENIZER, t) for t in ("[]", '{"model": 5}', DEEP)},
    "tokenizer_config list": holds("tokenizer_config.json", "[]"),
    "token of a wrong type": sets("tokenizer_config.json", "eos_token", {"a": 1}),
    "broken regex": split("(a"),
    "slow regex": split("(a+)+b"),
    "broken template": holds("chat_template.jinja", "{% for %}"),
    "endless template": holds("chat_template.jinja", LOOP),
    "generation list": holds("generation_config.json", "[]"),
    "generation types": holds("generation_config.json", '{"eos_token_id": "x"}'),
    "processor list": holds(PROCESSOR, "[]"),
    "processor size": sets(PROCESSOR, "image_processor/size", "big"),
    "processor class": sets(PROCESSOR, "processor_class", "Nothing"),
    "code": brings_code,
}


SAYS = {
    "no template": r"lacks a chat template \(chat_template.jinja\)",
    "no tokenizer": r"lacks a tokenizer \(tokenizer.json\)",
    "another's tokenizer": r"ids go up to 1004, but its table of tokens has \d+ rows",
    "other sizes": r"proj.weight is \(\d+, \d+\) in the file but \(\d+, \d+\) by config.json",
    "0.5 of the weights": r"model.safetensors is not whole",
}
"""What the line of some must name."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.build("llava_onevision", tmp_path_factory.mktemp("good"))


def ask(folder: Path) -> None:
    options = EngineOptions(engine="transformers", device="cpu")
    assistant = load_assistant(folder, FakeDecoder(), options, similarity=False)
    try:
        asked = [Message.user("a" * 40)]
        assistant.answer_all([asked], GenerationOptions(max_tokens=2))
    finally:
        assistant.close()


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_line(
    good: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_template, "RENDER_S", 0.5 if name == "endless template" else 60.0)
    folder = shutil.copytree(good, tmp_path / "model")
    BREAKS[name](folder)
    with pytest.raises(MicoError) as raised:
        ask(folder)
    said = str(raised.value)
    assert "\n" not in said
    assert str(folder) in said or "tokenizer.json" in said
    assert re.search(SAYS.get(name, ""), said)
    assert not MARK.exists(), "code of the folder was run"


def test_the_command_says_it(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(good)
    folder = shutil.copytree(good, tmp_path / "model")
    cut(0.5)(folder)
    command("ask", "Hello?", "--model", str(folder), "--engine", "transformers", code=2)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {folder}: ")
