"""The options that say which chat model is evaluated, in this process or behind a URL."""

from __future__ import annotations

import argparse
from typing import Any

from mico_chat.errors import ConfigError
from mico_chat.evaluation.chat.endpoint import DEFAULT_KEY, Endpoint, key_of
from mico_chat.evaluation.chat.model import ChatModel
from mico_chat.evaluation.chat.wire import Sending
from mico_chat.load import ENGINES, EngineOptions, asked_quantization
from mico_chat.settings import positive

IN_PROCESS = ("engine", "quantization", "dtype", "device", "frames", "slices")
"""Options of a model that is loaded here; an endpoint's owner has chosen these."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of chat models."""
    group = parser.add_argument_group("a chat model in this process")
    group.add_argument("--engine", choices=ENGINES, help="what runs it; transformers by default")
    group.add_argument("--quantization", help="int8, nf4 (transformers); Q8_0, .. (llamacpp)")
    group.add_argument("--load-in-4bit", action="store_true", help="--quantization nf4")
    group.add_argument("--load-in-8bit", action="store_true", help="--quantization int8")
    group = parser.add_argument_group("a chat model behind an OpenAI-compatible URL")
    group.add_argument("--base-url", metavar="URL", help="http://127.0.0.1:8000/v1")
    group.add_argument(
        "--api-key-env", metavar="NAME", help=f"variable with its key; {DEFAULT_KEY} by default"
    )
    group.add_argument(
        "--video-as-frames", type=positive, metavar="N", help="send N stills in a video's place"
    )
    group.add_argument(
        "--audio-as-wav", action="store_true", help="send WAV where a sound is not WAV or MP3"
    )
    group = parser.add_argument_group("answers of chat models")
    group.add_argument("--max-tokens", type=positive, help="of an answer; by default the task's")


def check_options(options: argparse.Namespace) -> None:
    """Refuse options of the other kind of model.

    Raises:
        ConfigError: naming one.
    """
    asked_quantization(options.quantization, options.load_in_4bit, options.load_in_8bit)
    given = vars(options)
    if options.base_url is not None:
        here = [
            name for name in (*IN_PROCESS, "load_in_4bit", "load_in_8bit") if _is_set(given, name)
        ]
        if here:
            flag = here[0].replace("_", "-")
            raise ConfigError(f"--{flag} is for a model in this process; --base-url names another")
        return
    there = [name for name in ("api_key_env", "video_as_frames", "audio_as_wav") if given[name]]
    if there:
        flag = there[0].replace("_", "-")
        raise ConfigError(f"--{flag} is for an endpoint; --base-url names one")


def _is_set(given: dict[str, Any], name: str) -> bool:
    return given[name] is not None and given[name] is not False


def open_model(options: argparse.Namespace) -> ChatModel:
    """The chat model that the command line names.

    Raises:
        MicoError: it cannot be loaded, or an option makes no sense.
    """
    if options.base_url is not None:
        return Endpoint(
            options.model,
            options.base_url,
            key_of(options.api_key_env),
            concurrency=options.batch_size,
            sending=Sending(options.video_as_frames, options.audio_as_wav),
            workers=options.workers,
        )
    from mico_chat.evaluation.chat.in_process import InProcess

    return InProcess(
        options.model,
        EngineOptions(
            options.engine or "transformers",
            asked_quantization(options.quantization, options.load_in_4bit, options.load_in_8bit),
            options.dtype,
            options.device,
            max_running=options.batch_size,
        ),
        frames=options.frames,
        workers=options.workers,
    )
