import pytest

from outpace.drafters import DRAFTERS, Drafter, drafter_names, make_drafter, registry
from outpace.errors import ConfigError


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "draft_model"])
def test_every_name_makes_a_drafter_that_bears_it(name):
    drafter = make_drafter(name)
    assert isinstance(drafter, Drafter)
    assert drafter.name == name


def test_options_are_converted_by_their_defaults():
    drafter = make_drafter("suffix:draft_len=5,factor=1.5,history=true")
    assert (drafter.draft_len, drafter.factor, drafter.history is not None) == (5, 1.5, True)
    assert make_drafter("layer_skip:skip=1/2").skip == (1, 2)


def test_none_is_plain_decoding():
    assert make_drafter("none") is None
    assert make_drafter(None) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sufix", "did you mean 'suffix'"),
        ("suffix:draft_length=3", "did you mean 'draft_len'"),
        ("suffix:draft_len", "needs a value: suffix:draft_len=..."),
        ("suffix:draft_len=many", "expected something like 16"),
        ("suffix:history=maybe", "expected something like False"),
        ("draft_model", "cannot be made"),
        ("lookahead+lookahead", "only one merged drafter may bring scouts"),
        ("suffix+", "unknown drafter ''"),
    ],
)
def test_mistakes_are_told_with_what_is_right(spec, words):
    with pytest.raises(ConfigError, match=words):
        make_drafter(spec)


class Point:
    def __init__(self, name, value):
        self.name, self.value = name, value


def test_third_parties_join_by_entry_point(monkeypatch):
    monkeypatch.setattr(
        registry.metadata, "entry_points", lambda group: [Point("mine", "outpace.drafters.suffix:Suffix")]
    )
    assert "mine" in drafter_names()
    assert make_drafter("mine").name == "suffix"


def test_two_packages_may_not_claim_one_name(monkeypatch):
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point("suffix", "elsewhere:Suffix")])
    with pytest.raises(ConfigError, match="is claimed by"):
        make_drafter("suffix")


def test_what_is_not_a_drafter_is_refused(monkeypatch):
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [Point("fake", "outpace.laws:Tree")])
    with pytest.raises(ConfigError, match="not a subclass"):
        make_drafter("fake")
