"""Other open multimodal models in vLLM, which has the weights and encodes media itself.

This process has the model's processor alone. The inputs of a medium are those of vLLM's own
processor (:mod:`mico_chat.engine.vllm_media`), and so is the number of its tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image

from mico_chat.adapters.pictures import Shown as AnyShown
from mico_chat.adapters.processor import ProcessorAdapter, Shown, of_frames, refused
from mico_chat.engine.vllm import VllmEngine
from mico_chat.engine.vllm_media import VllmMedium
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import SAMPLE_RATE, Audio, Image, Video


class VllmAdapter(ProcessorAdapter):
    """See :class:`mico_chat.adapters.base.ModelAdapter`; ``name`` is the model's, for errors."""

    def __init__(self, engine: VllmEngine, processor: Any, name: str) -> None:
        super().__init__(processor, name)
        self._engine = engine
        limits = engine.media_limits
        self.input_modalities = tuple(k for k in self.input_modalities if limits.get(k))
        self._own = {kind: self._tokens_of(kind) for kind in self.input_modalities}

    def _tokens_of(self, kind: Kind) -> tuple[int, ...]:
        """The tokens that the template has for a medium, before vLLM's processor expands them."""
        ids = self.tokenizer(self._alone(kind, 1), add_special_tokens=False).input_ids
        start, stop = self._span(ids, first=False)
        return tuple(ids[start:stop])

    def _several(self, shown: Sequence[Kind]) -> bool:
        return False  # vLLM processes each picture by itself

    def _read(
        self, medium: AnyShown, n: int, settings: Mapping[str, Any]
    ) -> tuple[Shown, int, VllmMedium]:
        own = self._own[medium.kind]
        settings = dict(settings)
        data: Any
        if isinstance(medium, Video):
            settings |= of_frames(medium.times, medium.report.seconds)
            data = (medium.frames, settings.pop("video_metadata")[0])
        elif isinstance(medium, Audio):
            data = (medium.samples, SAMPLE_RATE)
        else:
            assert isinstance(medium, Image)
            data = PIL.Image.fromarray(medium.pixels)
        with refused(medium, f"vLLM's processor of {self._name}"):
            inputs = self._engine.medium(own, medium.kind, data, settings)
        return Shown(self._marks[medium.kind], own), len(inputs), inputs
