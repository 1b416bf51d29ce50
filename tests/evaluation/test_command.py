"""``mico-chat evaluate``: tasks and items in one report, missing data, wrong command lines."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mico_chat.cli import evaluate as command
from mico_chat.cli.evaluate import main
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.datasets import datasets_in
from mico_chat.evaluation.store import PREDICTIONS
from tests.evaluation.conftest import write_items
from tests.evaluation.parrot import Parrot


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return [*words, "--device", "cpu", "--workers", "1", "--batch-size", "4", *more]


def test_items_and_tasks_of_several_runs_are_one_report(
    model_folder: Path,
    msvd: Path,
    flickr: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = command.open_model
    monkeypatch.setattr(
        command, "open_model", lambda options, chat: Parrot() if chat else opened(options, chat)
    )
    row = {"skill": "sum", "message": "Two and two?", "accept": ["four"]}
    items = write_items(tmp_path, [row])
    output = tmp_path / "out"
    assert main([str(items), "msvd-qa", *arguments(model_folder, msvd, output)]) == 0
    assert main(["flickr30k-retrieval", *arguments(model_folder, flickr, output)]) == 0
    printed = capsys.readouterr().out
    assert "| sum | 1 |  | 100 % (21-100) |" in printed
    last = printed.split("| task |")[-1]
    assert "| msvd-qa |" in last
    assert "| flickr30k-retrieval | R@1 |" in last
    assert "1 broken and not counted: 3.jpg: 3.jpg:" in last
    written = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    written = {path: data for path, data in written.items() if path.suffix != ".png"}
    charts = [output / "items.png", output / "radar.png"]
    for path in (*written, *charts):
        path.unlink()
    unfinished = output / "tgif-qa"
    unfinished.mkdir()
    (unfinished / PREDICTIONS).write_text('{"format": 1, "task": "tgif-qa"}\n')
    monkeypatch.setattr(command, "open_model", None)
    assert main(["--rescore", str(output)]) == 0
    again = capsys.readouterr()
    assert again.out.split("| task |")[-1] == last
    assert f"not in the table: {unfinished}" in again.err
    assert {path.name for path in written} == {"results.json", "table.md"}
    assert {path: path.read_bytes() for path in written} == written
    assert all(chart.is_file() for chart in charts)
    with pytest.raises(DataError, match=r"no TASK/predictions\.jsonl in it"):
        main(["--rescore", str(tmp_path / "none")])


A, B = ({"stage": f"stage {n}", "data": [f"data/{p}.jsonl"]} for n, p in ((1, "sbu"), (2, "x")))
FLICKR = {"stage": "stage 3", "data": ["runs/x", "data/Flickr-30K/train.jsonl"]}
OTHER = {"stage": "runs/other", "data": None}


@pytest.mark.parametrize(
    ("record", "marked"),
    [
        (None, "unknown"),
        ([A, B], "no"),
        ([OTHER, FLICKR, B], "yes"),
        ([OTHER, A], "unknown"),
    ],
)
def test_a_task_says_whether_the_model_was_trained_on_it(
    record: object,
    marked: str,
    model_folder: Path,
    flickr: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    branch = folder / "pretraining" if (folder / "pretraining").is_dir() else folder
    content = json.loads((branch / "config.json").read_text()) | {"trained_on": record}
    (branch / "config.json").write_text(json.dumps(content))
    output = tmp_path / "out"
    main(["flickr30k-retrieval", *arguments(folder, flickr, output, "--limit", "2")])
    lines = capsys.readouterr().out.splitlines()
    titles, row = (next(x for x in lines if x.startswith(f"| {n}")) for n in ("task", "flickr30k"))
    assert row.split("|")[titles.split("|").index(" trained on ")].strip() == marked
    note = "- flickr30k-retrieval: trained on stage 3: data/Flickr-30K/train.jsonl"
    assert (note in lines) is (marked == "yes")
    found = json.loads((output / "results.json").read_text())["tasks"]["flickr30k-retrieval"]
    expected = {"yes": ["stage 3: data/Flickr-30K/train.jsonl"], "no": [], "unknown": None}
    assert found["trained_on"] == expected[marked]


def test_a_path_names_data_sets() -> None:
    for path, names in (
        ("data/clotho_aqa.jsonl", "clotho-aqa"),
        ("data/clotho/development.csv", "clothov1 clothov2"),
        ("/x/MSR-VTT/train-qa.jsonl", "msrvtt-qa"),
        ("data/msrvtt/train.jsonl", "msrvtt msrvtt-1ka"),
        ("data/llava_v1_5_mix665k.json", "vqav2"),
        ("data/wavcaps-cc4m-webvid/*.tar", ""),
        ("own/cocoa-world.jsonl", ""),
    ):
        assert datasets_in(path) == set(names.split())


def test_missing_data_are_reported_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "open_model", None)
    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        main(["coco-captioning", "coco-retrieval", "msvd-qa", "--data", str(tmp_path)])
    said = str(caught.value)
    assert "coco/ lacks dataset_coco.json; msvd/ lacks test_qa.json, YouTubeClips/" in said
    assert "\n" not in said
    layout = capsys.readouterr().err
    assert layout.count(f"{tmp_path / 'coco'}/\n") == 1
    assert "  dataset_coco.json  Karpathy's splits and captions\n" in layout
    assert "from: github.com/xudejing/video-question-answering (MSVD-QA)" in layout
    with pytest.raises(DataError, match=r"mico_world\.mini items --data .*/mini` makes"):
        main(["mini-skills", "--data", str(tmp_path)])


def test_the_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 49
    assert lines[-1].startswith("mini-skills ")
    assert lines[1].split()[:3] == ["coco-retrieval", "68.1", "R@1,"]


@pytest.mark.parametrize(
    ("words", "said"),
    yaml.safe_load(Path(__file__).with_name("misuse.yaml").read_text(encoding="utf-8")),
)
def test_wrong_command_lines_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        main(words)
