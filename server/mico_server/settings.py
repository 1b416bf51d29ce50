"""What ``mico-chat serve`` can be told: by flag, ``MICO_SERVER_*`` variable or TOML file.

Limits on a single medium are the media layer's (``MICO_MEDIA_*``).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mico_chat.errors import ConfigError

ENV_PREFIX = "MICO_SERVER_"

MAX_TTL_S = 10 * 366 * 86400
"""Seconds that something may be asked to be kept: ten years, which every calendar holds."""


def _split(value: Any) -> Any:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""Texts, separated by commas in a flag or variable."""


class ServerSettings(BaseSettings):
    """Serve the model over HTTP.

    A flag goes before a MICO_SERVER_* environment variable, that before the file of --config.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = Field(None, description="a TOML file of these settings")
    show_settings: bool = Field(False, description="print the settings and where to, then end")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port; 0 takes any free one")
    insecure: bool = Field(False, description="serve without keys on any address")

    model: str | None = Field(None, description="mini, a folder or a hub name [MICO_MODEL or mini]")
    engine: str = Field("auto", description="auto, llamacpp or transformers")
    quantization: str | None = Field(None, description="the engine's name for it")
    load_in_4bit: bool = Field(False, description="short for --quantization nf4")
    load_in_8bit: bool = Field(False, description="short for --quantization int8")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, mps; the best one if not set")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16")
    max_running: int = Field(16, ge=1, description="requests that are computed at the same time")
    context_cache_bytes: int = Field(
        256 << 20, ge=0, description="context tokens kept for media that are shown again"
    )
    decoder_workers: int = Field(2, ge=1, le=64, description="processes that decode media")

    data_dir: Path = Field(
        Path("~/.local/share/mico-chat"), description="folder of the database and of media"
    )
    database_url: str | None = Field(
        None, description="postgresql://user:password@host/name; SQLite in data-dir if not set"
    )
    media_dir: Path | None = Field(
        None, description="folder of uploaded media, shared by replicas [data-dir/media]"
    )
    media_ttl_s: int = Field(
        7 * 86400,
        ge=1,
        le=MAX_TTL_S,
        description="seconds an uploaded medium is kept that no conversation shows",
    )

    max_body_bytes: int = Field(512 << 20, ge=1, description="bytes of a request's body")
    max_json_bytes: int = Field(
        64 << 20, ge=1, description="bytes of a JSON body, which is held in memory"
    )
    max_media: int = Field(32, ge=1, description="media of a request")
    max_text_bytes: int = Field(1 << 20, ge=1, description="bytes of a text field")
    max_requests: int = Field(80, ge=1, description="requests that are answered or wait at once")
    max_inputs: int = Field(64, ge=1, description="inputs of an embeddings or score request")
    rate_limit: str | None = Field(
        None, description="requests of each key, such as '60/minute'; not limited if not set"
    )
    request_timeout_s: float = Field(300.0, gt=0, description="seconds a request may take")
    body_timeout_s: float = Field(
        30.0, gt=0, description="seconds to wait for the next piece of a request's body"
    )
    default_max_tokens: int = Field(
        512, ge=1, description="longest answer of /v1/chat/completions where it is not asked for"
    )

    allow_urls: bool = Field(False, description="fetch media from http(s) URLs of requests")
    url_hosts: Names = Field(
        (), description="the only hosts to fetch from; any public one if not set"
    )
    url_timeout_s: float = Field(30.0, gt=0, description="seconds one URL may take")
    max_redirects: int = Field(3, ge=0, le=10, description="redirects of a URL that are followed")

    cors_origins: Names = Field(
        (), description="origins of other sites' pages that may call, such as https://example.org"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what is logged"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere"
    )
    shutdown_timeout_s: int = Field(
        30, ge=0, description="seconds that running answers may take after SIGTERM"
    )

    @property
    def media_folder(self) -> Path:
        """Where media are, absolute."""
        return (self.media_dir or self.data_dir / "media").expanduser().absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come before these; a file, if one is named, after the environment."""
        sources = (init_settings, env_settings)
        if settings_cls.model_config.get("toml_file") is None:
            return sources
        return (*sources, TomlConfigSettingsSource(settings_cls))


def read_settings(args: Sequence[str] = ()) -> ServerSettings:
    """The settings that flags, environment and the file they name make together.

    Raises:
        ConfigError: for a file that cannot be read.
        ValidationError: for a setting that makes no sense.
    """

    def read(settings: type[ServerSettings]) -> ServerSettings:
        return settings(_cli_parse_args=list(args), _cli_prog_name="mico-chat serve")

    found = read(ServerSettings)
    if found.config is None:
        return found
    try:
        tomllib.loads(found.config.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{found.config}: no TOML file to read ({error})") from error

    class WithFile(ServerSettings):
        model_config = SettingsConfigDict(title="ServerSettings", toml_file=found.config)

    return read(WithFile)


def shown_settings(settings: ServerSettings) -> str:
    """The settings as the TOML file that would make them, those that are not set as comments.

    A password in the database's URL is not shown.
    """
    lines = []
    for name, value in settings.model_dump(exclude={"config", "show_settings"}).items():
        if name == "database_url" and value is not None:
            value = re.sub(r"(?<=://)([^:/@]*):[^@]*@", r"\1:***@", value)
        shown = json.dumps(str(value) if isinstance(value, Path) else value)
        lines.append(f"# {name} =" if value is None else f"{name} = {shown}")
    return "\n".join(lines)
