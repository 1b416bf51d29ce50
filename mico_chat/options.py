"""The options of a request, each declared once: its type, bounds, default, text and names.

A *door* is a way in: a format of the API, the command ``ask``, the settings of a chat. Request
models, forms, command-line options and their descriptions are made of these declarations, so that
another option is one more field of :class:`GenerationOptions`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

from mico_chat.errors import RequestError

Door = Literal["completions", "responses", "messages", "ask", "settings", "defaults"]
"""/v1/chat is not listed: it takes every option by its own name. ``settings`` are those of a chat
in the terminal, ``defaults`` those that a model may set and /v1/models shows."""

StopText = Annotated[str, Field(max_length=1000)]
"""Each of an answer's tokens is compared with the stop texts: their length is work."""

TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]

DepthScale = Annotated[
    float, Field(gt=0, le=1000, description="metres for one unit of a 16-bit depth map")
]

M = TypeVar("M", bound=BaseModel)


class Doors:
    """The doors that take an option: by its own name, or by the names that are given for a door.

    ``reasoning.effort`` is the field ``effort`` of the object ``reasoning``.
    """

    def __init__(self, *same: Door, **others: str | tuple[str, ...]) -> None:
        self.same, self.others = same, others

    def names(self, door: Door, own: str) -> tuple[str, ...]:
        """What a door calls the option ``own``; empty if it does not take the option."""
        found = own if door in self.same else self.others.get(door, ())
        return (found,) if isinstance(found, str) else found


_OF_TEMPLATE = ("chat_template_kwargs.enable_thinking", "chat_template_kwargs.thinking")
_THINKING = ("thinking", "enable_thinking", *_OF_TEMPLATE)

EVERY_DOOR = Doors("ask", "settings", "defaults", "completions", "responses", "messages")


