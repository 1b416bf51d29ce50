"""Thoughts are told from the answer wherever the tokens cut the text."""

from itertools import combinations

import pytest

from mico_chat.chat_template import ChatTemplate
from mico_chat.engine.base import Prompt
from mico_chat.engine.request import Request
from mico_chat.engine.scheduler import Sampled
from mico_chat.messages import Message
from mico_chat.options import GenerationOptions
from mico_chat.prompt_parts import PromptText
from mico_chat.thoughts import FORMATS, ThoughtFormat, ThoughtReader, thoughts_of
from tests.engine.fake_model import block, ids, joined_letters
from tests.support.templates import HERMES, THINKING, tokenizer_with

THINK, HARMONY = FORMATS[0], FORMATS[-1]
BEGUN = ThoughtFormat("<think>", "</think>", begun=True)


@pytest.mark.parametrize(
    ("form", "text", "thoughts", "answer"),
    [
        (THINK, "<think>\nA b\n</think>\n\n A.\n", "A b", "A.\n"),
        (THINK, " <think></think>A", "", "A"),
        (THINK, "<think>A</thin\n</ ", "A</thin\n</", ""),
        (THINK, "<think>A\n</th", "A", ""),
        (THINK, "\n<thin A", "", "\n<thin A"),
        (THINK, "<thi", "", "<thi"),
        (THINK, "A<think>b</think>", "", "A<think>b</think>"),
        (BEGUN, "A\n</think>\n<b", "A", "<b"),
        (BEGUN, "\nA \n", "A", ""),
        (HARMONY, f"{HARMONY.open}A{HARMONY.close}B", "A", "B"),
        (HARMONY, f"{HARMONY.bare}B", "", "B"),
    ],
)
def test_thoughts_are_told_apart_at_every_cut(
    form: ThoughtFormat, text: str, thoughts: str, answer: str
) -> None:
    places = range(len(text) + 1)
    for first, second in [*combinations(places, 2), (0, 0)]:
        reader = ThoughtReader(form)
        pieces = [text[:first], text[first:second], text[second:]]
        said, thought = "", ""
        for piece in pieces:
            said += reader.feed(piece)
            thought += reader.take()
        said += reader.feed("", final=True)
        assert (said, thought + reader.take()) == (answer, thoughts), pieces


def test_a_template_says_how_its_model_thinks() -> None:
    assert (thoughts_of(HERMES, {}), thoughts_of(THINKING, {})) == (None, THINK)
    template = ChatTemplate(tokenizer_with(THINKING))
    ends = {}
    for thinks in (None, True, False):
        options = GenerationOptions(thinking=thinks)
        parts = template.parts([Message.user("Hm.")], options=options)
        assert isinstance(parts[-1], PromptText)
        ends[thinks] = parts[-1].text.partition("assistant\n")[2]
        found = template.thoughts_before(options)
        assert found is not None
        assert not found.begun
    assert ends == {None: "", True: "", False: "<think>\n\n</think>\n\n"}


def test_a_prompt_that_begins_thoughts_is_closed_where_there_are_to_be_none() -> None:
    always = THINKING.replace(
        "{%- if enable_thinking", "{{- '<think>\\n' }}{%- if false and enable"
    )
    template = ChatTemplate(tokenizer_with(always))
    for thinks, end in ((None, "<think>\n"), (True, "<think>\n"), (False, "</think>\n\n")):
        options = GenerationOptions(thinking=thinks)
        last = template.parts([Message.user("Hm.")], options=options)[-1]
        assert isinstance(last, PromptText)
        assert last.text.endswith(end)
        found = template.thoughts_before(options)
        assert found is not None
        assert found.begun is (thinks is not False)


@pytest.mark.anyio
async def test_thoughts_neither_count_in_the_confidence_nor_end_at_a_stop_text() -> None:
    tokenizer = joined_letters()
    options = GenerationOptions(logprobs=0, stop=("June",))
    prompt = Prompt((ids("Q"), block(2)), thoughts=THINK)
    request = Request(prompt, options, tokenizer)
    thoughts, answer = tokenizer("<think>June</think>\n"), tokenizer("AB")
    tokens = [(token, -9.0) for token in thoughts.input_ids]
    tokens += [(token, -0.5) for token in answer.input_ids]
    reasons = [*[None] * (len(tokens) - 1), "length"]
    deltas = [
        request.advance(0, Sampled(*token), reason)  # type: ignore[arg-type]
        for token, reason in zip(tokens, reasons, strict=True)
    ]
    assert "".join(delta.reasoning_content for delta in deltas) == "June"
    assert "".join(delta.text for delta in deltas) == "AB"
    assert deltas[-1].avg_logprob == -0.5
    usage = deltas[-1].usage
    assert usage is not None
    assert usage.reasoning_tokens == len(thoughts.input_ids)
    assert [one.token for delta in deltas[-2:] for one in delta.logprobs] == ["A", "B"]
