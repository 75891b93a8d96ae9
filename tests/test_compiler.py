"""C sources are compiled once, for this processor, and whatever hinders that is said in words."""

from pathlib import Path

import pytest
import torch

from outpace import compiler
from outpace.errors import UnsupportedError

SOURCE = Path(compiler.__file__).parent / "laws" / "noise.c"
compiled = pytest.mark.skipif(compiler.why_not(SOURCE) is not None, reason=str(compiler.why_not(SOURCE)))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing has been compiled or asked yet, and the cache is empty."""
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    compiler._attempt.cache_clear()
    yield tmp_path
    compiler._attempt.cache_clear()


def test_without_a_compiler_the_reason_is_said(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler (apt install gcc, or name one in CC)" in str(compiler.why_not(SOURCE))


@pytest.mark.skipif(not Path("/bin/false").exists(), reason="no command that fails")
def test_a_compiler_that_fails_is_no_accident(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(UnsupportedError, match="/bin/false cannot compile the C sources of outpace"):
        compiler.load(SOURCE)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("OUTPACE_NATIVE", "off")
    with pytest.raises(UnsupportedError, match="OUTPACE_NATIVE=off"):
        compiler.load(SOURCE)


def test_other_dtypes_are_refused_in_words():
    with pytest.raises(UnsupportedError, match=r"for float32 and bfloat16, not torch\.float64"):
        compiler.load(SOURCE, torch.float64)


@compiled
def test_it_is_compiled_once(fresh, monkeypatch):
    compiler.load(SOURCE)
    assert [file.suffix for file in (fresh / "native").iterdir()] == [".so"]
    compiler._attempt.cache_clear()
    said, asked = compiler._said, []
    monkeypatch.setattr(compiler, "_said", lambda *words: asked.append(words) or said(*words))
    compiler.load(SOURCE)
    assert [words[1:] for words in asked] == [("--version",)]


@compiled
def test_another_header_is_another_library(fresh, tmp_path):
    place = tmp_path / "sources"
    place.mkdir()
    (place / "some.c").write_text('#include "some.h"\nint outpace_some(void) { return SOME; }\n')
    for number in (3, 5):
        (place / "some.h").write_text(f"#define SOME {number}\n")
        compiler._attempt.cache_clear()
        assert compiler.load(place / "some.c").outpace_some() == number


@compiled
def test_without_a_cache_it_is_compiled_for_the_process(fresh, monkeypatch):
    monkeypatch.setenv("OUTPACE_CACHE", "off")
    compiler.load(SOURCE)
    assert not (fresh / "native").exists()
