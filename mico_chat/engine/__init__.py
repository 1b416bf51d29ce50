"""Engines continue prompts. :mod:`mico_chat.load` imports one when a model is loaded."""
