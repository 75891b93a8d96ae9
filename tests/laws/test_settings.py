import pytest

from outpace.errors import ConfigError
from outpace.laws import Settings


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": 1, "top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": 1, "top_p": 1.1}, "top_p must be"),
        ({"temperature": 1, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1, "min_p": 1.5}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens must be at most"),
        ({"stop": ("",)}, "stop must be"),
        ({"noise": "normal"}, "noise must be"),
        ({"seed": -1}, "seed must be"),
        ({"request": -1}, "request must be"),
    ],
)
def test_values_out_of_range_are_refused_in_words(bad, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**bad)


@pytest.mark.parametrize("name", ["top_p", "top_k", "min_p"])
def test_settings_without_effect_are_refused(name):
    with pytest.raises(ConfigError, match="no effect at temperature=0"):
        Settings(temperature=0, **{name: 1})


def test_unknown_setting_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        Settings().replace(temprature=1)


def test_one_stop_string_or_one_eos_id_may_be_given_bare():
    settings = Settings(stop="END", eos=[3, 4])
    assert settings.stop == ("END",)
    assert settings.eos == (3, 4)
