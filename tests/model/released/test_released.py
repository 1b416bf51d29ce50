"""The released checkpoint converts to the same numbers, comes back bit for bit, or is refused."""

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import save, save_file
from torch import Tensor
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from mico_chat.checkpoints.assemble import read_preprocessing
from mico_chat.checkpoints.load import load_pretraining
from mico_chat.checkpoints.released import (
    ConvertOptions,
    convert_released,
    read_released,
    write_released,
)
from mico_chat.checkpoints.released_check import differences
from mico_chat.errors import ModelError
from mico_chat.media import MediaFile, MediaLimits, decode
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import EncodedContexts, MicoForPretraining
from mico_chat.model.released import Subtitles
from mico_chat.model.text_branch import backwards, captions
from tests.model.released import released_replica as replica
from tests.support.tiny import command

STEP = "model_step_300.pt"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def lay(folder: Path, state: Any, cfg: dict[str, Any] | None = None) -> Path:
    """A folder as the release comes in."""
    (folder / "ckpt").mkdir(parents=True)
    (folder / "log").mkdir()
    torch.save(state, folder / "ckpt" / STEP)
    known = {"vision_encoder_type": "evaclip01_giant", "vision_resolution": replica.SIDE}
    known |= {"frame_embedding_type": "adaptive", "pool_video": False}
    hps = {"model_cfg": known | (cfg or {}), "run_cfg": {"seed": 50}}
    (folder / "log" / "hps.json").write_text(json.dumps(hps))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay(tmp_path_factory.mktemp("released") / "MiCo", replica.checkpoint())


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    output = source.parent / "converted"
    convert_released(source, output)
    return output


@pytest.fixture(scope="module")
def model(folder: Path) -> MicoForPretraining:
    model: MicoForPretraining = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


@pytest.fixture(scope="module")
def original() -> replica.Original:
    return replica.Original(replica.checkpoint())


