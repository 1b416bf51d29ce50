"""Engines: the probes on this machine, and what is said of those that do not work."""

from __future__ import annotations

import pytest
import torch

from mico_chat.cli.doctor.children import Outcome
from mico_chat.cli.doctor.engines import (
    bitsandbytes_finding,
    llamacpp_finding,
    postgres_finding,
    probe_bitsandbytes,
    probe_llamacpp,
    probe_torch,
    probe_transformers,
    torch_finding,
    transformers_finding,
    vllm_finding,
)
from tests.doctor.fakes import torch_facts


def test_torch_here() -> None:
    assert torch_finding(Outcome(probe_torch({})), 1024).mark == "ok"


def test_transformers_here() -> None:
    found = transformers_finding(Outcome(probe_transformers({})))
    assert found.mark == "ok"
    assert found.facts["device"] in found.text


def test_a_forward_that_gives_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], layer.out_features), torch.nan)

    monkeypatch.setattr(torch.nn.Linear, "forward", broken)
    with pytest.raises(ArithmeticError, match="not finite"):
        probe_transformers({})


def test_bitsandbytes_here() -> None:
    pytest.importorskip("bitsandbytes")
    facts = probe_bitsandbytes({})
    assert 0.01 < facts["error"] < 0.2  # 4 bit it was, and 4 bit well
    assert bitsandbytes_finding(Outcome(facts), True).mark == "ok"


def test_llama_cpp_here() -> None:
    pytest.importorskip("llama_cpp")
    facts = probe_llamacpp({})
    assert facts["features"]
    assert llamacpp_finding(Outcome(facts), True).mark == "ok"


def test_more_threads_than_may_run() -> None:
    found = torch_finding(Outcome(torch_facts(threads=64)), 2)
    assert (found.mark, found.mend) == ("warning", "export OMP_NUM_THREADS=2")
    assert "64 threads, but only 2 may run at a time" in found.text


BROKEN = Outcome(None, "ImportError: libgomp.so.1: cannot open shared object file")


def test_torch_and_transformers_are_needed_by_all() -> None:
    for found in (torch_finding(BROKEN, 2), transformers_finding(BROKEN)):
        assert found.mark == "problem"
        assert "libgomp.so.1" in found.text
        assert found.mend is not None


def test_llama_cpp_is_a_problem_where_it_would_be_taken() -> None:
    assert llamacpp_finding(None, False).mark == "note"
    assert llamacpp_finding(None, True).mark == "problem"
    assert llamacpp_finding(None, True).mend == "pip install 'mico-chat[llamacpp]'"
    assert llamacpp_finding(BROKEN, False).mark == "problem"  # auto would take it


def test_llama_cpp_of_another_processor() -> None:
    found = llamacpp_finding(Outcome(None, "killed by SIGILL"), False)
    assert "compiled for another processor" in found.text
    assert "--no-binary llama-cpp-python" in (found.mend or "")


def test_llama_cpp_that_leaves_instructions_unused() -> None:
    facts = {"version": "0.3.36", "features": ["SSE3", "AVX2"], "gpu": False}
    found = llamacpp_finding(Outcome(facts), False, ("AVX2", "AVX-512"))
    assert found.mark == "warning"
    assert "the processor has AVX-512 too" in found.text
    assert llamacpp_finding(Outcome(facts), False, ("AVX2",)).mark == "ok"


def test_what_is_optional_is_a_problem_only_where_asked_for() -> None:
    for finding in (vllm_finding, bitsandbytes_finding):
        marks = [
            finding(outcome, asked).mark for outcome in (None, BROKEN) for asked in (False, True)
        ]
        assert marks == ["note", "problem", "warning", "problem"]
    facts = {"version": "0.32.0", "device": "cuda"}
    assert vllm_finding(Outcome(facts), True).text == "0.32.0 imports, for cuda"


def test_the_database_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico_chat.cli.doctor.engines.is_installed", lambda module: False)
    assert postgres_finding(False).mark == "note"
    assert postgres_finding(True).mark == "problem"
    assert postgres_finding(True).mend == "pip install 'mico-chat[postgres]'"
