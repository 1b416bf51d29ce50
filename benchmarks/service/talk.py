"""How soon a spoken question is answered in sound, over ``/v1/realtime`` as fast as one speaks.

Each of the questions is a session's turn: clean, with a pause inside, or with noise. The voices are
hibari's, espeak-ng's, and persons that read names for a drawing program (Tux Paint). Sound is sent
in pieces of 20 ms, and silence behind it, until the answer is whole.
"""

import asyncio
import base64
import io
import json
import random
import statistics
import time
import wave
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.harness import Panel, Ratio, Report
from benchmarks.media import photograph
from benchmarks.model.reading import word_errors
from benchmarks.processes import service
from benchmarks.service.users import MAY_RISE, Seen, by_minute, lines_of
from mico_chat.evaluation.metrics.answers import normal_words
from mico_chat.speech import Voices
from mico_chat.speech.hearing import Resampler
from mico_chat.speech.sound import RATES, pcm16, to_raw
from mico_world.sounds.recordings import _speak, decode_file
from mico_world.sources import source

RATE, PIECE_S = 24_000, 0.02
PAUSES_S = (0.3, 0.4, 0.5, 0.6, 0.65)
NOISES_DB = (20.0, 10.0)
UNHEARD_S, PATIENCE_S = 5.0, 60.0
"""Seconds after a question: if it is not taken for speech by then, it was not heard. And the
seconds in which the next event of an answer has to come."""
STARTED = "input_audio_buffer.speech_started"
LOUD = 0.02
"""The part of full scale from which speech is heard: its first sound begins there."""
BEGUN = (
    ("When you look at", "this picture, what do you see?"),
    ("Please tell me,", "which animal is it?"),
    ("I would like to know", "what colour it is."),
    ("In one sentence,", "what happens there?"),
    ("If you can see it,", "how many birds are there?"),
    ("What is the name", "of this fruit?"),
    ("Can you hear", "what I am saying?"),
    ("Is there a dog,", "or is it a cat?"),
)
VOICES = ("en-us", "en-us+f3", "en-us+m3")

Sound = NDArray[np.float32]


@dataclass
class Question:
    """A text and its sound (n,) at 24,000 Hz; ``kind`` is what is hard about it."""

    kind: str
    text: str
    sound: Sound
    pause_s: float = 0.0


@dataclass
class Heard:
    """When events of a turn came, in seconds after the end of speech, and the answer's sound."""

    question: Question
    sound_s: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    stops: int = 0
    transcript: str = ""
    errors: list[str] = field(default_factory=list)


