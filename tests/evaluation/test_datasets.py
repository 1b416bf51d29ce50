"""Readers on hand-written files of the published formats, with rows that are broken in their ways:
every row is an entry or is counted with a reason."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.datasets.files import read_table, read_text
from mico_chat.evaluation.task import TASKS, Contents
from mico_chat.media.file import TarMember
from tests.evaluation.conftest import empty_files, write_json


def read(name: str, data: Path, split: Any = "test") -> Contents:
    return DATASETS[name].read(data, split)


def captions(contents: Contents) -> dict[str, tuple[str, ...]]:
    return {item.id: item.captions for item in contents.items}


def questions(contents: Contents) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {item.id: (item.question, item.answers) for item in contents.items}


def lost(contents: Contents) -> dict[str, str]:
    return dict(contents.broken)


def files(contents: Contents) -> list[str]:
    return [item.media[0].name for item in contents.items]


# --- pictures -----------------------------------------------------------------------------------


def coco_row(cocoid: int, split: str = "test", **more: Any) -> dict[str, Any]:
    name = f"COCO_val2014_{cocoid:012d}.jpg"
    sentences = [{"raw": " A man  rides. ", "sentid": 1}, {"raw": "Un café naïf 猫", "sentid": 2}]
    row = {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences}
    return {"cocoid": cocoid, "imgid": cocoid, **row, **more}


def test_coco(tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    empty_files(folder / "val2014", [f"COCO_val2014_{n:012d}.jpg" for n in (1, 2, 3, 4, 5, 6)])
    empty_files(folder / "train2014", ["COCO_train2014_000000000009.jpg"])
    train = {"filepath": "train2014", "filename": "COCO_train2014_000000000009.jpg"}
    rows = [
        coco_row(1),
        coco_row(2, split="val"),
        coco_row(3, split="restval"),
        coco_row(4, sentences=[]),
        coco_row(5, sentences=[{"raw": ""}, {"raw": "one \ud800"}, {}, "two"]),
        coco_row(1),
        coco_row(7),
        coco_row(6, filepath="../../etc"),
        coco_row(9, split="train", **train),
    ]
    write_json(folder / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    contents = read("coco", tmp_path)
    assert captions(contents) == {"1": ("A man rides.", "Un café naïf 猫"), "5": ("one ?",)}
    assert files(contents)[0] == "COCO_val2014_000000000001.jpg"
    assert lost(contents) == {
        "4": "it has no caption",
        "5, caption 1": "it is empty",
        "5, caption 3": "it is empty",
        "5, caption 4": "it is empty",
        "1": "the item occurs twice; only the first is used",
        "7": "no file COCO_val2014_000000000007.jpg in val2014/",
        "6": "its filepath is '../../etc', expected train2014 or val2014",
    }
    assert set(captions(read("coco", tmp_path, "train"))) == {"3", "9"}


def test_vqav2(tmp_path: Path) -> None:
    folder = tmp_path / "vqav2"
    empty_files(folder / "val2014", ["COCO_val2014_000000262148.jpg"])
    asked = [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "How many?", "question_id": 262148001},
        {"image_id": 1, "question": "What?", "question_id": 1000},
        {"image_id": "x", "question": "What?", "question_id": 1001},
        {"image_id": 262148, "question": " ", "question_id": 262148002},
        {"image_id": 262148, "question": "No answers?", "question_id": 262148003},
    ]
    answered = [
        {
            "question_id": row["question_id"],
            "answers": [
                {"answer": a, "answer_id": n} for n, a in enumerate(["down", "2", "", "ü"])
            ],
        }
        for row in asked[:5]
    ]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": answered})
    contents = read("vqav2", tmp_path)
    people = ("down", "2", "ü")
    assert questions(contents) == {
        "262148000": ("Where is he looking?", people),
        "262148001": ("How many?", people),
    }
    assert len({item.media for item in contents.items}) == 1
    assert lost(contents) == {
        "1000": "no file COCO_val2014_000000000001.jpg in val2014/",
        "1001": "its image_id is 'x', expected a whole number",
        "262148002": "it has no question",
        "262148003": "it has no answer",
    }


# --- sounds -------------------------------------------------------------------------------------

CLOTHO = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16"])
@pytest.mark.parametrize("name", ["clothov1", "clothov2"])
def test_clotho(tmp_path: Path, name: str, encoding: str) -> None:
    folder = tmp_path / name
    empty_files(folder / "evaluation", ["Santa Motor.wav", "Café.wav", "short.wav"])
    rows = (
        'Santa Motor.wav,"A machine, old, whines.",B.,C.,D.,"He said ""go"".\r\nThen left."\r\n'
        "Café.wav,Crème,B,,D,E\r\n"
        "gone.wav,A,B,C,D,E\r\n"
        "short.wav\r\n"
        "Santa Motor.wav,A,B,C,D,E\r\n"
    )
    table = folder / "clotho_captions_evaluation.csv"
    table.write_bytes((CLOTHO + rows).encode(encoding))
    contents = read(name, tmp_path)
    said = captions(contents)
    assert said["Santa Motor.wav"][0] == "A machine, old, whines."
    assert said["Santa Motor.wav"][4] == 'He said "go". Then left.'
    assert said["Café.wav"] == ("Crème", "B", "D", "E")
    assert lost(contents)["gone.wav"] == "no file gone.wav in evaluation/"
    assert lost(contents)["Café.wav, caption 3"] == "it is empty"
    assert lost(contents)["short.wav"] == "it has no caption"
    assert lost(contents)["Santa Motor.wav"] == "the item occurs twice; only the first is used"


def test_audiocaps(tmp_path: Path) -> None:
    folder = tmp_path / "audiocaps"
    empty_files(folder / "test", ["abc.wav", "-d_f_30.flac", "Yghi.MP3", "other.wav"])
    (folder / "test.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n"
        "1,abc,0,A dog barks\n2,-d_f,30,Rain\n3,abc,0,A bark\n4,gone,10,A horn\n5,ghi,5,Wind\n"
        "6,abc,0,\n7,,5,Nothing\n"
    )
    contents = read("audiocaps", tmp_path)
    said = {"abc": ("A dog barks", "A bark"), "-d_f": ("Rain",), "ghi": ("Wind",)}
    assert captions(contents) == said
    assert files(contents) == ["abc.wav", "-d_f_30.flac", "Yghi.MP3"]
    assert lost(contents)["gone"] == "no file gone.wav in test/"
    assert lost(contents)["abc, caption 3"] == "it is empty"
    assert "(no youtube_id)" in lost(contents)
    (folder / "retrieval_test.txt").write_text("abc\nghi\n")
    assert set(captions(read("audiocaps", tmp_path))) == {"abc", "ghi"}


# --- clips --------------------------------------------------------------------------------------


def test_msrvtt(tmp_path: Path) -> None:
    folder = tmp_path / "msrvtt"
    empty_files(folder / "videos", ["video7010.mp4", "video7011.webm", "video7013.mp4"])
    videos = [{"video_id": f"video{n}", "split": "test", "id": n} for n in range(7010, 7014)]
    sentences = [
        {"caption": f"caption {n} of {video['video_id']}", "video_id": video["video_id"]}
        for video in videos[:3]
        for n in range(2)
    ]
    content = {"videos": [*videos, {"video_id": "video1", "split": "validate"}]}
    write_json(folder / "test_videodatainfo.json", {**content, "sentences": sentences})
    contents = read("msrvtt", tmp_path)
    assert captions(contents) == {
        f"video{n}": (f"caption 0 of video{n}", f"caption 1 of video{n}") for n in (7010, 7011)
    }
    assert lost(contents) == {
        "video7012": "no file video7012.mp4 in videos/",
        "video7013": "it has no caption",
    }


def test_msrvtt_1ka(tmp_path: Path) -> None:
    folder = tmp_path / "msrvtt"
    empty_files(folder / "videos", ["video7020.mp4", "video9.mp4", "video7021.mp4"])
    (folder / "MSRVTT_JSFUSION_test.csv").write_text(
        "key,vid_key,video_id,sentence\n"
        'ret0,msr9770,video7020,"a woman, creating a fondant baby"\n'
        "ret1,msr9771,video9773,a boy plays\nret2,msr1,video7021,\n"
    )
    contents = read("msrvtt-1ka", tmp_path)
    assert captions(contents) == {"video7020": ("a woman, creating a fondant baby",)}
    assert set(lost(contents)) == {"video9773", "video7021, caption 1", "video7021"}
    for name, video in (("train_val", "video9"), ("test", "video7021")):
        said = [{"video_id": video, "caption": f"{video} {n}"} for n in range(2)]
        write_json(folder / f"{name}_videodatainfo.json", {"sentences": said, "videos": []})
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\nvideo9\nvideo7021\n")
    trained = captions(read("msrvtt-1ka", tmp_path, "train"))
    assert trained == {v: (f"{v} 0", f"{v} 1") for v in ("video9", "video7021")}


def test_youcook2(tmp_path: Path) -> None:
    folder = tmp_path / "youcook2"
    empty_files(folder / "clips", ["xHr8_0.mp4", "xHr8_2.mkv", "train_0.mp4"])
    segments = [
        {"segment": [41, 54], "id": 0, "sentence": "place bacon in a pan"},
        {"segment": [54, 60], "id": 1, "sentence": "flip it"},
        {"segment": [60, 65], "id": 2, "sentence": ""},
    ]
    database = {
        "xHr8": {"subset": "validation", "annotations": segments},
        "train": {"subset": "training", "annotations": segments[:1]},
        "secret": {"subset": "testing"},
        "none": None,
    }
    write_json(folder / "youcookii_annotations_trainval.json", {"database": database})
    contents = read("youcook2", tmp_path)
    assert captions(contents) == {"xHr8_0": ("place bacon in a pan",)}
    assert lost(contents)["none"] == "the record is not a video with annotations"
    assert lost(contents)["xHr8_1"] == "no file xHr8_1.mp4 in clips/"
    assert lost(contents)["xHr8_2"] == "it has no caption"
    assert set(captions(read("youcook2", tmp_path, "train"))) == {"train_0"}


def test_valor32k(tmp_path: Path) -> None:
    folder = tmp_path / "valor32k"
    empty_files(folder / "videos", ["x-2A_30.000_40.000.mp4"])
    rows = [
        {"video_id": "x-2A_30.000_40.000", "desc": "With the rumble, a train passes."},
        {"video_id": "gone_0.000_10.000", "desc": "Nothing."},
        {"video_id": "x-2A_30.000_40.000", "desc": "Again."},
    ]
    write_json(folder / "desc_test.json", rows)
    contents = read("valor32k", tmp_path)
    assert list(captions(contents).values()) == [("With the rumble, a train passes.",)]
    assert len(contents.broken) == 2


def test_vatex(tmp_path: Path) -> None:
    folder = tmp_path / "vatex"
    empty_files(folder / "videos", ["a_000001_000011.mp4", "b_000001_000011.mp4"])
    rows = [
        {"videoID": "a_000001_000011", "enCap": ["One.", "Two."], "chCap": ["一"]},
        {"videoID": "b_000001_000011", "enCap": ["Three."]},
        {"videoID": "c_000001_000011", "enCap": ["Four."]},
    ]
    write_json(folder / "vatex_validation_v1.0.json", rows)
    contents = read("vatex", tmp_path)
    assert list(captions(contents).values()) == [("One.", "Two."), ("Three.",)]
    assert set(lost(contents)) == {"c_000001_000011"}
    (folder / "test_list.txt").write_text("b_000001_000011\n")
    contents = read("vatex", tmp_path)
    assert list(captions(contents)) == ["b_000001_000011"]
    assert not contents.broken


# --- paragraphs ---------------------------------------------------------------------------------


def test_didemo(tmp_path: Path) -> None:
    folder = tmp_path / "didemo"
    empty_files(folder / "videos", ["1@N00_2_a.avi", "2@N00_3_b.mp4"])
    rows = [
        {"annotation_id": 1, "video": "1@N00_2_a.avi", "description": "a dog runs."},
        {"annotation_id": 2, "video": "2@N00_3_b.mov", "description": "first."},
        {"annotation_id": 3, "video": "1@N00_2_a.avi", "description": " it  stops."},
        {"annotation_id": 4, "video": "1@N00_2_a.avi", "description": None},
        {"annotation_id": 5, "video": None, "description": "x"},
        {"annotation_id": 6, "video": "3@N00_4_c.avi", "description": "gone"},
    ]
    write_json(folder / "test_data.json", rows)
    contents = read("didemo", tmp_path)
    assert list(captions(contents).values()) == [("a dog runs. it stops.",), ("first.",)]
    assert files(contents) == ["1@N00_2_a.avi", "2@N00_3_b.mp4"]
    assert set(lost(contents)) == {"annotation 4", "annotation 5", "3@N00_4_c.avi"}


def test_activitynet(tmp_path: Path) -> None:
    folder = tmp_path / "activitynet"
    empty_files(folder / "videos", ["v_a.mp4", "v_b.mkv"])
    content = {
        "v_a": {
            "duration": 82.7,
            "timestamps": [[0, 1]],
            "sentences": [" A man runs.", "He sits."],
        },
        "v_b": {"duration": 5, "timestamps": [], "sentences": []},
        "v_c": None,
    }
    write_json(folder / "val_1.json", content)
    contents = read("activitynet", tmp_path)
    assert captions(contents) == {"v_a": ("A man runs. He sits.",)}
    assert lost(contents)["v_b"] == lost(contents)["v_c"] == "it has no caption"


# --- questions about videos ---------------------------------------------------------------------


def test_msrvtt_qa(tmp_path: Path) -> None:
    folder = tmp_path / "msrvtt"
    empty_files(folder / "videos", ["video7010.mp4"])
    rows = [
        {"id": 1, "video_id": 7010, "category_id": 3, "question": "what is he?", "answer": "man"},
        {"id": 2, "video_id": 7010, "category_id": 3, "question": "how many?", "answer": 2},
        {"id": 3, "video_id": 7011, "category_id": 3, "question": "who?", "answer": "dog"},
        {"id": 4, "video_id": 7010, "category_id": 3, "question": "who?", "answer": None},
        {"id": 1, "video_id": 7010, "category_id": 3, "question": "again?", "answer": "man"},
    ]
    write_json(folder / "test_qa.json", rows)
    contents = read("msrvtt-qa", tmp_path)
    assert questions(contents) == {"1": ("what is he?", ("man",)), "2": ("how many?", ("2",))}
    assert set(lost(contents)) == {"3", "4", "1"}


@pytest.mark.parametrize("mapped", [True, False])
def test_msvd_qa(tmp_path: Path, mapped: bool) -> None:
    folder = tmp_path / "msvd"
    empty_files(folder / "YouTubeClips", ["-4ws_5_15.avi" if mapped else "vid1.avi"])
    if mapped:
        (folder / "youtube_mapping.txt").write_text("-4ws_5_15 vid1\r\nbroken\r\n")
    rows = [
        {"id": 9, "video_id": 1, "question": "what?", "answer": "cat"},
        {"id": 10, "video_id": 2, "question": "what?", "answer": "cat"},
    ]
    write_json(folder / "test_qa.json", rows)
    contents = read("msvd-qa", tmp_path)
    assert questions(contents) == {"9": ("what?", ("cat",))}
    assert set(lost(contents)) == {"10"}


def test_tgif_qa(tmp_path: Path) -> None:
    folder = tmp_path / "tgif-qa"
    empty_files(folder / "gifs", ["tumblr_a.mp4"])
    (folder / "Test_frameqa_question.csv").write_text(
        "gif_name\tquestion\tanswer\ttype\tvid_id\tdescription\n"
        "tumblr_a\twhat is the cat wearing ?\that\t0\tFRAMEQA1\ta cat\n"
        "tumblr_a\thow many ?\ttwo\t1\tFRAMEQA1\t\n"
        "tumblr_b\twho ?\tdog\t0\tFRAMEQA2\t\n"
    )
    contents = read("tgif-qa", tmp_path)
    assert questions(contents) == {
        "FRAMEQA1-2": ("what is the cat wearing ?", ("hat",)),
        "FRAMEQA1-3": ("how many ?", ("two",)),
    }
    assert set(lost(contents)) == {"FRAMEQA2-4"}


def test_activitynet_qa(tmp_path: Path) -> None:
    folder = tmp_path / "activitynet"
    empty_files(folder / "videos", ["v_1QIU.mp4"])
    asked = [
        {"video_name": "1QIU", "question": "is he inside", "question_id": "v_1QIU_1"},
        {"video_name": "1QIU", "question": "why", "question_id": "v_1QIU_2"},
        {"video_name": "gone", "question": "why", "question_id": "v_gone_1"},
    ]
    answered = [
        {"answer": "no", "type": 3, "question_id": "v_1QIU_1"},
        {"answer": "x", "type": 3, "question_id": "v_gone_1"},
    ]
    write_json(folder / "test_q.json", asked)
    write_json(folder / "test_a.json", answered)
    contents = read("activitynet-qa", tmp_path)
    assert questions(contents) == {"v_1QIU_1": ("is he inside", ("no",))}
    assert set(lost(contents)) == {"v_1QIU_2", "v_gone_1"}


def test_music_avqa(tmp_path: Path) -> None:
    folder = tmp_path / "music-avqa"
    empty_files(folder / "videos", ["00000093.mp4"])
    row = {"video_id": "00000093", "type": '["Audio", "Counting"]', "templ_values": "[]"}
    rows = [
        {**row, "question_id": 1, "question_content": "How many types?", "anser": "two"},
        {
            **row,
            "question_id": 2,
            "question_content": "Is the <Object> louder than the <Object>?",
            "templ_values": '["flute", "drum"]',
            "anser": "yes",
        },
        {**row, "question_id": 3, "question_content": "Is the <Object> loud?", "anser": "no"},
        {**row, "question_id": 4, "question_content": "A?", "templ_values": "[", "anser": "no"},
        {**row, "question_id": 5, "question_content": None, "anser": "no"},
    ]
    write_json(folder / "avqa-test.json", rows)
    contents = read("music-avqa", tmp_path)
    assert questions(contents) == {
        "1": ("How many types?", ("two",)),
        "2": ("Is the flute louder than the drum?", ("yes",)),
    }
    assert lost(contents)["3"] == "its question has 1 places, but there are 0 templ_values"
    assert lost(contents)["4"].startswith("its templ_values are not a list")
    assert lost(contents)["5"] == "it has no question"


# --- the data engine's shards -------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_world(tmp_path: Path) -> None:
    said = {"image.jpg": ["a cat"], "audio2.flac": ["a bell"], "smell.dat": ["roses"]}
    record = {"id": "s1", "captions": {**said, "video.mp4": ["gone"]}}
    members = {
        "s1.json": json.dumps(record).encode(),
        "s1.image.jpg": b"picture",
        "s1.audio2.flac": b"sound",
        "s1.smell.dat": b"?",
    }
    write_tar(tmp_path / "shards" / "validation-000000.tar", members)
    write_tar(tmp_path / "shards" / "train-000000.tar", {})
    contents = read("world", tmp_path)
    assert contents.same_words
    assert captions(contents) == {"s1.image.jpg": ("a cat",), "s1.audio2.flac": ("a bell",)}
    assert [item.media[0].kind for item in contents.items] == ["image", "audio"]
    sources = [item.media[0].source for item in contents.items]
    assert all(isinstance(source, TarMember) for source in sources)
    assert [s.read() for s in sources if isinstance(s, TarMember)] == [b"picture", b"sound"]
    assert lost(contents)["s1.video.mp4"] == "the shard lacks this file"
    assert lost(contents)["s1.smell.dat"].startswith("its kind is unknown")
    (tmp_path / "shards" / "validation-000001.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"validation-000001\.tar: this is not a tar"):
        read("world", tmp_path)


# --- whole files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2", "not JSON"),
        ("[]", "expected an object, got list"),
        ('{"videos": []}', "the array of objects 'images' is missing"),
        ('{"images": [1]}', "the array of objects 'images' is missing"),
        ('{"images": []}', "none of 0 items can be used"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: str, said: str) -> None:
    empty_files(tmp_path / "flickr30k" / "flickr30k-images", [])
    (tmp_path / "flickr30k" / "dataset_flickr30k.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read("flickr30k", tmp_path)


def test_where_no_item_can_be_used_the_first_reason_is_told(tmp_path: Path) -> None:
    rows = [{"filename": "1.jpg", "split": "test", "sentences": [{"raw": "x"}]}] * 2
    empty_files(tmp_path / "flickr30k" / "flickr30k-images", [])
    write_json(tmp_path / "flickr30k" / "dataset_flickr30k.json", {"images": rows})
    with pytest.raises(DataError, match=r"none of 2 items .*; the first: 1\.jpg: no file 1\.jpg"):
        read("flickr30k", tmp_path)


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match=r"t\.csv:1: missing columns: a, b; the columns are a;b"):
        list(read_table(path, ("a", "b")))
    path.write_text("")
    with pytest.raises(DataError, match="the columns are none"):
        list(read_table(path, ("a",)))


def test_text_of_no_known_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\x81\x8d\x8f")
    with pytest.raises(DataError, match="not encoded as utf-8-sig or cp1252"):
        read_text(path)
    with pytest.raises(DataError, match="No such file"):
        read_text(tmp_path / "none.txt")


def test_every_task_has_a_data_set_and_every_data_set_a_task() -> None:
    assert {task.dataset for task in TASKS.values()} == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_a_layout_names_everything_that_is_missing(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name]
    needed = [part for part in dataset.tree if not part.startswith("[")]
    assert dataset.missing(tmp_path) == needed
    layout = dataset.layout(tmp_path)
    assert layout.splitlines()[0] == f"{tmp_path / dataset.folder}/"
    assert all(part in layout for part in dataset.tree)
    assert dataset.page in layout
    for part in needed:
        place = tmp_path / dataset.folder / part.replace("*", "000000")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir() if part.endswith("/") else place.touch()
    assert dataset.missing(tmp_path) == []
