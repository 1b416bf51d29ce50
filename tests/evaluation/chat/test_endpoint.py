"""A model behind a URL: refusals, faults, limits, replies of no use; and a run over all of it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mico_chat.errors import ConfigError, ModelError
from mico_chat.evaluation.chat.endpoint import Endpoint
from mico_chat.evaluation.chat.model import Answered, Refused, Reply, Unreadable
from mico_chat.evaluation.command import main
from mico_chat.evaluation.tasks.store import PREDICTIONS
from mico_chat.media import MediaFile
from mico_chat.messages import Message
from tests.evaluation.openai_endpoint import Answer, answering, body, parts, text
from tests.made import write_sound


def ask(
    answer: Answer, messages: Sequence[Message], **options: Any
) -> tuple[dict[int, Reply], list[dict[str, Any]]]:
    """The replies by place, and the requests that the server got."""
    with answering(answer) as (url, requests), closing(Endpoint("m", url, **options)) as model:
        return dict(model.answers([[message] for message in messages], 7)), requests


def test_answers_come_by_their_places() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        number = int(text(request))
        time.sleep(0.02 * (number % 3))
        return 200, str(number * 2)

    asked = [Message.user(str(n)) for n in range(20)]
    found, requests = ask(answer, asked, api_key="secret", concurrency=5)
    assert found == {n: Answered(str(2 * n)) for n in range(20)}
    first = requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 7, 0)
    assert (first["key"], first["path"]) == ("Bearer secret", "/v1/chat/completions")


def test_no_more_requests_at_a_time_than_asked_for() -> None:
    lock, running, most = threading.Lock(), [0], [0]
    together = threading.Barrier(3)  # fewer at a time would wait here

    def answer(request: dict[str, Any]) -> tuple[int, str]:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(60)
        with lock:
            running[0] -= 1
        return 200, "yes"

    ask(answer, [Message.user("?")] * 12, concurrency=3)
    assert most == [3]


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refusal_is_no_wrong_answer(status: int) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        kinds = {part["type"] for part in parts(request)}
        return (200, "yes") if kinds == {"text"} else (status, "no such\nkind of part")

    shown = Message.user(MediaFile("depth", b"\x89PNG"), "Which?")
    found, requests = ask(answer, [shown, Message.user("Hm?")])
    assert found[1] == Answered("yes")
    assert isinstance(found[0], Refused)
    assert found[0].reason.startswith(f"Error code: {status} - ")
    assert "no such kind of part" in found[0].reason
    assert len(requests) == 2, "a refusal is not asked again"


@pytest.mark.parametrize("faults", [[429, 429, 503], [500], [0], [408, 409]])
def test_what_passes_is_asked_again(faults: list[int]) -> None:
    statuses = iter(faults)

    def answer(request: dict[str, Any]) -> tuple[int, str]:
        status = next(statuses, 200)
        return status, "busy" if status != 200 else "yes"

    found, requests = ask(answer, [Message.user("?")])
    assert found == {0: Answered("yes")}
    assert len(requests) == len(faults) + 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(429, "slow down"), (500, "out of memory"), (401, "wrong key"), (404, "no model m")],
)
def test_what_does_not_pass_ends_the_run(status: int, said: str) -> None:
    with pytest.raises(
        ModelError, match=rf"^'m' at http.* does not answer: .*{said}.*to continue"
    ) as e:
        ask(lambda _: (status, said), [Message.user("?")] * 9, retries=1, concurrency=2)
    assert "\n" not in str(e.value)


def test_nobody_at_the_url() -> None:
    with (
        closing(Endpoint("m", "http://127.0.0.1:9/v1", retries=0)) as model,
        pytest.raises(ModelError, match="does not answer: Connection error"),
    ):
        list(model.answers([[Message.user("?")]], 5))


@pytest.mark.parametrize(
    "reply",
    [b"{}", b'{"choices": []}', b'{"choices": null}', b"<html>", b"[1]", b'"yes"', b"", b"null"],
)
def test_a_reply_without_an_answer_ends_the_run(reply: bytes) -> None:
    with pytest.raises(ModelError, match="does not answer"):
        ask(lambda _: (200, reply), [Message.user("?")], retries=0)


def test_an_empty_answer_is_an_answer_unless_it_was_cut() -> None:
    cut = json.dumps(body(200, "", "length")).encode()
    none = json.dumps(body(200, "")).replace('"content": ""', '"content": null').encode()
    found, _ = ask(
        lambda request: (200, cut if text(request) == "cut" else none),
        [Message.user("cut"), Message.user("silent")],
    )
    assert found[1] == Answered("")
    assert found[0] == Refused(
        "the model wrote no answer within 7 tokens: a model that thinks first needs a "
        "higher --max-tokens"
    )


def test_a_medium_that_is_not_there_is_not_sent(tmp_path: Path) -> None:
    gone = Message.user(MediaFile("image", tmp_path / "gone.png"), "?")
    found, requests = ask(lambda _: (200, "yes"), [gone, Message.user("?")])
    assert found[1] == Answered("yes")
    assert isinstance(found[0], Unreadable)
    assert "gone.png: no such file" in found[0].reason
    assert len(requests) == 1


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of colours to see, tones to hear, and a sum."""
    folder = tmp_path_factory.mktemp("items")
    rows = []
    for number, colour in enumerate(("red", "green", "blue") * 4):
        name = f"{number}.png"
        Image.new("RGB", (8, 8 + number), colour).save(folder / name)
        media = [{"kind": "image", "path": name}]
        rows.append(("colour", "Which colour?", media, colour))
    for hertz in (220, 440):
        write_sound(str(folder / f"{hertz}.wav"), "pcm_s16le", seconds=0.1, hertz=hertz)
        media = [{"kind": "audio", "path": f"{hertz}.wav"}]
        rows.append(("tone", "Which tone?", media, str(hertz)))
    rows.append(("text", "Two and two?", [], "four"))
    lines = [
        json.dumps({"id": str(n), "skill": s, "message": q, "media": m, "accept": [a]})
        for n, (s, q, m, a) in enumerate(rows)
    ]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "items.jsonl"