def questions(n: int, seed: int) -> list[Question]:
    """A quarter of them clean, with a pause, and with each noise."""
    rng = np.random.default_rng(seed)
    voice = Voices().get()

    def hibari(text: str) -> Sound:
        return trimmed(np.concatenate(list(voice.say(text))))

    def espeak(text: str) -> Sound:
        said = np.asarray(_speak(VOICES[len(text) % 3], text), np.float32)
        return trimmed(Resampler(16_000, RATE)(said, last=True))

    folder = source("tuxpaint-stamps-default")
    texts = {
        path: path.with_name(path.name.replace("_desc.ogg", ".txt"))
        for path in folder.rglob("*_desc.ogg")
    }
    read = sorted(path for path, text in texts.items() if text.is_file())
    random.Random(seed).shuffle(read)
    found = []
    for number in range(n):
        kind = ("clean", "pause", *(f"{db:g} dB" for db in NOISES_DB))[number % 4]
        halves = BEGUN[number // 4 % len(BEGUN)]
        speaker = number // 4 % 3
        pause_s = 0.0
        if kind == "pause":
            pause_s = PAUSES_S[number // 4 % len(PAUSES_S)]
            say = (hibari, espeak)[number // 4 % 2]
            parts = [say(halves[0]), np.zeros(int(pause_s * RATE), np.float32), say(halves[1])]
            text, sound = " ".join(halves), np.concatenate(parts)
        elif speaker == 2:
            path = read.pop()
            text = texts[path].read_text().split("\n")[0]
            sound = trimmed(Resampler(16_000, RATE)(decode_file(path, 5.0), last=True))
        else:
            text = " ".join(halves)
            sound = (hibari, espeak)[speaker](text)
        if kind.endswith("dB"):
            level = np.sqrt(np.mean(sound**2)) * 10 ** (-float(kind.split()[0]) / 20)
            sound = sound + rng.normal(0, level, len(sound)).astype(np.float32)
        found.append(Question(kind, text, sound.clip(-1, 1), pause_s))
    return found


def trimmed(sound: Sound) -> Sound:
    """Without the silence at both ends: its end is the end of speech."""
    loud = np.flatnonzero(np.abs(sound) > LOUD * np.abs(sound).max())
    return sound[loud[0] : loud[-1] + 1]


class Talk:
    """A session that hears questions, one after the other."""

    def __init__(self, socket: ClientConnection, form: str) -> None:
        self._socket, self._form = socket, form

    async def begin(self, turn_detection: str) -> None:
        audio = {
            "input": {
                "format": {"type": self._form},
                "transcription": {"language": "en"},
                "turn_detection": {"type": turn_detection},
            }
        }
        await self._send("session.update", session={"type": "realtime", "audio": audio})
        while json.loads(await self._socket.recv())["type"] != "session.updated":
            pass

    async def ask(self, question: Question, frame: str | None, *, listen: bool = True) -> Heard:
        """Say a question, show ``frame`` while it is said, and wait for the whole answer.

        With ``listen`` also until its sound has been played, as whoever asks again has heard it.
        """
        heard, done = Heard(question), asyncio.Event()
        speaking = asyncio.create_task(self._say(question.sound, done, frame))
        ended = time.perf_counter() + len(question.sound) / RATE
        try:
            async with asyncio.timeout(len(question.sound) / RATE + UNHEARD_S) as limit:
                await self._listen(heard, ended, limit)
            if listen and SOUND in heard.first:
                played = ended + heard.first[SOUND] + heard.sound_s
                await asyncio.sleep(played - time.perf_counter())
        except TimeoutError:
            if STARTED in heard.first:
                raise RuntimeError(f"no end of an answer: {heard}") from None
        finally:
            done.set()
            await speaking
        return heard

    async def _listen(self, heard: Heard, ended: float, limit: asyncio.Timeout) -> None:
        while True:
            event = json.loads(await self._socket.recv())
            kind, at = event["type"], time.perf_counter() - ended
            heard.errors += [event["error"]["message"]] if kind == "error" else []
            heard.stops += kind == "input_audio_buffer.speech_stopped"
            if kind.endswith(("speech_stopped", "transcription.completed")):
                heard.first[kind] = at  # of several the last
            heard.first.setdefault(kind, at)
            if kind == SOUND:
                heard.sound_s += len(base64.b64decode(event["delta"])) / (2 * RATE)
            if STARTED in heard.first:
                limit.reschedule(asyncio.get_running_loop().time() + PATIENCE_S)
            if kind.endswith("transcription.completed"):
                heard.transcript += " " + event["transcript"]
                if not event["transcript"]:
                    return  # nothing was understood, and nothing is answered
            if kind == "response.done" and at > 0:
                return

    async def _say(self, sound: Sound, done: asyncio.Event, frame: str | None) -> None:
        rate = RATES[self._form]
        raw = to_raw(Resampler(RATE, rate)(sound, last=True), self._form)
        silence = to_raw(np.zeros(int(PIECE_S * rate), np.float32), self._form)
        pieces = [raw[at : at + len(silence)] for at in range(0, len(raw), len(silence))]
        start = time.perf_counter()
        if frame is not None:
            content = [{"type": "input_image", "image_url": frame}]
            item = {"type": "message", "role": "user", "content": content}
            await self._send("conversation.item.create", item=item)
        sent = 0
        while sent < len(pieces) or not done.is_set():
            piece = pieces[sent] if sent < len(pieces) else silence
            audio = base64.b64encode(piece).decode()
            await self._send("input_audio_buffer.append", audio=audio)
            sent += 1
            await asyncio.sleep(max(0.0, start + sent * PIECE_S - time.perf_counter()))

    async def interrupt(self, question: Question, stop: Sound) -> float:
        """Ask, say "stop" at the answer's first sound, and wait until it is heard; seconds."""
        await self.ask(question, None, listen=False)
        done = asyncio.Event()
        start = time.perf_counter()
        speaking = asyncio.create_task(self._say(stop, done, None))
        while json.loads(await self._socket.recv())["type"] != STARTED:
            pass
        seconds = time.perf_counter() - start
        done.set()
        await speaking
        return seconds

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **fields}))


def realtime(url: str) -> str:
    return f"ws{url.removeprefix('http')}/v1/realtime"


async def session(
    url: str, asked: Sequence[Question], form: str, turns: str, frame: str | None
) -> list[Heard]:
    async with connect(realtime(url), max_size=None, proxy=None) as socket:
        talk = Talk(socket, form)
        await talk.begin(turns)
        return [await talk.ask(one, frame) for one in asked]


def by_file(url: str, asked: Sequence[Question], rate: int) -> int:
    """The wrong words of the same sounds as files of so many Hz."""
    errors = 0
    for one in asked:
        file = io.BytesIO()
        with wave.open(file, "wb") as written:
            written.setparams((1, 2, rate, 0, "NONE", ""))
            written.writeframes(pcm16(Resampler(RATE, rate)(one.sound, last=True)))
        form = {"model": "whisper-1", "language": "en"}
        sent = {"file": ("speech.wav", file.getvalue())}
        said = httpx.post(f"{url}/v1/audio/transcriptions", data=form, files=sent, timeout=None)
        errors += word_errors(one.text, said.raise_for_status().json()["text"])
    return errors


