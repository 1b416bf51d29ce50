"""A byte-level BPE tokenizer of a family: all bytes, a few merges, the family's own markup."""

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "system user assistant model User: Assistant: You are a helpful assistant.",
    "Describe the image, the audio and the video. What do you see? What do you hear?",
    "The cat and the dog are in the garden; the bird is on the tree. Frame from 00:01: seconds",
    '{"name": "weather", "arguments": {"city": "Paris"}} functions tools call response',
] * 4
_N_MERGES = 120


@cache
def trained() -> str:
    """The tokenizer of bytes and merges as JSON: training it is the slow part."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + _N_MERGES, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()


def tokenizer(
    control: list[str], plain: list[str], *, named: dict[str, str], **roles: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer with ``control`` tokens, which decoding can skip, and ``plain`` ones.

    ``named`` gives the processor's names of tokens (``image_token``), ``roles`` those of every
    tokenizer (``eos_token``).
    """
    backend = Tokenizer.from_str(trained())
    backend.add_special_tokens([AddedToken(word, special=True) for word in control])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=named, padding_side="left", **roles
    )
