"""Real media: the table, files in packages and archives, and what is made of photographs."""

import io
import json
import re
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import label

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.answers import NUMBERS, is_right
from mico_chat.evaluation.task import read_items
from mico_chat.media import MediaDecoder, MediaFile
from mico_world import sources
from mico_world.mini import real, unscripted
from mico_world.mini.real import TABLE, Real, disparity, media_at, pairs, read_rcc, real_items
from mico_world.mini.unscripted import Unscripted
from mico_world.motion.motion import encode_video
from mico_world.pictures.compose import encoded
from mico_world.sounds.synth import decode, flac

PLAIN, ZLIB, ZSTD = 0, 1, 4
FOLDER = 2


def write_rcc(path: Path, folders: dict[str, list[tuple[str, bytes, int]]]) -> Path:
    """A Qt resource file: a root folder with folders of files (name, data, flags)."""
    names, blobs = bytearray(), bytearray()

    def added(to: bytearray, data: bytes) -> int:
        to.extend(data)
        return len(to) - len(data)

    def node(name: str, flags: int, *numbers: int) -> bytes:
        text = struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return struct.pack(">IHIIQ", added(names, text), flags, *numbers, 0)

    nodes = [node("", FOLDER, len(folders), 1)]
    leaves: list[bytes] = []
    for folder, files in folders.items():
        nodes.append(node(folder, FOLDER, len(files), 1 + len(folders) + len(leaves)))
        for name, data, flags in files:
            packed = struct.pack(">I", len(data)) + zlib.compress(data) if flags & ZLIB else data
            blob = added(blobs, struct.pack(">I", len(packed)) + packed)
            leaves.append(node(name, flags, 0, blob))
    tree = b"".join([*nodes, *leaves])
    offsets = (24, 24 + len(tree), 24 + len(tree) + len(blobs))
    path.write_bytes(b"qres" + struct.pack(">I3II", 3, *offsets, 0) + tree + blobs + names)
    return path


def test_a_resource_files_pictures_and_sounds_are_read(tmp_path: Path) -> None:
    folders = {
        "resource": [("cat.webp", b"meow", PLAIN), ("Main.qml", b"code", PLAIN)],
        "größe": [("dog.ogg", b"woof" * 100, ZLIB), ("cow.png", b"", PLAIN)],
    }
    found = dict(read_rcc(write_rcc(tmp_path / "x.rcc", folders)))
    assert found == {"cat.webp": b"meow", "dog.ogg": b"woof" * 100, "cow.png": b""}


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rcc").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"x\.rcc.*not a Qt resource file"):
        list(read_rcc(tmp_path / "x.rcc"))
    packed = write_rcc(tmp_path / "z.rcc", {"r": [("cat.webp", b"?", ZSTD)]})
    with pytest.raises(DataError, match=r"cat\.webp is zstd-compressed"):
        list(read_rcc(packed))


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> Real:
    return Real.read(TABLE)


def places(table: Real) -> list[str]:
    lists = (table.photographs, table.sounds, table.clips, table.stereo, table.models)
    return [place for listed in lists for place in listed]


def test_the_packages_of_the_tables_are_known_and_train_nothing(table: Real) -> None:
    others = Unscripted.read(unscripted.TABLE).media
    real_ones, used = ({Path(place).parts[0] for place in of} for of in (places(table), others))
    assert real_ones.isdisjoint(used)
    used |= real_ones
    assert used <= set(sources.packages())
    folder = Path(real.__file__).parents[1]
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    recordings = (folder / "sounds/recordings.yaml").read_text(encoding="utf-8")
    trained_on = {*re.findall(r"[\w.-]+", recordings.replace("/", " "))}
    assert "luanti-game-minetest" in trained_on
    for package in sorted(used):
        assert package not in trained_on
        assert not [name for name, text in texts.items() if f'source("{package}")' in text]


def test_the_table_is_large_and_names_each_medium_once(table: Real) -> None:
    counts = [sum(map(len, of.values())) for of in (table.photographs, table.sounds, table.clips)]
    assert counts >= [150, 100, 20]
    for listed in (table.photographs, table.sounds):
        ids = [(Path(place).stem, name) for place, of in listed.items() for name in of]
        assert len(set(ids)) == len(ids)
    depths = sum(map(len, table.stereo.values())) + real.ROOMS
    assert (depths >= 20, len(table.cut_outs) >= 12) == (True, True)


