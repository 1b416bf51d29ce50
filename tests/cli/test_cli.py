"""The command line: media in the order given, batches in the order of the file, one-line errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mico_chat import __version__, media
from mico_chat.checkpoints.marks import Marks
from mico_chat.cli import main as cli
from mico_chat.cli import models
from mico_chat.cli.ask import Asking, Waiting
from mico_chat.cli.main import main
from mico_chat.engine.base import GenerationOptions
from tests.support.fakes import EXPLAINED, WALL, FakeAssistant, FakeDecoder


class Terminal:
    """Runs commands with a fake assistant and shows what they wrote and how they ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.assistant = FakeAssistant()
        self.decoder = FakeDecoder()
        self.loads: list[str | None] = []
        self.engines: list[tuple[Any, ...]] = []
        self.depth_models: list[str | None] = []
        self._capsys = capsys

    def load(self, model: str, decoder: FakeDecoder, how: Any, **options: Any) -> FakeAssistant:
        self.loads.append(model)
        self.depth_models.append(how.depth_model)
        self.engines.append((how.engine, how.quantization, how.device, how.dtype))
        return self.assistant

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        output = self._capsys.readouterr()
        return code, output.out, output.err


@pytest.fixture
def terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Terminal:
    terminal = Terminal(capsys)

    class Decoder(FakeDecoder):
        def __init__(self, limits: media.MediaLimits) -> None:
            super().__init__()
            terminal.decoder = self

        def __enter__(self) -> Decoder:
            return self

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(media, "MediaDecoder", Decoder)
    monkeypatch.setattr("mico_chat.load.load_assistant", terminal.load)
    # Without a libraries' setting left behind for the tests after this one.
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "c.wav", "d.mp4", "e.png", "f.png"):
        (tmp_path / name).write_bytes(b"bytes")
    (tmp_path / "broken.png").write_bytes(b"broken")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    return terminal


