"""The real lmms-eval asks our plugin, and through its own client our service."""

import gc
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mico_chat.errors import ConfigError, MicoError, RequestError
from mico_chat.evaluation.lmms.items import write_tasks
from tests.evaluation.conftest import write_chat_model
from tests.evaluation.lmms.drawn import drawn_items
from tests.server.support import sent
from tests.server.support.served import Served, served
from tests.support import replicas
from tests.support.tiny import chat_model

pytestmark = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed here; `make test-lmms` has it",
    ),
    # Packages that lmms-eval imports give deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
]

SHOWN = ["drawn_colour", "drawn_sound", "drawn_clip"]  # both ways can show these media
Run = dict[str, list[str]]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny", chat_model())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks([drawn_items(folder / "items", n=4)], folder, name="drawn", max_tokens=12)
    return folder


@pytest.fixture(scope="module")
def service(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    # In bfloat16, the other requests of a batch would decide near ties.
    exact = ("--engine", "transformers", "--dtype", "float32")
    with served(folder, "--model", str(tiny), *exact) as one:
        yield one


def evaluated(model: str, arguments: str, folder: Path, names: list[str], **more: Any) -> Any:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with warnings.catch_warnings():
        # The client of lmms-eval never closes its connections.
        warnings.filterwarnings("ignore", "unclosed <socket", ResourceWarning)
        found = simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=names,
            task_manager=TaskManager(include_path=str(folder), model_name=model),
            batch_size=more.pop("batch_size", 3),
            log_samples=True,
            **more,
        )
        gc.collect()
    return found


def plugin(model: Path | str) -> str:
    return f"pretrained={model},engine=transformers,dtype=float32"


def client(service: Served, name: str) -> str:
    return (
        f"model={name},base_url={service.url}/v1,api_key={service.key},httpx_trust_env=False,"
        "num_concurrent=3,max_retries=1,pass_video_url=True"
    )


def answers(results: Any) -> Run:
    return {
        task: [sample["resps"][0][0] for sample in samples]
        for task, samples in results["samples"].items()
    }


def model_of(folder: Path | str, kind: str = "MicoChat", **arguments: Any) -> Any:
    from mico_chat.evaluation.lmms import model

    return getattr(model, kind)(
        str(folder), **{"engine": "transformers", "dtype": "float32", **arguments}
    )


def test_the_entry_point_names_both_interfaces() -> None:
    from lmms_eval.models import get_model

    assert get_model("mico_chat").__name__ == "MicoChat"
    assert get_model("mico_chat", force_simple=True).__name__ == "MicoChatSimple"


def test_the_plugin_and_the_client_of_our_service_answer_the_same(
    tiny: Path, tasks: Path, service: Served
) -> None:
    ours = evaluated("mico_chat", plugin(tiny), tasks, [*SHOWN, "drawn_how_far"])
    simple = evaluated("mico_chat", plugin(tiny), tasks, SHOWN, force_simple=True)
    theirs = evaluated("openai", client(service, "tiny"), tasks, SHOWN)
    for task in SHOWN:
        assert answers(ours)[task] == answers(theirs)[task] == answers(simple)[task]
        right = [float(run["results"][task]["accuracy,none"]) for run in (ours, theirs)]
        assert right[0] == right[1]
    for given in answers(ours).values():
        assert len(given) == 4
        assert all(given)
    sample = ours["samples"]["drawn_colour"][0]
    assert sample["token_counts"][0]["output_tokens"] == 12


def test_another_projects_model_answers_too(tasks: Path, tmp_path: Path) -> None:
    folder = replicas.build("llava_onevision", tmp_path / "llava")
    found = evaluated("mico_chat", plugin(folder), tasks, [*SHOWN, "drawn_how_far"])
    for task, given in answers(found).items():
        assert all(given) is (task != "drawn_sound"), "it reads no sounds"
    model = model_of(folder, "MicoChatSimple", batch_size=2)
    asked = [
        request("Which?", text, lambda document: [document["clip"]], 0, "t", "test")
        for text in ("a dog", "a bird that sings")
    ]
    model.task_dict["t"] = {"test": [{"clip": sent.mp4()}]}
    losses = [loss for loss, _ in model.loglikelihood([*asked, request("Which?", "a dog")])]
    assert all(np.isfinite(losses))
    assert losses[0] != losses[2], "the clip makes a difference"
    model.clean()


def test_batches_change_nothing_and_frames_are_counted(tiny: Path, tasks: Path) -> None:
    one = evaluated("mico_chat", plugin(tiny), tasks, ["drawn_clip"], batch_size=1)
    auto = evaluated("mico_chat", plugin(tiny), tasks, ["drawn_clip"], batch_size="auto")
    assert answers(one) == answers(auto)
    few = f"{plugin(tiny)},max_frames=2"
    few_frames = evaluated("mico_chat", few, tasks, ["drawn_clip"])["samples"]["drawn_clip"]
    before = one["samples"]["drawn_clip"]
    for fewer, all_ in zip(few_frames, before, strict=True):
        counts = [s["token_counts"][0]["input_tokens"] for s in (fewer, all_)]
        assert counts[0] < counts[1]


