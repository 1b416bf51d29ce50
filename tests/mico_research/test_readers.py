"""Files of every format, and what a broken one is told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.errors import ConfigError, DataError
from mico_research.modalities.readers import Series, read_samples, read_series
from mico_research.modalities.samples import Graph, Modality


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('\ufeffage,"home, town",sick\n30,"Rio, RJ",yes\n,Oslo,no\n', encoding="utf-8")
    first, second = read_samples("tabular", path, "sick")
    assert first.values == {"age": "30", "home, town": "Rio, RJ"}
    assert (first.target, first.line, second.line) == ("yes", 2, 3)
    assert read_samples("tabular", path, "sick", ["age"])[0].values == {"age": "30"}


def test_a_series_and_its_windows(tmp_path: Path) -> None:
    path = tmp_path / "s.csv"
    path.write_text("day,x,y\n" + "".join(f"d{i},{i},{-i}\n" for i in range(10)))
    series = read_series(path)
    assert series.channels == ("x", "y")
    assert read_series(path, ["y"]).values[3, 0] == -3
    windows = series.windows(4, 10, lookback=3, horizon=2)
    assert [float(np.asarray(w.target)[0, 0]) for w in windows] == [4, 5, 6, 7, 8]
    assert np.asarray(windows[0].values)[:, 0].tolist() == [1, 2, 3]
    assert series.windows(0, 4, 3, 2) == []
    path.write_text("day\nmonday\n")
    with pytest.raises(DataError, match=r"s\.csv:2: no column holds numbers"):
        read_series(path)
    path.write_text("x,y\n1,2\n,3\n")
    with pytest.raises(DataError, match=r"s\.csv:3: column 'x': '' is not a number"):
        read_series(path)


def test_windows_do_not_share_forecast_steps() -> None:
    series = Series(np.arange(40, dtype=np.float32)[:, None], ("x",), "s")
    before, after = series.windows(0, 20, 5, 3), series.windows(20, 40, 5, 3)
    assert max(float(np.max(np.asarray(w.target))) for w in before) == 19
    assert min(float(np.min(np.asarray(w.target))) for w in after) == 20


def test_sequences_of_several_lengths(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez(path, x=np.ones((2, 6, 3)), y=np.array([0, 1]), lengths=np.array([6, 4]))
    samples = read_samples("imu", path)
    assert [np.asarray(s.values).shape for s in samples] == [(6, 3), (4, 3)]
    assert [s.target for s in samples] == ["0", "1"]
    np.savez(path, x=np.ones((2, 6)), y=np.array([0.5, 1]))
    samples = read_samples("time_series", path)
    assert np.asarray(samples[0].values).shape == (6, 1)
    assert samples[0].target == 0.5


def test_a_scene_is_its_labelled_pixels(tmp_path: Path) -> None:
    path = tmp_path / "scene.npz"
    cube = np.arange(4 * 5 * 7).reshape(4, 5, 7)
    labels = np.zeros((4, 5), dtype=int)
    labels[0, 0], labels[2, 3] = 1, 2
    np.savez(path, cube=cube, labels=labels)
    corner, inner = read_samples("hyperspectral", path, patch_size=3)
    assert (corner.target, inner.target) == ("1", "2")
    assert np.asarray(corner.values).shape == (7, 9)
    assert np.asarray(inner.values)[:, 4].tolist() == cube[2, 3].tolist()  # the middle of 9
    assert np.asarray(corner.values)[:, 0].tolist() == cube[1, 1].tolist()  # mirrored
    assert np.asarray(read_samples("hyperspectral", path)[0].values).shape == (7, 1)
    np.savez(path, cube=cube)
    assert len(read_samples("hyperspectral", path)) == 20
    with pytest.raises(ConfigError, match="patch_size 2"):
        read_samples("hyperspectral", path, patch_size=2)
    np.savez(path, cube=cube, labels=labels[:2])
    with pytest.raises(DataError, match=r"shape \(4, 5, 7\) and the labels \(2, 5\)"):
        read_samples("hyperspectral", path)


def test_graphs(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    lines: list[dict[str, Any]] = [
        {"nodes": [[1], [2]], "edges": [[0, 1]], "edge_features": [[5]], "y": 1.5},
        {"nodes": [[1]], "edges": [], "y": 2},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = read_samples("graph", path)
    assert isinstance(first.values, Graph)
    assert first.target == 1.5
    assert second.target == "2"
    assert second.line == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "t.csv:1: the header is missing"),
        ("t.csv", "a,a\n1,2\n", "two columns have the name 'a'"),
        ("t.csv", "a,b\n1,2\n3\n", "t.csv:3: the line has 1 cells, but the header has 2"),
        ("t.csv", "a,b\n", "no samples"),
        ("t.csv", "a,c\n1,2\n", "the column 'b' is missing; the columns are a, c"),
        ("t.csv", "b\n1\n", "the target 'b' is the only column"),
        ("t.csv", b"a,b\n\xff\xfe,1\n", "not a CSV file in UTF-8"),
        ("s.npz", {"z": np.ones(3)}, "the array 'x' is missing; the arrays are z"),
        ("s.npz", {"x": np.ones((3, 4)), "y": np.ones(2)}, r"shape \(2,\), expected \(3,\)"),
        ("s.npz", {"x": np.ones((0, 4)), "y": np.ones(0)}, "no samples"),
        ("s.npz", {"x": np.array([{}])}, "not an NPZ file of plain arrays"),
        ("s.npz", b"PK\x03\x04 or so", "not an NPZ file"),
        ("s.npz", b"", "not an NPZ file"),
        ("s.npz", np.ones(3), "one array without a name"),
        ("g.jsonl", '{"nodes": [[1]]}', "g.jsonl:1: the key 'edges' is missing"),
        ("g.jsonl", '{"nodes": [[1], [1, 2]], "edges": []}', "g.jsonl:1: not a graph"),
        ("g.jsonl", '{"nodes": [[1]], "edges": [[0]]}', "g.jsonl:1: not a graph"),
        ("g.jsonl", "[1", "g.jsonl:1: not a graph"),
        ("g.jsonl", "[]", "g.jsonl:1: not a graph"),
        ("g.jsonl", '{"nodes": [[1]], "edges": [], "y": [1]}', "y is .1., expected a class"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, str | bytes):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        with path.open("wb") as file:
            if isinstance(content, dict):
                np.savez(file, **content)
            else:
                np.save(file, content)
    modalities: dict[str, Modality] = {".csv": "tabular", ".npz": "imu", ".jsonl": "graph"}
    with pytest.raises(DataError, match=message):
        read_samples(modalities[path.suffix], path, "b")


def test_a_file_of_another_format_or_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"imu is read from a \.npz file"):
        read_samples("imu", tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        read_samples("imu", tmp_path / "none.npz")


def test_a_folder_of_pictures_keeps_sixteen_bits(tmp_path: Path) -> None:
    for name, value in (("cold", 7000), ("warm", 8000)):
        (tmp_path / name).mkdir()
        picture = Image.fromarray(np.full((4, 6), value, dtype=np.uint16))
        picture.save(tmp_path / name / "0.png")
    cold, warm = read_samples("thermal", tmp_path)
    assert (cold.target, warm.target) == ("cold", "warm")
    assert np.asarray(warm.values).max() == 8000
    Image.new("RGB", (4, 4)).save(tmp_path / "warm" / "1.jpg")
    assert np.asarray(read_samples("thermal", tmp_path)[2].values).shape == (4, 4, 3)
    (tmp_path / "warm" / "2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"2\.png: this picture cannot be read"):
        read_samples("thermal", tmp_path)