def pixels(n: int, seed: int = 5) -> Tensor:
    """Two media of ``n`` units."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, 3, replica.SIDE, replica.SIDE, generator=random)


def caption() -> tuple[Tensor, Tensor]:
    """Two captions, the second one padded."""
    random = torch.Generator().manual_seed(9)
    ids = torch.randint(1, 100, (2, 7), generator=random)
    ids[:, 0] = replica.CLS
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids * mask, mask


@torch.no_grad()
def encode(
    model: MicoForPretraining, *media: tuple[Kind, Tensor], said: Subtitles | None = None
) -> EncodedContexts:
    """Two samples, each with a medium of every kind given."""
    units = torch.cat([torch.cat([x[i] for _, x in media]) for i in range(2)])
    return model.encode(
        torch.tensor([KINDS.index(kind) for kind, _ in media] * 2),
        torch.tensor([x.shape[1] for _, x in media] * 2),
        torch.arange(2).repeat_interleave(len(media)),
        2,
        units,
        subtitles=said,
    )


def close(ours: Tensor, theirs: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within)


BRANCHES = [("image", "vision"), ("video", "vision"), ("audio", "audio"), ("depth", "depth")]


@pytest.mark.parametrize(("kind", "branch"), BRANCHES)
@pytest.mark.parametrize("n", [1, 2, 4, 7])
@torch.no_grad()
def test_encoder_pooling_heads_and_conditions_are_the_originals(
    model: MicoForPretraining, original: replica.Original, kind: Kind, branch: str, n: int
) -> None:
    x = pixels(n)
    theirs = original.tokens(x)
    close(model.encoder(x.flatten(0, 1)).unflatten(0, (2, n)), theirs)
    ours = encode(model, (kind, x))
    close(ours.pooled, original.head(branch[0], original.pooled(theirs)))
    close(ours.context, original.condition(branch, theirs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_text_matching_and_caption_logits_are_the_originals(
    model: MicoForPretraining,
    original: replica.Original,
    attention: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mico_chat.model.text_branch.attention_on", lambda device: attention)
    ids, mask = caption()
    video, sound = pixels(3), pixels(2, seed=6)
    seen = original.condition("vision", original.tokens(video))
    both = torch.cat([seen, original.condition("audio", original.tokens(sound))], 1)

    alone, _ = original.bert(ids, mask)
    close(model.text(ids, mask), alone)
    close(model.encode_text(ids, mask), original.head("t", alone[:, 0]))

    joint = encode(model, ("video", video), ("audio", sound))
    hidden, _ = original.bert(ids, mask, both)
    matching = model.match(ids, mask, joint.context, joint.mask)
    close(matching.sigmoid(), original.matching(hidden))

    shown = encode(model, ("video", video))
    for causal in (False, True):
        _, logits = original.bert(ids, mask, seen, causal)
        by_whom = mask
        if causal:
            by_whom = mask.bool().unsqueeze(1) & backwards(mask[:, :0], mask.shape[1])
        ours = model.text(ids, by_whom, shown.context, shown.mask)
        close(model.text.logits(ours), logits)


@torch.no_grad()
def test_two_branches_of_a_sample_go_through_their_joint_head(
    model: MicoForPretraining, original: replica.Original
) -> None:
    picture, sound, depth = pixels(1), pixels(2, seed=6), pixels(1, seed=7)
    v, a, d = (original.pooled(original.tokens(x)) for x in (picture, sound, depth))
    media: dict[Kind, Tensor] = {"image": picture, "audio": sound, "depth": depth}
    both = original.head("va", torch.cat([v, a], 1))
    # No head is for sound and depth: each branch's own, taken together.
    mean = torch.nn.functional.normalize(original.head("a", a) + original.head("d", d), dim=-1)
    expected: list[tuple[Kind, Kind, Tensor]] = [("image", "audio", both), ("audio", "image", both)]
    expected += [("image", "depth", original.head("id", torch.cat([v, d], 1)))]
    for one, other, point in [*expected, ("audio", "depth", mean)]:
        close(encode(model, (one, media[one]), (other, media[other])).pooled, point)


@torch.no_grad()
def test_subtitles_are_read_as_in_the_released_code(
    model: MicoForPretraining, original: replica.Original
) -> None:
    """Text alone, all of it with its padding, behind the media; heads of their own."""
    ids, mask = caption()
    video, sound = pixels(3), pixels(2, seed=6)
    hidden, _ = original.bert(ids, mask)
    tokens = [original.tokens(video), original.tokens(sound)]
    seen = [original.condition("vision", tokens[0]), original.condition("audio", tokens[1])]
    media: list[tuple[Kind, Tensor]] = [("video", video), ("audio", sound)]
    for n, head in ((1, "vs"), (2, "vas")):
        ours = encode(model, *media[:n], said=Subtitles(ids, mask))
        close(ours.context, torch.cat([*seen[:n], original.said(hidden)], 1))
        assert bool(ours.mask.all())
        pooled = torch.cat([*map(original.pooled, tokens[:n]), hidden[:, 0]], 1)
        close(ours.pooled, original.head(head, pooled))
    some = encode(model, *media, said=Subtitles(ids, mask * torch.tensor([[1], [0]])))
    close(some.pooled[:1], ours.pooled[:1])
    close(some.pooled[1:], encode(model, *media).pooled[1:])
    # Depth and subtitle have no head together: each one's own, as for two other branches.
    depth = pixels(1, seed=7)
    d = original.head("d", original.pooled(original.tokens(depth)))
    mean = torch.nn.functional.normalize(d + original.head("s", hidden[:, 0]), dim=-1)
    close(encode(model, ("depth", depth), said=Subtitles(ids, mask)).pooled, mean)


@torch.no_grad()
def test_captions_are_the_words_that_a_mask_asks_for_one_by_one(
    model: MicoForPretraining, original: replica.Original
) -> None:
    class Special:
        cls_token_id, sep_token_id, pad_token_id = replica.CLS, replica.SEP, replica.PAD

        def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
            assert skip_special_tokens
            return [" ".join(map(str, row)) for row in ids.tolist()]

    video = pixels(3)
    seen = original.condition("vision", original.tokens(video))
    said = torch.full((2, 1), replica.CLS)
    for _ in range(6):
        asked = torch.cat([said, torch.full((2, 1), replica.MASK)], 1)
        _, logits = original.bert(asked, torch.ones_like(asked), seen, causal=True)
        said = torch.cat([said, logits[:, -1].argmax(-1, keepdim=True)], 1)
    shown = encode(model, ("video", video))
    special: Any = Special()
    found = captions(model, shown.context, shown.mask, special, max_new_tokens=6, num_beams=1)
    for row, expected in zip(found, said[:, 1:].tolist(), strict=True):
        ends = expected.index(replica.SEP) + 1 if replica.SEP in expected else 6
        assert list(map(int, row.split())) == (expected[:ends] + [replica.PAD] * 6)[:6]
    assert len(captions(model, shown.context, shown.mask, special, max_new_tokens=6)) == 2  # beams


# --- there and back -----------------------------------------------------------------------------


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_the_way_back_gives_every_tensor_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = replica.checkpoint(seed=3, dtype=dtype)
    source = lay(tmp_path / "MiCo", state)
    convert_released(source, tmp_path / "ours")
    write_released(tmp_path / "ours", tmp_path / "back")
    assert same(torch.load(tmp_path / "back" / "ckpt" / STEP), state)
    for_both = ((f / "log" / "hps.json").read_text() for f in (source, tmp_path / "back"))
    one, other = map(json.loads, for_both)
    assert one == other
    write_released(tmp_path / "ours", tmp_path / "one.pt")
    assert same(torch.load(tmp_path / "one.pt"), state)


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The release's names as they were before: ``video``, and CLIP's own word for the encoder."""
    spelt = {}
    for name, tensor in state.items():
        if name.startswith("vision_encoder"):
            name = name.replace("vision_encoder", "evaclip_model")
        else:
            name = name.replace("vision", "video")
        spelt[f"module.{name}"] = tensor
    return spelt


