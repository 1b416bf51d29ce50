"""Media to units: what is near, what is a hole, what a tone looks like, how a sound is cut."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from mico_chat.errors import MediaError
from mico_chat.media import Audio, Depth, Image
from mico_chat.model.preprocessing import (
    FBANK_MEAN,
    FBANK_STD,
    Preprocessing,
    fbank,
    released_preprocessing,
)
from tests.support.tiny import SIDE, clip, depth, normals, picture, sound

PLAIN = Preprocessing(image_size=SIDE, image_mean=(0, 0, 0), image_std=(1, 1, 1))


def test_a_picture_is_resized_whole_and_normalised() -> None:
    pixels = np.zeros((20, 90, 3), np.uint8)
    pixels[:, :45] = (255, 0, 51)
    unit = PLAIN.units(Image(pixels))[0]
    torch.testing.assert_close(unit[:, 5, 5], torch.tensor([1.0, 0.0, 0.2]))
    torch.testing.assert_close(unit[:, 5, -5], torch.zeros(3))
    normalised = Preprocessing(image_size=SIDE, image_mean=(0.5,) * 3, image_std=(0.25,) * 3)
    torch.testing.assert_close(normalised.units(Image(pixels))[0], (unit - 0.5) / 0.25)


def test_frames_are_units_in_order() -> None:
    for medium in (picture(), normals(), depth()):
        assert PLAIN.units(medium).shape == (1, 3, SIDE, SIDE)
    video = clip(4)
    units = PLAIN.units(video)
    for frame, unit in zip(video.frames, units, strict=True):
        torch.testing.assert_close(PLAIN.units(Image(frame))[0], unit)


# --- depth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [True, False])
def test_nearer_is_larger(metric: bool) -> None:
    unit = PLAIN.units(depth(metric))[0]
    assert (unit[:, :14, :14] == 0).all(), "a hole"
    nearness = unit[0]
    row = nearness[SIDE // 2]
    assert (row[:-1] >= row[1:]).all(), "distance grows to the right"
    assert row[0] > 0.9
    assert row[-1] < 0.1
    assert 0 <= nearness.min() <= nearness.max() <= 1


def test_absolute_distance_is_told_for_metres_alone() -> None:
    near, far = (Depth(np.full((8, 8), metres, np.float32)) for metres in (1.0, 8.0))
    absolute = [float(PLAIN.units(d)[0, 2].mean()) for d in (near, far)]
    assert absolute == pytest.approx([2 / 7, 5 / 7])  # log2 steps from 0.25 m to 32 m
    relative = PLAIN.units(depth(metric=False))[0]
    assert float(relative[2, SIDE // 2].mean()) == pytest.approx(0.5)
    torch.testing.assert_close(relative[0], relative[1])


def test_relative_maps_do_not_depend_on_their_scale() -> None:
    values = depth(metric=False).values
    one, other = (
        PLAIN.units(Depth((values * scale).astype(np.float32), metric=False))
        for scale in (1.0, 0.25)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_flat_map_is_finite() -> None:
    for value in (1e-30, 1e-3, 2.0, 1e6):
        for metric in (True, False):
            flat = Depth(np.full((8, 8), value, np.float32), metric=metric)
            assert PLAIN.units(flat).isfinite().all()


# --- sound -------------------------------------------------------------------------------------


def test_fbank_is_kaldis() -> None:
    generator = np.random.default_rng(0)
    time = np.arange(8000) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 1000 * time) + 0.01 * generator.standard_normal(8000)
    scale: dict[str, Any] = {"norm": None, "mel_scale": "kaldi", "triangularize_in_mel_space": True}
    kaldi: dict[str, Any] = {"fft_length": 512, "power": 2.0, "center": False, "preemphasis": 0.97}
    kaldi |= {"log_mel": "log", "mel_floor": 1.192092955078125e-07, "remove_dc_offset": True}
    kaldi["mel_filters"] = mel_filter_bank(257, SIDE, 20, 8000, 16_000, **scale)
    window = window_function(400, "povey", periodic=False)
    reference = spectrogram(wave * 32768, window, 400, 160, **kaldi).T
    found = fbank(torch.from_numpy(wave.astype(np.float32)), SIDE)
    assert found.shape == (1 + (8000 - 400) // 160, SIDE)
    np.testing.assert_allclose(found.numpy(), reference, atol=0.01)


def test_a_sound_has_three_equal_normalised_channels() -> None:
    audio = sound(1.0)
    unit = PLAIN.units(audio)[0]
    torch.testing.assert_close(unit[0], unit[1])
    torch.testing.assert_close(unit[0], unit[2])
    first = fbank(torch.from_numpy(audio.samples[: (SIDE - 1) * 160 + 400]), SIDE)
    torch.testing.assert_close(unit[0], (first - FBANK_MEAN) / FBANK_STD)
    short = sound(0.1)  # 1,600 samples are 10 rows, and are repeated
    torch.testing.assert_close(
        PLAIN.units(short), PLAIN.units(Audio(np.tile(short.samples, 8)))[:1]
    )


def test_a_long_sound_is_spread_over_its_slices() -> None:
    size = SIDE * 160
    silence = np.zeros(20 * size, np.float32)
    silence[-size:] = sound(1.0).samples[:size]  # the last slice alone is a tone
    units = PLAIN.units(Audio(silence))
    assert len(units) == 4
    loud = units.mean((1, 2, 3))
    assert loud[3] > loud[0] + 0.1
    torch.testing.assert_close(units[0], units[1])
    assert len(PLAIN.model_copy(update={"max_slices": 7}).units(Audio(silence))) == 7


def test_the_number_of_slices_follows_the_length() -> None:
    second = SIDE * 160 / 16_000
    counts = [len(PLAIN.units(sound(second * n - 0.01))) for n in (2, 3, 4, 9)]
    assert counts == [2, 3, 4, 4]
    assert [len(PLAIN.units(sound(n * second))) for n in (0.1, 0.5, 1.0)] == [1, 1, 1]


RELEASED = released_preprocessing(SIDE, 3).model_copy(
    update={"image_mean": (0, 0, 0), "image_std": (1, 1, 1)}
)


@pytest.mark.parametrize("preprocessing", [PLAIN, RELEASED])
def test_slices_are_drawn_one_of_each_run(preprocessing: Preprocessing) -> None:
    time = np.arange(12 * SIDE * 160)
    rising = Audio((time / time[-1] * np.sin(time / 3)).astype(np.float32))  # ever louder
    n = preprocessing.max_slices

    def loudness(seed: int | None) -> list[float]:
        generator = None if seed is None else np.random.default_rng(seed)
        return preprocessing.units(rising, generator).amax((1, 2, 3)).tolist()

    drawn = [loudness(seed) for seed in range(12)]
    assert drawn[3] == loudness(3)
    for found in drawn:
        assert len(found) == n
        assert found == sorted(found)
    assert all(len(set(place)) > 2 for place in zip(*drawn, strict=True))
    assert loudness(None) == loudness(None)


def test_a_single_slice_is_the_middle_one() -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 51_600).astype(np.float32)
    unit = PLAIN.model_copy(update={"max_slices": 1}).units(Audio(samples))[0, 0]
    need = (SIDE - 1) * 160 + 400
    middle = torch.from_numpy(samples[(len(samples) - need) // 2 :][:need])
    torch.testing.assert_close(unit, (fbank(middle, SIDE) - FBANK_MEAN) / FBANK_STD)


def test_a_file_without_the_settings_means_what_it_meant() -> None:
    old = json.loads(PLAIN.model_dump_json())
    assert not {"sampling", "antialias"} & set(old)
    assert Preprocessing(**old) == PLAIN
    assert Preprocessing(**json.loads(RELEASED.model_dump_json())) == RELEASED


def test_a_medium_without_content_is_refused() -> None:
    with pytest.raises(MediaError, match="no samples"):
        PLAIN.units(Audio(np.zeros(0, np.float32)))
    with pytest.raises(MediaError, match="no distances"):
        PLAIN.units(Depth(np.full((8, 8), np.nan, np.float32)))
    assert (RELEASED.units(Audio(np.ones(300, np.float32))) == 0).all(), "no whole frame"
