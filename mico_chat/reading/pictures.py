"""Printed text in pictures, by PP-OCRv6 (Apache-2.0), whose weights are inside ``rapidocr``."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.engine.cpu import free_cores, usable_cores
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


Line: TypeAlias = tuple[NDArray[np.uint8], float]
"""It holds a line's pixels (H, W, 3), and its width, padding included, for each pixel of height."""


class PictureReader:
    """Reads lines of text in any script that PP-OCRv6 knows. Threads may share it.

    Finding the lines of a picture is a step, and so is each line. Pictures that are read at the
    same time take turns: a page with many lines does not hold up a sign.

    As many ``threads`` as there are cores compute the steps, in the order in which they were asked
    for. Finding takes 0.3 s for a photograph: most of the time in which twenty are attached.
    """

    def __init__(self, engine: PaddleEngine | None = None, threads: int | None = None) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._steps = ThreadPoolExecutor(threads or usable_cores(), "mico-ocr")

    def read(
        self,
        pixels: NDArray[np.uint8],
        enough: Callable[[list[str], float], bool] = lambda texts, width: False,
    ) -> list[WrittenText]:
        """The lines of text in a picture (H, W, 3), in reading order.

        No more lines are recognised once ``enough`` is true. It gets the texts so far, and the
        width of all that was recognised, scaled to a height of 1.
        """
        high, wide = pixels.shape[:2]
        if min(high, wide) < LEAST_SIDE:
            return []
        longest = max(high, wide)
        wanted = min(max(longest, min(SIDES[0], ENLARGED * longest)), SIDES[1])
        size = tuple(max(1, round(side * wanted / longest)) for side in (wide, high))
        scaled = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        picture = np.ascontiguousarray(np.asarray(scaled)[..., ::-1])
        boxes, found = self._steps.submit(self._find, picture).result()
        corners = np.clip(boxes / size, 0, 1)
        lines: dict[int, WrittenText] = {}
        width = 0.0
        for at in reading_order(boxes):
            if enough([line.text for line in lines.values()], width):
                break
            width += found[at][1]
            text, score = self._steps.submit(self._recognise, found[at]).result()
            if text.strip() and score >= SURE:
                box = np.concatenate([corners[at].min(0), corners[at].max(0)]).round(4)
                sure = round(float(score), 3)
                lines[at] = WrittenText(text=text.strip(), box=tuple(box.tolist()), confidence=sure)
        places = sorted(lines)  # what is no text has no part in the final order
        return _texts([lines[places[at]] for at in reading_order(boxes[places])])

    def _find(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float64], list[Line]]:
        with free_cores().take(1):
            with self._lock:
                self._engine = engine = self._engine or PaddleEngine()
            return engine.find(picture)

    def _recognise(self, line: Line) -> tuple[str, float]:
        assert self._engine is not None
        with free_cores().take(1):
            return self._engine.recognise(line)


class PaddleEngine:
    """Finds lines of text and recognises one at a time, by ``rapidocr``. Threads may share it."""

    def __init__(self) -> None:
        import rapidocr

        made: Any = rapidocr.RapidOCR
        detection, recognition = models() or (None, None)
        self._engine = made(
            params={
                "Global.log_level": "critical",
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
        self._recogniser = self._engine._load_rec_model()

    def find(self, picture: NDArray[np.uint8]) -> tuple[NDArray[np.float64], list[Line]]:
        """Corners (n, 4, 2) in pixels, from the top left clockwise, and the lines.

        ``picture`` (H, W, 3) is BGR.
        """
        from rapidocr.main import RapidOCRError
        from rapidocr.utils.process_img import map_boxes_to_original

        padded: dict[str, Any] = {}  # what is added to a wide picture, until it is taken off again
        try:
            cut, found = self._engine.detect_and_crop(picture, padded)
        except RapidOCRError:  # there is nothing
            return np.empty((0, 4, 2)), []
        boxes = map_boxes_to_original(found.boxes, padded, *picture.shape[:2])
        # rapidocr pads batches of lines of about the same width to the widest. One line at a time,
        # padded in the same way, has the same text and score, in two thirds of the time.
        widths = np.array([line.shape[1] / line.shape[0] for line in cut])
        _, high, wide = self._recogniser.rec_image_shape
        batch, order = self._recogniser.rec_batch_num, np.argsort(widths)
        widest = np.arange(len(cut)) // batch * batch + batch - 1
        to = np.empty(len(cut))
        to[order] = widths[order][np.minimum(widest, len(cut) - 1)].clip(wide / high)
        return np.asarray(boxes, np.float64), list(zip(cut, to.tolist(), strict=True))

    def recognise(self, line: Line) -> tuple[str, float]:
        """A line's text and confidence."""
        padded = self._recogniser.resize_norm_img(*line)[None]  # (1, 3, H, W)
        ((text, score),), _ = self._recogniser.postprocess_op(self._recogniser.session(padded))
        return text, score


def _texts(lines: list[WrittenText]) -> list[WrittenText]:
    """The lines that are text. A character alone is a leaf, a wheel or a star, unless there is
    text beside it."""
    return lines if any(sum(map(str.isalnum, line.text)) > 1 for line in lines) else []


def reading_order(boxes: NDArray[np.float64]) -> list[int]:
    """The places of boxes (n, 4, 2), corners from the top left clockwise, as they are read.

    The lines of a picture may rise or fall together: they are turned level by their mean slope.
    """
    if not len(boxes):
        return []
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
