"""A tiny language model, and its answers by Hugging Face's ``generate``."""

import pytest
from transformers import LlamaForCausalLM

from tests.engine.tiny_llm import generated, prompts, tiny_llm


@pytest.fixture(scope="package")
def llm() -> LlamaForCausalLM:
    return tiny_llm()


@pytest.fixture(scope="package")
def said(llm: LlamaForCausalLM) -> list[list[int]]:
    return [generated(llm, prompt) for prompt in prompts()]
