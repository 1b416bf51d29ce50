"""A chat model behind an OpenAI-compatible URL: vLLM, ``mico-chat serve``, a service.

Media are sent as the parts that vLLM and this project's server share (``image_url``, ``video_url``,
``audio_url``, ..); WAV and MP3 sounds are sent as OpenAI's ``input_audio``. If the endpoint refuses
a request (status 400, 413, 415, 422, ..), its item is *refused*. After a temporary fault, OpenAI's
client tries again with growing waits. If the fault stays, the run ends, and can continue later.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import PIL.Image

from mico_chat.errors import ConfigError, MediaError, MissingExtraError, ModelError
from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import Item, Model, Reply, Task
from mico_chat.media import Audio, Image, MediaDecoder, MediaFile, MediaLimits, Video
from mico_chat.media.file import mime_type
from mico_chat.media.medium import Medium
from mico_chat.messages import Message, Part, to_openai

DEFAULT_KEY = "OPENAI_API_KEY"
TIMEOUT_S = 600.0
"""A long video on a busy server takes minutes."""
RETRIES = 6
"""OpenAI's client waits 0.5, 1, 2, 4, 8 and 8 s, or as long as the server asks for."""
NOT_REFUSED = (401, 403, 404, 408, 409, 429)
"""Statuses that end the run: a wrong key or model name, and temporary faults."""
AUDIO_FORMATS = {"audio/wav": "wav", "audio/mpeg": "mp3"}
JPEG_QUALITY = 95

Key = TypeVar("Key")
Asked = TypeVar("Asked")
Given = TypeVar("Given")


def key_of(variable: str | None, flag: str = "--api-key-env") -> str:
    """The key in the environment variable that ``flag`` names; without a key, ``none``."""
    if variable is not None and not os.environ.get(variable):
        raise ConfigError(f"{flag} names {variable}, which is not set")
    return os.environ.get(variable or DEFAULT_KEY) or "none"


def at_once(
    ask: Callable[[Asked], Given], items: Iterable[tuple[Key, Asked]], concurrency: int
) -> Iterator[tuple[Key, Given]]:
    """Yields each result with its key as soon as it is ready.

    After an error, the calls that have started end first, then the error is raised.
    """
    running: dict[Future[Given], Key] = {}

    def finished() -> Iterator[tuple[Key, Given]]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        if any(future.exception() for future in done):
            done, _ = wait(running)
        for future in sorted(done, key=lambda future: future.exception() is not None):
            yield running.pop(future), future.result()

    with ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool:
        for key, item in items:
            running[pool.submit(ask, item)] = key
            if len(running) >= concurrency:
                yield from finished()
        while running:
            yield from finished()


