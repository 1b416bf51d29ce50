"""The tables of a build, one row a thing; every stage reads rows and writes as many.

A build has four, in ``build/`` beside the shards. All are Parquet, so that any tool can read them:

* ``sources.parquet``: a file that was given (:data:`SOURCE`);
* ``files/``: what was found in it, its clips in a list (:data:`FILE`, one row a source);
* ``clips.parquet``: the manifest, a row a clip (:data:`CLIP`), those left out too;
* ``index/``: where each clip of the manifest went (:data:`INDEX`).

An empty ``reason`` means that a row was kept. Times are seconds of the file.
"""

from typing import Any

import pyarrow as pa

Row = dict[str, Any]

SOURCES = "build/sources.parquet"
FILES = "build/files"
CLIPS = "build/clips.parquet"
INDEXES = "build/index"

SPAN = pa.struct({"start": pa.float64(), "end": pa.float64()})

SOURCE = pa.schema(
    {
        "id": pa.string(),  # hash of address and member
        "address": pa.string(),  # a file, or an address of fsspec; a tar if there is a member
        "member": pa.string(),
        "offset": pa.int64(),  # of the member in the tar; 0 and the size otherwise
        "size": pa.int64(),
        "source": pa.string(),  # the collection it belongs to
        "licence": pa.string(),
        "text": pa.string(),  # the caption that came with it
        "category": pa.string(),  # such as music or gaming
        "spans": pa.list_(SPAN),  # where to cut it, seconds; empty: at its scenes
        "fault": pa.string(),  # why the row of an annotation file cannot be used
    }
)

MEASURES = {
    "brightness": pa.float32(),  # mean luma, 0 to 1
    "motion": pa.float32(),  # mean change of luma from sampled frame to sampled frame, 0 to 1
    "loudness": pa.float32(),  # dB below full scale (0 and less); NaN without sound
    "hash": pa.binary(8),  # perceptual hash of the middle frame
}

CUT = pa.struct({"start": pa.float64(), "end": pa.float64(), "reason": pa.string(), **MEASURES})

FILE = pa.schema(
    [
        *SOURCE,
        pa.field("content", pa.string()),  # hash of the file's bytes
        pa.field("seconds", pa.float64()),
        pa.field("width", pa.int32()),  # as shown, after rotation
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float32()),  # mean
        pa.field("has_sound", pa.bool_()),
        pa.field("clips", pa.list_(CUT)),
        pa.field("reason", pa.string()),  # one of REASONS
        pa.field("detail", pa.string()),  # the sentence that names what was found
        pa.field("took", pa.float32()),  # seconds of work
    ]
)

CLIP = pa.schema(
    [
        pa.field("id", pa.string()),  # hash of the file's content, start and end
        *(f for f in FILE if f.name not in ("id", "clips", "took", "spans", "fault")),
        pa.field("start", pa.float64()),
        pa.field("end", pa.float64()),
        *(pa.field(name, kind) for name, kind in MEASURES.items()),
    ]
)

ANNOTATION = pa.struct(
    {
        "annotator": pa.string(),
        "version": pa.string(),
        "role": pa.string(),
        "medium": pa.string(),
        "text": pa.string(),
        "score": pa.float64(),  # as given, so that a record is the same whatever rows went through
        "data": pa.binary(),
        "start": pa.float64(),
        "end": pa.float64(),
    }
)

TOOK = pa.list_(pa.struct({"stage": pa.string(), "seconds": pa.float32()}))

ANNOTATED = pa.schema(
    [*CLIP, pa.field("annotations", pa.list_(ANNOTATION)), pa.field("stages", TOOK)]
)
"""It is a row between two annotators; ``reason`` is set once one leaves the clip out."""

INDEX = pa.schema(
    [*ANNOTATED, pa.field("shard", pa.string()), pa.field("files", pa.list_(pa.string()))]
)
"""It is the row above without the annotations' ``data``, which is in the shard alone."""

REASONS = {
    # of a file
    "missing": "no such file, or it cannot be read",
    "empty": "0 bytes",
    "broken": "no frame can be decoded",
    "encrypted": "its frames are encrypted",
    "no pictures": "sound alone",
    "too long": "longer than clips.longest_file; of a span, than clips.longest",
    "bad row": "a row of an annotation file lacks what it needs",
    "same file": "the bytes of another file",
    # of a clip
    "too short": "a scene shorter than clips.shortest",
    "dark": "brightness below clips.darkest",
    "still": "motion below clips.least_motion",
    "silent": "loudness below clips.quietest, where sound is asked for",
    "duplicate": "looks like another clip",
    "damaged": "its frames or its sound cannot be decoded",
    "unsafe": "an annotator of safety scored it above its limit",
    "no caption": "no annotator described it",
    "removed": "taken out of the finished shards",
}