def test_older_spellings_are_the_same_model_and_come_back_as_they_were(
    tmp_path: Path, folder: Path
) -> None:
    state = older(replica.checkpoint())
    convert_released(lay(tmp_path / "old", state), tmp_path / "ours")
    one, other = ((f / "model.safetensors").read_bytes() for f in (tmp_path / "ours", folder))
    assert one == other
    write_released(tmp_path / "ours", tmp_path / "back.pt")
    assert same(torch.load(tmp_path / "back.pt"), state)


def test_the_last_step_of_a_folder_is_taken_and_a_file_alone_will_do(
    tmp_path: Path, source: Path
) -> None:
    both = lay(tmp_path / "both", replica.checkpoint())
    torch.save(replica.checkpoint(seed=8), both / "ckpt" / "model_step_90.pt")
    torch.save({"optimizer": {}}, both / "ckpt" / "optimizer_step_900.pt")
    assert read_released(both).file.name == STEP
    alone = tmp_path / "alone.pt"
    torch.save({"model": replica.checkpoint()}, alone)
    convert_released(alone, tmp_path / "ours")
    config = MicoConfig.from_pretrained(tmp_path / "ours")
    assert config.encoder_config.image_size == replica.SIDE


def test_tables_of_other_lengths(tmp_path: Path, source: Path) -> None:
    options = ConvertOptions(image_size=56, frames=8, slices=3)
    convert_released(source, tmp_path / "larger", options)
    model = MicoForPretraining.from_pretrained(tmp_path / "larger", dtype=torch.float32)
    assert model.encoder.grid == 4
    frame = replica.checkpoint()["vision_frame_embedding"][0].float()
    tables = {name: t for name, t in model.named_parameters() if name.endswith(".frame")}
    assert torch.equal(tables["text.context_proj.vision.frame"], frame.repeat_interleave(2, 0))
    assert len(tables["text.context_proj.audio.frame"]) == 3
    x = torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert encode(model, ("image", x)).pooled.isfinite().all()


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"converted: no tokenizer .*--tokenizer"):
        load_pretraining(folder)


