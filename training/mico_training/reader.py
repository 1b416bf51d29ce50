"""A small reader in the language model's place, while the bridge learns what to tell.

Counting, telling colours and sides apart is for the bridge to learn, and it takes many questions.
All layers of the language model are not needed to grade the answers: a copy of its first few,
which learn along and are thrown away afterwards, does so several times faster. (BLIP-2 trains its
bridge without the language model first, for the same reason.)
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from mico_chat.errors import ConfigError


def first_layers(llm: PreTrainedModel, n: int) -> PreTrainedModel:
    """The language model's first ``n`` layers, norm and vocabulary head as a model of their own.

    The layers and the norm train, in float32; the word table stays as it is.

    Raises:
        ConfigError: it does not have so many layers.
    """
    layers: nn.ModuleList = llm.get_decoder().layers
    if n > len(layers):
        raise ConfigError(f"stage2.reader: {n} layers, but the language model has {len(layers)}")
    table = {id(p): p for p in (llm.get_input_embeddings().weight,)}
    kept = {id(layer): layer for layer in layers}
    reader = copy.deepcopy(llm, {**table, **kept})
    decoder = reader.get_decoder()
    decoder.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers[:n])
    reader.config.num_hidden_layers = n
    for module in (decoder.layers, decoder.norm):
        module.to(torch.float32).requires_grad_(True)
    return reader