class GenerationOptions(BaseModel):
    """How a question is answered. The default is greedy: the same request, the same answer.

    A checkpoint may set other defaults (:meth:`of_checkpoint`). The penalties count the answer's
    tokens, not the prompt's: ``repetition_penalty`` divides a repeated token's logit (and
    multiplies a negative logit), ``presence_penalty`` is subtracted once, ``frequency_penalty`` as
    often as the token occurs. Of another project's model in transformers, whose defaults were
    chosen so, ``repetition_penalty`` counts the prompt's tokens too.

    The answer ends before the first of the ``stop`` texts. ``seed`` makes a sampled answer
    repeatable: while such a request runs alone, it is computed as
    by an engine that has just started. ``logprobs`` asks for the model's own log-probability of
    each token, without temperature and penalties, and for this number of the likeliest tokens; the
    token that ends the answer has none. ``logit_bias`` is added to the logits of tokens. The answer
    ends with one of the ``stop_token_ids`` too, and with ``ignore_eos`` with these alone; no token
    ends it before ``min_tokens``. A schema goes before both. ``prefix`` is the beginning of the
    answer: the model continues it, and its tokens count as prompt tokens. ``depth_scale`` holds for
    the depth maps of all messages, if it is set. At most one of ``json_schema``, ``regex``,
    ``choice``, ``grammar`` and ``structural_tag`` limits what the answer may be (:attr:`form`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: Annotated[
        int,
        Doors(
            "ask", "settings", "defaults", "completions", "messages", responses="max_output_tokens"
        ),
    ] = Field(256, ge=1, description="longest answer, in tokens")
    temperature: Annotated[float, EVERY_DOOR] = Field(
        0.0, ge=0.0, le=2.0, description="0: always the likeliest word; higher: more varied words"
    )
    top_p: Annotated[float, EVERY_DOOR] = Field(
        1.0, gt=0.0, le=1.0, description="sample from tokens that have this probability together"
    )
    top_k: Annotated[int, EVERY_DOOR] = Field(
        0, ge=0, description="sample from this many likeliest tokens; 0: all"
    )
    min_p: Annotated[float, EVERY_DOOR] = Field(
        0.0, ge=0.0, le=1.0, description="leave out tokens below this share of the likeliest's"
    )
    seed: Annotated[int | None, Doors("ask", "settings", "completions")] = Field(
        None, ge=0, lt=2**63, description="makes a sampled answer repeatable"
    )
    repetition_penalty: Annotated[float, EVERY_DOOR] = Field(
        1.0, gt=0.0, le=10.0, description="above 1: fewer repetitions"
    )
    presence_penalty: Annotated[float, Doors("settings", "defaults", "completions")] = Field(
        0.0, ge=-2.0, le=2.0, description="above 0: more new words"
    )
    frequency_penalty: Annotated[float, Doors("settings", "defaults", "completions")] = Field(
        0.0, ge=-2.0, le=2.0, description="above 0: the same words less often"
    )
    stop: Annotated[tuple[StopText, ...], Doors("ask", "settings", messages="stop_sequences")] = (
        Field(
            (),
            max_length=16,
            fail_fast=True,
            description='end the answer before this text; several: repeat it, or ["a", "b"]',
        )
    )
    stop_token_ids: Annotated[tuple[TokenId, ...], Doors("completions")] = Field(
        (), max_length=64, description="end the answer with one of these tokens, too"
    )
    ignore_eos: Annotated[bool, Doors("completions")] = Field(
        False, description="do not end the answer where the model would end it"
    )
    min_tokens: Annotated[int, Doors("completions")] = Field(
        0, ge=0, description="least tokens of the answer"
    )
    logit_bias: Annotated[dict[TokenId, Bias], Doors("completions")] = Field(
        {}, max_length=1024, description="what is added to the logits of tokens, by their ids"
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="give each token's log-probability, and this many others"
    )
    n: Annotated[int, Doors("completions")] = Field(
        1, ge=1, le=16, description="answers that are sampled from one prompt"
    )
    json_schema: Annotated[dict[str, Any] | None, Doors("settings")] = Field(
        None, description="answer with JSON of this schema"
    )
    regex: Annotated[
        str | None, Doors(completions=("structured_outputs.regex", "guided_regex"))
    ] = Field(
        None, description="answer with a text that this regular expression matches as a whole"
    )
    choice: Annotated[
        tuple[str, ...] | None,
        Doors(completions=("structured_outputs.choice", "guided_choice")),
    ] = Field(None, min_length=1, fail_fast=True, description="answer with one of these texts")
    grammar: Annotated[
        str | None, Doors(completions=("structured_outputs.grammar", "guided_grammar"))
    ] = Field(None, description="answer with a text of this grammar, in Lark's form or GBNF")
    structural_tag: dict[str, Any] | None = Field(
        None,
        description="behind each of the triggers that the answer has, write one of the structures "
        "that begin so: their begin, JSON of their schema, and their end",
    )
    prefix: str = Field("", description="the beginning of the answer, which the model continues")
    explain: Annotated[bool, Doors("ask", "completions")] = Field(
        False, description="tell which media the answer rests on; it takes longer"
    )
    mm_processor_kwargs: Annotated[dict[str, Any], Doors("completions", "responses")] = Field(
        {},
        description="settings of the model's own processor of pictures and clips, as vLLM takes "
        "them; what the model does not have is refused with what it has",
    )
    media_io_kwargs: Annotated[dict[str, dict[str, Any]], Doors("completions", "responses")] = (
        Field(
            {}, description="frames of all clips, as vLLM takes them: video.fps, video.num_frames"
        )
    )
    truncation: Annotated[
        Literal["auto", "disabled"], Doors("settings", "completions", "responses")
    ] = Field(
        "disabled",
        description="auto: leave out what is oldest of a conversation that does not fit",
    )
    depth_scale: Annotated[
        DepthScale, Doors("ask", "settings", "completions", "responses", "messages")
    ] = 0.001
    estimate_depth: Annotated[
        bool, Doors("ask", "settings", "completions", "responses", "messages")
    ] = Field(
        False,
        description="estimate a depth map of each picture, and show it behind the picture; a "
        "message that has a depth map gets none. MICO_DEPTH_MODEL names what estimates: a depth "
        "estimator of transformers, or mini",
    )

    thinking: Annotated[
        bool | None, Doors("ask", "settings", completions=_THINKING, responses=_THINKING)
    ] = Field(
        None,
        description="think before the answer, if the model's chat template knows it; default: as "
        "the template does. An answer with a schema, a prefix or an explanation has no thoughts",
    )
    reasoning_effort: Annotated[
        str | None,
        Doors(
            "ask",
            "settings",
            completions=("reasoning_effort", "chat_template_kwargs.reasoning_effort"),
            responses="reasoning.effort",
            messages="output_config.effort",
        ),
    ] = Field(
        None,
        pattern=r"^[A-Za-z_-]{0,20}$",  # it becomes a part of the template's own text
        description="how much to think: none, minimal, low, medium, high, or what else the model's "
        "chat template knows; a model that does not think ignores it",
    )

    @property
    def thinks(self) -> bool | None:
        """Whether the model is to think before it answers; None: as its chat template does."""
        if self.thinking is None and self.reasoning_effort:
            return self.reasoning_effort != "none"
        return self.thinking

    @property
    def form(self) -> tuple[str, Any] | None:
        """What limits the answer: the option's name and value; None if nothing does.

        Raises:
            RequestError: two options do.
        """
        given = [(name, getattr(self, name)) for name in FORMS if getattr(self, name) is not None]
        if len(given) > 1:
            (first, _), (second, _) = given[:2]
            reason = f"{first} limits the answer already; leave one of the two out"
            raise RequestError.at(second, reason)
        return given[0] if given else None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GenerationOptions:
        """Options from a user's values, whose numbers may be text.

        Raises:
            RequestError: naming the first option that is wrong.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise request_error(error.errors()[0]) from error

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> GenerationOptions:
        """The options that ``generation_config.json`` sets; greedy unless ``do_sample`` is true."""
        names = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
        if config.get("do_sample"):
            names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
        return cls.of({ours: config[n] for n, ours in names.items() if config.get(n) is not None})

    def over(self, defaults: GenerationOptions) -> GenerationOptions:
        """These options; an option that was not set comes from ``defaults``."""
        return defaults.model_copy(update={n: getattr(self, n) for n in self.model_fields_set})


