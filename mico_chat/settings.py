"""Settings of the library that an environment variable can move.

Limits on media have their own settings (:class:`mico_chat.media.MediaLimits`), and so has the
server; what concerns one answer is :class:`mico_chat.engine.GenerationOptions`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """``MICO_CACHE_DIR`` and ``MICO_MODEL``.

    ``cache_dir`` holds what is fetched once: base language models (``llm/``) and the data
    engine's sources (``sources/``). ``model`` is what the commands take without ``--model``.
    """

    model_config = SettingsConfigDict(env_prefix="MICO_", frozen=True)

    cache_dir: Path = Path("~/.cache/mico-chat")
    model: str = "mini"


def cache_dir() -> Path:
    """The cache folder, absolute, with ``~`` resolved. It need not exist yet."""
    return Settings().cache_dir.expanduser().absolute()
