"""Every bomb there is."""

from __future__ import annotations

from tests.server.bombs import arrays, clips, others, png_jpeg, rasters, sounds

BOMBS = (
    *png_jpeg.BOMBS,
    *rasters.BOMBS,
    *arrays.BOMBS,
    *sounds.BOMBS,
    *clips.BOMBS,
    *others.BOMBS,
)
