"""A model behind a URL: its requests, refusals, faults and limits, and a whole run."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.cli.evaluate import main
from mico_chat.errors import ConfigError, ModelError
from mico_chat.evaluation.endpoint import Endpoint, at_once
from mico_chat.evaluation.task import TASKS, Item, Reply
from mico_chat.media import MediaFile, decode
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message, TextPart, from_openai
from tests.evaluation.lmms.drawn import drawn_items
from tests.evaluation.models.openai_endpoint import Answer, answering, body, parts, text
from tests.support.made import write_clip, write_sound


def ask(
    answer: Answer, items: Sequence[Item | str], **options: Any
) -> tuple[dict[int, Reply], list[dict[str, Any]]]:
    """The replies by place, and the requests that the server got."""
    with answering(answer) as (url, requests), closing(Endpoint("m", url, **options)) as model:
        asked = [Item("", question=one) if isinstance(one, str) else one for one in items]
        return dict(model.answers(TASKS["msvd-qa-chat"], asked, 7)), requests


def test_answers_come_by_their_places() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        number = int(text(request))
        time.sleep(0.02 * (number % 3))
        return 200, str(number * 2)

    found, requests = ask(answer, [str(n) for n in range(20)], api_key="secret", concurrency=5)
    assert found == {n: Reply("answer", str(2 * n)) for n in range(20)}
    first = requests[0]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("m", 7, 0)
    assert (first["key"], first["path"]) == ("Bearer secret", "/v1/chat/completions")


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refusal_is_no_wrong_answer(status: int, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        kinds = {part["type"] for part in parts(request)}
        return (200, "yes") if kinds == {"text"} else (status, "no such\nkind of part")

    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    shown = Item("", (MediaFile("depth", tmp_path / "x.png"),), "Which?")
    found, requests = ask(answer, [shown, "Hm?"])
    assert found[1] == Reply("answer", "yes")
    assert found[0].kind == "refused"
    assert found[0].text.startswith(f"Error code: {status} - ")
    assert "no such kind of part" in found[0].text
    assert len(requests) == 2, "a refusal is not asked again"


@pytest.mark.parametrize("faults", [[429, 429, 503], [0], [408, 409]])
def test_what_passes_is_asked_again(faults: list[int]) -> None:
    statuses = iter(faults)

    def answer(request: dict[str, Any]) -> tuple[int, str]:
        status = next(statuses, 200)
        return status, "busy" if status != 200 else "yes"

    found, requests = ask(answer, ["?"])
    assert found == {0: Reply("answer", "yes")}
    assert len(requests) == len(faults) + 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, "slow down"),
        (500, "out of memory"),
        (401, "wrong key"),
        (404, "no model m"),
        *((200, reply) for reply in (b"{}", b'{"choices": null}', b"<html>", b"[1]", b"", b"null")),
    ],
)
def test_a_fault_that_stays_ends_the_run(status: int, said: str | bytes) -> None:
    reason = said if isinstance(said, str) else ""
    pattern = rf"^'m' at http.* does not answer: .*{reason}.*to continue"
    with pytest.raises(ModelError, match=pattern) as e:
        ask(lambda _: (status, said), ["?"] * 9, retries=1, concurrency=2)
    assert "\n" not in str(e.value)


def test_an_empty_answer_is_an_answer_unless_it_was_cut() -> None:
    cut = json.dumps(body(200, "", "length")).encode()
    none = json.dumps(body(200, "")).replace('"content": ""', '"content": null').encode()
    replies = {"cut": cut, "silent": none}
    found, _ = ask(lambda request: (200, replies[text(request)]), [*replies])
    assert found[1] == Reply("answer", "")
    assert found[0].kind == "refused"
    assert found[0].text.startswith("the model wrote no answer within 7 tokens: ")
    assert found[0].text.endswith(" needs a higher --max-tokens")


@pytest.mark.parametrize(("said", "known"), [(0.25, 0.25), ("high", None), (None, None)])
def test_the_confidence_that_a_server_gives(said: object, known: float | None) -> None:
    whole = body(200, "yes")
    whole["choices"][0]["confidence"] = said
    found, _ = ask(lambda _: (200, json.dumps(whole).encode()), ["?"])
    assert found == {0: Reply("answer", "yes", known)}


def test_a_broken_medium_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "torn.mp4").write_bytes(b"torn")
    gone = Item("", (MediaFile("image", tmp_path / "gone.png"),), "?")
    torn = Item("", (MediaFile("video", tmp_path / "torn.mp4"),), "?")
    found, requests = ask(lambda _: (200, "yes"), [gone, torn, "?"], video_as_frames=4)
    assert found[2] == Reply("answer", "yes")
    assert found[0] == Reply("broken", f"{tmp_path}/gone.png: no such file")
    assert found[1].kind == "broken"
    assert "torn.mp4: " in found[1].text
    assert len(requests) == 1


def test_what_was_under_way_is_given_before_a_failure() -> None:
    failed = threading.Event()

    def ask(number: int) -> int:
        if number == 3:
            failed.set()
            raise ValueError("no more")
        if number == 2:  # this call ends after the failure of the next
            assert failed.wait(10)
        return number * number

    kept: list[tuple[str, int]] = []
    with pytest.raises(ValueError, match="no more"):
        kept.extend(at_once(ask, ((f"n{n}", n) for n in range(100)), 2))
    assert sorted(kept) == [("n0", 0), ("n1", 1), ("n2", 4)]


def test_no_more_than_so_many_are_taken_at_a_time() -> None:
    taken = []

    def numbered() -> Iterator[tuple[int, int]]:
        for n in range(20):
            taken.append(n)
            yield n, n

    for done, _ in enumerate(at_once(lambda n: n, numbered(), 4), 1):
        assert len(taken) - done < 4
    assert len(taken) == 20


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wire")
    paths = {n: folder / n for n in ("a.png", "a.wav", "a.mp3", "a.ogg", "a.mp4", "depth.png")}
    Image.new("RGB", (20, 10), (200, 30, 30)).save(paths["a.png"])
    Image.fromarray(np.full((10, 20), 1500, np.uint16)).save(paths["depth.png"])
    write_sound(str(paths["a.wav"]), "pcm_s16le")
    write_sound(str(paths["a.mp3"]), "libmp3lame")
    write_sound(str(paths["a.ogg"]), "libopus", rate=48_000)
    write_clip(str(paths["a.mp4"]), "libx264", n=40, sound="aac")
    return paths


def endpoint(**options: Any) -> Endpoint:
    return Endpoint("m", "http://127.0.0.1:9/v1", **options)


def sent(wire: Endpoint, kind: Kind, source: Path | bytes) -> list[dict[str, Any]]:
    """The parts of a message about one medium, without the question, which must be the last."""
    (message,) = wire.messages([Message.user(MediaFile(kind, source), "What?")])
    assert message["role"] == "user"
    *parts, question = message["content"]
    assert question == {"type": "text", "text": "What?"}
    return list(parts)


def test_our_own_server_understands_all_of_it(media: dict[str, Path]) -> None:
    kinds: list[tuple[Kind, str]] = [("image", "a.png"), ("audio", "a.wav"), ("audio", "a.ogg")]
    kinds += [("video", "a.mp4"), ("depth", "depth.png"), ("normal", "a.png")]
    asked = Message.user(*(MediaFile(kind, media[name]) for kind, name in kinds), "What?")
    with closing(endpoint()) as wire:
        (shown,) = wire.messages([asked])
    types = ["image_url", "input_audio", "audio_url", "video_url", "depth_url", "normal_url"]
    assert [part["type"] for part in shown["content"]] == [*types, "text"]
    (got,) = from_openai([shown])
    assert [(part.kind, part.source) for part in got.files] == [
        (kind, media[name].read_bytes()) for kind, name in kinds
    ]
    assert got.content[-1] == TextPart("What?")


def test_a_video_as_frames_is_spread_over_all_of_it(media: dict[str, Path]) -> None:
    with closing(endpoint(video_as_frames=4)) as wire:
        parts = sent(wire, "video", media["a.mp4"])
        assert len(sent(wire, "image", media["a.png"])) == 1
    assert [part["type"] for part in parts] == ["image_url"] * 4
    greys = []
    for part in parts:
        data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (64, 48)
            greys.append(np.asarray(picture.convert("L"))[30:].mean())
    # The brightness grows with time, from 20 to 215.
    assert greys == sorted(greys)
    assert greys[0] < 60
    assert greys[-1] > 170


def test_a_sound_as_wav_is_what_was_heard(media: dict[str, Path]) -> None:
    with closing(endpoint(audio_as_wav=True)) as wire:
        (part,) = sent(wire, "audio", media["a.ogg"])
        (same,) = sent(wire, "audio", media["a.mp3"])
    assert same["input_audio"]["format"] == "mp3"
    assert base64.b64decode(same["input_audio"]["data"]) == media["a.mp3"].read_bytes()
    assert part["input_audio"]["format"] == "wav"
    heard = decode(MediaFile("audio", base64.b64decode(part["input_audio"]["data"])))
    true = decode(MediaFile("audio", media["a.ogg"]))
    np.testing.assert_allclose(heard.samples, true.samples, atol=2**-14)  # type: ignore[union-attr]


def sighted(request: dict[str, Any]) -> tuple[int, str]:
    """Calls every picture red, and refuses sounds."""
    kinds = [part["type"] for part in parts(request)]
    if "input_audio" in kinds:
        return 400, "m does not listen"
    return 200, "Red." if "image_url" in kinds else "No idea."


def test_a_run_over_an_endpoint_and_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "mine")
    items = drawn_items(tmp_path, n=4)
    with answering(sighted) as (url, requests):
        words = ["--base-url", url, "--model", "m", "--api-key-env", "MY_KEY"]
        assert main([str(items), *words, "--output", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert {request["key"] for request in requests} == {"Bearer mine"}
    printed = capsys.readouterr().out
    assert "| skill | n | chance | full | withheld | swapped |" in printed
    assert f"m, over {url};" in printed
    assert "| colour | 4 | 25 % | 25 % (5-70) | 0 % (0-49) | 25 % (5-70) |" in printed
    assert "| sound | 4 |  | 4 refused | 0 % (0-49) | 4 refused |" in printed
    assert "8 refused and not counted: sound-0.wav (full): Error code: 400 - m does " in printed
    assert main(["--rescore", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == printed, "without the endpoint, which has gone"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="--api-key-env names MY_KEY, which is not set"):
        main([str(items), *words])
