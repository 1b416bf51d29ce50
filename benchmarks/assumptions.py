"""What ``benchmarks.capacity`` takes for granted: traffic, limits, shares, prices."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.data_cost import BANDWIDTH, CPU_PRICE, GPU_PRICES, STORAGE_PRICE, prices_of
from benchmarks.queueing import Limits
from benchmarks.traffic import Medium, Traffic
from mico_chat.errors import ConfigError
from mico_training.estimate import REACHED

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class Assumptions(BaseModel):
    """What is neither counted nor measured here; the descriptions say where a value comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    bandwidth_share: Share = Field(
        0.7,
        description="share of the data sheet's bytes/s that a step reaches; llama.cpp's own loop "
        "reached 180 of 253 tokens/s on a CPU on 2026-11-25, 129 of 251 on 2026-11-28 (engines.md)",
    )
    flops_share: Share = Field(
        REACHED, description="share of the data sheet's FLOP/s; as in training's estimates"
    )
    step_tokens: int = Field(
        512,
        ge=64,
        description="tokens of a step at most: `max_num_batched_tokens` in `--engine-args`",
    )
    turns: float = Field(2.0, ge=1, description="turns of a conversation; LMSYS-Chat-1M, table 1")
    prompt: Positive = Field(69.5, description="tokens of a question, mean; LMSYS-Chat-1M")
    answer: Positive = Field(214.5, description="tokens of an answer, mean; LMSYS-Chat-1M")
    sigma: Positive = Field(1.0, description="of the log-normal lengths; no source")
    longest: int = Field(1024, ge=1, description="tokens of a text at most; no source")
    think: Positive = Field(
        100.0,
        description="mean seconds to the next turn: an answer of 161 words is read at 238 words a "
        "minute (Brysbaert 2019), 52 words are typed at 52 a minute (Dhakal 2018)",
    )
    shown: float = Field(
        1.0, ge=0, le=1, description="conversations that begin with a medium; no source, all do"
    )
    peak: float = Field(
        2.0, ge=1, le=10, description="the day's largest rate over its mean; no source"
    )
    users: Positive = Field(1e6, description="users of a day")
    answers: Positive = Field(
        8.0,
        description="answers of a user in a day; ChatGPT's users of a week ask 3.7 a day (18 "
        "billion a week of 700 million, NBER 34255), those of a day more",
    )
    first: Positive = Field(1.0, description="seconds to the first token, for 99 of 100; the goal")
    token: Positive = Field(0.05, description="seconds between tokens, for 99 of 100; the goal")
    core_share: Share = Field(0.5, description="how busy a processor core may be; no source")
    cpu_price: Positive = Field(
        CPU_PRICE, description="US $, a core for an hour; as in data-cost.md"
    )
    storage_price: Positive = Field(
        STORAGE_PRICE, description="US $, 1 GB of objects for a month; as in data-cost.md"
    )
    disk_price: Positive = Field(0.1, description="US $, 1 GB of disk for a month; a round price")
    gpu_prices: str = Field(GPU_PRICES, description="US $, a GPU for an hour; as in data-cost.md")
    simulated: int = Field(10_000, ge=100, description="answers of a simulation at least")
    seed: int = Field(0, ge=0, description="of all draws")

    @classmethod
    def read(cls, pairs: Sequence[str]) -> Self:
        """Those of ``name=value`` texts; a :class:`ConfigError` says what is wrong."""
        given = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"--set {pair}: write it as name=value, for example peak=3")
            given[name] = value
        try:
            found = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            if name not in cls.model_fields:
                names = ", ".join(cls.model_fields)
                raise ConfigError(f"--set {name}: no such assumption; they are {names}") from error
            raise ConfigError(f"--set {name}={given[name]}: {first['msg']}") from error
        prices = prices_of(found.gpu_prices)
        if missing := sorted(BANDWIDTH.keys() - prices.keys()):
            raise ConfigError(f"gpu_prices={found.gpu_prices}: it lacks {', '.join(missing)}")
        return found

    @property
    def limits(self) -> Limits:
        return Limits(self.first, self.token)

    def traffic(self, rate: float, media: Sequence[Medium], system: int) -> Traffic:
        """A steady rate of answers a second; ``system``: tokens before the first question."""
        names = ("turns", "prompt", "answer", "sigma", "longest", "think", "shown")
        given = {name: getattr(self, name) for name in names}
        return Traffic(rate, system=system, media=tuple(media), **given)

    def over_the_day(self, traffic: Traffic) -> Traffic:
        """The same traffic with its rate at the peak of a day."""
        return replace(traffic, rate=traffic.rate / self.peak, peak=self.peak)
