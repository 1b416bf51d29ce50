"""Media to context tokens: in batches, each medium once, and errors reach only its requests."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.encode import MAX_UNITS, ContextCache, MediaEncoder
from mico_chat.errors import LimitError, MediaError, ModelError
from mico_chat.media import Image, MediaFile, Medium, Video
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import ContextBlock, MeasuredMedium, MediaReport
from mico_chat.model.processing import MicoChatProcessor
from tests.support.tiny import clip, in_loop, one_of_each, picture, run, shown
from tests.support.waiting import PATIENCE_S


class Watched:
    """A chat model that notes how many media each forward has, and waits for its gate."""

    def __init__(self, model: MicoChatForConditionalGeneration) -> None:
        self.model = model
        self.device, self.dtype, self.rows = model.device, model.dtype, model.rows
        self.forwards: list[int] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.cannot: Kind | None = None

    def context_tokens(self, kind: Tensor, units: Tensor, pixels: Tensor) -> list[Tensor]:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.forwards.append(len(kind))
        if self.cannot in [KINDS[k] for k in kind.tolist()]:
            raise ZeroDivisionError
        return self.model.context_tokens(kind, units, pixels)


class NumberDecoder:
    """Decodes a number to the picture of that seed; ``broken`` fails."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def decode(self, file: MediaFile) -> Medium:
        self.names.append(file.name)
        assert self.gate.wait(PATIENCE_S)
        content = file.read()
        if content == b"broken":
            raise LimitError(file.name, "not a number")
        size = len(content)
        report = MediaReport(name=file.name, kind="image", bytes=size, decode_ms=7.0)
        return Image(picture(int(content)).pixels, report=report)


@pytest.fixture
def model(chat: MicoChatForConditionalGeneration) -> Watched:
    return Watched(chat)


@pytest.fixture
def decoder() -> NumberDecoder:
    return NumberDecoder()


@pytest.fixture
def encoder(
    model: Watched, decoder: NumberDecoder, processor: MicoChatProcessor
) -> Iterator[MediaEncoder]:
    encoder = MediaEncoder(MicoAdapter(model, processor), decoder)
    yield encoder
    model.gate.set()
    encoder.close()


async def begun(
    encoder: MediaEncoder, model: Watched, medium: MediaFile | Medium
) -> asyncio.Task[Any]:
    """A request whose forward waits for the gate."""
    model.gate.clear()
    task = asyncio.create_task(encoded(encoder, medium))
    await until(model.entered.is_set)
    return task


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def number(content: bytes = b"1", name: str = "one.png") -> MediaFile:
    return MediaFile("image", content, name)


async def encoded(encoder: MediaEncoder, *media: MediaFile | Medium, tenant: str = "") -> Any:
    """The encoded media of a request; of one medium, itself."""
    found = await encoder.encode(media, tenant=tenant)
    return found[0] if len(found) == 1 else found


def tokens_of(medium: MeasuredMedium) -> Tensor:
    return torch.cat([part.encoded.tokens for part in medium.parts])


def expected(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor, medium: Medium
) -> Tensor:
    inputs = processor([[shown(medium)]])
    with torch.inference_mode():
        return torch.cat(
            chat.context_tokens(inputs["media_kind"], inputs["media_units"], inputs["pixel_values"])
        )


