"""What a row of the table of engines has: an engine's facts, its choice and its loading."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico_chat.adapters.base import ModelAdapter
from mico_chat.engine.base import Engine, Preference, check_names
from mico_chat.engines.source import Form, Source
from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.late import late

with late():
    from mico_chat.adapters import mico
    from mico_chat.checkpoints import configs, footprint
    from mico_chat.engine import batching

if TYPE_CHECKING:
    from mico_chat.checkpoints.lora import Lora
    from mico_chat.media.kinds import Kind

AUTO = "auto"

MAX_RUNNING = 16
"""Requests that run at the same time by default, in an engine that does not choose for itself."""

DTYPES = ("float32", "bfloat16", "float16")

OFFERED = "offered"
"""A ``depth_model`` of :class:`EngineOptions` that nobody has named."""


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run.

    ``engine`` is a name of the table (:mod:`mico_chat.engines.table`), ``quantization`` one of the
    engine's own; by default both are chosen. ``device`` is that of the media encoder too. At most
    ``max_running`` requests run at once, with ``max_batch`` tokens in a step; ``prefer`` says what
    a step keeps short that computes answers and prompts. An engine that
    encodes media itself takes at most ``max_media`` media of each kind in a request. The pictures
    and clips of a request together take at most the share ``media_token_budget`` of the context of
    another project's model. Context tokens of media are cached, up to ``context_cache_bytes``.
    ``arguments`` are the engine's own. Without ``chat_defaults``, the checkpoint's system prompt,
    generation options and mark of unsure answers are not used, and text and speech are recognised
    only if ``MICO_READS`` says so: an evaluation
    measures the weights alone. Python code that a model's folder brings is run only with
    ``trust_remote_code``. ``mmproj`` is the projector of a GGUF model's media; by default the one
    beside it. ``depth_model`` estimates the depth of pictures, where a question asks for it
    (:func:`mico_chat.reading.depths.depth_estimator`); :data:`OFFERED` is the small network, where
    it is there and the model reads depth maps.
    """

    engine: str = AUTO
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    max_running: int | None = None
    prefer: Preference | None = None
    max_batch: int = 512
    max_media: int = 32
    media_token_budget: float = 0.5
    context_cache_bytes: int = 256 << 20
    arguments: Mapping[str, Any] = field(default_factory=dict)
    chat_defaults: bool = True
    trust_remote_code: bool = False
    mmproj: Path | None = None
    depth_model: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.media_token_budget <= 1:
            reason = "expected a share of the context above 0, at most 1"
            raise ConfigError(f"media_token_budget: {reason}, got {self.media_token_budget}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"no dtype {self.dtype!r}; known are {', '.join(DTYPES)}")

    @property
    def running(self) -> int:
        return self.max_running or MAX_RUNNING


@dataclass(frozen=True)
class Loaded:
    """A model's adapter, and the engine with its language model.

    ``generation`` is the content of its folder's ``generation_config.json``. ``notes`` say what a
    model of another project does here in another way than one expects, each in a sentence.
    ``loras`` are adapters of its own for questions with media of a kind, the first before others.
    """

    adapter: ModelAdapter
    engine: Engine
    generation: Mapping[str, Any] | None = None
    system_prompt: str | None = None
    notes: tuple[str, ...] = ()
    loras: dict[Kind, Lora] = field(default_factory=dict)

    @classmethod
    def of_chat(cls, chat: Any, processor: Any, engine: Engine) -> Loaded:
        adapter = mico.MicoAdapter(chat, processor)
        return cls(adapter, engine, chat.generation, processor.system_prompt)


class EngineRow(ABC):
    """An engine: a row of the table."""

    name: str
    module: str
    """It needs this Python package."""
    package: str
    """People know the package by this name."""
    install: str
    """This command installs it."""
    repair: str | None = None
    """The command for a package that is installed and does not run, if ``auto`` takes it so too."""
    remark: str = ""
    """What the doctor says where it is not installed; empty if it must be."""

    forms: tuple[Form, ...]
    """The models that it reads."""
    quantizations: tuple[str, ...] = ()
    """All its quantizations; empty if only the package itself knows them,"""
    some_quantizations: str
    """and those that ``--help`` names."""
    quantized_by: str = ""
    smaller: tuple[str, ...] = ()
    """The quantizations to try for a model that does not fit."""
    sizes: tuple[str, ...] | None = None
    """Its arguments, whole numbers all; None if only the package itself knows them."""
    settings: Mapping[str, str] = {}
    """The settings of a service that are arguments of this engine, each with its description."""
    uses_gpu = True
    scores = True
    """Whether it gives the log-probabilities of an answer that is there already."""
    in_torch = False
    """Whether its language model is a module of torch in this process."""
    may_refuse = False
    """Whether only loading shows that it cannot read some models: the next engine takes these."""

    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    def check_installed(self, feature: str) -> None:
        if not self.installed():
            raise MissingExtraError(feature, self.name)

    @abstractmethod
    def suits(self, source: Source | None, options: EngineOptions, gpu: str | None) -> str | None:
        """The reason why ``auto`` takes it before the engines below it; None if it does not.

        ``source`` None is any chat model of this project. ``gpu`` is the name of the graphics card.
        """

    def why_not(self, source: Source, options: EngineOptions) -> str | None:
        """Why it cannot read a chat model, as far as the model's config says."""
        return None

    def takes(self, options: EngineOptions) -> bool:
        return self.sizes is None or set(options.arguments) <= set(self.sizes)

    def check(self, options: EngineOptions) -> None:
        """Refuse arguments, a preference and a quantization that it lacks."""
        if self.sizes is not None:
            check_names(self.name, options.arguments, self.sizes)
            for name, value in options.arguments.items():
                if type(value) is not int or value < 1:
                    raise ConfigError(
                        f"{name}: expected a whole number of at least 1, got {value!r}"
                    )
        elif options.prefer is not None:
            reason = f"the {self.name} engine itself says which tokens a step computes"
            raise ConfigError(f"prefer {options.prefer}: {reason}; leave it out")
        quantization, known = options.quantization, self.quantizations
        if known and quantization is not None and quantization not in known:
            reason = f"the {self.name} engine has no quantization {quantization!r}"
            raise ConfigError(f"{reason}; known are {', '.join(known)}")

    def needed_bytes(self, source: Source, options: EngineOptions) -> int:
        """The memory that a model will need beside that of the program, by an estimate."""
        if source.form != "chat":
            return source.weight_bytes
        needs = footprint.serving(configs.chat_config(source.folder), options.dtype)
        return self.total(needs, self.precision(needs, options)) - footprint.PROGRAM

    def usual_quantization(self, trained: str | None) -> str | None:
        """Of a chat model that nobody asked a quantization for; ``trained``: its config's own."""
        return None

    def precision(self, needs: footprint.Serving, options: EngineOptions) -> str:
        """The key of ``needs.llm`` that the language model is loaded in."""
        plain = options.dtype or "bfloat16"
        wanted = options.quantization or self.usual_quantization(needs.gguf) or plain
        return wanted if wanted in needs.llm else plain  # the package's own are not known here

    def total(self, needs: footprint.Serving, precision: str) -> int:
        """Bytes to serve one longest conversation; ``precision`` is a key of ``needs.llm``."""
        context = needs.context * needs.kv_per_token
        return footprint.PROGRAM + needs.beside + needs.llm[precision] + context + needs.working

    def converted(self, model: str | Path, quantization: str) -> Path | None:
        """The file that the first start makes of a chat model; None if the model is read itself."""
        return None

    @abstractmethod
    def load(self, source: Source, options: EngineOptions) -> Loaded: ...

    def probe(self) -> str:
        """What the doctor says of an engine that works here; any error says that it does not."""
        return f"{importlib.import_module(self.module).__version__} can be imported"


def batching_engine(
    name: str, model: Any, tokenizer: Any, ending: Collection[int], options: EngineOptions
) -> batching.BatchingEngine:
    running, prefer = options.running, options.prefer
    return batching.BatchingEngine(
        model, tokenizer, ending, name=name, max_running=running, prefer=prefer
    )


def ends(*saying: Any) -> set[int]:
    """The tokens that end an answer, as a tokenizer and configurations say."""
    found: set[int] = set()
    for said in saying:
        given = getattr(said, "eos_token_id", None)  # some configurations lack the field
        found.update(given if isinstance(given, list) else [] if given is None else [given])
    return found
