"""Media that vLLM encodes itself, for models whose weights are vLLM's alone.

vLLM's own processor makes the inputs of each medium apart, once: a follow-up question takes them
from this project's cache, and vLLM's cache of them is off. A prompt is put together from them and
from token ids, so vLLM never sees its text, and no text can become a placeholder. vLLM's other
caches (keys and values, encoder outputs) know a medium by the block's key, which depends on the
tenant too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mico_chat.engine.base import Prompt
from mico_chat.errors import RequestError
from mico_chat.media.medium import ContextBlock


@dataclass(frozen=True, eq=False)
class VllmMedium:
    """vLLM's ``MultiModalInput`` of a prompt that is one medium."""

    given: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.given["prompt_token_ids"])

    @property
    def nbytes(self) -> int:
        from vllm.multimodal.cache.base import MultiModalCache

        return int(MultiModalCache.get_item_size(self.given["mm_kwargs"]))


def prompt_of_media(prompt: Prompt, limits: Mapping[str, int]) -> Any:
    """vLLM's ``MultiModalInput`` of a prompt. ``limits`` are the most media of each modality."""
    from vllm.inputs import mm_input
    from vllm.multimodal.inputs import MultiModalKwargsItems

    ids: list[int] = []
    items: dict[str, list[Any]] = {}
    keys: dict[str, list[str]] = {}
    places: dict[str, list[Any]] = {}
    for segment in prompt.segments:
        if not isinstance(segment, ContextBlock):
            ids += segment
            continue
        medium: Mapping[str, Any] = segment.inputs.given
        for modality, found in medium["mm_placeholders"].items():
            moved = (replace(place, offset=place.offset + len(ids)) for place in found)
            places.setdefault(modality, []).extend(moved)
            items.setdefault(modality, []).extend(medium["mm_kwargs"][modality])
            keys.setdefault(modality, []).extend([segment.key.hex()] * len(found))
        ids += medium["prompt_token_ids"]
    for modality, found in places.items():
        n = len(found)
        if n > limits[modality]:
            raise RequestError(
                f"{n} media of the kind {modality}, but this service's vLLM takes at most "
                f"{limits[modality]} in a request (limit_mm_per_prompt); a clip's sound counts too"
            )
    salt = prompt.tenant or None
    return mm_input(ids, MultiModalKwargsItems(items), keys, places, cache_salt=salt)