def sighted(request: dict[str, Any]) -> tuple[int, str]:
    """Calls every picture red, refuses sounds, and can add."""
    kinds = [part["type"] for part in parts(request)]
    if "input_audio" in kinds:
        return 400, "m does not listen"
    return 200, "Red." if "image_url" in kinds else "Four."


def test_a_run_over_an_endpoint_and_its_report(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "mine")
    with answering(sighted) as (url, requests):
        words = ["--base-url", url, "--model", "m", "--api-key-env", "MY_KEY"]
        assert main([str(items), *words, "--output", str(tmp_path), "--workers", "1"]) == 0
    assert {request["key"] for request in requests} == {"Bearer mine"}
    printed = capsys.readouterr().out
    assert "| skill | n | chance | full | withheld | swapped |" in printed
    assert f"m, over {url};" in printed
    assert "| colour | 12 |  | 33 % (14-61) | 0 % (0-24) | 33 % (14-61) |" in printed
    assert "| tone | 2 |  | 2 refused | 0 % (0-66) | 2 refused |" in printed
    assert "| text | 1 |  | 100 % (21-100) |  |  |" in printed
    assert "4 refused and not counted: 12 (full): Error code: 400 - m does " in printed
    assert "m does not listen" in printed
    assert main(["--rescore", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed, "without the endpoint, which has gone"


@pytest.mark.parametrize("control", ["without-grid", "without-concepts", "base-llm"])
def test_an_endpoint_has_no_parts_to_switch_off(items: Path, control: str) -> None:
    with pytest.raises(ConfigError, match=rf"^the control {control} needs the model in this proc"):
        main([str(items), "--base-url", "http://127.0.0.1:9/v1", "--controls", "full", control])


def test_a_key_that_is_named_must_be_there(items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="--api-key-env names MY_KEY, which is not set"):
        main([str(items), "--base-url", "http://127.0.0.1:9/v1", "--api-key-env", "MY_KEY"])


def test_a_run_that_failed_goes_on(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = itertools.count()

    def failing(request: dict[str, Any]) -> tuple[int, str]:
        return sighted(request) if next(count) < 8 else (401, "the key has expired")

    answer: list[Answer] = [failing]
    with answering(lambda request: answer[0](request)) as (url, requests):
        words = [str(items), "--base-url", url, "--model", "m", "--output", str(tmp_path)]
        words += ["--batch-size", "2", "--workers", "1"]
        with pytest.raises(ModelError, match="the key has expired"):
            main(words)
        kept = (tmp_path / "items" / PREDICTIONS).read_text().count('"kind": "answer"')
        assert kept == 8
        answer[0] = sighted
        del requests[:]
        assert main(words) == 0
        assert len(requests) == 15 + 14 + 14 - 8
        del requests[:]
        assert main(words) == 0
        assert requests == [], "a finished run asks nothing"
    assert "| colour | 12 |  | 33 %" in capsys.readouterr().out


@pytest.mark.slow
def test_sigkill(items: Path, tmp_path: Path) -> None:
    def slow(request: dict[str, Any]) -> tuple[int, str]:
        time.sleep(0.05)
        return sighted(request)

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with answering(slow) as (url, requests):
        words = [str(items), "--base-url", url, "--model", "m"]
        words += ["--batch-size", "2", "--workers", "1", "--output"]
        assert main([*words, str(tmp_path / "whole")]) == 0
        asked = len(requests)
        process = subprocess.Popen(
            [sys.executable, "-m", "mico_chat.cli", "evaluate", *words, str(tmp_path / "killed")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        path = tmp_path / "killed" / "items" / PREDICTIONS
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            if path.is_file() and path.read_bytes().count(b'"number"') > 5:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait(60) == -signal.SIGKILL
        kept = path.read_bytes().count(b'"number"')
        assert 5 < kept < asked
        del requests[:]
        assert main([*words, str(tmp_path / "killed")]) == 0
        assert len(requests) <= asked - kept + 1, "at most the torn line is asked again"
    rows = [
        json.loads((tmp_path / name / "results.json").read_text())["skills"]["items"]
        for name in ("whole", "killed")
    ]
    assert rows[0]["skills"] == rows[1]["skills"]
    assert rows[0]["refused"]["count"] == rows[1]["refused"]["count"] == 4