@in_loop
async def test_all_kinds_in_one_request(
    encoder: MediaEncoder, chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> None:
    media = one_of_each()

    done = await encoder.encode(media)
    assert [medium.kind for medium in done] == [medium.kind for medium in media]
    for found, medium in zip(done, media, strict=True):
        assert found.report.tokens == len(tokens_of(found)) == processor.context_length(found)
        torch.testing.assert_close(
            tokens_of(found), expected(chat, processor, medium), atol=1e-5, rtol=1e-4
        )


@in_loop
async def test_a_clip_and_its_sound_track_are_two_blocks_of_one_medium(
    encoder: MediaEncoder, model: Watched
) -> None:
    both, silent = await encoded(encoder, clip(2, track=True), clip(2))
    assert both.units == silent.units == 2
    own, track = both.parts
    assert track.kind == "audio"
    assert [part.block for part in silent.parts] == [silent.block]
    assert len({own.block.key, track.block.key, silent.block.key}) == 3
    assert both.nbytes == tokens_of(both).nbytes
    assert sum(model.forwards) == 3
    assert encoder.cache.stats().entries == 2


@in_loop
async def test_bytes_a_path_and_arrays_give_the_same(encoder: MediaEncoder, tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(b"7")

    from_bytes = await encoded(encoder, number(b"7"))
    from_path = await encoded(encoder, MediaFile("image", tmp_path / "7.png"))
    from_text = await encoded(encoder, MediaFile("image", f"{tmp_path}/7.png"))
    from_array = await encoded(encoder, picture(7))
    for other in (from_path, from_text, from_array):
        torch.testing.assert_close(tokens_of(other), tokens_of(from_bytes))
    assert from_path.block.key == from_text.block.key == from_bytes.block.key
    assert from_path.report.name == str(tmp_path / "7.png")


@in_loop
async def test_requests_that_wait_are_encoded_in_one_forward(
    encoder: MediaEncoder, model: Watched, processor: MicoChatProcessor
) -> None:
    first = await begun(encoder, model, picture(0))
    media: list[Medium] = [picture(1), clip(3), picture(2)]
    others = [asyncio.create_task(encoded(encoder, medium)) for medium in media]
    await until(lambda: encoder.n_waiting == 3)
    model.gate.set()
    await first
    for task, medium in zip(others, media, strict=True):
        torch.testing.assert_close(
            tokens_of(await task), expected(model.model, processor, medium), atol=1e-5, rtol=1e-4
        )
    assert model.forwards == [1, 3]


@in_loop
async def test_media_that_are_to_be_alone_share_no_forward(
    encoder: MediaEncoder, model: Watched
) -> None:
    first = await begun(encoder, model, picture(0))
    media = [picture(1), picture(2)]
    others = [asyncio.create_task(encoder.encode(media, alone=alone)) for alone in (False, True)]
    await until(lambda: encoder.n_waiting == 4)
    model.gate.set()
    await asyncio.gather(first, *others)
    assert sorted(model.forwards) == [1, 1, 1, 2]


@in_loop
async def test_a_batch_has_an_end(encoder: MediaEncoder, model: Watched) -> None:
    first = await begun(encoder, model, picture(0))
    many = [picture(seed) for seed in range(1, MAX_UNITS + 3)]
    others = asyncio.create_task(encoded(encoder, *many))
    await until(lambda: encoder.n_waiting == len(many))
    model.gate.set()
    await asyncio.gather(first, others)
    assert model.forwards == [1, MAX_UNITS, 2]


@in_loop
async def test_a_medium_shown_twice_at_once_is_encoded_once(
    encoder: MediaEncoder, model: Watched, decoder: NumberDecoder
) -> None:
    one, two = await asyncio.gather(
        encoded(encoder, number(name="a.png")), encoded(encoder, number(name="b.png"))
    )
    assert one.block is two.block
    assert (one.report.name, two.report.name) == ("a.png", "b.png")
    assert (model.forwards, len(decoder.names)) == ([1], 1)
    twice = await encoded(encoder, number(b"2"), number(b"2"))
    assert twice[0].block is twice[1].block
    assert sum(model.forwards) == 2


def test_a_medium_shown_again_costs_nothing(
    encoder: MediaEncoder, model: Watched, decoder: NumberDecoder
) -> None:
    seen: list[MeasuredMedium] = []

    async def test(name: str) -> None:
        seen.append(await encoded(encoder, number(name=name)))

    run(test("before.png"))
    run(test("now.png"))
    assert seen[0].block is seen[1].block
    assert [medium.report.name for medium in seen] == ["before.png", "now.png"]
    assert seen[1].report.bytes == 1
    assert (model.forwards, decoder.names) == ([1], ["before.png"])
    stats = encoder.cache.stats()
    assert (stats.hits, stats.misses) == (1, 1)


@in_loop
async def test_a_medium_that_was_counted_is_not_decoded_again(
    encoder: MediaEncoder, decoder: NumberDecoder
) -> None:
    whole = await encoded(encoder, number(b"1"), tenant="other")
    counts = [(await encoder.measure([number(b"1", f"{n}.png")]))[0] for n in range(3)]
    found = await encoded(encoder, number(b"1", "asked.png"))
    assert decoder.names == ["one.png", "0.png"]
    assert [len(one) for one in (*counts, found)] == [len(whole)] * 4
    assert [one.report.name for one in (*counts, found)] == ["0.png", "1.png", "2.png", "asked.png"]
    assert torch.equal(found.block.tokens, whole.block.tokens)
    assert not found.report.cached
    assert all(one.inputs is None for one in counts)  # nothing that is encoded lies about
    with pytest.raises(LimitError, match=r"b\.png"):
        await encoder.measure([number(b"broken", "b.png")])
    with pytest.raises(LimitError, match=r"c\.png"):
        await encoder.measure([number(b"broken", "c.png")])


@in_loop
async def test_arrays_keep_the_report_of_their_own_file(encoder: MediaEncoder) -> None:
    reports = [MediaReport(name=f"{n}.png", kind="image", bytes=n) for n in (10, 20)]
    media = [Image(picture().pixels, report=report) for report in reports]

    found = await encoded(encoder, *(medium for medium in media))
    assert found[0].block is found[1].block
    assert [medium.report.bytes for medium in found] == [10, 20]


@in_loop
async def test_a_report_has_tokens_times_and_whether_they_were_cached(
    encoder: MediaEncoder, processor: MicoChatProcessor
) -> None:
    first = (await encoded(encoder, number(name="a.png"))).report
    again = (await encoded(encoder, number(name="b.png"))).report
    assert (first.tokens, first.cached, first.decode_ms) == (processor.still_tokens, False, 7.0)
    assert first.encode_ms is not None
    assert first.encode_ms > 0
    nothing = {"name": "b.png", "cached": True, "decode_ms": None, "encode_ms": None}
    assert again == first.model_copy(update=nothing)


async def two_for_one(
    encoder: MediaEncoder, entered: Callable[[], bool], content: bytes = b"1"
) -> tuple[asyncio.Task[Any], asyncio.Task[Any]]:
    doing = asyncio.create_task(encoded(encoder, number(content, "a.png")))
    await until(entered)
    waiting = asyncio.create_task(encoded(encoder, number(content, "b.png")))
    await until(lambda: encoder.cache.stats().misses == 2)
    return doing, waiting


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@in_loop
async def test_a_request_that_waits_takes_over_from_a_cancelled_one(
    encoder: MediaEncoder, model: Watched
) -> None:
    model.gate.clear()
    doing, waiting = await two_for_one(encoder, model.entered.is_set)
    await cancelled(doing)
    model.gate.set()
    found = await waiting
    assert (found.report.name, found.report.cached) == ("b.png", False)
    assert encoder.cache.stats().entries == 1


@in_loop
async def test_a_request_that_waits_can_be_cancelled(encoder: MediaEncoder, model: Watched) -> None:
    model.gate.clear()
    doing, waiting = await two_for_one(encoder, model.entered.is_set)
    await cancelled(waiting)
    model.gate.set()
    assert (await doing).report.name == "a.png"
    assert model.forwards == [1]


@in_loop
async def test_a_medium_given_up_in_the_queue_is_not_encoded(
    encoder: MediaEncoder, model: Watched
) -> None:
    first = await begun(encoder, model, number(b"1"))
    second = asyncio.create_task(encoded(encoder, number(b"2")))
    await until(lambda: encoder.n_waiting == 1)
    await cancelled(second)
    model.gate.set()
    await first
    await encoded(encoder, number(b"3"))
    assert model.forwards == [1, 1]


@in_loop
async def test_an_error_reaches_all_under_their_own_names_and_is_not_kept(
    encoder: MediaEncoder, decoder: NumberDecoder
) -> None:
    decoder.gate.clear()
    doing, waiting = await two_for_one(encoder, lambda: len(decoder.names) == 1, b"broken")
    decoder.gate.set()
    for task, name in ((doing, "a.png"), (waiting, "b.png")):
        with pytest.raises(LimitError, match=rf"^{name}: not a number$"):
            await task
    assert decoder.names == ["a.png"]
    with pytest.raises(LimitError, match=r"^c\.png"):
        await encoded(encoder, number(b"broken", "c.png"))
    assert decoder.names == ["a.png", "c.png"]
    assert encoder.cache.stats().entries == 0


@in_loop
async def test_a_medium_that_cannot_be_encoded_fails_alone(
    encoder: MediaEncoder, model: Watched
) -> None:
    model.cannot = "normal"
    first = await begun(encoder, model, picture(9))
    media = one_of_each()
    tasks = [asyncio.create_task(encoded(encoder, medium)) for medium in media]
    await until(lambda: encoder.n_waiting == len(media) + 1)  # one has a sound track
    model.gate.set()
    await first
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [isinstance(result, ZeroDivisionError) for result in results]
    assert failed == [medium.kind == "normal" for medium in media]


@in_loop
async def test_files_that_cannot_be_read(encoder: MediaEncoder, tmp_path: Path) -> None:
    paths = {tmp_path / "nowhere.png": "no such file", Path("/dev/zero"): "is not a regular file"}
    for path, said in paths.items():
        with pytest.raises(MediaError, match=rf"^it\.png: {said}"):
            await encoded(encoder, MediaFile("image", path, name="it.png"))


def test_a_closed_encoder_refuses_at_once(
    model: Watched, decoder: NumberDecoder, processor: MicoChatProcessor
) -> None:
    encoder = MediaEncoder(MicoAdapter(model, processor), decoder)
    run(encoded(encoder, number()))
    encoder.close()
    encoder.close()
    for message in (number(), number(b"2"), picture(3)):
        with pytest.raises(ModelError, match="closed"):
            run(encoded(encoder, message))


@in_loop
async def test_the_key_covers_everything_that_changes_tokens(
    encoder: MediaEncoder, model: Watched
) -> None:
    pixels = picture().pixels
    frames = clip(2, track=True)

    keys: set[bytes] = set()

    async def new(medium: MediaFile | Medium) -> None:
        before = len(model.forwards)
        found = await encoded(encoder, medium)
        assert len(model.forwards) > before
        own = {part.encoded.key for part in found.parts}
        assert not keys & own
        keys.update(own)
        again = await encoded(encoder, medium)
        assert again.block is found.block

    await new(number(b"1"))
    await new(number(b"2"))
    await new(Image(pixels))
    await new(Image(pixels[:, ::-1].copy()))
    await new(MediaFile("depth", b"1"))
    await new(MediaFile("depth", b"1", depth_scale=0.01))
    await new(frames)
    await new(replace(frames, audio=None))
    await new(Video(frames.frames, frames.times * 2))
    assert encoder.cache.stats().entries == 9
    await encoded(encoder, MediaFile("image", b"1", depth_scale=0.01))  # not of depth: as before
    assert encoder.cache.stats().entries == 9
    encoder.variant = "without-grid"
    await new(number(b"1"))


@in_loop
async def test_tenants_share_nothing(
    encoder: MediaEncoder, model: Watched, decoder: NumberDecoder
) -> None:
    """Neither cached media, nor media that are being encoded, nor the keys of tokens."""
    model.gate.clear()
    tenants = ("", "one", "other", "one")
    tasks = [asyncio.create_task(encoded(encoder, number(), tenant=tenant)) for tenant in tenants]
    await until(lambda: encoder.cache.stats().misses == len(tenants))
    model.gate.set()
    found = [await task for task in tasks]
    assert (sum(model.forwards), len(decoder.names)) == (3, 3)
    assert sorted(medium.report.cached for medium in found) == [False, False, False, True]
    assert len({medium.block.key for medium in found}) == 3
    again = await encoded(encoder, number(), tenant="another")
    assert again.report.cached is False
    assert (await encoded(encoder, number(), tenant="one")).report.cached is True


def medium_of(n_bytes: int) -> MeasuredMedium:
    return MeasuredMedium("image", 1, block=ContextBlock(torch.zeros(n_bytes // 4, 1), b""))


def test_the_least_recently_used_goes() -> None:
    cache: ContextCache[MeasuredMedium] = ContextCache(100)
    for name in (b"a", b"b"):
        cache.put(name, medium_of(40))
    assert cache.get(b"a") is not None
    cache.put(b"c", medium_of(40))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    cache.put(b"a", medium_of(80))  # in place of the old one
    assert (cache.stats().entries, cache.stats().bytes) == (1, 80)
    assert cache.get(b"c") is None
    cache.put(b"large", medium_of(104))
    assert cache.get(b"large") is None
    assert cache.take(b"a") is not None
    assert (cache.take(b"a"), cache.stats().bytes) == (None, 0)
    cache.put(b"a", medium_of(40))
    cache.clear()
    assert (cache.stats().entries, cache.stats().bytes) == (0, 0)


@in_loop
async def test_cached_tokens_keep_no_batch_in_memory(encoder: MediaEncoder) -> None:
    for medium in await encoded(encoder, picture(1), picture(2), picture(3)):
        tokens = medium.block.tokens
        assert tokens.dtype == torch.float32
        assert tokens.untyped_storage().nbytes() == tokens.nbytes


@in_loop
async def test_a_tenants_picture_is_not_encoded_behind_anothers(
    encoder: MediaEncoder, model: Watched
) -> None:
    model.gate.clear()
    first = asyncio.create_task(encoder.encode([picture(99)], tenant="greedy"))
    await until(model.entered.is_set)
    many = [picture(n) for n in range(40)]
    load = asyncio.create_task(encoder.encode(many, tenant="greedy"))
    await until(lambda: encoder.n_waiting == len(many))
    small = asyncio.create_task(encoder.encode([picture(77)], tenant="small"))
    await until(lambda: encoder.n_waiting == len(many) + 1)
    model.gate.set()
    await asyncio.gather(first, load, small)
    assert model.forwards == [1, 2, 16, 16, 7], "one of each tenant, then what is left"


@in_loop
async def test_a_tenants_clips_do_not_take_all_decoders(
    model: Watched, processor: MicoChatProcessor
) -> None:
    entered, release = threading.Semaphore(0), threading.Event()

    class Slow(NumberDecoder):
        def decode(self, file: MediaFile) -> Medium:
            if file.name == "slow":
                entered.release()
                release.wait(PATIENCE_S)
            return super().decode(file)

    encoder = MediaEncoder(MicoAdapter(model, processor), Slow())
    slow = [number(b"%d" % n, "slow") for n in range(30)]
    load = [asyncio.create_task(encoder.encode([file], tenant="greedy")) for file in slow]
    for _ in range(2):
        await asyncio.to_thread(entered.acquire)
    for task in load[:20]:  # who leaves frees no decoder: it still works
        task.cancel()
    (small,) = await encoder.encode([number(b"99")], tenant="small")
    assert small.report.kind == "image"
    release.set()
    await asyncio.gather(*load, return_exceptions=True)
    encoder.close()


@in_loop
async def test_a_batch_without_end_is_given_up(encoder: MediaEncoder, model: Watched) -> None:
    asked = [await begun(encoder, model, picture(9))]
    asked += [asyncio.create_task(encoded(encoder, picture(n))) for n in range(2)]
    await until(lambda: encoder.n_waiting == 2)
    assert encoder.busy_s > 0
    encoder.give_up("a step has lasted")
    for task in asked:
        with pytest.raises(ModelError, match="a step has lasted"):
            await task
    with pytest.raises(ModelError, match="closed"):
        await encoded(encoder, picture(5))