def write_lines(path: Path, *records: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_media_keep_their_order_across_kinds(terminal: Terminal) -> None:
    code, out, err = terminal(
        *("ask", "--image", "a.png", "--audio=c.wav", "--image", "b.png", "Do they match?"),
        *("--video", "d.mp4", "--normal", "f.png", "--depth", "e.png", "--model", "folder"),
    )
    assert (code, err) == (0, "")
    shown = "image a.png, audio c.wav, image b.png, video d.mp4, normal f.png, depth e.png"
    assert out.strip() == f"[{shown}] Do they match?"
    assert terminal.loads == ["folder"]


def test_an_option_value_that_looks_like_an_option(terminal: Terminal) -> None:
    _, out, _ = terminal("ask", "--stop", "--audio", "--image", "a.png", "--", "--image")
    assert out.strip() == "[image a.png] --image"


def test_json_is_one_object(terminal: Terminal) -> None:
    code, out, _ = terminal("ask", "--json", "--depth", "e.png", "--depth-scale", "0.01", "Far?")
    answer = json.loads(out)
    assert code == 0
    rated = {"confidence", "unsure"}
    assert set(answer) == {"answer", "finish_reason", *rated, "usage", "media"}
    assert (answer["confidence"], answer["unsure"]) == (pytest.approx(0.75), None)
    kinds = ("prompt", "completion", "media", "cached", "reasoning")
    sent = {"turns_left_out", "media_left_out", "pages_sent"}
    assert set(answer["usage"]) == {f"{kind}_tokens" for kind in kinds} | sent
    assert (answer["media"][0]["kind"], answer["media"][0]["name"]) == ("depth", "e.png")
    assert terminal.decoder.depth_scales == [0.01]


def test_depth_is_estimated_of_each_picture(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.assistant.encoder.depths = WALL
    shown = "image a.png, depth depth of a.png.png"
    asked = ("ask", "--image", "a.png", "--estimate-depth")
    assert terminal(*asked, "Far?")[1] == f"[{shown}] Far?\n"
    media = json.loads(terminal(*asked, "--json", "Far?")[1])["media"]
    assert [one["kind"] for one in media] == ["image", "depth"]
    monkeypatch.setenv("MICO_DEPTH_MODEL", "some/model")
    line = {"id": 1, "message": "Far?", "image": "a.png"}
    batch = write_lines(Path("b.jsonl"), line, {**line, "id": 2, "depth": "e.png"})
    lines = read_lines(terminal("ask", "--batch", batch, "--estimate-depth")[1])
    answers = [line["answer"] for line in lines]
    assert answers == [f"[{shown}] Far?", "[image a.png, depth e.png] Far?"]
    assert terminal("ask", "--image", "a.png", "Far?")[1] == "[image a.png] Far?\n"
    assert terminal.depth_models == ["mini", "mini", "some/model", None]


def test_an_answer_that_is_not_sure(terminal: Terminal) -> None:
    terminal.assistant.marks = Marks.read(0.5)
    for text, shown in (("perhaps", "perhaps (not sure)"), ("A cat?", "A cat?")):
        assert terminal("ask", "--image", "a.png", text)[1] == f"[image a.png] {shown}\n"
    assert terminal("ask", "perhaps")[1] == "[] perhaps\n"


def test_what_an_answer_rests_on(terminal: Terminal) -> None:
    _, out, _ = terminal("ask", "--image", "a.png", "--explain", "Hi")
    where = "      0% to 25% from the left, 0% to 25% from the top (1.5)"
    assert out.splitlines()[1:] == ["", "100%  a.png: fake", where]
    _, out, _ = terminal("ask", "--image", "a.png", "--explain", "--json", "Hi")
    assert json.loads(out)["explanation"] == EXPLAINED.model_dump(mode="json")


def test_options_reach_the_assistant(terminal: Terminal) -> None:
    sampled = ("--temperature", "0", "--min-p", "0.1", "--seed", "3")
    terminal("ask", "--json", "--max-tokens", "7", *sampled, "--stop", "x", "Hi")
    terminal("ask", "--engine", "llamacpp", "--quantization", "Q4_0", "--device", "cpu", "Hi")
    options, default = terminal.assistant.options
    assert (options.max_tokens, options.temperature, options.stop) == (7, 0, ("x",))
    assert (options.min_p, options.seed, options.n) == (0.1, 3, 1)
    assert default.max_tokens == GenerationOptions().max_tokens
    assert not default.model_fields_set  # so that the model's own defaults hold
    assert terminal.engines == [("auto", None, None, None), ("llamacpp", "Q4_0", "cpu", None)]


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_the_model_is_given_back(terminal: Terminal, json: list[str]) -> None:
    terminal("ask", *json, "refuse")
    assert terminal.assistant.closed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "nowhere.png", "What?"], r"nowhere\.png: no such file"),
        (["--image", "a.png", "--image", "broken.png", "?"], r"broken\.png: not a image"),
        (["--image", "a.png"], "a question is needed"),
        (["--max-tokens", "0", "What?"], "max_tokens: .*got 0"),
        (["--batch", "nowhere.jsonl"], r"nowhere\.jsonl: no such file"),
        (["--batch", "x.jsonl", "What?"], "--batch takes questions and media from its file"),
    ],
)
def test_an_error_is_one_line_before_any_model(
    terminal: Terminal, arguments: list[str], said: str
) -> None:
    code, out, err = terminal("ask", *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {said}.*\n", err)
    assert terminal.loads == []


NO = "there is no option"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ask", "--imge", "a.png", "?"], f"{NO} --imge; did you mean --image? See `mico-chat ask"),
        (["ask", "--picture", "a.png", "?"], f"{NO} --picture; see `mico-chat ask --help`"),
        (["serve", "--prot", "80"], f"{NO} --prot; did you mean --port? See `mico-chat serve --he"),
        (["ui", "--insecur"], f"{NO} --insecur; did you mean --insecure? See `mico-chat serve --h"),
        (["evaluate", "--modl=mini"], f"{NO} --modl; did you mean --model? See `mico-chat evaluat"),
        (["evaluate", "--limit", "x"], "argument --limit: 'x' is no whole number; see `mico-chat"),
        (["ask", "--seed", "x", "What?"], "invalid value for '--seed': "),
        (["asc"], "no such command 'asc'"),
        (["ask", "--engine", "ollama", "Hi"], "no engine 'ollama'; known are auto, llamacpp, "),
        (["ask", "--dtype", "half", "Hi"], "no dtype 'half'; known are float32, bfloat16, float16"),
        (["ask", "--model", "foldr", "What?"], "no model 'foldr': there is no such folder, "),
        (["ask", "--model", "./foldr", "What?"], "./foldr: there is no such folder"),
    ],
)
def test_what_is_mistyped_is_one_line(terminal: Terminal, words: list[str], said: str) -> None:
    code, out, err = terminal(*words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert terminal.loads == []


def test_bad_setting_is_one_line(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICO_MEDIA_MAX_BYTES", "many")
    code, _, err = terminal("ask", "What?")
    assert code == 2
    assert err.startswith("error: MediaLimits: max_bytes: ")
    assert err.count("\n") == 1


def test_batch_keeps_order_and_batches(terminal: Terminal, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "requests.jsonl",
        *({"id": n, "message": f"q{n}", "image": ["a.png"]} for n in range(4)),
        {"id": "last", "message": "mixed", "audio": "c.wav", "image": ["b.png"], "label": 1},
    )
    code, out, err = terminal("ask", "--batch", file, "--batch-size", "2")
    assert code == 0
    assert read_lines(out) == [
        *({"id": n, "answer": f"[image a.png] q{n}"} for n in range(4)),
        {"id": "last", "answer": "[audio c.wav, image b.png] mixed"},
    ]
    assert terminal.assistant.batches == [2, 2, 1]
    assert len(terminal.loads) == 1
    assert terminal.assistant.closed
    assert "5/5" in err


def test_bad_lines_stay_in_place(terminal: Terminal, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "requests.jsonl",
        {"id": 1, "message": "good"},
        {"id": 2, "message": "shown", "image": ["broken.png"]},
        "{nonsense",
        {"id": 4},
        "",
        {"id": 5, "message": "x", "images": ["a.png"]},
        {"id": 10, "mesage": "Hi"},
        {"id": 6, "message": "refuse"},
        {"id": 7, "message": "x", "image": [3]},
        {"id": 8, "message": "x", "video": ["nowhere.mp4"]},
        {"id": 9, "message": "good too"},
    )
    code, out, err = terminal("ask", "--batch", file)
    results = read_lines(out)
    assert code == 2
    assert "error: 8 of the lines" in err
    assert [result["id"] for result in results] == [1, 2, None, 4, 5, 10, 6, 7, 8, 9]
    answers = [result["answer"] for result in results if "answer" in result]
    assert answers == ["[] good", "[] good too"]
    errors = {result["id"]: result["error"] for result in results if "error" in result}
    assert errors[2] == "broken.png: not a image"
    assert re.match(r".*requests\.jsonl:3: not JSON", errors[None])
    assert errors[4].endswith("requests.jsonl:4: the key 'message' is missing")
    assert errors[5].endswith("requests.jsonl:6: unknown key 'images'; did you mean 'image'?")
    assert errors[10].endswith("unknown key 'mesage'; did you mean 'message'?")
    assert errors[6] == "refused"
    assert errors[7].endswith("requests.jsonl:9: image: expected a list of paths, got [3]")
    assert errors[8] == "nowhere.mp4: no such file"


def test_batch_paths_start_here_or_at_the_file(terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "questions"
    file = write_lines(
        folder / "requests.jsonl",
        {"id": 1, "message": "here", "image": ["a.png"]},
        {"id": 2, "message": "there", "image": ["g.png"]},
    )
    (folder / "g.png").write_bytes(b"bytes")
    code, out, _ = terminal("ask", "--batch", file, "--json")
    assert code == 0
    assert [line["media"][0]["name"] for line in read_lines(out)] == ["a.png", "g.png"]


def test_a_batch_without_a_good_line_loads_no_model(terminal: Terminal, tmp_path: Path) -> None:
    code, _, _ = terminal("ask", "--batch", write_lines(tmp_path / "bad.jsonl", "{"))
    assert code == 2
    assert terminal.loads == []


def test_missing_package_names_the_extra() -> None:
    """In a process of its own: a module that another test has run would stay."""
    code = "import sys; sys.modules['fastapi'] = None; "
    code += "from mico_chat.cli.main import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'fastapi'" in done.stderr
    assert "pip install 'mico-chat[server]'" in done.stderr


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_gets_recipe_and_overrides(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    from mico_training import estimate, stages

    seen: list[tuple[Path, list[str], None]] = []
    monkeypatch.setattr(stages, f"train_stage{stage}", lambda *given: seen.append(given))

    def of_file(command: str, *how: Any) -> tuple[list[str], None]:
        return [f"estimate of {command} on {how[2]} x {how[3]}"], None

    monkeypatch.setattr(estimate, "of_file", of_file)
    monkeypatch.setattr(estimate, "inputs", lambda *given: ["what it reads"])
    monkeypatch.setattr(models, "log_to_stderr", lambda: None)
    command = [f"train-stage{stage}", "--config", "run.yaml", "--set", "train.lr=1"]
    command += ["--set", "a.b=2"]
    said = f"estimate of train-stage{stage} on 1 x None\n"
    assert terminal(*command, "--dry-run") == (0, f"{said}what it reads\n", "")
    eight = terminal(*command, "--dry-run", "--gpus", "8", "--gpu", "h100-80gb")
    assert eight == (0, said.replace("1 x None", "8 x h100-80gb") + "what it reads\n", "")
    assert not seen
    assert terminal(*command) == (0, "", said)
    assert seen == [(Path("run.yaml"), ["train.lr=1", "a.b=2"], None)]
    if stage > 1:
        terminal(*command, "--load-in-4bit")
        assert seen[-1][1][-1] == "model.llm_quantization=nf4"
        code, _, error = terminal(*command, "--load-in-4bit", "--load-in-8bit")
        assert (code, "give one of them" in error) == (2, True)


@pytest.mark.parametrize("code", [0, 1])
def test_the_doctors_exit_code(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seen: list[Any] = []

    def run(model: str | None, options: Any, **how: Any) -> int:
        seen.append((model, options.engine, options.quantization, how["as_json"]))
        return code

    monkeypatch.setattr("mico_chat.cli.doctor.run", run)
    found, _, _ = terminal("doctor", "a/model", "--json", "--quantization", "nf4")
    assert (found, seen) == (code, [("a/model", "auto", "nf4", True)])
    assert terminal("doctor", "--engine", "vlm")[0] == 2


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version(terminal: Terminal, word: str) -> None:
    assert terminal(word) == (0, f"{__version__}\n", "")


def test_streams_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        flushed: list[str]

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    screen = Screen()
    screen.flushed = []
    asking = Asking(FakeDecoder(), lambda _: FakeAssistant(), GenerationOptions(), False, screen)
    asking.one("one two", [], Waiting(io.StringIO()))
    assert screen.flushed == ["[] ", "[] one ", "[] one two"]
    assert screen.getvalue() == "[] one two\n"
