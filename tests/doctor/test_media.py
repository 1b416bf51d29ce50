"""The decoder's process and PyAV's codecs."""

from __future__ import annotations

import pytest

from mico_chat.cli.doctor.children import Outcome
from mico_chat.cli.doctor.media import CODECS, media_findings, probe_codecs, probe_decoder
from mico_chat.errors import LimitError


def test_this_machine() -> None:
    facts = probe_codecs({})
    assert facts["missing"] == []
    codecs, decoder = media_findings(Outcome(facts), Outcome(probe_decoder({})))
    assert (codecs.mark, decoder.mark) == ("ok", "ok")
    assert all(shown in codecs.text for shown in CODECS.values())


def test_codecs_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "no_such_codec", "Theirs")
    facts = probe_codecs({})
    assert facts["missing"] == ["Theirs"]
    (codecs, _) = media_findings(Outcome(facts), Outcome({"seconds": 1.0}))
    assert codecs.mark == "warning"
    assert "not Theirs" in codecs.text


def test_limits_that_let_nothing_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICO_MEDIA_MAX_BYTES", "100")
    with pytest.raises(LimitError):
        probe_decoder({})


def test_neither_works() -> None:
    broken = Outcome(None, "MicoError: the media decoder process does not start: no memory")
    codecs, decoder = media_findings(Outcome(None, "ImportError: libav"), broken)
    assert (codecs.mark, decoder.mark) == ("problem", "problem")
    assert "does not start: no memory" in decoder.text
