"""The tables of ``benchmarks.capacity``: each figure with its formula or source."""

from collections.abc import Iterator

from benchmarks import fleet
from benchmarks.assumptions import Assumptions
from benchmarks.fleet import Capacity, Replica
from benchmarks.model_size import PARTS
from benchmarks.queueing import checks
from benchmarks.service_cost import AT_ONCE, PACE
from mico_chat.encode import DEFAULT_CACHE_BYTES

FORMULA = ["figure", "value", "formula or source"]


def counted(found: Capacity) -> Iterator[list[str]]:
    serving, model = found.model.serving, found.model
    beside = sum(n for n, _ in serving.parts.values())
    rows, width = serving.table
    yield ["language model", f"{serving.llm_parameters / 1e9:.3f} B parameters", "its modules"]
    for name, bits in (("bfloat16", 16), ("int8", 8)):
        size = serving.llm[name] / 1e9
        told = "" if bits == 16 else "; token table and head stay at 16"
        yield [f"its weights, {bits} bit", f"{size:.2f} GB", f"its modules{told}"]
    yield [
        "token table",
        f"{rows * width * 2 / 1e9:.2f} GB",
        f"{rows} x {width} x 2 bytes: a step reads a row a token, not all",
    ]
    yield [
        "FLOPs of a token",
        f"{2 * (serving.llm_parameters - rows * width) / 1e9:.2f} G",
        "2 x parameters without the token table",
    ]
    yield [
        "keys and values of a token",
        f"{serving.kv_per_token:,} bytes",
        "2 x 32 layers x 32 heads x 128 x 2 bytes, from the cache of a fake run",
    ]
    yield [
        "encoder, context, bridge",
        f"{beside / 1e9:.3f} B parameters, {serving.beside / 1e9:.2f} GB",
        "their modules, 16 bit",
    ]
    for kind, medium in model.media.items():
        units = " and ".join(f"{n} {part}" for part, n in PARTS[kind].items())
        value = (
            f"{medium.tokens} tokens, {medium.flops / 1e12:.2f} TFLOP, {medium.cached / 1e6:.2f} MB"
        )
        yield [
            f"{kind}: {units}",
            value,
            "configuration; products of a fake run; tokens x width x 4 bytes in the cache",
        ]
    yield [
        "before the first question",
        f"{model.system} tokens",
        "Vicuna's format, by the mini's tokenizer",
    ]


def service(found: Capacity) -> Iterator[list[str]]:
    n = round(found.given.answer)
    yield [
        "service, an answer",
        f"{1e3 * found.answer:.1f} ms of a core",
        f"streamed and stored, {n} tokens, one each {1e3 * PACE:.0f} ms, {AT_ONCE} at once; "
        "a stand-in writes them",
    ]
    for kind, one in found.media.items():
        ms = " + ".join(f"{1e3 * part:.1f}" for part in (one.decode, one.prepare, one.read))
        value = f"{one.bytes / 1e6:.2f} MB; {ms} ms of a core"
        yield [
            f"{kind}: {one.name}",
            value,
            "gradio's; decoded, prepared, text and speech recognised",
        ]
    turn = found.turn
    value = f"{turn.bytes:,.0f} bytes, {1e3 * turn.seconds:.1f} ms"
    yield [
        f"turn in {turn.database}",
        value,
        "200 turns, every other one with a picture: growth of the database; two transactions",
    ]
    if turn.log:
        yield ["its log", f"{turn.log:,.0f} bytes a turn", "growth of PostgreSQL's WAL"]


