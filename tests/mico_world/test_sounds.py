"""Sounds of the data engine, on synthesised tones only: no package is needed."""

import io
import re
import shutil
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from mico_training.data.sources.written import Split
from mico_world.sounds import recordings as soundsources
from mico_world.sounds import sounds, synth
from mico_world.sounds.bank import SoundBank, confusable, sound_names, trim
from mico_world.sounds.recordings import Strikes
from mico_world.sounds.synth import SAMPLE_RATE, Note, play_patches, read_patch
from mico_world.sources import split_of
from mico_world.things.catalogue import Thing

NAMES = ("dog", "cat", "piano", "rain", "speech", "telephone", "violin", "siren")
SPLITS: tuple[Split, ...] = ("train", "validation")


@pytest.fixture(scope="module")
def bank() -> SoundBank:
    return SoundBank.of(
        (f"tone:{name}:{i}", name, synth.beep(200 + 30 * i + 100 * n, 0.4 + 0.1 * (i % 4)))
        for n, name in enumerate(NAMES)
        for i in range(30)
    )


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def bursts(signal: synth.Signal) -> int:
    """How many separate events: loud 10 ms frames with at least 0.1 s of quiet before."""
    frames = signal[: len(signal) // 160 * 160].reshape(-1, 160)
    level = np.abs(frames).max(axis=1)
    loud = np.flatnonzero(level > 0.25 * level.max())
    return 1 + int(np.count_nonzero(np.diff(loud) > 10))


def pitch(signal: synth.Signal) -> int:
    """The strongest frequency of the first second, Hz."""
    return int(np.abs(np.fft.rfft(signal[:SAMPLE_RATE])).argmax())


def test_every_class_is_named_in_its_phrase_and_sentence() -> None:
    for sound in sound_names().values():
        for text in (sound.phrase, sound.sentence):
            assert re.search(rf"\b{sound.name}\b", text), text


def test_flac_is_mono_16_bit_16_khz(bank: SoundBank, rng: np.random.Generator) -> None:
    sample = sounds.make(rng, "train", bank)
    with av.open(io.BytesIO(sample.files["audio.flac"])) as container:
        stream = container.streams.audio[0].codec_context
        assert (stream.name, stream.format.name) == ("flac", "s16")
        assert (stream.sample_rate, stream.layout.name) == (SAMPLE_RATE, "mono")
    assert 0.3 < len(synth.decode(sample.files["audio.flac"], 60.0)) / SAMPLE_RATE < 7
    tone = synth.beep(440, 1.0)
    back = synth.decode(synth.flac(tone), 10.0)
    assert back.shape == tone.shape
    assert np.abs(back - tone).max() < 1e-3


def test_an_identity_is_in_one_split_and_a_lone_one_for_training(bank: SoundBank) -> None:
    rng = np.random.default_rng(2)
    for split in SPLITS:
        drawn = {bank.draw(rng, split, name)[0].identity for name in NAMES for _ in range(20)}
        assert {split_of(identity) for identity in drawn} == {split}
    alone = next(f"clip{i}" for i in range(99) if split_of(f"clip{i}") == "validation")
    lone = SoundBank.of([(alone, "owl", synth.beep(300, 0.5))])
    assert lone.names("train") == ["owl"]
    assert lone.names("validation") == []
    with pytest.raises(ValueError, match="no class"):
        lone.draw_name(np.random.default_rng(0), "validation")


def test_silence_is_left_out_and_a_bank_survives_saving(bank: SoundBank, tmp_path: Path) -> None:
    silence = np.zeros(SAMPLE_RATE, np.float32)
    assert trim(silence) is None
    heard = SoundBank.of([("a", "dog", silence), ("b", "dog", synth.beep(300, 1))])
    assert [entry.identity for entry in heard.entries] == ["b"]
    kept = trim(np.concatenate([silence, synth.beep(300, 0.5), silence]))
    assert kept is not None
    assert len(kept) / SAMPLE_RATE == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="quokka"):
        SoundBank.of([("a", "quokka", synth.beep(300, 1))])
    bank.save(tmp_path / "bank-0")
    loaded = SoundBank.load(tmp_path / "bank-0")
    assert loaded.entries == bank.entries
    assert np.array_equal(loaded.signal(loaded.entries[3]), bank.signal(bank.entries[3]))