def measure(n: int = 40, seed: int = 0, turns: str = "semantic_vad") -> Report:
    asked = questions(n, seed)
    words = sum(len(normal_words(one.text)) for one in asked)
    picture = "data:image/jpeg;base64," + base64.b64encode(photograph((640, 480), seed)).decode()
    pcm, narrow = "audio/pcm", "audio/pcmu"
    with ExitStack() as stack:
        url = service(stack)

        def run(form: str = pcm, frame: str | None = None, at_once: int = 1) -> list[Heard]:
            async def all_sessions() -> list[list[Heard]]:
                parts = [asked[i::at_once] for i in range(at_once)]
                return await asyncio.gather(*(session(url, p, form, turns, frame) for p in parts))

            return [one for part in asyncio.run(all_sessions()) for one in part]

        asyncio.run(session(url, asked[:2], pcm, turns, picture))  # what loads, loads now
        ways = {"one session": run(), "with a camera's frame": run(frame=picture)}
        ways |= {f"{k} sessions at once": run(at_once=k) for k in (2, 4)}
        ways["of 8,000 Hz"] = run(narrow)
        file_errors = [by_file(url, asked, rate) for rate in (RATE, RATES[narrow])]
        stops = asyncio.run(interruptions(url, asked[:8:4], turns))
    rows, ratios = [], list[Ratio]()
    for name, heard in ways.items():
        late = [one.first[SOUND] for one in heard if SOUND in one.first]
        p50, p95 = np.quantile(late, (0.5, 0.95))
        parts = [f"{statistics.median(share(one, k) for one in heard):.2f}" for k in range(4)]
        errors = sum(word_errors(one.question.text, one.transcript) for one in heard)
        wrong = f"{errors / words:.1%}"
        rows.append([name, f"{p50:.2f}", f"{p95:.2f}", *parts, wrong, f"{len(late)} of {n}"])
        for which, goal in GOALS.get(name, {}).items():
            value = {"p50": p50, "p95": p95}[which]
            ratios.append(Ratio.bound(f"{name}, {which}", value, "s", goal))
    paused = [one for one in ways["one session"] if one.question.pause_s]
    false = sum(one.stops > 1 for one in paused)
    ratios.append(Ratio.bound("speech heard over an answer", max(stops), "s", 0.2))
    found = {"rows": rows, "cut": false, "paused": len(paused), "stop": f"{max(stops):.2f}"}
    files = [f"{errors / words:.1%}" for errors in file_errors]
    return Report({**found, "files": files, "words": words}, ratios)


def half_hour(minutes: float = 30.0, seed: int = 0, turns: str = "semantic_vad") -> Report:
    """One session for so long: does the service's memory or the time to the first sound rise?"""
    with ExitStack() as stack:
        seen = Seen(seconds=60 * minutes)
        heard = asyncio.run(_talk_on(service(stack), questions(40, seed), turns, seen))
    mute = [one for one in heard if STEPS[2] in one.first and SOUND not in one.first]
    found = by_minute(seen)
    rows, ratios = lines_of(found, minutes / 6, "one talk")
    panels = [Panel("minute", name, {"": (found["minute"], found[name])}) for name in MAY_RISE]
    why = sorted({error for one in mute for error in one.errors})
    values = {"rows": rows, "warm": minutes / 6, "answers": len(seen.answers)}
    values |= {"asked": len(heard), "mute": len(mute), "why": why}
    return Report(values, ratios, {"talk-half-hour": panels})


async def _talk_on(url: str, asked: Sequence[Question], turns: str, seen: Seen) -> list[Heard]:
    found = []
    async with connect(realtime(url), max_size=None, proxy=None) as socket:
        talk = Talk(socket, "audio/pcm")
        await talk.begin(turns)
        watching = asyncio.create_task(seen.watch())
        for question in cycle(asked):
            found.append(await talk.ask(question, None))
            late = found[-1].first.get(SOUND)
            if late is not None:
                seen.answers.append((seen.now(), late, late, 0))
            if seen.now() > seen.seconds:
                break
        watching.cancel()
    return found


SOUND = "response.output_audio.delta"
STEPS = (
    "input_audio_buffer.speech_stopped",
    "conversation.item.input_audio_transcription.completed",
    "response.output_audio_transcript.delta",
    SOUND,
)
GOALS = {
    "one session": {"p50": 1.2, "p95": 2.0},
    "with a camera's frame": {"p50": 1.6},
}


def share(heard: Heard, step: int) -> float:
    """The seconds of a step alone: turn, hearing, thinking, speaking."""
    at = [heard.first.get(name, 0.0) for name in STEPS]
    return at[step] - (at[step - 1] if step else 0.0)


async def interruptions(url: str, asked: Sequence[Question], turns: str) -> list[float]:
    stop = trimmed(np.concatenate(list(Voices().get().say("Stop!"))))
    found = []
    for one in asked:
        async with connect(realtime(url), max_size=None, proxy=None) as socket:
            talk = Talk(socket, "audio/pcm")
            await talk.begin(turns)
            found.append(await talk.interrupt(one, stop))
    return found