def test_a_broken_item_is_named_and_counted(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = drawn_items(tmp_path / "items", n=3)
    (tmp_path / "items/sound-1.wav").write_bytes(b"RIFF....WAVEnothing")
    (tmp_path / "items/colour-2.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    write_tasks([file], tmp_path / "tasks", name="drawn", max_tokens=4)
    found = evaluated("mico_chat", plugin(tiny), tmp_path / "tasks", SHOWN[:2])
    assert [bool(text) for text in answers(found)["drawn_sound"]] == [True, False, True]
    assert [bool(text) for text in answers(found)["drawn_colour"]] == [True, True, False]
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("drawn_sound test 1 was not answered: ") for line in told)
    assert any(line.startswith("drawn_colour test 2 was not answered: a medium: ") for line in told)
    assert "2 of 6 requests were not answered; they count as wrong" in told


def test_if_nothing_can_be_answered_the_run_ends(tiny: Path, tmp_path: Path) -> None:
    file = drawn_items(tmp_path / "items", n=1)
    (tmp_path / "items/sound-0.wav").write_bytes(b"RIFF....WAVEnothing")
    write_tasks([file], tmp_path / "tasks", name="drawn")
    with pytest.raises(MicoError, match="no request could be answered: "):
        evaluated("mico_chat", plugin(tiny), tmp_path / "tasks", ["drawn_sound"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            {"batch_size": "many"},
            "batch_size is 'many'; it must be a whole number of at least 1, or auto",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"max_frame": 3},
            "unknown model argument 'max_frame'; the arguments are pretrained, engine",
        ),
        ({"dtype": "int3"}, "no dtype 'int3'"),
    ],
)
def test_arguments_that_make_no_sense(tiny: Path, arguments: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        model_of(tiny, **arguments)


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_each_round_gets_the_earlier_answers(tiny: Path) -> None:
    heard: list[list[str]] = []

    def doc_to_messages(document: Any, **round_: Any) -> Any:
        content = [{"role": "user", "content": [{"type": "text", "text": document["q"]}]}]
        if not round_:
            return content
        heard.append(round_["previous_output"])
        ended = len(round_["previous_output"]) == document["rounds"]
        return content, ended, round_["previous_output"], "info"

    model = model_of(tiny, batch_size=2)
    model.task_dict["t"] = {"test": [{"q": "a", "rounds": 1}, {"q": "b", "rounds": 3}]}
    options = {"max_new_tokens": 3}
    requests = [request("", doc_to_messages, options, n, "t", "test") for n in range(2)]
    given = model.generate_until_multi_round(requests)
    assert [len(rounds) for rounds in given] == [1, 3]
    with pytest.raises(RequestError, match="--force_simple and engine=transformers"):
        model.loglikelihood([request("", "x")])
    assert given[1][:2] in heard
    # After clean(), the model is loaded again.
    model.clean()
    assert model.generate_until_multi_round(requests) == given
    model.clean()


def test_the_likelihood_of_given_answers(tiny: Path) -> None:
    """The greedy answer is likelier than any other answer of its length."""
    model = model_of(tiny, "MicoChatSimple", batch_size=2)
    model.task_dict["t"] = {"test": [{"clip": sent.mp4()}]}

    def visuals(document: Any) -> list[Any]:
        return [document["clip"]]

    options = {"max_new_tokens": 5}
    (said,) = model.generate_until([request("Which?", options, visuals, 0, "t", "test")])
    greedy_text = said.text[::2]  # tokens are letters; decoding puts spaces between them
    assert len(greedy_text) == 5
    others = ["zzzzz", greedy_text[:4] + ("a" if greedy_text[4] != "a" else "b")]
    found = model.loglikelihood(
        [
            *(request("Which?", f" {text}", visuals, 0, "t", "test") for text in others),
            request("Which?", lambda document: greedy_text, visuals, 0, "t", "test"),
            request("", "zzzzz"),
        ]
    )
    losses, greedy = zip(*found, strict=True)
    assert greedy == (False, False, True, False)
    assert min(losses) == losses[2]
    assert losses[0] != losses[3]  # the clip makes a difference
    assert all(np.isfinite(losses))
    model.clean()


def test_sounds_of_a_data_set_need_no_decoder_of_its_own(tiny: Path) -> None:
    """As in ClothoAQA: left alone, ``datasets`` decodes a column of Audio with torchcodec."""
    from datasets import Audio, Dataset

    row = {"question": "What is it?", "audio": {"bytes": sent.wav(), "path": "a.wav"}}
    model = model_of(tiny)
    model.task_dict["t"] = {"test": Dataset.from_list([row]).cast_column("audio", Audio())}

    def doc_to_messages(document: Any) -> Any:
        from lmms_eval.api.task import ConfigurableMessagesTask

        part = ConfigurableMessagesTask._visual_to_content(document["audio"])
        text = {"type": "text", "text": document["question"]}
        return [{"role": "user", "content": [part, text]}]

    (result,) = model.generate_until(
        [request("", doc_to_messages, {"max_new_tokens": 4}, 0, "t", "test")]
    )
    assert result.token_counts.input_tokens > len("What is it?") + 10
    model.clean()


def test_an_official_task_on_data_laid_out_locally(tiny: Path, tmp_path: Path) -> None:
    """MME's prompt and score on two pictures, as docs/lmms-eval.md describes."""
    import lmms_eval.tasks.mme
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    features = Features({"question_id": text, "image": Image(), "question": text, "answer": text,
                         "category": text})  # fmt: skip
    rows = [
        {"question_id": f"color/{n}.png", "image": {"bytes": sent.png(sent.square()), "path": None},
         "question": "Is it red?", "answer": answer, "category": "color"}
        for n in range(2) for answer in ("Yes", "No")
    ]  # fmt: skip
    (tmp_path / "MME").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "MME/test.parquet"))
    official = Path(next(iter(lmms_eval.tasks.mme.__path__))) / "mme.yaml"
    (tmp_path / "mme_here.yaml").write_text(
        f"include: {official}\ntask: mme_here\ndataset_path: {tmp_path}/MME\ndataset_kwargs: {{}}\n"
    )
    found = evaluated("mico_chat", plugin(tiny), tmp_path, ["mme_here"])
    assert len(found["samples"]["mme_here"]) == 4
    assert "mme_perception_score,none" in found["results"]["mme_here"]
