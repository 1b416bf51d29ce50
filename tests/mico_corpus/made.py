"""A small finished build: real clips in shards, and the tables that say how they came about."""

import hashlib
import io
import math
import wave
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mico_corpus.rows import CLIP, FILE, INDEX, SOURCE, Row
from mico_training.data.sources.written import Sample, write_shard

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
LICENCES = {"films": "CC-BY-4.0", "phones": "CC0-1.0"}
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)>"
SECONDS = 6.0


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def video(colour: str, seconds: float = 1.0, side: int = 64, hertz: float = 330.0) -> bytes:
    """A square that crosses the picture, and a tone that grows loud, as MP4."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        pictures = out.add_stream("libx264", rate=12, options={"threads": "1", "crf": "30"})
        width = 3 * side // 2
        pictures.width, pictures.height, pictures.pix_fmt = width, side, "yuv420p"
        sound = out.add_stream("aac", rate=16_000, layout="mono")
        frames = int(12 * seconds)
        for number in range(frames):
            pixels = np.full((side, width, 3), 70 + 60 * (number % 2), dtype=np.uint8)
            left = number * side // frames
            pixels[side // 4 : 3 * side // 4, left : left + side // 3] = COLOURS[colour]
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(pictures.encode())
        samples = tone(hertz, seconds)[None]
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "mono")
        frame.sample_rate = 16_000
        out.mux(sound.encode(frame))
        out.mux(sound.encode())
    return file.getvalue()


def tone(hertz: float, seconds: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    time = np.arange(int(16_000 * seconds)) / 16_000
    loud = 0.5 * np.sin(math.pi * time / seconds) ** 2
    return (np.sin(2 * np.pi * hertz * time) * loud).astype(np.float32)


@cache
def sound(hertz: float = 330.0, seconds: float = 1.0) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((tone(hertz, seconds) * 32_767).astype("<i2").tobytes())
    return file.getvalue()


def picture(colour: str, side: int = 64) -> bytes:
    pixels = np.full((side, side, 3), 128, dtype=np.uint8)
    pixels[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = COLOURS[colour]
    return encoded(pixels, "JPEG")


@cache
def metres(side: int = 48) -> bytes:
    """A floor that goes from 1 to 5 metres, in millimetres."""
    rows = np.linspace(5000, 1000, side).astype(np.uint16)
    return encoded(np.repeat(rows[:, None], side * 4 // 3, axis=1), "PNG")


@cache
def relative(side: int = 48) -> bytes:
    rows = np.linspace(10, 250, side).astype(np.uint8)
    return encoded(np.repeat(rows[:, None], side * 4 // 3, axis=1), "PNG")


@cache
def normals(side: int = 48) -> bytes:
    pixels = np.zeros((side, side * 4 // 3, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, side * 4 // 3)
    pixels[..., 2] = 255
    return encoded(pixels, "PNG")


def encoded(pixels: np.ndarray[Any, Any], form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def said(annotator: str, role: str, medium: str, text: str = "", score: float = math.nan) -> Row:
    about = {"annotator": annotator, "version": f"{annotator}-1.0", "role": role, "medium": medium}
    times = {"start": math.nan, "end": math.nan}
    if role in ("speech", "text"):
        times = {"start": 0.5, "end": 2.0}
    return {**about, "text": text, "score": score, "data": b"", **times}


def clip_row(number: int, folder: Path, reason: str = "", detail: str = "") -> Row:
    """A row of the manifest; three clips come from a file."""
    file, place = divmod(number, 3)
    source = list(LICENCES)[file % 2]
    loud = math.nan if number % 4 == 3 else -20.0 - number % 7
    return {
        "id": digest(f"clip {number}"),
        "address": str(folder / "videos" / f"{source} {file}.mp4"),
        "member": "",
        "offset": 0,
        "size": 1000 + file,
        "source": source,
        "licence": LICENCES[source],
        "text": f"film number {file}",
        "content": digest(f"file {file}"),
        "seconds": 3 * SECONDS,
        "width": 640,
        "height": 480,
        "fps": 25.0,
        "has_sound": not math.isnan(loud),
        "reason": reason,
        "detail": detail,
        "start": place * SECONDS,
        "end": (place + 1) * SECONDS,
        "brightness": 0.01 if reason == "dark" else 0.3 + number % 5 / 10,
        "motion": 0.05,
        "loudness": loud,
        "hash": number.to_bytes(8, "big"),
    }


def annotations_of(number: int, text: str) -> list[Row]:
    found = [
        said("mini", "caption", "image", text, 0.5 + number % 5 / 10),
        said("mini", "caption", "video", f"{text} that moves", 0.4),
        said("rooms", "depth", "image"),
        said("planes", "normal", "image"),
        said("names", "tag", "image", "square", 0.9),
    ]
    if number % 4 != 3:
        found.append(said("whisper", "speech", "audio", f"this is number {number}", 0.8))
        found.append(said("mini", "caption", "audio", "a tone", 0.6))
    if number % 5 == 0:
        found.append(said("ocr", "text", "image", "EXIT", 0.95))
    return found


def sample_of(number: int, row: Row, annotations: Sequence[Row]) -> Sample:
    colour = list(COLOURS)[number % 3]
    files = {"image.jpg": picture(colour), "video.mp4": video(colour)}
    if row["has_sound"]:
        files["audio.wav"] = sound()
    files |= {"depth.png": relative() if number % 2 else metres(), "normal.png": normals()}
    names = {name.partition(".")[0]: name for name in files}
    captions: dict[str, tuple[str, ...]] = {}
    for one in annotations:
        if one["role"] == "caption":
            name = names[one["medium"]]
            captions[name] = (*captions.get(name, ()), one["text"])
    return Sample(row["id"], "train", files, captions, (), {"image.jpg": "square"})


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Row], group: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=group)


def build(folder: Path, clips: int = 12, a_shard: int = 5) -> Path:
    """``clips`` in shards of ``a_shard``, two more that the cutting left out, and one that the
    annotators did; and two files with nothing in them."""
    output = folder / "out"
    rows = [clip_row(number, folder) for number in range(clips)]
    dark = clip_row(clips, folder, "dark", "mean brightness 0.01")
    twin = clip_row(clips + 1, folder, "duplicate", f"looks like {rows[0]['id']}")
    unsafe = clip_row(clips + 2, folder)
    write_rows(output / "build" / "clips.parquet", CLIP, [*rows, dark, twin, unsafe])
    for number, row in enumerate(rows):
        colour = list(COLOURS)[number % 3]
        text = HOSTILE if number == 1 else f"a {colour} square"
        row["annotations"] = annotations_of(number, text)
        row["stages"] = [{"stage": "mini", "seconds": 0.5}, {"stage": "pack", "seconds": 0.25}]
    for first in range(0, clips, a_shard):
        some = range(first, min(first + a_shard, clips))
        samples = [sample_of(n, rows[n], rows[n]["annotations"]) for n in some]
        shard = f"{digest(' '.join(sample.id for sample in samples))}.tar"
        output.mkdir(exist_ok=True)
        write_shard(output / shard, samples)
        for n, sample in zip(some, samples, strict=True):
            rows[n] |= {"shard": shard, "files": list(sample.files)}
        write_rows(
            output / "build" / "index" / f"{first}.parquet", INDEX, (rows[n] for n in some), 2
        )
    lost: Row = {
        "reason": "unsafe",
        "detail": "0.93 by nudity",
        "shard": "",
        "files": [],
        "stages": [],
    }
    lost["annotations"] = [said("nudity", "safety", "image", "", 0.93)]
    write_rows(output / "build" / "index" / "lost.parquet", INDEX, [unsafe | lost])
    _write_files(output, [*rows, dark, twin, unsafe])
    return output


def _write_files(output: Path, clips: Sequence[Row]) -> None:
    files = {row["address"]: row for row in clips}
    found = []
    for address, row in files.items():
        cuts = [clip for clip in clips if clip["address"] == address]
        found.append({**row, "id": digest(address), "reason": "", "clips": cuts, "took": 0.75})
    nothing = {"clips": [], "took": 0.01, "seconds": 0.0, "has_sound": False}
    for name, reason, detail in (
        ("cut | short.mp4", "broken", "moov atom not found"),
        ("<b>empty</b>.mp4", "empty", "0 bytes"),
    ):
        about = {"address": name, "source": "films", "licence": "", "id": digest(name)}
        found.append({**found[0], **nothing, **about, "reason": reason, "detail": detail})
    write_rows(output / "build" / "sources.parquet", SOURCE, found)
    write_rows(output / "build" / "files" / "0.parquet", FILE, found)
