"""Files that clients send: a medium of every kind, made on the spot."""

import base64
import io
import wave
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

RED, BLUE = (220, 30, 30), (30, 60, 220)


def square(colour: tuple[int, int, int] = RED) -> NDArray[np.uint8]:
    """A square on white (224, 224, 3): the mini names its colour and its shape."""
    y, x = np.abs(np.mgrid[:224, :224] - 112)
    inside = np.maximum(x, y) < 60
    return np.where(inside[..., None], np.array(colour), 255).astype(np.uint8)


def png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """Pixels (H, W, 3), or a depth map (H, W) of 16 bits, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 1.0, hertz: float = 440.0) -> bytes:
    """A tone, mono, at 16,000 Hz, as a WAV file."""
    samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16_000 * seconds)) / 16_000)
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes((32767 * samples).astype("<i2").tobytes())
    return file.getvalue()


def mp4(colours: tuple[tuple[int, int, int], ...] = (RED, BLUE)) -> bytes:
    """A silent clip, half a second of a square of each colour."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 224
        stream.pix_fmt = "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(square(colour), format="rgb24")
            for _ in range(5):
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def depth() -> bytes:
    """A wall at 1 to 5 metres that runs away to the right, as a PNG file of millimetres."""
    return png(np.tile(np.linspace(1000, 5000, 224, dtype=np.uint16), (224, 1)))


def normal() -> bytes:
    """A wall that faces the camera, as a PNG file."""
    return png(np.full((224, 224, 3), (128, 128, 255), np.uint8))


def part(kind: str, url: str) -> dict[str, Any]:
    """A medium as a content part of chat completions."""
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def completion(text: str, *parts: dict[str, Any], model: str = "fake") -> dict[str, Any]:
    """The body of a request to /v1/chat/completions."""
    content = [*parts, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}]}


def data_uri(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
