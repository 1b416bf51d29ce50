"""Text and paths of the terminal, with what people and models may write in them."""

import io
from pathlib import Path

import pytest
from rich.cells import cell_len

from mico_ui.client import ApiError
from mico_ui.terminal.screen import WordWrap, printable
from mico_ui.terminal.talk import dropped, paths_of


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31mb\x07\r\x9bc\x00\u202ed\ud800") == "a[31mbcd"
    assert printable("two\nlines\tä 👩\u200d💻 \u00a0") == "two\nlines   ä 👩\u200d💻 \u00a0"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_words_are_never_broken(size: int) -> None:
    out = io.StringIO()
    flow = WordWrap(out, 20)
    text = "The quick  brown fox jumps over\n\n  a lazy dog, incomprehensible too."
    for at in range(0, len(text), size):
        flow.feed(text[at : at + size])
    flow.end()
    lines = out.getvalue().split("\n")
    assert all(cell_len(line) <= 20 for line in lines[:-1])
    assert out.getvalue().split() == text.split()
    assert "  a lazy dog," in [line.rstrip() for line in lines]
    assert lines[-1] == ""


def test_text_without_spaces_is_shown_before_its_end() -> None:
    out = io.StringIO()
    WordWrap(out, 40).feed("漢字" * 30)
    lines = out.getvalue().split("\n")
    assert [cell_len(line) for line in lines[:2]] == [40, 40]  # two cells each
    assert ("漢字" * 30).startswith("".join(lines))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("cat.jpg", "my cat.png", "it's.wav", "ü.mp4", "notes.bin", "map.npy"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "pictures.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat.jpg", ["cat.jpg"]),
        ("my cat.png", ["my cat.png"]),
        ("'my cat.png' ", ["my cat.png"]),
        ('"my cat.png"', ["my cat.png"]),
        ("my\\ cat.png", ["my cat.png"]),
        ("'my cat.png", ["my cat.png"]),
        ("it's.wav", ["it's.wav"]),
        ("'it'\\''s.wav' cat.jpg", ["it's.wav", "cat.jpg"]),
        ("~/cat.jpg ./cat.jpg", ["cat.jpg", "cat.jpg"]),
        ("notes.bin", ["notes.bin"]),
        ("{folder}/cat.jpg", ["cat.jpg"]),
        ("file://{folder}/my%20cat.png", ["my cat.png"]),
    ],
)
def test_paths_as_they_are_written(folder: Path, text: str, names: list[str]) -> None:
    found = paths_of(text.format(folder=folder))
    assert [path.resolve().name for path in found] == names


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing.png", r"^nothing\.png: no such file$"),
        ("no such thing.png", r"^no such thing\.png: no such file$"),
        ("cat.jpg nothing.png", r"^nothing\.png: no such file$"),
        ("pictures.png", r"^pictures\.png: is a folder$"),
        ("~nobody-of-this-name/a.png", "no such file"),
        ("a\0b", "no such file"),
        ("file://[", r"^file:/+\[: no such file$"),
        ("x" * 5000, r"^x{200}: no such file$"),
    ],
)
def test_a_path_without_a_file_is_an_error(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ApiError, match=said):
        paths_of(text)


@pytest.mark.parametrize(
    ("text", "message", "names"),
    [
        ("{folder}/cat.jpg", "", ["cat.jpg"]),
        ("'{folder}/my cat.png' ", "", ["my cat.png"]),
        ("What is in ./cat.jpg?", "What is in?", ["cat.jpg"]),
        ("Is ~/cat.jpg like '~/ü.mp4', you think?", "Is like, you think?", ["cat.jpg", "ü.mp4"]),
        ("It's ./it's.wav that's heard", "It's that's heard", ["it's.wav"]),
        ("cat.jpg alone is a word", "cat.jpg alone is a word", []),
        ("./notes.bin and ./nothing.png", "./notes.bin and ./nothing.png", []),
        ("./pictures.png", "./pictures.png", []),
        ("keep   the\n  spaces of code", "keep   the\n  spaces of code", []),
        ("/" * 5000 + ".png", "/" * 5000 + ".png", []),
    ],
)
def test_dropped_paths(folder: Path, text: str, message: str, names: list[str]) -> None:
    rest, found = dropped(text.format(folder=folder))
    assert (rest, [path.name for _, path in found]) == (message, names)
    kinds = {"cat.jpg": "image", "my cat.png": "image", "it's.wav": "audio", "ü.mp4": "video"}
    assert [kind for kind, _ in found] == [kinds[name] for name in names]
