"""Clips and sounds by class: what tells them apart is learnt, and order counts."""

import csv
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from mico_chat.errors import ConfigError, DataError
from mico_chat.model.config import MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_research.finetune.fit import main
from mico_research.finetune.recipe import FinetuneRun
from mico_research.finetune.report import Report, score
from mico_research.modalities.media import MediaInput, UnitOrder
from mico_research.modalities.model import MicoForModality, MicoModalityConfig, predict
from mico_research.modalities.readers import read_samples
from mico_research.modalities.samples import Sample, Target
from mico_training.recipe import load_recipe
from tests.mico_research.test_finetune_modality import best, figure, write_run
from tests.mico_training.scenes import tone

SHORT = {"finetune__seeds": [0], "finetune__control": False, "finetune__units": 4}


def clip(path: Path, brightness: list[int]) -> None:
    """A clip of four grey frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for grey in brightness:
            pixels = np.full((32, 32, 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def clips(folder: Path, n: int = 48) -> Path:
    """The same frames forwards and backwards: brighter and darker."""
    random = np.random.default_rng(0)
    for number in range(n):
        name = "brighter" if number % 2 else "darker"
        (folder / name).mkdir(parents=True, exist_ok=True)
        first = int(random.integers(20, 60))
        rising = [first, first + 60, first + 120, first + 180]
        clip(folder / name / f"{number}.mp4", rising if number % 2 else rising[::-1])
    return folder


def test_clips_that_differ_in_order_alone_are_told_apart(tmp_path: Path, tiny_chat: Path) -> None:
    changes = {"modality": "video", "finetune__lrs": [3e-3], "train__steps": 160, **SHORT}
    report = main(
        write_run(tmp_path / "run", tiny_chat, {"train": clips(tmp_path / "x")}, **changes)
    )
    assert best(report, "pretrained") >= 0.9
    assert [row.name for row in report.rows][:2] == ["most frequent class", "logistic regression"]
    assert best(report, "baseline") < 0.8  # a mean frame has no order
    found = io.StringIO()
    predict(tmp_path / "run/out", tmp_path / "x", found, "cpu")
    rows = list(csv.DictReader(io.StringIO(found.getvalue())))
    right = ["brighter"] * 24 + ["darker"] * 24
    assert np.mean([row["prediction"] == name for row, name in zip(rows, right, strict=True)]) > 0.9


def sounds(folder: Path, n: int = 60) -> Path:
    """Low and high tones, alone, together or neither, as a table lists them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = ["file,labels"]
    for number in range(n):
        low, high = number % 2, number // 2 % 2
        parts = [
            np.frombuffer(tone(float(hertz), 1.0)[44:], "<i2")
            for hertz, there in (
                (random.uniform(200, 300), low),
                (random.uniform(2000, 3000), high),
            )
            if there
        ]
        samples = np.sum([part / 2 for part in parts], axis=0) if parts else np.zeros(16000)
        noisy = samples + random.normal(scale=200, size=16000)
        header = tone(440.0, 1.0)[:44]
        (folder / f"{number}.wav").write_bytes(header + noisy.astype("<i2").tobytes())
        names = ["low"] * low + ["high"] * high
        lines.append(f"{number}.wav,{';'.join(names)}")
    (folder / "sounds.csv").write_text("\n".join(lines))
    return folder / "sounds.csv"


def test_sounds_with_several_labels_are_measured_by_map(tmp_path: Path, tiny_chat: Path) -> None:
    table = sounds(tmp_path / "x")
    changes = {"modality": "audio", "task": "multi-label", "train__steps": 120, **SHORT}
    report = main(write_run(tmp_path / "run", tiny_chat, {"train": table}, **changes))
    assert report.metric == "mAP"
    assert figure(report.rows[0], "mAP") < 0.75  # half of the sounds have each label
    assert figure(report.rows[1], "mAP") > 0.9
    assert best(report, "pretrained", "mAP") > 0.9
    assert "mAP" in (tmp_path / "run/out/results.md").read_text()
    found = io.StringIO()
    predict(tmp_path / "run/out", table, found, "cpu")
    rows = list(csv.DictReader(io.StringIO(found.getvalue())))
    both = [row["prediction"] for row in rows if float(row["low"]) > 0.5 < float(row["high"])]
    assert both
    assert set(both) == {"high;low"}
    assert Report.read(tmp_path / "run/out").rows == report.rows


