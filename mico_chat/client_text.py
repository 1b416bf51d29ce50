"""Text of a client in a chat template: the template reads what it says, and none becomes markup.

Each character of the text is moved, one for one, to planes that Unicode has not assigned. The
prompt is cut where moved characters stand, and behind the cuts they are moved back. A template may
split, trim, join or double a text: its markup has none of the text's characters.

:class:`ClientText` answers a template as if nothing had been moved: ``'</think>' in content``,
``content.split(...)``, ``content | trim``. A string that lost this class on its way still has its
moved characters. A gap here could thus make a prompt odd, but it could not make markup of text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, cast

import numpy as np
from jinja2 import Template
from transformers.utils.chat_template_utils import _compile_jinja_template

SAID, GIVEN, SLOT, _KEPT = 0x40000, 0x80000, 0xC0000, 0xE0000
"""Where the places begin of characters that the assistant said, and of those of others. A slot is
one character that stands for what is no text. From the last number on, characters are not moved:
they are flags and characters for private use."""

_PLACES = pairwise((SAID, GIVEN, SLOT, _KEPT, 0x110000))
_SAID, _GIVEN, _SLOTS, _STAY = (f"{chr(first)}-{chr(end - 1)}" for first, end in _PLACES)
MOVED = re.compile(f"[{_SAID}{_GIVEN}{_SLOTS}]")
_RUNS = re.compile(
    f"(?P<said>[{_STAY}]*[{_SAID}][{_SAID}{_STAY}]*)|(?P<slot>[{_SLOTS}])"
    f"|(?P<given>[{_STAY}]*[{_GIVEN}][{_GIVEN}{_STAY}]*)"
    f"|(?P<markup>(?:[^{_SAID}{_GIVEN}{_SLOTS}{_STAY}]|[{_STAY}]+(?![{_SAID}{_GIVEN}{_STAY}]))+)"
)


def _changed(text: str, change: Callable[[Any], Any]) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return cast(str, change(codes).astype("<u4").tobytes().decode("utf-32-le", "surrogatepass"))


def plain(text: str) -> str:
    """What a text says, wherever its characters are."""
    if MOVED.search(text) is None:
        return str.__str__(text)
    return _changed(text, lambda codes: np.where(codes < SLOT, codes % SAID, codes))


def client_text(text: str, place: int) -> "ClientText":
    """A client's text, moved. U+FFFD stands for characters that Unicode has not assigned."""
    return _moved(MOVED.sub("\ufffd", text), place)


def _moved(text: str, place: int) -> "ClientText":
    return ClientText(_changed(text, lambda codes: np.where(codes < SAID, codes + place, codes)))


def runs(rendered: str) -> Iterator[tuple[str, str]]:
    """The runs of a prompt, moved back, each with its kind: markup, said, given or slot."""
    return ((str(run.lastgroup), plain(run[0])) for run in _RUNS.finditer(rendered))


class ClientText(str):
    """A string with moved characters, and perhaps a template's own between them."""

    __slots__ = ()

    def __str__(self) -> str:
        return self  # a string's filters call it first

    def __repr__(self) -> str:
        return _as(self, repr(plain(self)))

    def __iter__(self) -> Iterator[str]:
        return map(ClientText, super().__iter__())

    def __radd__(self, other: str) -> str:
        return ClientText(str.__add__(other, self))

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def replace(self, old: str, new: str, count: Any = -1, /) -> str:
        pieces = self.split(old, count) if old else [super().replace(old, new, count)]
        return ClientText(str.join(new, pieces))


def _seen(value: Any) -> Any:
    """A template's value, in which all strings are as it reads them."""
    if isinstance(value, Mapping):
        return {_seen(key): _seen(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_seen, value))
    return plain(value) if isinstance(value, str) else value


def _as(pattern: str, text: str) -> str:
    """A text, moved to the place of the first moved character of ``pattern``."""
    found = MOVED.search(pattern)
    place = SLOT if found is None else ord(found[0]) & SLOT
    return text if place == SLOT else _moved(text, place)


def _pieces(method: Any, text: str, *given: Any, **named: Any) -> Any:
    whole, at, found = plain(text), 0, []
    pieces = method(whole, *_seen(given), **_seen(named))
    gaps = len(whole) - sum(map(len, pieces))
    apart = isinstance(given[0] if given else named.get("sep"), str)
    for piece in pieces:
        at = at if apart else whole.index(piece, at)  # behind white space
        found.append(text[at : at + len(piece)])
        at += len(piece) + gaps // max(len(pieces) - 1, 1) * apart
    return type(pieces)(found)


def _cased(method: Any, text: str) -> str:
    changed = (_as(run[0], method(plain(run[0]))) for run in _RUNS.finditer(text))
    return ClientText("".join(changed))


# The methods of a string, for a ClientText: what a template asks or wants is found in the plain
# text, and what it gets are the moved characters of the same places.
_METHODS: tuple[tuple[Callable[..., Any], str], ...] = (
    (
        lambda method, text, *given: method(plain(text), *_seen(given)),
        "count find index rfind rindex startswith endswith __contains__ __hash__ __eq__ __ne__ "
        "__lt__ __le__ __gt__ __ge__ " + " ".join(name for name in dir(str) if name[:2] == "is"),
    ),
    (
        lambda method, text, *given: text[: len(method(plain(text), *_seen(given)))],
        "rstrip removesuffix",
    ),
    (
        lambda method, text, *given: text[len(text) - len(method(plain(text), *_seen(given))) :],
        "lstrip removeprefix",
    ),
    (lambda method, text, *given: ClientText(method(text, *given)), "__getitem__ __add__ join"),
    (_pieces, "split rsplit splitlines partition rpartition"),
    (_cased, "upper lower title capitalize casefold swapcase"),
)


def _method(made: Callable[..., Any], method: Any) -> Any:
    return lambda *given, **named: made(method, *given, **named)


for _made, _names in _METHODS:
    for _name in _names.split():
        setattr(ClientText, _name, _method(_made, getattr(str, _name)))


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose strings stay :class:`ClientText`."""

    @wraps(function)
    def kept(*given: Any, **named: Any) -> Any:
        value = function(*given, **named)
        return ClientText(value) if type(value) is str and MOVED.search(value) else value

    return kept


@lru_cache(maxsize=64)
def template_of(source: str) -> Template:
    """A chat template as transformers compiles it, whose strings stay :class:`ClientText`."""
    environment: Any = _compile_jinja_template(source).environment.overlay()
    tojson = environment.filters["tojson"]

    def written(value: Any, *given: Any, **named: Any) -> str:
        return _as(tojson(value), tojson(_seen(value), *given, **named))

    environment.filters = {name: _keeping(f) for name, f in environment.filters.items()}
    environment.filters["tojson"] = written
    environment.concat = _keeping("".join)
    environment.call = _keeping(environment.call)
    template = cast(Template, environment.from_string(source))
    joined = _keeping(lambda texts: "".join(map(str, texts)))
    template.root_render_func.__globals__["str_join"] = joined  # Jinja's ~
    return template