def test_the_unscripted_questions_are_sixty_whose_answers_can_be_right() -> None:
    table = Unscripted.read(unscripted.TABLE)
    assert len(table.questions) == 60
    used = {name for question in table.questions for name in question.media}
    used |= {n for question in table.questions for turn in question.earlier for n in turn.media}
    names = [name for of in table.media.values() for (name,) in of.values()]
    assert len(set(names)) == len(names)
    assert set(names) == used
    for question in table.questions:
        for answer in question.accept:
            assert is_right(answer, question.accept, question.choices, question.reject), question
    sides = Counter(q.accept[0] for q in table.questions if q.choices == ("yes", "no"))
    assert sides["yes"] == sides["no"] == 5


# --- tiny packages --------------------------------------------------------------------------------


BOX = """v 0 0 0\nv 1 0 0\nv 0 1 0\nv 1 1 0\nv 0 0 1\nv 1 0 1\nv 0 1 1\nv 1 1 1
f 1 2 4\nf 1 4 3\nf 5 6 8\nf 5 8 7\nf 1 2 6\nf 1 6 5\nf 3 4 8\nf 3 8 7\nf 1 3 7\nf 1 7 5
f 2 4 8\nf 2 8 6
"""


def picture(colour: str, size: tuple[int, int] = (120, 80)) -> bytes:
    """A disc of one colour on white."""
    rows, columns = np.indices(size[::-1])
    inside = np.hypot(rows - size[1] / 2, columns - size[0] / 2) < size[1] / 4
    image = np.full((size[1], size[0], 3), 255, np.uint8)
    image[inside] = np.asarray(Image.new("RGB", (1, 1), colour))
    return encoded(image, "PNG")