def media(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = ["card", *(f"{kind}, ms" for kind in found.model.media), "prompt of 100 tokens, ms"]
    rows = []
    for one in found.replicas:
        times = [m.flops / one.card.flops for m in found.model.media.values()]
        times.append(100 * one.card.per_token / one.card.flops)
        rows.append([one.name, *(f"{1e3 * seconds:.1f}" for seconds in times)])
    return head, rows


def cards(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = ["card", "room, tokens", "tokens/s of one stream", "answers/s", "of the fluid bound",
            "with 2,048 tokens a step", "tokens/s", "answers at once", "people in a conversation",
            "users a day", "first token, s", "between tokens, ms"]  # fmt: skip
    rows, given = [], found.given
    for one in found.replicas:
        row = [one.name, f"{one.card.room:,.0f}", f"{1 / one.card.step(1, 0):.0f}"]
        first, token = one.run.p99()
        if one.rate:
            talk = (one.seconds + given.think * (1 - 1 / given.turns)) * one.rate
            users = one.rate / given.peak * 86_400 / given.answers
            row += [f"{one.rate:.2f}", f"{one.rate / one.bound:.2f}", f"{one.default:.2f}",
                    f"{one.tokens:,.0f}", f"{one.run.running:.0f}", f"{talk:,.0f}",
                    f"{users:,.0f}"]  # fmt: skip
        else:
            row += ["none: beyond the limits"] + [""] * 6
        rows.append([*row, f"{first:.2f}", f"{1e3 * token:.1f}"])
    return head, rows


def money(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = [
        "card",
        "US $ an hour",
        "a million answers, always full",
        "over the day's curve",
        "a million tokens, always full",
    ]
    rows = []
    for one in serving(found):
        full = 1e6 / one.rate / 3600 * one.price
        tokens = 1e6 / one.tokens / 3600 * one.price
        rows.append(
            [
                one.name,
                f"{one.price:g}",
                f"{full:,.0f}",
                f"{full * found.given.peak:,.0f}",
                f"{tokens:.2f}",
            ]
        )
    return head, rows


def queue(given: Assumptions) -> tuple[list[str], list[list[str]]]:
    rows = [
        [name, what, f"{simulated:.3f}", f"{known:.3f}", f"{simulated / known - 1:+.1%}"]
        for name, what, simulated, known in checks(seed=given.seed)
    ]
    return ["queue", "quantity", "simulated", "by the formula", "difference"], rows


def again(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = ["card", "follow-ups", "keys and values still there",
            f"media not encoded again, {DEFAULT_CACHE_BYTES >> 20} MiB",
            f"{fleet.LARGE_CACHE >> 30} GiB",
            "answers/s if any replica may get a follow-up"]  # fmt: skip
    rows = []
    for one in serving(found):
        run, large = one.run, one.large
        shown = share(run.encoded_again, run.shown_again)
        rows.append([
            one.name, f"{run.followups / len(run.answers):.0%}", share(run.kept, run.followups),
            shown, share(large.encoded_again, large.shown_again),
            f"{one.alone:.2f}",
        ])  # fmt: skip
    return head, rows


def days(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = [
        "card",
        "answers",
        "busy",
        "answers at once, mean",
        "first token, s",
        "between tokens, ms",
        "keys and values still there",
    ]
    rows = []
    for one in serving(found):
        day, (first, token) = one.day, one.day.p99()
        kept = share(day.kept, day.followups)
        rows.append([one.name, f"{len(day.answers):,}", f"{day.busy:.0%}", f"{day.running:.0f}",
                     f"{first:.2f}", f"{1e3 * token:.1f}", kept])  # fmt: skip
    return head, rows


def needed(found: Capacity) -> tuple[list[str], list[list[str]]]:
    head = [
        "card",
        "at the peak",
        "with spare",
        "cores",
        "US $ a month: GPUs and cores",
        "with database and objects",
        "a million answers",
    ]
    rows = []
    for one in serving(found):
        busy, n, cores, price = found.needed(one)
        whole = price + found.database[1] + found.objects
        million = whole / (found.daily * fleet.HOURS / 24 / 1e6)
        rows.append(
            [
                one.name,
                f"{busy}",
                f"{n}",
                f"{cores:,.0f}",
                f"{price:,.0f}",
                f"{whole:,.0f}",
                f"{million:,.0f}",
            ]
        )
    return head, rows


def beside(found: Capacity) -> Iterator[list[str]]:
    given, turn = found.given, found.turn
    cores, price = found.database
    yield [
        "answers",
        f"{found.daily / 1e6:g} M a day, {found.daily / 86_400:.1f}/s on the mean, "
        f"{found.peak:.1f}/s at the peak",
        "users x answers; / 86,400; x peak",
    ]
    busy = found.peak * found.cpu
    yield [
        "cores of the services",
        f"{busy:.1f} busy, {busy / given.core_share:.1f} to have",
        f"peak x {1e3 * found.cpu:.1f} ms; / core_share. Each vLLM takes one more",
    ]
    yield [
        "answers/s of one service process",
        f"{1 / found.answer:.0f} at most",
        "1 / its seconds of a core; a replica gets fewer",
    ]
    yield [
        "transactions",
        f"{2 * found.peak:.0f}/s at the peak",
        "2 a turn: question, answer; one more with rate limits",
    ]
    yield [
        "cores of the database",
        f"{cores:.1f}",
        f"{fleet.COPIES} copies x peak x {1e3 * turn.seconds:.1f} ms / core_share; "
        "at most, disk included",
    ]
    yield [
        "database grows",
        f"{found.daily * turn.bytes * fleet.DAYS / 1e9:,.0f} GB a year",
        "answers x bytes of a turn x 365",
    ]
    if turn.log:
        yield [
            "its log",
            f"{found.peak * turn.log / 1e6:.1f} MB/s at the peak",
            "peak x bytes of the log a turn",
        ]
    yield [
        "database",
        f"US $ {price:,.0f} a month after a year",
        "cores x cpu_price x 730 + copies x GB x disk_price",
    ]
    yield [
        "uploads",
        f"{found.uploads / 1e9:,.0f} GB a day, {found.uploads * 30 / 1e12:,.1f} TB in 30 days",
        "answers / turns x shown x mean bytes of the three media",
    ]
    yield [
        "object storage",
        f"US $ {found.objects:,.0f} a month after a year",
        "a year's GB x storage_price, if nothing is deleted",
    ]


def share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def serving(found: Capacity) -> list[Replica]:
    """The replicas that keep the limits."""
    return [one for one in found.replicas if one.rate]
