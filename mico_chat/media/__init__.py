"""Decodes media: bytes or a path to numpy arrays, with a report.

``MediaDecoder`` decodes what users send, in a worker process with limits of memory and time.
``decode`` decodes trusted media, such as training data, in this process. This package does not
import torch.
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
    Pages,
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
    "Pages",
    "Video",
    "decode",
]
