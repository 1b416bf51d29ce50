"""Media: untrusted bytes or a path in, numpy arrays and a report of what was decoded out.

``MediaDecoder`` decodes in a worker process under limits of memory and time (for anything a
user sends); ``decode`` does the same in this process (for trusted media, such as training data).
Only numpy, Pillow and PyAV are imported: no torch.
"""

from mico_chat.media.decoder import MediaDecoder
from mico_chat.media.file import MediaFile, MediaLimits
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import (
    SAMPLE_RATE,
    Audio,
    Depth,
    Image,
    MediaReport,
    Medium,
    Normal,
    Video,
)
from mico_chat.media.worker import decode

__all__ = [
    "KINDS",
    "SAMPLE_RATE",
    "Audio",
    "Depth",
    "Image",
    "Kind",
    "MediaDecoder",
    "MediaFile",
    "MediaLimits",
    "MediaReport",
    "Medium",
    "Normal",
    "Video",
    "decode",
]
