"""Files that are no media at all."""

from __future__ import annotations

from random import Random

from tests.server.bombs.bomb import Bomb

_OTHER = [
    b"",
    b"\x00",
    b"\xff",
    b"hello, this is no medium\n",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='99999999' height='99999999'/>",
    b"<!DOCTYPE html><html>",
    b"%PDF-1.7",
    b"\x1f\x8b" + bytes(100),
    b"\x7fELF" + bytes(100),
    b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    bytes(4_000),
]


def no_medium(random: Random) -> bytes:
    return random.choice(_OTHER)


BOMBS = (
    Bomb(no_medium, "image", "jpg"),
    Bomb(no_medium, "audio", "mp3"),
    Bomb(no_medium, "video", "mp4"),
    Bomb(no_medium, "depth", "npy"),
)
