"""A file's clips: its scenes and what is measured of them, in one pass over its frames and sound.

No file is an error: its row names the reason why it gives no clips.
"""

import hashlib
import time

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from mico_chat.errors import MediaError
from mico_chat.media import MediaLimits
from mico_chat.media.audio import decoded, packets_of
from mico_chat.media.video import upright_size
from mico_corpus.cutting.container import (
    Stored,
    chunks,
    name_of,
    opened,
    pictures_of,
    sound_stream,
    stored,
    zero_of,
)
from mico_corpus.cutting.measures import ClipMeasures, Looks, Loudness
from mico_corpus.recipe import BuildRecipe, ClipsRecipe
from mico_corpus.rows import Row

FAULTS = ("missing", "empty", "encrypted", "no pictures", "too long")
"""A MediaError has one of these faults as its reason; any other fault is "broken"."""
SCRAMBLED = ("encv", "drmi")
"""FFmpeg gives this codec to an MP4's encrypted video whose codec it cannot tell."""


def cut(row: Row, recipe: BuildRecipe) -> Row:
    """The ``FILE`` row of a ``SOURCE`` row."""
    began = time.perf_counter()
    found = _nothing()
    if row.get("fault"):
        found |= {"reason": "bad row", "detail": row["fault"]}
        return {**row, **found, "took": time.perf_counter() - began}
    try:
        _watch(row, recipe.clips, found)
    except MediaError as error:
        fault = error.fault if error.fault in FAULTS else "broken"
        found |= {"clips": [], "reason": fault, "detail": error.reason}
    except av.FFmpegError as error:
        said = f"FFmpeg cannot decode it: {error.strerror or type(error).__name__}"
        found |= {"clips": [], "reason": "broken", "detail": said}
    return {**row, **found, "took": time.perf_counter() - began}


def crashed(row: Row, how: str) -> Row:
    """The row of a file of which the process that cut it died."""
    said = f"FFmpeg crashed on it ({how})"
    return {**row, **_nothing(), "reason": "broken", "detail": said, "took": 0.0}


def _nothing() -> Row:
    found: Row = {"content": "", "seconds": 0.0, "width": 0, "height": 0, "fps": 0.0}
    return found | {"has_sound": False, "clips": [], "reason": "", "detail": ""}


def _watch(row: Row, recipe: ClipsRecipe, found: Row) -> None:
    """Decode a file once; ``found`` holds what is known of it so far, also when this raises."""
    bytes_ = stored(row)
    found["size"] = bytes_.size
    with opened(row) as container:
        stream, sound = pictures_of(row, container), sound_stream(container)
        if stream.codec_context.codec_tag in SCRAMBLED:
            raise _encrypted(row)
        MediaLimits().check_pixels(name_of(row), stream.width, stream.height)
        found |= {"width": stream.width, "height": stream.height}
        found["seconds"] = _claimed(container, stream)
        _check_length(row, found["seconds"], recipe, "its header says")
        found["content"] = content_of(bytes_)
        # Frames that no other refers to need no deblocking here. It saves a tenth of the decoding.
        stream.codec_context.options = {"skip_loop_filter": "noref"}
        looks = Looks(stream, zero_of(container), recipe)
        loudness = Loudness(zero_of(container), recipe.longest_file)
        streams = [stream] if sound is None else [stream, sound]
        damage: list[Exception] = []
        for packet in packets_of(container, streams, damage):
            if packet.stream.index != stream.index:
                for frame in decoded(packet, []):
                    loudness.hear(frame)
                continue
            if packet.has_sidedata("encryption_info"):
                raise _encrypted(row)
            for frame in decoded(packet, damage):
                if not looks.n_frames:
                    _check_first(row, frame, found)
                looks.see(frame, damaged=bool(damage))
                damage.clear()
                _check_length(row, looks.end, recipe, "it runs past")
        if not looks.n_frames:
            raise MediaError(name_of(row), "no frame can be decoded", "damaged")
        looks.finish(damaged=bool(damage))
    found["seconds"], found["fps"] = looks.end, looks.fps
    found["has_sound"] = loudness.heard
    spans = [(span["start"], span["end"]) for span in row.get("spans") or ()]
    found["clips"] = [
        clip.row(_reason(clip, recipe)) for clip in looks.clips(loudness, recipe.longest, spans)
    ]


def _reason(clip: ClipMeasures, recipe: ClipsRecipe) -> str:
    if clip.end - clip.start < recipe.shortest - 1e-6:
        return "too short"
    if clip.end - clip.start > recipe.longest + 1e-6:  # a scene is cut into shorter ones
        return "too long"
    if clip.damaged:
        return "damaged"
    if clip.brightness < recipe.darkest:
        return "dark"
    if clip.motion < recipe.least_motion:
        return "still"
    if recipe.quietest is not None and not clip.loudness >= recipe.quietest:
        return "silent"
    return ""


def _check_first(row: Row, frame: VideoFrame, found: Row) -> None:
    """Headers may be wrong about the size, and do not tell how a frame is turned."""
    MediaLimits().check_pixels(name_of(row), frame.width, frame.height)
    found["width"], found["height"] = upright_size(frame)


def _check_length(row: Row, seconds: float, recipe: ClipsRecipe, how: str) -> None:
    if seconds > recipe.longest_file:
        limit = f"the limit is {recipe.longest_file:,.0f} s (clips.longest_file)"
        raise MediaError(name_of(row), f"{how} {seconds:,.0f} s; {limit}", "too long")


def _claimed(container: InputContainer, stream: VideoStream) -> float:
    """The header's length, in seconds; 0 if it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return max(0.0, float(stream.duration * stream.time_base))
    return max(0.0, (container.duration or 0) / av.time_base)


def _encrypted(row: Row) -> MediaError:
    return MediaError(name_of(row), "its frames are encrypted; decrypt the file first", "encrypted")


def content_of(part: Stored) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with part.open() as stream:
        for data in chunks(stream, part.size):
            digest.update(data)
    return digest.hexdigest()
