"""The settings of ``mico-chat serve``: by flag, ``MICO_SERVER_*`` variable or TOML file.

Limits on a single medium are the media layer's (``MICO_MEDIA_*``).
"""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from mico_chat.engine.base import Preference
from mico_chat.engines.base import AUTO
from mico_chat.engines.table import ENGINE_HELP, ENGINES, engine_name, setting_help
from mico_chat.errors import ConfigError
from mico_chat.settings import misused

ENGINE_ARGUMENTS = tuple(name for engine in ENGINES.values() for name in engine.settings)
"""Settings that are passed to the engine under the same names."""

MAX_TTL_S = 10 * 366 * 86400
"""Most seconds for which a request may ask to keep something: ten years."""


def _split(value: Any) -> Any:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
"""They are texts, separated by commas in a flag or variable."""

EngineName = Annotated[str, AfterValidator(engine_name)]

Bound = Annotated[int | None, BeforeValidator(lambda value: None if value == "none" else value)]
"""A limit; the text ``none`` takes it away."""


def _of_engine(name: str, **bounds: Any) -> Any:
    return Field(None, description=setting_help(name), **bounds)


class ServerSettings(BaseSettings):
    """Serve the model over HTTP.

    A flag overrides a MICO_SERVER_* environment variable, which overrides the file of --config.
    """

    model_config = SettingsConfigDict(
        env_prefix="MICO_SERVER_",
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = Field(None, description="a TOML file of these settings")
    show_settings: bool = Field(False, description="print the settings as a TOML file, then end")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port; 0 takes any free one")
    insecure: bool = Field(False, description="serve without keys on any address")
    require_keys: bool = Field(
        False, description="ask everybody for a key, on loopback too; for a proxy in front"
    )

    model: Names = Field(
        (),
        description="mini, a folder, a GGUF file or a hub name; several are loaded when requests "
        "name them, the first at once [MICO_MODEL or mini]",
    )
    max_models_bytes: int | None = Field(
        None,
        ge=1,
        description="most memory of all loaded models together; the one used longest ago is "
        "unloaded first [for several models: 80 % of the machine's]",
    )
    adapter: Names = Field(
        (),
        description="NAME=FOLDER: a LoRA adapter of a served model, which requests name as a model",
    )
    keep_alive_s: float | None = Field(
        None, ge=0, description="unload a model that nobody has used for these seconds [never]"
    )
    engine: EngineName = Field(AUTO, description=ENGINE_HELP)
    quantization: str | None = Field(None, description="quantization, by the engine's name")
    load_in_4bit: bool = Field(False, description="short for --quantization nf4")
    load_in_8bit: bool = Field(False, description="short for --quantization int8")
    device: str | None = Field(None, description="cpu, cuda, cuda:1, mps; the best one if not set")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16")
    mmproj: Path | None = Field(
        None, description="media projector of a GGUF model [the mmproj file beside it]"
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that a model of another project brings; read it before"
    )
    max_running: int | None = Field(
        None, ge=1, description="requests computed at the same time [by default the engine's own]"
    )
    prefer: Preference | None = Field(
        None,
        description="where a prompt meets running answers, keep their pauses short, or its own "
        "wait for its first token: pauses or first-token [between both; not of vLLM]",
    )
    tensor_parallel_size: int | None = _of_engine("tensor_parallel_size", ge=1)
    pipeline_parallel_size: int | None = _of_engine("pipeline_parallel_size", ge=1)
    data_parallel_size: int | None = _of_engine("data_parallel_size", ge=1)
    distributed_executor_backend: str | None = _of_engine("distributed_executor_backend")
    gpu_memory_utilization: float | None = _of_engine("gpu_memory_utilization", gt=0, le=1)
    max_model_len: int | None = _of_engine("max_model_len", ge=1)
    engine_args: dict[str, Any] = Field(
        {}, description="""more of the engine's options by its names: '{"enforce_eager": true}'"""
    )
    media_token_budget: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of another project's model's context that the pictures and clips of a "
        "request may take together; larger ones are scaled down",
    )
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
        description="seconds for which an uploaded medium is kept that no conversation shows",
    )

    max_stored_bytes: Bound = Field(
        20 << 30, ge=1, description="most bytes of files and media that a key may store, or none"
    )
    max_stored_files: Bound = Field(
        100_000, ge=1, description="most files and media that a key may store, or none"
    )

    max_body_bytes: int = Field(512 << 20, ge=1, description="most bytes of a request's body")
    max_json_bytes: int = Field(
        64 << 20, ge=1, description="most bytes of a JSON body, which is held in memory"
    )
    max_json_values: int = Field(
        1_000_000, ge=1, description="most braces, brackets, commas and colons of a JSON body"
    )
    max_bodies_bytes: int | None = Field(
        None,
        ge=2,
        description="most bytes of all JSON bodies that are held in memory; one tenant may have "
        "half [256 MiB, or 4 times max-json-bytes if that is more]",
    )
    max_connections: int = Field(1024, ge=1, description="most open connections")
    max_connections_per_address: int = Field(
        512,
        ge=1,
        description="most open connections of one address; behind a proxy all have the proxy's",
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        description="seconds in which the headers of a request must come, from their first byte",
    )
    idle_timeout_s: int = Field(
        75,
        ge=1,
        description="seconds for which a connection is kept between two requests; longer than a "
        "proxy in front keeps it",
    )
    max_media: int = Field(32, ge=1, description="most media of a request")
    max_text_bytes: int = Field(1 << 20, ge=1, description="most bytes of a text field")
    max_requests: int = Field(80, ge=1, description="requests that are answered or wait at once")
    max_batch_requests: int = Field(
        2, ge=1, le=64, description="requests of batches that are answered at once"
    )
    max_realtime_sessions: int = Field(8, ge=0, description="most sessions of /v1/realtime at once")
    realtime_session_s: float = Field(
        3600.0, gt=0, description="seconds after which a session of /v1/realtime ends"
    )
    realtime_idle_s: float = Field(
        300.0, gt=0, description="seconds without an event of its client after which one ends"
    )
    max_inputs: int = Field(64, ge=1, description="most inputs of an embeddings or score request")
    rate_limit: str | None = Field(
        None, description="requests of each key, such as '60/minute'; not limited if not set"
    )
    rate_limit_store: str | None = Field(
        None,
        description="where requests are counted: memory, or redis://host:6379, which replicas "
        "share [the database if it is PostgreSQL, else memory]",
    )
    max_step_s: float = Field(
        150.0,
        gt=0,
        description="seconds of one step of a model after which the service is not ready; after "
        "twice as many it starts anew",
    )
    request_timeout_s: float = Field(300.0, gt=0, description="most seconds of a request")
    body_timeout_s: float = Field(
        30.0, gt=0, description="seconds to wait for the next piece of a request's body"
    )
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of an answer if the request sets none [the model's own]",
    )

    allow_urls: bool = Field(False, description="fetch media from http(s) URLs of requests")
    url_hosts: Names = Field(
        (), description="the only hosts to fetch from; any public one if not set"
    )
    url_timeout_s: float = Field(30.0, gt=0, description="seconds one URL may take")
    max_redirects: int = Field(3, ge=0, le=10, description="redirects of a URL that are followed")
    allow_files: Path | None = Field(
        None, description="a folder whose files any client may name by file:// URLs"
    )

    cors_origins: Names = Field(
        (), description="origins of other sites' pages that may call, such as https://example.org"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the lowest level that is logged"
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="auto: text on a terminal, JSON lines elsewhere"
    )
    shutdown_timeout_s: int = Field(
        30, ge=0, description="seconds that running answers may take after SIGTERM"
    )

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """``engine_args`` and :data:`ENGINE_ARGUMENTS`."""
        own = {name: getattr(self, name) for name in ENGINE_ARGUMENTS}
        own = {name: value for name, value in own.items() if value is not None}
        if twice := sorted(own.keys() & self.engine_args.keys()):
            raise ConfigError(f"{twice[0]}: set by itself and in engine_args: set it once")
        return {**own, **self.engine_args}

    @property
    def media_folder(self) -> Path:
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
        """Flags override these; the environment overrides a file."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls))


def read_settings(args: Sequence[str] = ()) -> ServerSettings:
    def read(settings: type[ServerSettings]) -> ServerSettings:
        try:
            return settings(
                _cli_parse_args=list(args),
                _cli_prog_name="mico-chat serve",
                _cli_exit_on_error=False,
            )
        except SettingsError as error:
            _, found, wrong = str(error).partition("error parsing CLI: ")
            if found:
                flags = [f"--{name.replace('_', '-')}" for name in settings.model_fields]
                raise misused(wrong, flags, "mico-chat serve") from error
            # engine_args is the one setting that is JSON
            raise ConfigError(
                "engine_args: expected a JSON object, such as '{\"enforce_eager\": true}'"
            ) from error

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
    """The settings as a TOML file, without passwords; those that are not set are comments."""
    lines = []
    for name, value in settings.model_dump(exclude={"config", "show_settings"}).items():
        if name in ("database_url", "rate_limit_store") and value is not None:
            value = without_password(value)
        if value is None and ServerSettings.model_fields[name].default is not None:
            value = "none"  # a bound that is taken away
        lines.append(f"# {name} =" if value is None else f"{name} = {_toml(value)}")
    return "\n".join(lines)


def without_password(url: str) -> str:
    return re.sub(r"(?s)(?<=://)([^:/@]*):.*@", r"\1:***@", url)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None]
        return f"{{ {', '.join(entries)} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value) if isinstance(value, Path) else value)
