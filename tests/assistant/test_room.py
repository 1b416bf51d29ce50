"""A conversation that does not fit: what is oldest is left out, is counted, and nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from random import Random
from string import ascii_lowercase
from typing import Any

import pytest

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ContextLengthError
from mico_chat.media import MediaFile, Medium, decode
from mico_chat.messages import LEAST_ANSWER, Conversation, Message, Shortened
from mico_chat.model.processing import MicoChatProcessor
from tests.assistant.test_assistant import sharp_chat, tiny_assistant
from tests.support.tiny import picture, run, shown

AUTO = GenerationOptions(max_tokens=20, truncation="auto")


@pytest.fixture(scope="module")
def chat() -> MicoChatForConditionalGeneration:
    return sharp_chat()


@pytest.fixture
def assistant(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> Iterator[Assistant]:
    with closing(tiny_assistant(chat, processor)) as assistant:
        yield assistant


def answered(assistant: Assistant, messages: list[Message], **options: object) -> Answer:
    return run(assistant.answer(Ask(messages, AUTO.model_copy(update=options))))


def letters(seed: int, n: int) -> str:
    """Text of ``n`` tokens: each letter is one."""
    random = Random(seed)
    return "".join(random.choice(ascii_lowercase) for _ in range(n))


def talk(n: int, *, system: bool = True, pictures: bool = False) -> list[Message]:
    """A conversation of ``n`` turns and a question."""
    messages = [Message.system("Be brief.")] if system else []
    for number in range(n):
        words = f"{letters(number, 12)}?"
        messages.append(shown(picture(number), words) if pictures else Message.user(words))
        messages.append(Message.assistant(letters(100 + number, 12)))
    return [*messages, Message.user("and now?")]


def test_each_step_leaves_out_the_oldest_medium_then_the_oldest_turn() -> None:
    messages = talk(3, pictures=True)
    whole = Conversation.of(messages)
    assert (whole.steps, whole.media) == (6, 3)
    for steps in range(7):
        short = whole.shortened(steps)
        media = [medium.name for message in short.messages for medium in message.media]
        assert len(media) == 3 - min(steps, 3)
        assert list(short.kept) == [0, 1, 2][min(steps, 3) :]
        assert short.turns == max(0, steps - 3)
        assert short.media == min(steps, 3) - short.turns
        assert short.messages[0] == messages[0], "the system message stays"
        assert short.messages[-1] == messages[-1]
        assert sum(message.text.count("[image ") for message in short.messages) == short.media
    assert Conversation.of([Message.user("alone")]).steps == 0


def test_what_does_not_fit_is_left_out_and_counted(assistant: Assistant) -> None:
    most = assistant.engine.max_position
    messages = talk(most // 10)
    with pytest.raises(ContextLengthError):
        answered(assistant, messages, truncation="disabled")
    found = answered(assistant, messages)
    left = found.usage.turns_left_out
    assert 0 < left < most // 10
    kept = [messages[0], *messages[1 + 2 * left :]]
    assert found.choices[0].text == answered(assistant, kept, truncation="disabled").choices[0].text
    one_more = [messages[0], *messages[2 * left - 1 :]]
    with pytest.raises(ContextLengthError):
        answered(assistant, one_more, truncation="disabled")
    told = run(assistant.estimate(Ask(messages, AUTO)))
    assert (told.fits, told.turns_left_out) == (True, left)
    assert told.prompt_tokens == found.usage.prompt_tokens


def test_what_fits_is_tokenized_twice(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its room and for its prompt: each time takes a long conversation's answer a moment."""
    layout, laid = type(assistant.adapter).layout, list[int]()

    def counted(self: Any, messages: Sequence[Message], *args: Any) -> Any:
        laid.append(len(messages))
        return layout(self, messages, *args)

    monkeypatch.setattr(type(assistant.adapter), "layout", counted)
    found = answered(assistant, messages := talk(8))
    assert found.usage.turns_left_out == 0
    assert laid.count(len(messages)) == 2


@pytest.mark.parametrize(("pictures", "room"), [(False, 1000), (True, 1000), (True, 4000)])
def test_a_growing_conversation_mostly_begins_as_before(pictures: bool, room: int) -> None:
    """Else each of its answers would be computed from nothing."""

    def fits(short: Shortened) -> bool:
        return sum(len(one.text) for one in short.messages) + 50 * len(short.kept) < room

    fewest, taken = list[int](), list[int]()
    for n in range(50, 74):
        whole = Conversation.of(talk(n, pictures=pictures))
        short = whole.fitted(fits)
        assert fits(short)
        fewest.append(next(steps for steps in range(whole.steps) if fits(whole.shortened(steps))))
        could = whole.shortened(fewest[-1])
        assert len(could.messages) >= len(short.messages) > 0.7 * len(could.messages)
        assert len(could.kept) >= len(short.kept) >= 0.7 * len(could.kept)
        taken.append(short.turns or short.media)
    assert len(set(fewest)) >= 20, "something has to go for nearly each turn"
    assert len(set(taken)) <= 10, "and goes rarely"


