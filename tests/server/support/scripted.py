"""A language model that follows a script, for answers that call tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Sequence
from mico_chat.errors import RequestError
from mico_chat.media.decoder import Decoder
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor
from tests.engine.fake_model import END, FakeModel, FakeSampler, Held, joined_letters
from tests.server.support.echo import START
from tests.support.templates import HERMES
from tests.support.tiny import chat_model, processor_for

CITY = '{"city": "Berlin"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
BARE = f'{{"name": "weather", "arguments": {CITY}}}'
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
    "strict": True,
}
"""A tool, and what the models here write to call it."""

# ChatML whose calls begin with a special token, as Mistral's do.
MARKED = HERMES.replace("<tool_call>\\n{", "[TOOL_CALLS] [{").replace("}\\n</tool_call>", "}]")


UNTHOUGHT = "<think>\n\n</think>\n\n"


class ScriptedModel(FakeModel):
    """Its answer is the one whose key stands last in the prompt, without the thoughts in it if the
    prompt ends with empty ones.

    ``prompts`` has the prompts, and ``schemas`` the JSON schemas that answers had to follow: the
    script may follow any; a model that does not ``follows`` refuses them.
    """

    def __init__(self, answers: Mapping[str, str], *, follows: bool = True) -> None:
        super().__init__(
            n_slots=8, n_cells=60_000, max_position=8_000, max_batch=256, rule=self._next
        )
        self.tokenizer = _tokenizer()
        self._answers = answers
        self._follows = follows
        self.schemas: list[dict[str, Any] | None] = []
        self.prompts: list[str] = []

    def sampler(self, sequence: Sequence) -> FakeSampler:
        options = sequence.options
        self.schemas.append(options.json_schema)
        self.batches.clear()  # kept for other tests
        if options.json_schema is not None and not self._follows:
            raise RequestError("json_schema: not here")
        return super().sampler(sequence)

    def _next(self, held: Held) -> int:
        start = len(held) - held[::-1].index(START)
        said = self.tokenizer.decode(held[start:]).removeprefix("assistant\n")
        ids = [token for token in held[:start] if isinstance(token, int)]  # no context tokens
        prompt = "".join(self.tokenizer.convert_ids_to_tokens(ids))
        if said in ("", "<think>\n", UNTHOUGHT):
            self.prompts.append(prompt + said)
        answer = self._answers[max(self._answers, key=prompt.rfind)]
        if said.startswith(UNTHOUGHT):
            answer = UNTHOUGHT + answer.split("</think>\n\n")[-1]
        assert answer.startswith(said)
        tokens = self.tokenizer(answer[len(said) :], add_special_tokens=False).input_ids
        return int(tokens[0]) if tokens else END


def _tokenizer() -> Any:
    tokenizer = joined_letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "[TOOL_CALLS]"]})
    return tokenizer


def scripted_assistant(
    decoder: Decoder, model: ScriptedModel, *, source: str = HERMES
) -> Assistant:
    config = MicoChatConfig.tiny()
    preprocessing = processor_for(config).preprocessing
    processor = MicoChatProcessor.for_config(config, model.tokenizer, preprocessing, source)
    engine = BatchingEngine(model, model.tokenizer, (END,), name="scripted")
    adapter = MicoAdapter(chat_model(config), processor)
    encoder = MediaEncoder(adapter, decoder, cache_bytes=1 << 20)
    return Assistant(engine, encoder, name="tiny")
