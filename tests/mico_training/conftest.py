"""Fixtures of the shards and the tiny models that the lab's tests share."""

from tests.mico_training.scenes import llama as llama
from tests.mico_training.scenes import shards as shards
from tests.mico_training.scenes import tiny_chat as tiny_chat
from tests.mico_training.scenes import tiny_llm as tiny_llm
from tests.mico_training.scenes import tiny_pretraining as tiny_pretraining
