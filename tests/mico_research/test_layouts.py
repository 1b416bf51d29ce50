"""Public data sets: a miniature of each layout is read, and a missing one is printed."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mico_chat.errors import ConfigError, DataError
from mico_research.finetune import layouts
from mico_research.finetune.fit import main
from mico_research.finetune.layouts import PUBLIC, open_dataset
from mico_research.finetune.packaged import Packaged
from mico_research.finetune.recipe import FinetuneRun
from mico_research.modalities.samples import MEDIA, PICTURES, Graph, Sample, open_picture
from mico_training.recipe import load_recipe
from tests.mico_research.test_finetune_modality import write_run

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"


def picture(path: Path, grey: int = 90, bits: Any = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), grey, bits)).save(path)
    return path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def opened(name: str, root: Path, limit: int | None = None) -> Packaged:
    modality, task = PUBLIC[name].of
    options = {"patch_size": 1, "limit": limit, "lookback": 3, "horizon": 2}
    return open_dataset(name, root, modality, task, options)


def listed(samples: list[Sample] | None) -> list[Sample]:
    assert samples is not None
    return samples


def targets(samples: Any) -> list[Any]:
    return [sample.target for sample in samples]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_missing_layout_is_printed_whole(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        opened(name, tmp_path)
    said = str(caught.value)
    assert f"{name} lacks {', '.join(PUBLIC[name].tree)}; it needs" in said
    assert all(part in said for part in PUBLIC[name].tree)
    assert PUBLIC[name].page in said


def test_every_layout_has_its_test() -> None:
    tested = {"imagenet-1k", "places365", "kinetics-700", "audioset", "audioset-20k", "nyu-d"}
    tested |= {"sun-rgbd", "regdb", "sysu-mm01", "tb-xray", "ego4d-imu", "indian-pines", "fraud"}
    tested |= {"pcqm4m", "regdb-reid", "sysu-mm01-reid", "mmlu", "global-temp", "chestx-ray14"}
    assert set(PUBLIC) == tested
    assert {form for public in PUBLIC.values() for form in public.read} == set(layouts._FORMS)


def test_folders_of_classes(tmp_path: Path) -> None:
    for part, n in (("train", 3), ("val", 2)):
        for number in range(n):
            touch(tmp_path / "in" / part / "n01440764" / f"n01440764_{number}.JPEG")
            touch(tmp_path / "in" / part / "n01443537" / f"n01443537_{number}.JPEG")
            touch(tmp_path / "k700" / part / "abseiling" / f"x_00004{number}_000054.mp4")
            touch(tmp_path / "k700" / part / "zumba" / f"x_00004{number}_000054.mp4")
    for name, folder, first in (
        ("imagenet-1k", "in", "n01440764"),
        ("kinetics-700", "k700", "abseiling"),
    ):
        found = opened(name, tmp_path / folder)
        assert found.train is not None
        assert found.test is not None
        assert (len(found.train), len(found.test)) == (6, 4)
        assert targets(found.train)[:3] == [first] * 3
        assert found.train[0].values == Path(found.train[0].file)
    touch(tmp_path / "tb" / "Tuberculosis" / "Tuberculosis-1.png")
    touch(tmp_path / "tb" / "Normal" / "Normal-1.png")
    touch(tmp_path / "tb" / "Normal.metadata.xlsx")
    found = opened("tb-xray", tmp_path / "tb")
    assert found.test is None
    assert targets(found.train) == ["Normal", "Tuberculosis"]


def test_lists_of_files(tmp_path: Path) -> None:
    places = tmp_path / "places"
    write(places / "places365_train_standard.txt", "/a/airfield/1.jpg 0\n/z/zoo/one 2.jpg 364\n")
    write(places / "places365_val.txt", "Places365_val_1.jpg 165\n")
    picture(places / "data_256_standard/a/airfield/1.jpg")
    picture(places / "val_256/Places365_val_1.jpg")
    found = opened("places365", places)
    assert found.train is not None
    assert targets(found.train) == ["0", "364"]
    assert found.train[1].values == places / "data_256_standard/z/zoo/one 2.jpg"
    assert targets(found.test) == ["165"]
    assert open_picture(cast(Path, found.train[0].values)).shape == (8, 8)
    write(places / "places365_val.txt", "nothing\n")
    with pytest.raises(DataError, match=r"val\.txt:1: expected a path and a class, got 'nothing'"):
        opened("places365", places)
    write(tmp_path / "regdb/idx/train_thermal_1.txt", "Thermal/1/m_1.bmp 0\n")
    picture(tmp_path / "regdb/Thermal/1/m_1.bmp")
    (sample,) = listed(opened("regdb", tmp_path / "regdb").train)
    assert open_picture(cast(Path, sample.values)).max() == 90


def test_persons_by_camera(tmp_path: Path) -> None:
    write(tmp_path / "exp/train_id.txt", "1,3\n")
    for camera in ("cam3", "cam6"):
        for person in (1, 2, 3):
            touch(tmp_path / camera / f"{person:04d}" / "0001.jpg")
    found = opened("sysu-mm01", tmp_path)
    assert targets(found.train) == ["0001", "0003"] * 2


def audioset(root: Path, train: str) -> None:
    write(
        root / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/a,"Dog, bark"\n1,/m/b,Cat\n',
    )
    for part in (train, "eval_segments"):
        rows = [
            'x1, 30.000, 40.000, "/m/a,/m/b"',
            '-x2, 0.000, 10.000, "/m/b"',
            'x3, 1.0, 2.0, "/m/a"',
        ]
        write(root / f"{part}.csv", "# Segments\n# YTID, start, end, labels\n" + "\n".join(rows))
        touch(root / part / "Yx1.wav")
        touch(root / part / "-x2_0.flac")


@pytest.mark.parametrize("name", ["audioset", "audioset-20k"])
def test_audioset_has_all_classes_of_a_sound(name: str, tmp_path: Path) -> None:
    part = {"audioset": "unbalanced", "audioset-20k": "balanced"}[name] + "_train_segments"
    audioset(tmp_path, part)
    found = opened(name, tmp_path)
    assert targets(found.train) == [("Dog, bark", "Cat"), ("Cat",)]
    assert [sample.values for sample in listed(found.train)] == [
        tmp_path / part / "Yx1.wav",
        tmp_path / part / "-x2_0.flac",
    ]
    write(tmp_path / "eval_segments.csv", 'x1, 30.000, 40.000, "/m/z"\n')
    with pytest.raises(DataError, match=r"eval_segments\.csv:1: expected an id, two times"):
        opened(name, tmp_path)


def test_nyu_depth_and_its_scenes(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    depths = np.arange(3 * 6 * 4, dtype=np.float32).reshape(3, 6, 4)  # frames, width, height
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["depths"] = depths
        names = ["kitchen", "furniture_store", "bedroom"]
        refs = []
        for number, name in enumerate(names):
            codes = np.array([[ord(letter)] for letter in name], np.uint16)
            refs.append(file.create_dataset(f"#refs#/{number}", data=codes).ref)
        file.create_dataset("sceneTypes", data=np.array([refs], dtype=h5py.ref_dtype))
    splits = {"trainNdxs": np.array([[1], [2]]), "testNdxs": np.array([[3]])}
    savemat(tmp_path / "splits.mat", splits)
    found = opened("nyu-d", tmp_path)
    assert targets(found.train) == ["kitchen", "other"]
    assert targets(found.test) == ["bedroom"]
    assert found.train is not None
    assert np.array_equal(np.asarray(found.train[1].values), depths[1].T[::2, ::2])


def test_sun_rgbd_depth_comes_out_of_its_rotated_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "SUN_LEAST", 1)
    paths = []
    for number, (scene, mm) in enumerate([("office", 1500), ("office", 9000), ("lab", 20)]):
        folder = tmp_path / "SUNRGBD/kv1/NYUdata" / f"NYU{number:04d}"
        rotated = ((mm << 3) | (mm >> 13)) & 0xFFFF
        picture(folder / "depth_bfx" / f"{number}.png", rotated, np.uint16)
        write(folder / "scene.txt", f"{scene}\n")
        paths.append(f"/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU{number:04d}")
    split = tmp_path / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    split.parent.mkdir(parents=True)
    cells = {"alltrain": np.array([paths[::2]], object), "alltest": np.array([paths[1:2]], object)}
    savemat(split, cells)
    found = opened("sun-rgbd", tmp_path)
    assert targets(found.train) == targets(found.test) == ["office"]  # one lab is too few
    for samples, mm in ((found.train, 1500), (found.test, 9000)):
        (sample,) = listed(samples)
        assert np.unique(np.asarray(sample.values)).tolist() == [mm]
        assert np.asarray(sample.values).shape == (4, 4)


def test_ego4d_windows_have_even_times_and_whole_videos_a_side(tmp_path: Path) -> None:
    videos = [
        {"video_uid": f"v{n}", "scenarios": ["Cooking" if n % 2 else "Golf"]} for n in range(12)
    ]
    videos += [{"video_uid": "both", "scenarios": ["Cooking", "Golf"]}]
    videos += [{"video_uid": "no-imu", "scenarios": ["Golf"]}]
    write(tmp_path / "ego4d.json", json.dumps({"videos": videos}))
    header = "component_idx,component_timestamp_ms,canonical_timestamp_ms,"
    header += "gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z\n"
    times = np.arange(0, 11_000, 5.0)  # 11 s at 200 Hz: two windows
    rows = [f"0,{t},{t},,,,1,2,3" if t == 40 else f"0,{t},{t},{t},5,6,1,2,3" for t in times]
    for video in videos[:-1]:
        write(tmp_path / "imu" / f"{video['video_uid']}.csv", header + "\n".join(rows))
    found = opened("ego4d-imu", tmp_path)
    assert found.train is not None
    assert found.test is not None
    assert Counter(targets([*found.train, *found.test])) == {"Cooking": 12, "Golf": 12}
    tested = {Path(sample.file).stem for sample in found.test}
    assert tested == {f"v{n}" for n in range(12) if zlib.crc32(f"v{n}".encode()) % 5 == 0}
    values = np.asarray(found.train[0].values)
    assert values.shape == (250, 6)
    assert values[0, :3].tolist() == [1, 2, 3]
    np.testing.assert_allclose(values[:, 3], np.arange(250) * 20)  # also over the missing row


def test_indian_pines_has_the_split_of_its_maps(tmp_path: Path) -> None:
    cube = np.arange(4 * 5 * 7).reshape(4, 5, 7)
    train, test = np.zeros((4, 5), int), np.zeros((4, 5), int)
    train[0, 1], train[3, 2], test[2, 2] = 4, 5, 4
    savemat(tmp_path / "IndianPine.mat", {"input": cube, "TR": train, "TE": test})
    found = opened("indian-pines", tmp_path)
    assert targets(found.train) == ["4", "5"]
    assert targets(found.test) == ["4"]
    assert np.asarray(listed(found.test)[0].values)[:, 0].tolist() == cube[2, 2].tolist()
    savemat(tmp_path / "IndianPine.mat", {"input": cube, "TR": train})
    with pytest.raises(DataError, match="the array 'TE' is missing; the arrays are input, TR"):
        opened("indian-pines", tmp_path)
    (tmp_path / "IndianPine.mat").write_bytes(b"no matlab")
    with pytest.raises(DataError, match="not a MATLAB file that can be read"):
        opened("indian-pines", tmp_path)


def test_fraud_and_molecules(tmp_path: Path) -> None:
    write(tmp_path / "fraud/creditcard.csv", "Time,V1,Amount,Class\n0,-1.3,149.6,0\n1,2.0,9.9,1\n")
    found = opened("fraud", tmp_path / "fraud")
    assert targets(found.train) == ["0", "1"]
    pytest.importorskip("rdkit")
    (tmp_path / "raw").mkdir()
    lines = ["idx,smiles,homolumogap", *(f"{n},{'C' * (n + 1)}O,{n}.5" for n in range(6)), "6,CC,"]
    with gzip.open(tmp_path / "raw/data.csv.gz", "wt") as file:
        file.write("\n".join(lines))
    samples = listed(opened("pcqm4m", tmp_path, limit=3).train)
    assert targets(samples) == [0.5, 2.5, 5.5]  # evenly spread; the last has no target
    assert isinstance(samples[1].values, Graph)
    assert len(samples[1].values.nodes) == 4


def test_a_recipe_names_a_data_set_and_its_folder(tmp_path: Path, tiny_chat: Path) -> None:
    for part, n in (("train", 8), ("val", 2)):
        for grey, name in ((40, "dark"), (200, "light")):
            for number in range(n):
                picture(tmp_path / "x" / part / name / f"{number}.JPEG", grey + number)
    data = {"dataset": "imagenet-1k", "root": tmp_path / "x", "limit": 12}
    changes = {"modality": "image", "finetune__seeds": [0], "finetune__control": False}
    path = write_run(tmp_path / "run", tiny_chat, data, train__steps=20, **changes)
    report = main(path, ["finetune.baselines=false"])
    assert report.n[0] + report.n[1] == 12
    assert report.n[2] == 4
    assert [row.kind for row in report.rows] == ["pretrained"]
    assert report.data.startswith("ImageNet-1k")
    wrong: list[tuple[list[str], Callable[..., Any], str]] = [
        (["data.root=null"], load, "dataset and root, the data set's folder, go together"),
        (["data.train=x"], load, "give one of package, dataset and train"),
        (["data.dataset=imagenet"], main, "unknown data set 'imagenet'; the data sets are imagen"),
        (["modality=thermal"], main, "it is for image classification, not for thermal"),
    ]
    for overrides, run, said in wrong:
        with pytest.raises(ConfigError, match=said):
            run(path, [*overrides, f"output={tmp_path / 'other'}"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("table2-*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_table_2_is_that_of_table_8(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    told = re.search(r"steps: \d+  # (\d+) epochs of ([\d,]+) ", text)
    large = re.search(r"# ViT-L \(each with --set\): (.*)", text)
    assert told is not None
    assert large is not None
    n, long = int(told[2].replace(",", "")), path.stem in ("table2-kinetics-700", "table2-nyu-d")
    depth = path.stem == "table2-nyu-d"
    for overrides, lr, size, decay, warm, epochs, drop, mixup in (
        ([], 5e-5, 512, 1e-8, 0, 20 if long else 30, 0.3 if long else 0.2, (0, 0)),
        (large[1].split(), 4e-3, 4096, 0.05, 5, 90, 0.2 if depth else 0.1, (0.8, 1.0)),
    ):
        recipe = load_recipe(FinetuneRun, path, overrides)
        assert PUBLIC[str(recipe.data.dataset)].of == (recipe.modality, recipe.task)
        train, own = recipe.train, recipe.finetune
        assert (train.lr, train.weight_decay, own.drop_path) == (lr, decay, drop)
        assert train.batch_size * train.accumulation * 8 == size  # GPUs
        assert train.steps == round(epochs * n / size)
        assert train.warmup_steps == round(warm * n / size)
        assert (train.schedule, train.bf16, train.parallel) == ("cosine", True, "ddp")
        assert (own.augment is not None) == (recipe.modality in PICTURES | MEDIA)
        if own.augment is not None:
            assert own.augment.erasing == 0.25
            mixes = (0, 0) if recipe.task == "re-identification" else mixup
            assert (own.augment.mixup, own.augment.cutmix) == mixes
            if recipe.modality == "image":
                assert (own.augment.jitter, own.augment.flip) == (0.4, 0.5)
    with pytest.raises(DataError, match=f"{recipe.data.dataset} lacks"):
        main(path, [f"data.root={tmp_path}", f"output={tmp_path / 'out'}"])


def test_every_modality_of_table_2_has_its_recipe() -> None:
    seen = {load(path, []).modality for path in RECIPES.glob("table2-*.yaml")}
    wanted = {"text", "image", "video", "depth", "audio", "thermal", "imu", "graph"}
    assert seen == wanted | {"time_series", "hyperspectral", "tabular"}


def load(path: Path, overrides: list[str]) -> FinetuneRun:
    return load_recipe(FinetuneRun, path, overrides)
