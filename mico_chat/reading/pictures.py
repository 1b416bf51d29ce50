"""Printed text in pictures, by PP-OCRv6 (Apache-2.0), whose weights are inside ``rapidocr``."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.engine.cpu import free_cores
from mico_chat.media.medium import WrittenText

SIDES = 640, 960
"""Pixels of the longest side of what is searched for text: a smaller picture is enlarged, a larger
one is scaled down."""

ENLARGED = 3.0  # at most, by this factor
LEAST_SIDE = 8  # pixels: nothing can be written in a picture that is thinner

SURE = 0.93
"""Lines below this confidence are left out. Of 100 texts that were rendered on photographs, all
that were read well had 0.97 or more. In 204 pictures without text, what was seen in leaves and
stripes had less, apart from single characters."""

MAX_LINES = 150


def models() -> tuple[Path, Path] | None:
    """The weights of detection and recognition, found without importing the package."""
    found = importlib.util.find_spec("rapidocr")
    if found is None or found.origin is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    folder = Path(found.origin).parent / "models"
    files = folder / "PP-OCRv6_det_small.onnx", folder / "PP-OCRv6_rec_small.onnx"
    return files if all(file.is_file() for file in files) else None


def installed() -> bool:
    return models() is not None


class PictureReader:
    """Reads lines of text in any script that PP-OCRv6 knows. Threads may share it."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._lock = threading.Lock()

    def read(self, pixels: NDArray[np.uint8]) -> list[WrittenText]:
        """The lines of text in a picture (H, W, 3), in reading order."""
        height, width = pixels.shape[:2]
        if min(height, width) < LEAST_SIDE:
            return []
        longest = max(height, width)
        wanted = min(max(longest, min(SIDES[0], ENLARGED * longest)), SIDES[1])
        size = [max(1, round(side * wanted / longest)) for side in (width, height)]
        picture = np.asarray(
            Image.fromarray(pixels).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        )
        # One after the other: the engine keeps state of a picture while it reads it.
        with self._lock, free_cores().take(1):
            found = self._loaded()(np.ascontiguousarray(picture[..., ::-1]))  # it takes BGR
        if found.txts is None:
            return []
        corners = np.clip(np.asarray(found.boxes, np.float64) / size, 0, 1)  # (n, 4, 2)
        lines = [
            WrittenText(
                text=text.strip(),
                box=tuple(np.concatenate([box.min(0), box.max(0)]).round(4).tolist()),
                confidence=round(float(score), 3),
            )
            for text, box, score in zip(found.txts, corners, found.scores, strict=True)
        ]
        order = reading_order(np.asarray(found.boxes, np.float64))
        return _texts([lines[at] for at in order])

    def _loaded(self) -> Any:
        if self._engine is None:
            from rapidocr import RapidOCR

            detection, recognition = models() or (None, None)
            self._engine = RapidOCR(
                params={
                    "Global.log_level": "critical",
                    "Global.text_score": SURE,
                    "Global.use_cls": False,  # it would look for text that is upside down
                    "Global.use_preprocess_img": False,
                    # Here, not in threads of its own, which would spin while they wait.
                    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                    "Det.model_path": str(detection),
                    "Det.limit_type": "max",
                    "Det.limit_side_len": SIDES[1],
                    "Det.max_candidates": MAX_LINES,
                    "Rec.model_path": str(recognition),
                }
            )
        return self._engine


def _texts(lines: list[WrittenText]) -> list[WrittenText]:
    """The lines that are text. A character alone is a leaf, a wheel or a star, unless there is
    text beside it."""
    return lines if any(sum(map(str.isalnum, line.text)) > 1 for line in lines) else []


def reading_order(boxes: NDArray[np.float64]) -> list[int]:
    """The places of boxes (n, 4, 2), corners from the top left clockwise, as they are read.

    The lines of a picture may rise or fall together: they are turned level by their mean slope.
    """
    along = (boxes[:, 1] - boxes[:, 0]).sum(0)
    angle = np.arctan2(along[1], along[0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centres = boxes.mean(1) @ turn  # (n, 2), level
    height = float(np.median(np.linalg.norm(boxes[:, 3] - boxes[:, 0], axis=1)))
    order: list[int] = []
    row: list[int] = []
    for at in np.argsort(centres[:, 1], kind="stable").tolist():
        if row and centres[at, 1] - centres[row[0], 1] > height / 2:
            order += sorted(row, key=lambda place: float(centres[place, 0]))
            row = []
        row.append(at)
    return order + sorted(row, key=lambda place: float(centres[place, 0]))
