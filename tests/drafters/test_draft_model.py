import pytest
import torch

from outpace import Engine
from outpace.drafters.draft_model import DraftModel, VocabularyMap
from outpace.errors import CheckpointError, ConfigError
from outpace.target import Target
from tiny import PROMPTS, make_model, small_target, target


class Words:
    """A tokenizer over whole words."""

    chat_template = None
    eos_token_id = None

    def __init__(self, words):
        self.words = list(words)

    def __len__(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(self.words[i] for i in ids)

    def encode(self, text, *, add_special_tokens=False):
        ids = []
        while text:
            word = max((w for w in self.words if text.startswith(w)), key=len, default="")
            if word:
                ids.append(self.words.index(word))
            text = text[len(word) or 1 :]
        return ids


@torch.inference_mode()
def test_the_cache_is_that_of_a_fresh_reading_after_every_round(monkeypatch):
    """What the drafter has read is a prefix of the text; no hole after a fully accepted draft, nothing stale."""
    drafter = DraftModel(model=small_target(), draft_len=4)
    catch_up = drafter._catch_up

    def checked():
        logits = catch_up()
        for seat, request in enumerate(drafter._seats.requests):
            fresh = drafter.model.new_cache()
            drafter.model.prefill(request.tokens, fresh)
            assert drafter.cache.lengths[seat] == len(request.tokens)
            for layer in range(drafter.model.layers_total):
                for ours, want in zip(drafter.cache.entries(layer, seat), fresh.entries(layer, 0), strict=True):
                    torch.testing.assert_close(ours, want, atol=1e-5, rtol=1e-4)
        return logits

    monkeypatch.setattr(drafter, "_catch_up", checked)
    engine = Engine(target(), drafter, max_batch=2, stand_down=False)
    outputs = engine.generate(PROMPTS[:4], max_new_tokens=20, temperature=0.7)
    assert sum(o.stats.accepted for o in outputs) > 5


def test_the_target_as_its_own_drafter_is_always_right():
    for temperature in (0.0, 1.0):
        engine = Engine(target(), DraftModel(model=target(), draft_len=4), stand_down=False)
        output = engine.generate([PROMPTS[0]], max_new_tokens=26, temperature=temperature, ignore_eos=True)[0]
        assert output.stats.accepted_per_drafted == 1.0
        assert output.rounds == 6


def test_reading_the_paths_number_guesses_better_than_the_most_likely_token():
    """At temperature 1 on twelve prompts: coupling wins by far more than chance (fixed seeds)."""
    options = {"max_new_tokens": 60, "temperature": 1.0, "ignore_eos": True, "seed": 1}
    accepted = {}
    for draw in ("path", "greedy"):
        engine = Engine(target(), DraftModel(model=small_target(), draft_len=3, draw=draw), stand_down=False)
        accepted[draw] = sum(o.stats.accepted for o in engine.generate(PROMPTS, **options))
    assert accepted["path"] > 1.1 * accepted["greedy"]


def test_a_draft_may_end_after_an_unsure_token():
    sure = Engine(target(), DraftModel(model=small_target(), stop_below=0.5), stand_down=False)
    free = Engine(target(), DraftModel(model=small_target()), stand_down=False)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    one, two = (e.generate(PROMPTS[:3], **options) for e in (sure, free))
    assert [o.tokens for o in one] == [o.tokens for o in two]
    assert sum(o.stats.drafted for o in one) < sum(o.stats.drafted for o in two)
    assert all(r.drafted >= 1 for o in one for r in o.rounds_detail[:-1]), "the unsure token itself stays"


LETTERS = [chr(97 + i % 26) + str(i) for i in range(40)]


def test_other_vocabularies_are_joined_token_by_token():
    ours = Target(make_model(), Words(LETTERS))
    shuffled = [*LETTERS[20:], *LETTERS[:12], *(f"x{i}" for i in range(8))]
    theirs = Target(make_model(seed=5), Words(shuffled))
    options = {"max_new_tokens": 25, "temperature": 0.8, "ignore_eos": True}
    prompts = [[t for t in p if t < 12 or t >= 20] for p in PROMPTS[:3]]
    want = Engine(ours).generate(prompts, **options)
    for rule, draw in (("path", "path"), ("path", "own")):
        engine = Engine(ours, DraftModel(model=theirs, draw=draw), rule=rule, stand_down=False)
        assert [o.tokens for o in engine.generate(prompts, **options)] == [o.tokens for o in want]
    table = VocabularyMap(ours, theirs)
    assert not table.identical
    law = table.law_for_target(torch.arange(40.0), 40)
    assert law[25] == 5.0
    assert law[3] == 23.0
    assert law[15] == float("-inf"), "a token the drafter does not have"


def test_tokens_the_drafter_lacks_are_read_as_text():
    ours = Target(make_model(vocab_size=4), Words(["a", "b", "ab", "c"]))
    theirs = Target(make_model(vocab_size=3), Words(["b", "a", "c"]))
    assert VocabularyMap(ours, theirs).to_drafter([2, 3, 0]) == [1, 0, 2, 1]


def test_vocabularies_with_nothing_in_common_are_refused_in_words():
    ours = Target(make_model(), Words(LETTERS))
    theirs = Target(make_model(), Words([f"other{i}" for i in range(40)]))
    with pytest.raises(CheckpointError, match="share only 0 tokens"):
        Engine(ours, DraftModel(model=theirs))
    with pytest.raises(CheckpointError, match="give both a tokenizer"):
        Engine(target(), DraftModel(model=Target(make_model(vocab_size=41))))


@pytest.mark.parametrize("bad", [{"draft_len": 0}, {"draw": "random"}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        DraftModel(model="x", **bad)


def test_layer_skip_accepts_whole_when_nothing_is_skipped(monkeypatch):
    from outpace.drafters.layer_skip import LayerSkip

    drafter = LayerSkip(draft_len=3)
    engine = Engine(target(), drafter, stand_down=False)
    drafter.view = target().view(range(4))
    output = engine.generate([PROMPTS[0]], max_new_tokens=20, temperature=1.0, ignore_eos=True)[0]
    assert output.stats.accepted_per_drafted == 1.0
    assert output.rounds == 5


def test_layer_skip_refuses_layers_that_are_not_there():
    with pytest.raises(ConfigError, match="cannot skip layers"):
        Engine(target(), "layer_skip:skip=1/9")