class Endpoint(Model):
    """A model ``name`` at the address ``base_url``, which ends in ``/v1``; None is OpenAI's.

    With ``video_as_frames``, that number of stills from the whole video replaces its file. With
    ``audio_as_wav``, sounds that are neither WAV nor MP3 are sent as WAV, 16 kHz mono.
    """

    def __init__(
        self,
        name: str,
        base_url: str | None,
        api_key: str = "none",
        *,
        concurrency: int = 8,
        video_as_frames: int | None = None,
        audio_as_wav: bool = False,
        workers: int = 1,
        retries: int = RETRIES,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingExtraError("a chat model behind a URL", "eval") from error
        patience: dict[str, Any] = {"timeout": TIMEOUT_S, "max_retries": retries}
        self._client = OpenAI(api_key=api_key, base_url=base_url, **patience)
        self.name = name
        self.base_url = base_url or str(self._client.base_url)
        self.concurrency = concurrency
        self._video_as_frames = video_as_frames
        self._audio_as_wav = audio_as_wav
        limits = MediaLimits().model_copy(update={"max_frames": video_as_frames or 1})
        self._decoder = MediaDecoder(limits, workers=workers)

    def header(self) -> Record:
        how = [f"over {self.base_url}"]
        if self._video_as_frames is not None:
            how.append(f"videos as {self._video_as_frames} stills without sound")
        if self._audio_as_wav:
            how.append("sounds as WAV")
        return {"model": self.name, "weights": None, "how": ", ".join(how)}

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        asked = ((place, item.messages()) for place, item in enumerate(items))
        return at_once(lambda one: self._answer(one, max_tokens), asked, self.concurrency)

    def ask_all(
        self, conversations: Sequence[Sequence[Message]], max_tokens: int | None = None
    ) -> list[Reply]:
        """The replies to conversations, in their order; ``concurrency`` are asked at once.

        Raises:
            ModelError: the endpoint does not answer.
        """
        asked = enumerate(conversations)
        found = dict(at_once(lambda one: self._answer(one, max_tokens), asked, self.concurrency))
        return [found[place] for place in range(len(conversations))]

    def _answer(self, conversation: Sequence[Message], max_tokens: int | None) -> Reply:
        try:
            messages = self.messages(conversation)
        except MediaError as error:
            return Reply("broken", str(error))
        return self.ask(messages, max_tokens)

    def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int | None = None) -> Reply:
        """The greedy answer to messages of OpenAI's format, or the reason of a refusal.

        Raises:
            ModelError: the endpoint does not answer.
        """
        from openai.types.chat import ChatCompletion

        limit: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        shown: Any = messages  # has more kinds than OpenAI's own
        create = partial(self._client.chat.completions.create, model=self.name, messages=shown)
        done = self._called(partial(create, temperature=0, **limit))
        if isinstance(done, Reply):
            return done
        if not isinstance(done, ChatCompletion) or not done.choices:
            raise self._failed(f"its answer has no choices: {str(done)[:80]!r}")
        choice = done.choices[0]
        confidence = (choice.model_extra or {}).get("confidence")  # a server of mico-chat has it
        known = confidence if isinstance(confidence, float) else None
        return Reply.of(choice.message.content or "", choice.finish_reason, max_tokens, known)

    def embed(self, items: Sequence[str | Medium]) -> list[list[float]]:
        """The vectors of texts and media; a server of this project has those of media.

        Raises:
            ModelError: the endpoint does not answer, or refuses an item.
        """
        shown: Any = [  # the frames of a video are one item
            item if isinstance(item, str) else self.messages([Message.user(item)])[0]["content"]
            for item in items
        ]
        create = partial(self._client.embeddings.create, model=self.name, input=shown)
        done = self._called(partial(create, encoding_format="float"))
        if isinstance(done, Reply):
            raise self._failed(done.text)
        vectors = [one.embedding for one in getattr(done, "data", None) or ()]
        if len(vectors) != len(items):
            raise self._failed(f"{len(vectors)} vectors for {len(items)} items")
        return vectors

    def _called(self, call: Callable[[], Given]) -> Given | Reply:
        """What a call gives, or the reason of a refusal."""
        import openai

        try:
            return call()
        except openai.APIStatusError as error:
            if error.status_code < 500 and error.status_code not in NOT_REFUSED:
                return Reply("refused", _one_line(error.message))
            raise self._failed(error.message) from error
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise self._failed(str(error)) from error

    def _failed(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.name!r} at {self.base_url} does not answer: {_one_line(reason)}; run "
            "the same command again to continue from here"
        )

    def close(self) -> None:
        self._client.close()
        self._decoder.close()

    def messages(self, conversation: Sequence[Message]) -> list[dict[str, Any]]:
        """A conversation in OpenAI's format, with media as data URIs or in base64.

        Decoded media are sent as JPEG and WAV, a decoded video as its frames without sound.
        """
        shown = [
            replace(message, content=tuple(p for part in message.content for p in self._fit(part)))
            for message in conversation
        ]
        found = to_openai(shown)
        for message in found:
            if isinstance(message["content"], list):
                message["content"] = [_with_input_audio(part) for part in message["content"]]
        return found

    def _fit(self, part: Part) -> list[Part]:
        """The parts to send for a part: a video may become stills, and a sound a WAV file."""
        if isinstance(part, MediaFile):
            video = part.kind == "video" and self._video_as_frames is not None
            sound = part.kind == "audio" and self._audio_as_wav and not _is_input_audio(part)
            if not (video or sound):
                return [part]
            part = self._decoder.decode(part)
        match part:
            case Video():
                return [MediaFile("image", _jpeg(frame), part.name) for frame in part.frames]
            case Image():
                return [MediaFile("image", _jpeg(part.pixels), part.name)]
            case Audio():
                return [MediaFile("audio", _wav(part), part.name)]
        return [part]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _is_input_audio(file: MediaFile) -> bool:
    if file.path is not None and not file.path.is_file():
        return True  # reading the file will report that it is missing
    return mime_type("audio", file.head) in AUDIO_FORMATS


def _with_input_audio(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] != "audio_url":
        return part
    header, _, data = part["audio_url"]["url"].partition(";base64,")
    audio_format = AUDIO_FORMATS.get(header.removeprefix("data:"))
    if audio_format is None:
        return part
    return {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}}


def _jpeg(pixels: Any) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def _wav(audio: Audio) -> bytes:
    from scipy.io import wavfile

    data = io.BytesIO()
    samples = (audio.samples.clip(-1, 1) * 32767).round().astype("<i2")
    wavfile.write(data, audio.sample_rate, samples)
    return data.getvalue()