def test_sounds_are_exactly_as_many_as_the_answer_says(
    bank: SoundBank, rng: np.random.Generator
) -> None:
    for n in (1, 2, 3, 4):
        for sound in (synth.beep(900, 0.2), synth.knock(rng), synth.tick(rng)):
            assert bursts(synth.events(rng, sound, n)) == n
    for _ in range(20):
        sample = sounds.make_count(rng, "train", bank)
        (turn,) = sample.turns
        count = sample.truth["count"]
        word = ("one", "two", "three", "four")[count - 1]
        assert word in turn.answer.lower()
        assert turn.accept == (word, str(count))


def test_pitch_truth(bank: SoundBank) -> None:
    rng = np.random.default_rng(3)
    up, seen = synth.sweep(200, 800, 1.0), 0
    half = len(up) // 2
    crossings = [np.count_nonzero(np.diff(np.sign(part))) for part in (up[:half], up[half:])]
    assert crossings[1] > 1.5 * crossings[0]
    for _ in range(40):
        sample = sounds.make_change(rng, "train", bank)
        (turn,) = sample.turns
        first = turn.choices.index(turn.answer.rstrip(".").lower()) == 0
        assert first == sample.truth["up"]
        seen += turn.skill == "pitch"
    assert 0 < seen < 40


def test_names_are_true_and_yes_no_is_balanced(bank: SoundBank, rng: np.random.Generator) -> None:
    one, two = (sounds.make(np.random.default_rng(5), "train", bank) for _ in range(2))
    assert one == two
    yes, total = 0, 0
    for _ in range(300):
        sample = sounds.make_single(rng, "train", bank)
        name = sample.concepts["audio.flac"]
        for turn in sample.turns:
            if turn.choices == ("yes", "no"):
                total += 1
                says_yes = turn.answer.startswith("Yes")
                yes += says_yes
                assert turn.accept == (("yes",) if says_yes else ("no",))
                asked = [n for n in list(sound_names()) if re.search(rf"\b{n}\b", turn.question)]
                assert (name in asked) >= says_yes
            elif turn.skill == "sound":
                assert re.search(rf"\b{name}\b", turn.answer.lower())
                assert name in turn.accept
        assert all(re.search(rf"\b{name}\b", c.lower()) for c in sample.captions["audio.flac"])
    assert 0.4 < yes / total < 0.6
    said = [sounds.make_speaking(rng, "train", bank) for _ in range(150)]
    for sample in said:
        assert (sample.turns[0].accept == ("yes",)) == (sample.truth["sound"] == "speech")
    assert 0.35 < np.mean([s.truth["sound"] == "speech" for s in said]) < 0.65


def thing(name: str, *names: str) -> Thing:
    rgba = np.full((40, 60, 4), 255, np.uint8)
    return Thing(f"picture:{name}", name, names, None, lambda: rgba)


def test_pairs_belong_half_of_the_time_and_in_both_orders(
    bank: SoundBank, rng: np.random.Generator
) -> None:
    pictures = {"dog": (thing("dog"),), "piano": (thing("piano"),), "cat": (thing("cat"),)}
    pairs = [sounds.make_pair(rng, "train", bank, pictures) for _ in range(60)]
    for pair in pairs:
        belong = pair.truth["belong"]
        assert (pair.truth["thing"] == pair.truth["sound"]) == belong
        assert pair.turns[0].accept == (("yes",) if belong else ("no",))
        assert pair.turns[0].answer.endswith(f", so {pair.turns[0].accept[0]}.")
        assert pair.turns[0].skill == "belong"
        assert set(pair.files) == {"image.jpg", "audio.flac"}
    assert 0.35 < np.mean([pair.truth["belong"] for pair in pairs]) < 0.65
    assert len({pair.turns[0].media for pair in pairs}) == 2
    assert sounds.might_make(thing("teddy bear"), "bear")
    assert sounds.might_make(thing("penguin", "bird"), "bird")
    assert not sounds.might_make(thing("dog"), "piano")
    assert confusable("violin", "viola")
    assert not confusable("harp", "harpsichord")