def views(shift: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random wall seen by two eyes; the right third is ``shift`` pixels nearer than the rest."""
    wall = np.random.default_rng(0).integers(0, 255, (48, 160), np.uint8)
    left, right = wall[:, :128], np.roll(wall, -4, axis=1)[:, :128].copy()
    right[:, 80 - shift : 128 - shift] = left[:, 80:]
    return left, right


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(real, "source", lambda name: tmp_path / name)
    folder = tmp_path / "pack" / "photos"
    folder.mkdir(parents=True)
    for name, colour in {"ball": "red", "sea": "blue", "lawn": "green"}.items():
        (folder / f"{name}.png").write_bytes(picture(colour))
    (folder / "readme.txt").write_text("no medium")
    for eye, view in zip(real.SIDES, views(16), strict=True):
        (folder / f"hall_{eye}.png").write_bytes(encoded(view, "PNG"))
    still = np.zeros((30, 32, 48, 3), np.uint8)
    still[10:20] = 250
    (folder / "film.mp4").write_bytes(encode_video(still, 10))
    with zipfile.ZipFile(tmp_path / "pack" / "all.zip", "w") as archive:
        archive.writestr("deep/er/bell.wav", flac(np.sin(np.arange(16000, dtype=np.float32) / 5)))
        archive.writestr("deep/bell.wav", b"another bell")
        for name in ("box", "crate"):
            archive.writestr(f"deep/{name}.obj", BOX)
    return tmp_path / "pack"


def tiny() -> Real:
    place = "pack/photos"
    rows = {
        "questions": {
            "real photographs": ["What is it?", "What is shown?"],
            "real sounds": ["What do you hear?"],
            "real clips": ["What do you see?"],
            "real left-right": ["What is on the {}?"],
            "real colour": ["What colour {1} the {0}?"],
            "real count": ["How many {}?"],
            "real direction": ["Which way did the {} move?"],
            "real nearer": ["Which side is nearer?"],
        },
        "photographs": {place: {"ball": ["ball"], "sea": ["sea", "wave"], "lawn": ["grass"]}},
        "sounds": {"pack/all.zip/deep/er": {"bell": ["bell"]}},
        "clips": {place: {"film@1-2": ["light"]}},
        "things": {"photos-ball": ["ball", "red"], "photos-sea": ["waves", "blue"]},
        "cut_outs": dict.fromkeys(["photos-ball", "photos-sea"], "disc"),
        "backgrounds": ["photos-lawn"],
        "stereo": {place: {"hall": {"between": [0.25, 1], "side": "right"}}},
        "models": {"pack/all.zip/deep": {name: [0.5, 0.8, 0.5] for name in ("box", "crate")}},
    }
    return Real.of(rows, "tiny")


def test_files_of_folders_and_archives(package: Path) -> None:
    found = media_at("pack/photos", (".png",))
    assert set(found) == {"ball", "sea", "lawn", "hall_left", "hall_right"}
    suffix, read = found["ball"]
    assert (suffix, read()) == (".png", picture("red"))
    assert set(media_at("pack/all.zip/deep", (".obj",))) == {"box", "crate"}
    assert media_at("pack/all.zip/deep", (".wav",))["bell"][1]() == b"another bell"
    assert media_at("pack/all.zip/deep/er", (".wav",))["bell"][1]() != b"another bell"
    folders = {"r": [("cat.webp", b"meow", PLAIN), ("dog.webp", b"woof", ZLIB)]}
    write_rcc(package / "x.rcc", folders)
    found = media_at("pack/x.rcc", (".webp",))
    assert {name: read() for name, (_, read) in found.items()} == {"cat": b"meow", "dog": b"woof"}
    (package / "photos" / "film.avi").write_bytes(b"the same film")
    assert media_at("pack/photos", real.VIDEOS)["film"][0] == ".mp4"
    with pytest.raises(DataError, match="no such folder or archive"):
        media_at("pack/nothing", (".png",))


def test_a_medium_that_is_not_there_is_an_error(package: Path) -> None:
    table = tiny().model_copy(update={"photographs": {"pack/photos": {"moon": ("moon",)}}})
    with pytest.raises(DataError, match=r"no \.webp or .* named moon"):
        real_items(table)
    table = tiny().model_copy(update={"backgrounds": ("photos-desert",)})
    with pytest.raises(DataError, match="photos-desert is not among the photographs"):
        real_items(table)


def test_the_items_of_a_tiny_table(package: Path) -> None:
    made = real_items(tiny())
    ids = [item.id for item, _ in made]
    assert len(set(ids)) == len(ids)
    of = {skill: [pair for pair in made if pair[0].skill == skill] for skill in tiny().questions}
    questions = sorted(question for _, question in of["real photographs"])
    assert questions == ["What is it?", "What is it?", "What is shown?"]
    with MediaDecoder() as decoder:
        for item, _ in made:
            (path := package / item.name).write_bytes(item.data)
            decoder.decode(MediaFile(item.kind, path))
    (clip, _) = of["real clips"][0]
    frames = [
        frame.to_ndarray(format="rgb24")
        for frame in av.open(io.BytesIO(clip.data), "r").decode(video=0)
    ]
    assert (len(frames), min(frame.mean() for frame in frames) > 200) == (8, True)
    composites = of["real left-right"]
    assert len(composites) == 2 * real.COMPOSITES
    colours = {"ball": (255, 0, 0), "sea": (0, 0, 255)}
    for item, question in composites[:8]:
        pixels = np.asarray(Image.open(io.BytesIO(item.data)).convert("RGB"), np.float32)
        half = np.split(pixels, [pixels.shape[1] // 2], axis=1)["right" in question]
        (thing,) = {"ball", "sea"} & set(item.accept)
        assert np.abs(half - colours[thing]).max(-1).min() < 40
        assert np.abs(half - colours["sea" if thing == "ball" else "ball"]).max(-1).min() > 100
        assert set(item.reject) == {"ball", "sea", "wave"} - set(item.accept)
    asked = {question: item.accept for item, question in of["real colour"]}
    assert asked == {"What colour is the ball?": ("red",), "What colour are the waves?": ("blue",)}
    for item, question in of["real count"]:
        assert question == "How many discs?"
        pixels = np.asarray(Image.open(io.BytesIO(item.data)).convert("RGB"), np.float32)
        _, count = label(np.minimum(*(np.abs(pixels - c).max(-1) for c in colours.values())) < 60)
        assert NUMBERS[count] in item.accept
    for item, _ in of["real direction"]:
        frames = [
            frame.to_ndarray(format="rgb24").astype(int)
            for frame in av.open(io.BytesIO(item.data), "r").decode(video=0)
        ]
        channel = {"moves-00": 0, "moves-01": 2}[item.id]
        dominant = [frame[..., channel] - frame[..., 1] > 100 for frame in (frames[0], frames[-1])]
        start, end = (np.argwhere(mask)[:, 1].mean() for mask in dominant)
        assert item.accept == (("left", "right")[bool(end > start)],)
        assert abs(end - start) > 60
    for item, _ in of["real nearer"]:
        depth = np.asarray(Image.open(io.BytesIO(item.data)), np.float32)
        parts = np.split(depth, [depth.shape[1] // 2], axis=1)
        near = [np.percentile(part[part > 0], 20) for part in parts]
        assert item.accept == (real.SIDES[int(np.argmin(near))],), item.id
    assert {item.accept[0] for item, _ in of["real nearer"]} == {"left", "right"}


def test_unscripted_questions_are_written_with_their_media(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / "photos" / "ring.flac").write_bytes(flac(np.sin(np.arange(16000 * 12) / 5)))
    place = "pack/photos"
    rows: dict[str, Any] = {
        "media": {place: {"ball": ["ball"], "ring": ["ring"], "film@1-2": ["film"]}},
        "questions": [
            {
                "media": ["ball", "film"],
                "message": "The same?",
                "accept": ["no"],
                "choices": ["yes"],
            },
            {
                "earlier": [{"media": ["ring"], "message": "And this?", "answer": "A bell."}],
                "message": "How loud?",
                "accept": ["loud"],
                "reject": ["silent"],
            },
        ],
    }
    (path := tmp_path / "unscripted.yaml").write_text(yaml.safe_dump(rows))
    monkeypatch.setattr(unscripted, "TABLE", path)
    (tmp_path / "media").mkdir()
    written = tmp_path / "items.jsonl"
    made = list(unscripted.unscripted(tmp_path))
    written.write_text("".join(json.dumps(row) + "\n" for row in made))
    same, loud = read_items(written)
    assert (same.skill, same.question, same.answers, same.choices) == (
        ("unscripted", "The same?", ("no",), ("yes",))
    )
    assert (loud.question, loud.answers, loud.reject) == ("How loud?", ("loud",), ("silent",))
    assert loud.earlier == ((1, "And this?", "A bell."),)
    media = [*same.media, *loud.media]
    assert [medium.kind for medium in media] == ["image", "video", "audio"]
    assert Path(str(media[0].source)).read_bytes() == picture("red")
    assert len(decode(Path(str(media[2].source)).read_bytes(), 60)) == 10 * 16000
    with MediaDecoder() as decoder:
        for medium in media:
            decoder.decode(medium)
    rows["questions"][0]["media"] = ["moon"]
    path.write_text(yaml.safe_dump(rows))
    with pytest.raises(DataError, match="'moon' is not among the media"):
        list(unscripted.unscripted(tmp_path))


def test_pairs_share_neither_a_word_nor_a_colour(table: Real) -> None:
    words = {
        real.id_of(place, name): accept
        for place, listed in table.photographs.items()
        for name, accept in listed.items()
    }
    found = pairs(table, words, Random(0))
    assert len(found) == real.COMPOSITES == len(set(found))
    for left, right in found:
        assert set(words[left]).isdisjoint(words[right])
        colours = [table.things[id][1] for id in (left, right)]
        assert None in colours or len(set(colours)) == 2


def test_disparity_is_the_shift_of_each_part() -> None:
    left, right = (view.astype(np.float32) for view in views(16))
    found = disparity(left, right, most=24)
    for part, shift in ((found[:, 30:60], 4), (found[:, 90:120], 16)):
        assert np.median(part[part > 0]) == shift
        assert (part > 0).mean() > 0.8