def test_map_is_the_mean_over_the_classes_that_occur() -> None:
    samples = [Sample(Path("x"), labels) for labels in (("a",), ("b",), ("a", "b"), ())]
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 1.0], [0.7, 0.9, 0.0], [0.1, 0.8, 0.5]])
    # a: right at ranks 1 and 3; b: right at ranks 1 and 3; c is nobody's.
    expected = (1 + 2 / 3) / 2
    found = score("multi-label", samples, list(scores), ("a", "b", "c"))
    assert found == {"mAP": pytest.approx(expected)}
    swapped = score("multi-label", samples, list(scores[:, [1, 0, 2]]), ("b", "a", "c"))
    assert swapped == found


@torch.no_grad()
def test_order_of_units_counts_and_neighbours_do_not() -> None:
    torch.manual_seed(0)
    order = UnitOrder(4, 8).eval()
    x = torch.randn(5, 8)
    two = order(x, torch.tensor([2, 3]))
    torch.testing.assert_close(two[:1], order(x[:2], torch.tensor([2])))
    assert not torch.allclose(two[:1], order(x[:2].flip(0), torch.tensor([2])), atol=1e-4)


def test_an_encoder_with_an_ear_needs_none_here() -> None:
    """Mel slices and grey pictures would be heard, and the ear's weights may not be installed."""
    config = MicoConfig.tiny().encoder_config
    config.ear_blocks = 1
    spec = MediaInput.of("audio", Preprocessing(image_size=64), 2)
    own: dict[str, Any] = {"input_spec": spec.model_dump(mode="json"), "encoder_config": config}
    target = Target(task="classification", classes=("a", "b")).model_dump(mode="json")
    model = MicoForModality(MicoModalityConfig(modality="audio", target_spec=target, **own))
    slices = {"pixel_values": torch.ones(3, 3, 64, 64), "units": torch.tensor([1, 2])}
    assert model(**slices).logits.shape == (2, 2)


def test_targets_of_several_labels() -> None:
    samples = [Sample(Path("x"), labels) for labels in (("b",), ("a", "b"), ())]
    target = Target.fit("multi-label", samples)
    assert target.classes == ("a", "b")
    labels = [target.label(sample, None).tolist() for sample in samples]
    assert labels == [[0, 1], [1, 1], [0, 0]]
    with pytest.raises(DataError, match="the class 'c' was not in training"):
        target.label(Sample(Path("x"), ("c",)), None)
    with pytest.raises(DataError, match="'dog' is not a list of classes"):
        Target.fit("multi-label", [Sample(Path("x"), "dog")])
    with pytest.raises(DataError, match="none of the 1 training samples has a class"):
        Target.fit("multi-label", [Sample(Path("x"), ())])


def test_wrong_files_are_named(tmp_path: Path, tiny_chat: Path) -> None:
    (tmp_path / "t.csv").write_text("file,labels\ngone.wav,dog\n")
    with pytest.raises(DataError, match=r"t\.csv:2: no file gone\.wav in"):
        read_samples("audio", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("file,label\n")
    with pytest.raises(DataError, match="the column 'file' is missing"):
        read_samples("audio", tmp_path / "t.csv")
    for name in ("a", "b"):
        for number in range(4):
            (tmp_path / "x" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name / f"{number}.wav").write_bytes(b"no sound")
    changes: dict[str, Any] = {"modality": "audio", **SHORT}
    with pytest.raises(DataError, match=r"a/\d\.wav"):
        main(write_run(tmp_path / "run", tiny_chat, {"train": tmp_path / "x"}, **changes))
    path = write_run(tmp_path / "run", tiny_chat, {"train": tmp_path / "t.csv"})
    with pytest.raises(ConfigError, match=r"multi-label works for .*, not for tabular"):
        load_recipe(FinetuneRun, path, ["task=multi-label", "data.target=x"])
