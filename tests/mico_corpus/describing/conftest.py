"""The tiny chat model that annotators ask."""

from tests.mico_training.scenes import tiny_chat as tiny_chat
