"""The voice of a model that speaks itself: Qwen2.5-Omni's Talker and vocoder.

The model's Thinker hears and answers in text as any model here. Then the library's own ``generate``
makes the sound of that answer: it is given the tokens that the Thinker has said.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.checkpoints.hub import VOICES
from mico_chat.checkpoints.lora import wearing
from mico_chat.engine.base import Prompt
from mico_chat.engine.cpu import free_cores
from mico_chat.errors import ModelError, RequestError

PIXELS = ("pixel_values", "pixel_values_videos")
MOST_CODES, CODES = 4096, 50
"""The most codes of an answer's sound, and for each of its tokens: a second is 50."""


class Talker:
    """The voices ``names`` of a model in ``folder`` that has loaded its ``thinker``.

    The other parts are loaded when an answer is first spoken. Threads may share it: one speaks.
    Its ``adapter`` makes the prompts that :meth:`say` takes.
    """

    sample_rate = 24_000

    def __init__(self, thinker: Any, processor: Any, folder: Path, name: str) -> None:
        self._thinker, self._folder, self._name = thinker, folder, name
        self.adapter = TransformersAdapter(thinker, processor, name)
        self.adapter.encodes = False
        self._whole: Any = None
        self._lock = threading.Lock()
        self.names = tuple(torch.load(folder / VOICES, weights_only=True))

    def named(self, name: str | None) -> str:
        """The voice of a name; the first one without.

        Raises:
            RequestError: the model has no such voice.
        """
        if name is None or name in self.names:
            return name or self.names[0]
        reason = f"no voice {name[:64]!r}; {self._name} speaks as {', '.join(self.names)}"
        raise RequestError.at("voice", reason)

    def say(
        self, prompt: Prompt, answer: Sequence[int], voice: str, stop: threading.Event
    ) -> NDArray[np.float32]:
        """The sound (n,) in [-1, 1] of an answer's tokens to a prompt, of one at least; if ``stop``
        is set, nothing."""
        with (
            self._lock,
            free_cores().take() as threads,
            torch.inference_mode(),
            wearing(prompt.lora),
        ):
            if self._thinker.device.type == "cpu":
                torch.set_num_threads(threads)
            try:
                return self._sound(self.adapter.whole_inputs(prompt), answer, voice, stop)
            except _StoppedError:
                return np.zeros(0, np.float32)

    def _sound(
        self, inputs: dict[str, Any], answer: Sequence[int], voice: str, stop: threading.Event
    ) -> NDArray[np.float32]:
        whole, ends = self._loaded(), self._thinker.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        said = [*answer, *(ends[:1] if answer[-1] not in ends else ())]
        first = inputs["input_ids"].shape[1]
        speaks = whole.config.talker_config

        def forced(ids: Any, scores: Any) -> Any:
            if stop.is_set():
                raise _StoppedError
            only = torch.full_like(scores, -torch.inf)
            only[:, said[ids.shape[1] - first]] = 0
            return only

        def stopped(ids: Any, scores: Any) -> Any:
            if stop.is_set():
                raise _StoppedError
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        # The library would give them to the Talker too, which refuses them.
        seen = {f"thinker_{name}": inputs.pop(name) for name in PIXELS if name in inputs}
        _, sound = whole.generate(
            **inputs,
            **seen,
            speaker=voice,
            thinker_do_sample=False,
            thinker_logits_processor=[forced],
            thinker_max_new_tokens=len(said),
            talker_max_new_tokens=min(MOST_CODES, CODES * len(said)),
            talker_eos_token_id=[speaks.tts_codec_pad_token_id, speaks.tts_codec_end_token_id],
            talker_stopping_criteria=[stopped],
        )
        found: NDArray[np.float32] = sound.float().cpu().numpy()
        return np.clip(found, -1.0, 1.0)

    def _loaded(self) -> Any:
        """The whole model around the Thinker that is there."""
        if self._whole is None:
            whole, device = transformers.Qwen2_5OmniForConditionalGeneration, self._thinker.device
            config: Any = transformers.AutoConfig.from_pretrained(self._folder)
            config.enable_audio_output = False
            with torch.device("meta"):
                model: Any = whole(config)
            model.thinker = self._thinker
            for name, part, dtype in (
                ("talker", "Qwen2_5OmniTalkerForConditionalGeneration", self._thinker.dtype),
                ("token2wav", "Qwen2_5OmniToken2WavModel", torch.float32),
            ):
                own = getattr(config, f"{name}_config")
                setattr(model, name, self._part(part, name, own, dtype).to(device).eval())
            model.has_talker = True
            model.load_speakers(self._folder / VOICES)
            self._whole = model
        return self._whole

    def _part(self, part: str, name: str, config: Any, dtype: Any) -> Any:
        whole = getattr(transformers.models.qwen2_5_omni.modeling_qwen2_5_omni, part)
        alone = type(part, (whole,), {"_keys_to_ignore_on_load_unexpected": ["."]})  # other parts'
        try:
            model, info = alone.from_pretrained(  # type: ignore[attr-defined]
                self._folder,
                config=config,
                dtype=dtype,
                key_mapping={rf"^{name}\.": ""},
                output_loading_info=True,
            )
        except Exception as error:  # what a broken file makes transformers raise may be anything
            reason = " ".join(str(error).split())
            raise ModelError(f"{self._name}: it cannot speak: its {name}: {reason}") from error
        if missing := sorted(info["missing_keys"]):
            reason = f"the files lack {len(missing)} weights of its {name}, such as {missing[0]}"
            raise ModelError(f"{self._name}: it cannot speak: {reason}: fetch it again")
        return model


class _StoppedError(Exception):
    """Nobody wants the rest of the sound."""