def test_media_of_earlier_turns_go_first(assistant: Assistant) -> None:
    most = assistant.engine.max_position
    per = run(assistant.estimate(Ask(talk(1, pictures=True)[1:], AUTO))).media_tokens
    turns = most // (per + 40) + 2
    found = answered(assistant, talk(turns, pictures=True))
    assert found.usage.media_left_out > 0
    assert len(found.media) == turns - found.usage.media_left_out - found.usage.turns_left_out
    assert found.usage.media_tokens == per * len(found.media)


def test_a_long_system_message_stays_until_it_leaves_no_room(assistant: Assistant) -> None:
    most = assistant.engine.max_position
    messages = talk(5)
    messages[0] = Message.system(letters(7, most // 2))
    found = answered(assistant, messages)
    assert found.usage.turns_left_out > 0
    assert found.usage.prompt_tokens > most // 2, "it is sent whole"
    first = [Message.system(letters(7, most - 80)), Message.user("and now?")]
    assert answered(assistant, first, max_tokens=most).usage.completion_tokens >= LEAST_ANSWER
    for n in (most, 10 * most):
        for asked in (messages, first):
            asked[0] = Message.system(letters(7, n))
            with pytest.raises(ContextLengthError, match="shorten the system message"):
                answered(assistant, asked)


def test_an_answer_gets_less_room_before_its_question_is_refused(assistant: Assistant) -> None:
    most = assistant.engine.max_position
    asked = Message.user(letters(1, most - 60))
    fixed = run(assistant.estimate(Ask([asked], GenerationOptions()))).prompt_tokens
    found = answered(assistant, [asked], max_tokens=most)
    assert found.usage.prompt_tokens == fixed
    assert LEAST_ANSWER <= found.usage.completion_tokens <= most - fixed
    with pytest.raises(ContextLengthError):
        answered(assistant, [Message.user(letters(1, most))])
    with pytest.raises(ContextLengthError):
        answered(assistant, [*talk(3)[:-1], Message.user(letters(1, 40 * most))])


class InThisProcess:
    """A decoder that starts no process."""

    def decode(self, file: MediaFile) -> Medium:
        return decode(file)


@pytest.fixture
def reading(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> Iterator[Assistant]:
    with closing(tiny_assistant(chat, processor, decoder=InThisProcess())) as assistant:
        yield assistant


def paged(name: str, n: int, size: int) -> MediaFile:
    """A text of ``n`` pages of ``size`` letters."""
    leaves = (letters(page, size) for page in range(1, n + 1))
    return MediaFile("document", "\f".join(leaves).encode(), f"/folder/{name}.txt")


def test_of_a_long_document_the_pages_that_fit_are_sent(reading: Assistant) -> None:
    size = reading.engine.max_position // 8
    asked = [Message.user(paged("doc", 30, size), "What?")]
    for truncation in ("auto", "disabled"):
        found = answered(reading, asked, truncation=truncation)
        (report,) = found.media
        assert report.pages is not None
        n = len(report.pages)
        assert 2 < n < 8
        assert report.pages == tuple(range(1, n + 1))
        assert [one.page for one in report.written or ()] == [*report.pages]
        assert report.cut == [f"pages 1 to {n} of 30 are sent"]
        assert found.usage.pages_sent == (f"doc.txt: pages 1 to {n} of 30 are sent",)
        told = run(reading.estimate(Ask(asked, AUTO.model_copy(update={"truncation": truncation}))))
        assert (told.fits, told.prompt_tokens) == (True, found.usage.prompt_tokens)
        room = reading.engine.max_position - found.usage.prompt_tokens - AUTO.max_tokens
        assert 0 <= room < size + 100, "one more page does not fit"
    whole = answered(reading, [Message.user(paged("doc", 2, size), "page 2?")])
    assert (whole.media[0].pages, whole.usage.pages_sent) == ((1, 2), ())
    with pytest.raises(ContextLengthError):
        answered(reading, [Message.user(paged("doc", 1, 10 * size), "?")], truncation="disabled")


def test_a_page_is_asked_for_by_number_in_a_later_turn(reading: Assistant) -> None:
    size = reading.engine.max_position // 8
    document = [Message.user(paged("doc", 30, size), picture(1), "What?"), Message.assistant("ok")]
    for later, wanted in (
        ([Message.user("And page 27?")], {27}),
        ([Message.user("page 27?"), Message.assistant("ok"), Message.user("Why?")], {27}),
        ([Message.user("page 27?"), Message.assistant("ok"), Message.user("p. 9?")], {9, 27}),
        ([Message.user("the last page, and page 31")], {30}),
    ):
        found = answered(reading, [*document, *later])
        report = found.media[0]
        assert (found.usage.media_left_out, found.usage.turns_left_out) == (0, 0)
        assert wanted <= {*(report.pages or ())}
        assert 1 in (report.pages or ()), "the first ones come next"
        assert ("there is no page 31: it has 30" in report.cut) == (wanted == {30})
        assert found.media[1].pages is None


def test_pages_go_before_media_and_media_before_turns(reading: Assistant) -> None:
    most = reading.engine.max_position
    old = [Message.user(paged("old", 9, most // 12), "?"), Message.assistant("ok")]
    talk_of = [*old, shown(picture(1), "What?"), Message.assistant("ok")]
    new = Message.user(paged("new", 30, most // 12), "page 20?")
    found = answered(reading, [*talk_of, new])
    assert found.usage.media_left_out == 0
    first, second = (len(one.pages or ()) for one in found.media if one.kind == "document")
    assert first == second > 1
    assert 20 in (found.media[2].pages or ())
    crowd = [m for n in range(4) for m in (Message.user(letters(n, most // 8)), old[1])]
    tight = answered(reading, [*talk_of, *crowd, new])
    assert tight.usage.turns_left_out + tight.usage.media_left_out > 0
    assert [one.name for one in tight.media if one.kind == "document"] == ["/folder/new.txt"]
    assert tight.media[-1].pages == (20,)


PIN = MediaFile("image", b"x", "cat.png", pinned=True)


def test_pins_stay_with_each_step() -> None:
    first = Message.user("a", PIN, replace(PIN, name="dog.png", pinned=False))
    second = Message.user(replace(PIN, name="cow.png"), "b")
    said, last = Message.assistant("yes"), shown(picture(0), "and?")
    whole = Conversation.of([Message.system("Be brief."), first, said, second, said, last])
    assert (whole.steps, whole.media) == (3, 1)
    shorts = [whole.shortened(steps) for steps in range(4)]
    assert [list(short.kept) for short in shorts] == [[0, 1, 2, 3], *[[0, 2, 3]] * 3]
    for short in shorts:
        assert list(short.pinned) == [0, 2]
        assert [m for message in short.messages for m in message.media][-1] == last.media[0]
    assert shorts[2].messages[1].content == (PIN, *second.content)
    assert shorts[3].messages[1].content == (PIN, second.content[0], *last.content)
    assert (shorts[3].turns, shorts[3].media, len(shorts[3].messages)) == (2, 0, 2)


def test_a_pinned_medium_answers_after_its_turn_was_left_out(assistant: Assistant) -> None:
    messages = talk(assistant.engine.max_position // 10)
    at: dict[bool, list[Message]] = {}
    for pinned in (True, False):
        words = messages[1].text
        at[pinned] = [messages[0], Message.user(replace(PIN, pinned=pinned), words), *messages[2:]]
    found = answered(assistant, at[True])
    left = found.usage.turns_left_out
    assert left > 0
    assert [report.name for report in found.media] == ["cat.png"]
    assert answered(assistant, at[False]).media == ()
    head, *rest = messages[1 + 2 * left :]
    kept = [messages[0], replace(head, content=(PIN, *head.content)), *rest]
    assert found.choices[0].text == answered(assistant, kept, truncation="disabled").choices[0].text


def test_pins_that_do_not_fit_are_named(assistant: Assistant) -> None:
    most = assistant.engine.max_position
    pins = [replace(PIN, name=f"{n}.png") for n in range(most // 4)]
    asked = [Message.user(*pins, "?"), Message.assistant("yes"), Message.user("and now?")]
    with pytest.raises(ContextLengthError, match=rf"{most} tokens.*\(0\.png, 1\.png.*unpin some"):
        answered(assistant, asked)
    with pytest.raises(ContextLengthError, match="shorten the conversation"):  # no pin's fault
        answered(assistant, [Message.user(PIN), asked[1], Message.user(letters(1, most))])


def test_media_that_another_model_was_shown_are_named(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = talk(1, pictures=True)
    assert len(answered(assistant, messages).media) == 1
    monkeypatch.setattr(Assistant, "input_modalities", ("audio",))
    found = answered(assistant, messages)
    assert (found.media, found.usage.media_left_out) == ((), 1)
    name = messages[1].media[0].name
    asked = Message.user(f"[image {name}]\n{messages[1].text}")
    kept = [messages[0], asked, *messages[2:]]
    assert found.choices[0].text == answered(assistant, kept).choices[0].text
    for still in ({"truncation": "disabled"}, {}):  # and the question's own are not left out
        shown_now = messages if still else messages[:2]
        assert len(answered(assistant, shown_now, **still).media) == 1