GREEDY = GenerationOptions()

FORMS = ("json_schema", "regex", "choice", "grammar", "structural_tag")
"""The options that limit what an answer may be."""


def request_error(details: Mapping[str, Any], *, outer: int = 0) -> RequestError:
    """The error of a field that pydantic refuses, without the ``outer`` first parts of its path."""
    path = details["loc"][outer:]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    reason = details["msg"][:1].lower() + details["msg"][1:]
    got = reprlib.repr(details["input"])  # shortened: it may be long
    return RequestError.at(name.removeprefix(".") or "request", f"{reason}, got {got}")


def options_at(door: Door) -> Iterator[tuple[str, str, FieldInfo]]:
    """The options that a door takes: the door's name, the option's own, and its declaration."""
    for own, field in GenerationOptions.model_fields.items():
        for doors in field.metadata:
            if isinstance(doors, Doors):
                yield from ((name, own, field) for name in doors.names(door, own))


def options_of(body: BaseModel, door: Door) -> dict[str, Any]:
    """The options that a request of a door sets, by their own names.

    Raises:
        RequestError: two fields set one option to different values.
    """
    found: dict[str, Any] = {}
    for name, own, _ in options_at(door):
        value: Any = body
        for part in name.split("."):
            if value is not None:
                value = (
                    value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
                )
        if value is not None and found.setdefault(own, value) != value:
            reason = f"{value!r}, but another field of the request sets it to {found[own]!r}"
            raise RequestError.at(name, reason)
    return found


def with_options(
    door: Door, *, required: bool = False, leave: Collection[str] = ()
) -> Callable[[type[M]], type[M]]:
    """Add the options of a door to a model that lacks them, but those that it is to ``leave`` out.

    A switch is off, and any other option null, until a request sets it; ``depth_scale`` has its
    default. With ``required`` each has a value. An object with fields that are options takes no
    others.
    """

    def extended(model: type[M]) -> type[M]:
        fields: dict[str, Any] = {}
        objects: dict[str, dict[str, Any]] = {}
        for name, own, field in options_at(door):
            outer, _, inner = name.partition(".")
            if outer in model.model_fields or own in leave:
                continue  # the door has a form of its own for it
            bounds = [one for one in field.metadata if not isinstance(one, Doors)]
            kind: Any = field.annotation
            for bound in bounds:
                kind = Annotated[kind, bound]
            if inner:
                given = (kind | None, Field(None, description=field.description))
                objects.setdefault(outer, {})[inner] = given
            elif required:
                fields[name] = (field.annotation, ...)
            elif field.annotation is bool or name == "depth_scale":
                fields[name] = (kind, Field(field.default, description=field.description))
            else:
                fields[name] = (kind | None, Field(None, description=field.description))
        for outer, inside in objects.items():
            named = model.__name__ + "".join(word.title() for word in outer.split("_"))
            form = create_model(named, __config__=ConfigDict(extra="forbid"), **inside)
            fields[outer] = (form | None, None)
        return create_model(
            model.__name__,
            __base__=model,
            __module__=model.__module__,
            __doc__=model.__doc__,
            **fields,
        )

    return extended