def test_what_the_release_has_no_place_for_is_not_written_back(
    tmp_path: Path, folder: Path
) -> None:
    model = MicoForPretraining.from_pretrained(folder)
    with torch.no_grad():
        model.context.modality.weight[0] += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ModelError, match=r"context\.modality\.weight is not zero.*freeze"):
        write_released(tmp_path / "trained", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    MicoForPretraining(MicoConfig.tiny(concepts=False)).save_pretrained(tmp_path / "tiny")
    with pytest.raises(ModelError, match="share one projection"):
        write_released(tmp_path / "tiny", tmp_path / "back")


# --- refused --------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def with_(name: str, tensor: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: tensor}


VIT = "vision_encoder.visual."
MISSING: tuple[str, ...] = ("itm_head.linear1.weight", "contra_head_vas.bias", f"{VIT}pos_embed")
MISSING += (f"{VIT}blocks.0.norm1.bias", "multimodal_encoder.cls.predictions.decoder.bias")
WRONG: list[tuple[str, Any, str]] = [
    ("contra_head_x.weight", torch.zeros(2), r"contra_head_x\.weight is not a tensor of a MiCo"),
    (f"{VIT}blocks.0.extra", torch.zeros(2), r"blocks\.0\.extra is not a tensor"),
    ("contra_temp", torch.zeros(2), r"contra_temp has the shape \(2,\), expected \(\)"),
    ("itm_head.linear2.weight", torch.zeros(3, 32), r"the shape \(3, 32\), expected \(2, 32\)"),
    ("contra_head_s.linear.weight", torch.zeros(1, 1), r"\(1, 1\), expected \(16, 32\)"),
    (f"{VIT}pos_embed", torch.zeros(5, 88), r"pos_embed has the shape"),
    (f"{VIT}pos_embed", torch.zeros(1, 6, 88), "6 positions, expected 1"),
    ("video_frame_embedding", torch.zeros(1, 4, 32), "two spellings"),
    ("itm_head.linear1.bias", torch.zeros(32, dtype=torch.int64), r"torch\.int64"),
    ("step", 300, "'step' has the type int, expected a tensor"),
    ("multimodal_encoder.cls.predictions.decoder.bias", torch.ones(120), "differs from"),
]
REFUSED: list[tuple[Callable[[Any], Any], dict[str, Any], str]] = [
    *((without(name), {}, rf"{re.escape(name)} is missing") for name in MISSING),
    *((with_(name, tensor), {}, said) for name, tensor, said in WRONG),
    (lambda state: [state], {}, "expected a state dict, got list"),
    (lambda state: {}, {}, "expected a state dict"),
    (dict, {"vision_encoder_type": "clip_vit_base_16"}, "only evaclip01_giant"),
    (dict, {"pool_video": True}, "pool_video"),
]


@pytest.mark.parametrize(("changed", "cfg", "said"), REFUSED)
def test_a_checkpoint_that_is_none_is_refused_in_a_line(
    tmp_path: Path, changed: Callable[[Any], Any], cfg: dict[str, Any], said: str
) -> None:
    source = lay(tmp_path / "MiCo", changed(replica.checkpoint()), cfg)
    with pytest.raises(ModelError, match=said) as caught:
        convert_released(source, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["MiCo"], "nothing half-written"


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    went_off = tmp_path / "went-off"
    source = lay(tmp_path / "zipped", {**replica.checkpoint(), "x": Bomb(went_off)})
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(Bomb(went_off), protocol=2))
    for path in (source, bare):
        with pytest.raises(ModelError, match="refused, because it holds code") as caught:
            convert_released(path, tmp_path / "ours")
        assert "\n" not in str(caught.value)
    assert not went_off.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut", bytes(100)])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.pt"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.pt: ") as caught:
        convert_released(file, tmp_path / "ours")
    assert "\n" not in str(caught.value)


def expected(file: Path, original: replica.Original, **changed: Tensor) -> Path:
    """The original's numbers, of tokens every second one."""
    ids, mask = caption()
    video, sound = pixels(3), pixels(2, seed=6)[:, :, 0]
    sounds = sound.unsqueeze(2).repeat(1, 1, 3, 1, 1)
    with torch.no_grad():
        seen, heard = original.tokens(video), original.tokens(sounds)
        cond_v, cond_a = original.condition("vision", seen), original.condition("audio", heard)
        fused, _ = original.bert(ids, mask, torch.cat([cond_v, cond_a], 1))
        causal_hidden, causal_logits = original.bert(ids, mask, cond_v, causal=True)
        text, _ = original.bert(ids, mask)
        tensors = {"in.video": video, "in.audio": sound, "in.input_ids": ids}
        tensors |= {"in.attention_mask": mask, "out.vision_tokens": seen[:, :, ::2]}
        tensors |= {"out.audio_tokens": heard, "out.cond_v": cond_v[:, ::2], "out.cond_a": cond_a}
        tensors["out.feat_a"] = original.head("a", original.pooled(heard))
        tensors["out.feat_t"] = original.head("t", text[:, 0])
        tensors |= {"out.text_hidden": text, "out.fused_va": fused}
        tensors |= {"out.itm_va": original.matching(fused), "out.causal_hidden_v": causal_hidden}
        tensors["out.causal_logits_v"] = causal_logits
    save_file({k: t.contiguous() for k, t in (tensors | changed).items()}, file)
    return file


def test_a_converted_model_is_compared_with_the_originals_numbers(
    tmp_path: Path,
    source: Path,
    folder: Path,
    original: replica.Original,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = expected(tmp_path / "numbers.safetensors", original)
    command("convert", "mico", str(source), "--output", str(tmp_path / "a"), "--compare", str(file))
    title, *printed, left = capsys.readouterr().out.splitlines()[2:]
    assert title.split() == ["output", "of", "largest", "difference"]
    assert len(printed) == 11
    assert all(float(line.split()[-1]) < 1e-5 for line in printed)
    assert any(line.startswith("feat_a           contrastive head ") for line in printed)
    assert "numbers.safetensors lacks them: out.depth_tokens, out.feat_v" in left
    command("convert", "mico", str(folder), "--compare", str(file))  # converted before
    assert capsys.readouterr().out.splitlines() == [title, *printed, left]
    off = expected(tmp_path / "off.safetensors", original, **{"out.itm_va": torch.zeros(2)})
    command(
        *("convert", "mico", str(source), "--output", str(tmp_path / "b"), "--compare", str(off)),
        code=2,
    )
    error = capsys.readouterr().err
    assert "off.safetensors: itm_va by" in error
    assert "feat_a" not in error
    for changed, said in [
        ({"out.other": torch.zeros(2)}, "'other' is unknown"),
        ({"out.feat_d": torch.zeros(2, 16)}, "'depth' is unknown or missing"),
        ({"out.feat_t": torch.zeros(3, 16)}, "shape"),
        ({"in.video": torch.zeros(2, 3, 3, 30, 30)}, r"in.video has the shape .* 28 x 28 pixels"),
    ]:
        wrong = expected(tmp_path / "wrong.safetensors", original, **changed)
        with pytest.raises(ModelError, match=rf"wrong\.safetensors: .*{said}"):
            dict(differences(folder, wrong))
    for content in (b"PK", save({"in.video": pixels(3)})):
        wrong.write_bytes(content)
        with pytest.raises(ModelError, match=r"wrong\.safetensors: .*of the original code"):
            dict(differences(folder, wrong))
    command("convert", "mico", str(source), "--compare", str(file), code=2)
    assert "--output" in capsys.readouterr().err


def test_files_of_depth_are_pictures_in_a_converted_folder(folder: Path) -> None:
    """The release opens a depth map as an RGB picture; metres become the picture of DPT."""
    picture = np.random.default_rng(3).integers(0, 256, (40, 52), dtype=np.uint8)
    picture[:4] = 0  # the farthest, and a hole
    preprocessing = read_preprocessing(folder, MicoConfig.from_pretrained(folder))
    pixels = ToTensor()(Pillow.fromarray(picture).convert("RGB"))
    side = (replica.SIDE, replica.SIDE)
    theirs = Compose([Resize(side, antialias=False), Normalize(MEAN, STD)])(pixels)
    for mode in ("L", "RGB", "P"):
        png = io.BytesIO()
        Pillow.fromarray(picture).convert(mode).save(png, "PNG")
        medium = decode(MediaFile("depth", png.getvalue()), MediaLimits())
        close(preprocessing.units(medium)[0], theirs, within=1e-4)
    near_mid_far = np.array([[500, 1000, 2000, 0]] * 8, np.uint16).repeat(8, 1)  # millimetres
    png = io.BytesIO()
    Pillow.fromarray(near_mid_far).save(png, "PNG")
    metres = io.BytesIO()
    np.save(metres, near_mid_far.astype(np.float32) / 1000)
    for data in (png, metres):
        medium = decode(MediaFile("depth", data.getvalue()), MediaLimits())
        whole = preprocessing.model_copy(update={"image_size": 8}).units(medium)
        grey = (whole[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255
        close(grey[:, 0, 1::2], torch.tensor([[255.0, 85, 0, 0]] * 3), within=1e-3)


def test_the_command(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    command("convert", "mico", str(source), "--output", str(ours))
    said = capsys.readouterr().out
    assert "4 kept aside (multimodal_encoder, vision_encoder)" in said
    assert "--tokenizer" in said
    command("convert", "mico", str(ours), "--to-mico", "--output", str(back))
    assert same(torch.load(back / "ckpt" / STEP), replica.checkpoint())
    for arguments, said in [
        ([str(source), "--output", str(ours)], r"there already; name a new one"),
        ([str(tmp_path / "none"), "--output", str(tmp_path / "x")], "no such file or folder"),
        ([str(tmp_path), "--output", str(tmp_path / "x")], "ckpt/model_step_N.pt is missing"),
        ([str(source), "--output", str(tmp_path / "x"), "--text-heads", "5"], "into 5 heads"),
        ([str(source), "--output", str(tmp_path / "x"), "--image-size", "30"], "patch size 14"),
        ([str(source), "--to-mico", "--output", str(tmp_path / "x")], "not a stage 1 folder"),
    ]:
        command("convert", "mico", *arguments, code=2)
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert said in err
        assert err.count("\n") == 1