def test_gus_patch_is_read_and_played() -> None:
    tone = (np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) * 20000).astype("<i2").tobytes()
    head = bytearray(129 + 63 + 47)
    head[:12] = b"GF1PATCH110\0"
    head[198] = 1
    sample = bytearray(96)
    for at, value, size in ((8, len(tone), 4), (12, 0, 4), (16, len(tone), 4), (20, 8000, 2)):
        sample[at : at + size] = value.to_bytes(size, "little")
    sample[30:34] = (440_000).to_bytes(4, "little")
    sample[55] = 1 | 4  # 16 bits, looped
    (patch,) = read_patch(bytes(head + sample) + tone)
    played = play_patches([patch], [Note(0.0, 2.0, 81, 127)])
    assert pitch(played) == pytest.approx(880, abs=2)
    with pytest.raises(ValueError, match="not a GUS patch"):
        read_patch(b"RIFF")


def write_wav(path: Path, signal: synth.Signal) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((signal * 20000).astype("<i2").tobytes())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(soundsources, "source", lambda _: tmp_path)
    return tmp_path


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, package: Path) -> Callable[..., None]:
    """Sets these tables in place of the packages' own, and writes the files that they name."""

    def set_tables(names: Sequence[str], **tables: object) -> None:
        changed = soundsources.recordings().model_copy(update=tables)
        monkeypatch.setattr(soundsources, "recordings", lambda: changed)
        for name in names:
            write_wav(package / f"{name}.wav", synth.beep(300, 0.05))

    return set_tables


def test_files_give_takes_of_one_recording_and_no_links(
    package: Path, only: Callable[..., None]
) -> None:
    table = {"megaglest-data": {"cow": ("cow_*",), "bird": ("wood/day",)}}
    files = ("cow/sounds/cow_ack1", "cow/sounds/cow_die2", "wood/sounds/day", "sea/sounds/day")
    only(files, files=table)
    (package / "cow/sounds/cow_select1.wav").symlink_to("cow_ack1.wav")
    found = [(clip.identity, clip.name) for clip in soundsources._files()]
    cow = ("megaglest-data:cow/cow", "cow")
    assert found == [cow, cow, ("megaglest-data:wood/day", "bird")]


def test_patterns_name_folders_and_sounds_lie_in_archives_or_have_no_ending(
    package: Path, only: Callable[..., None]
) -> None:
    files = ("alert/dog/0", "die/dog/1", "steps/dog/2", "dog/3")
    only((), files={"p": {"dog": ("alert/dog/?", "die/dog/?"), "rain": ("rain",)}}, archives={})
    for name in files:
        write_wav(package / "inner" / f"{name}.wav", synth.beep(300, 0.05))
    write_wav(package / "inner" / "sound" / "rain", synth.beep(300, 0.05))
    found = [(clip.identity, clip.name) for clip in soundsources._files()]
    assert found == [("p:dog/0", "dog"), ("p:dog/1", "dog"), ("p:sound/rain", "rain")]
    shutil.make_archive(str(package / "all"), "zip", package / "inner")
    shutil.rmtree(package / "inner")
    only((), archives={"p": "all.zip"})
    for _ in range(2):  # the second time it is unpacked already
        assert [(clip.identity, clip.name) for clip in soundsources._files()] == found


def test_footsteps_are_many_of_one_ground(only: Callable[..., None]) -> None:
    steps = Strikes(gap=(0.42, 0.6), series={"steps": ("grass?", "stone?")})
    only(("grass1", "grass2", "stone1"), strikes={"footsteps": steps})
    clips = list(soundsources._series())
    found = {(clip.identity, clip.name) for clip in clips}
    assert found == {("steps:grass?", "footsteps"), ("steps:stone?", "footsteps")}
    assert 8 <= bursts(clips[0].load()) <= 14


def test_sampler_plays_in_the_recorded_octave(package: Path) -> None:
    write_wav(package / "A4.mp3", synth.beep(440.0, 2.0))
    write_wav(package / "A4 v2.mp3", synth.beep(600.0, 2.0))
    played = soundsources._play_sampler("one-note", [Note(0.0, 1.0, 45, 127)])
    assert pitch(played) == pytest.approx(440, abs=2)


def test_surroundings_are_found_by_name(package: Path) -> None:
    resource = b"GVariant..city.oggXXOggS\0\2one..rain.ogg\0\0OggS\0\2two..wind.ogg\0OggS\0\2three"
    (package / "blanket.gresource").write_bytes(resource)
    found = {(clip.identity, clip.name) for clip in soundsources._surroundings()}
    assert found == {("blanket:rain", "rain"), ("blanket:wind", "wind")}
