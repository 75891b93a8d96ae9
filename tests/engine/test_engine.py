import pytest
import torch

from outpace import Engine
from outpace.drafters import Drafter, Needs, TokenDrafter, make_drafter
from outpace.engine import Stats, total
from outpace.errors import ConfigError, DraftError
from outpace.laws import Draft, Tree
from outpace.target import Target
from tiny import EOS, PROMPTS, make_model, target


class Letters:
    """A tokenizer whose token i is one letter; ids decode to text of their own length."""

    chat_template = None
    eos_token_id = EOS
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"

    def __len__(self):
        return 40

    def encode(self, text, *, add_special_tokens=True):
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(self.alphabet[i] for i in ids)

    def get_vocab(self):
        return {letter: i for i, letter in enumerate(self.alphabet)}


class Talking(Letters):
    chat_template = "yes"

    def apply_chat_template(self, conversation, **options):
        return "".join(f"k{m['content']}" for m in conversation) + "A"


@pytest.fixture
def spoken():
    return Target(make_model(), Letters())


def test_counts_agree_with_what_was_emitted():
    engine = Engine(target(), "suffix:min_probability=0.05", stand_down=False)
    for output in engine.generate(PROMPTS, max_new_tokens=30, seed=1):
        stats = output.stats
        assert stats.emitted == len(output.tokens) == sum(len(r.tokens) for r in output.rounds_detail)
        assert stats.rounds == output.rounds == len(output.rounds_detail)
        assert stats.accepted == sum(r.accepted for r in output.rounds_detail)
        assert stats.accepted <= stats.emitted <= stats.accepted + stats.rounds
        assert stats.drafted == sum(r.drafted for r in output.rounds_detail)
        assert output.emitted_per_round == stats.emitted / stats.rounds
        assert [t for r in output.rounds_detail for t in r.tokens] == list(output.tokens)
        assert sum(stats.accepted_at) == stats.accepted
        assert all(a <= r for a, r in zip(stats.accepted_at, stats.reached, strict=True))
        assert stats.as_dict()["num_accepted_tokens_per_position"] == stats.accepted_at


def test_totals_add_counts_not_ratios():
    one, two = (
        Stats(rounds=2, emitted=4, reached=[2], accepted_at=[2]),
        Stats(rounds=6, emitted=6, reached=[6, 1], accepted_at=[0, 1]),
    )
    both = total([one, two])
    assert both.emitted_per_round == 10 / 8
    assert both.reached == [8, 1]
    assert both.accept_given_reached == [2 / 8, 1.0]


def test_streaming_gives_the_same_text_piece_by_piece(spoken):
    for spec in (None, "prompt_lookup:min_ngram=1"):
        whole = Engine(spoken, spec).generate("abcabcab", max_new_tokens=40, temperature=0.9)[0]
        chunks = list(Engine(spoken, spec).stream("abcabcab", max_new_tokens=40, temperature=0.9))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].output.tokens == whole.tokens
        assert all(chunk.output is None for chunk in chunks[:-1])


@pytest.mark.parametrize("spec", [None, "prompt_lookup:min_ngram=1,draft_len=8", "layer_skip:draft_len=6"])
def test_stop_strings_inside_accepted_blocks(spoken, spec):
    free = Engine(spoken).generate("abcabcab", max_new_tokens=40, ignore_eos=True)[0]
    for start in range(0, 30, 3):
        stop = free.text[start : start + 3]
        wanted = Engine(spoken).generate("abcabcab", max_new_tokens=40, ignore_eos=True, stop=stop)[0]
        ours = Engine(spoken, spec, stand_down=False).generate(
            "abcabcab", max_new_tokens=40, ignore_eos=True, stop=stop
        )[0]
        assert ours.tokens == wanted.tokens
        assert ours.text == wanted.text == free.text[: free.text.index(stop)]
        assert ours.finish_reason == "stop"
        assert len(ours.tokens) == free.text.index(stop) + len(stop)


def test_a_plain_string_is_a_user_turn_where_there_is_a_template():
    talking = Target(make_model(), Talking())
    want = tuple(Letters().encode("kabcA"))
    assert Engine(talking).generate("abc", max_new_tokens=1)[0].prompt_tokens == want
    assert Engine(talking).generate([{"role": "user", "content": "abc"}], max_new_tokens=1)[0].prompt_tokens == want
    bare = Engine(Target(make_model(), Letters())).generate("abc", max_new_tokens=1)[0]
    assert bare.prompt_tokens == tuple(Letters().encode("abc"))


def test_requests_draw_noise_by_their_index_unless_named():
    engine = Engine(target())
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    first, second = engine.generate([PROMPTS[0], PROMPTS[0]], **options)
    assert first.tokens != second.tokens
    assert engine.generate([PROMPTS[0]], request=1, **options)[0].tokens == second.tokens
    assert engine.generate([PROMPTS[0]], **{**options, "seed": 4})[0].tokens != first.tokens


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty prompt"),
        ("   ", "empty prompt"),
        ([], "no prompt"),
        ([[]], "empty prompt"),
        ([5, 99], "token id 99"),
        ([1] * 256, "prompt has 256 tokens"),
        ([1] * 300, "made for 256 positions"),
        ([{"role": "user", "content": "x"}], "no chat template"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_decoded(spoken, prompt, words):
    engine = Engine(spoken)
    with pytest.raises(ConfigError, match=words):
        engine.generate(prompt)
    assert engine.active == 0


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ConfigError, match="has no tokenizer"):
        Engine(target()).generate("abc")
    with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
        Engine(target()).generate([[1]], stop="x")


def test_unknown_settings_and_rules_are_refused_by_name():
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        Engine(target()).generate([[1]], temprature=1)
    with pytest.raises(ConfigError, match="unknown rule"):
        Engine(target(), rule="paths")
    with pytest.raises(ConfigError, match="token id 77"):
        Engine(target()).generate([[1]], logit_bias={77: 1.0})


def test_options_that_cannot_work_are_refused_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(Target, "from_pretrained", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    for options, words in (
        ({"drafter": "sufix"}, "did you mean 'suffix'"),
        ({"rule": "tokens"}, "unknown rule"),
        ({"drafter": "suffix", "rule": "token"}, "use rule='path'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Engine.from_pretrained("smollm2", **options)


class Faulty(TokenDrafter):
    name = "faulty"

    def __init__(self, tree, after=3):
        self.tree, self.after = tree, after

    def guess(self, request):
        return self.tree if request.round_index >= self.after else Tree()


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (Tree([99], [-1]), "'faulty' proposed token id 99"),
        (Tree([1, 2], [1, -1]), "gave node 0 the parent 1"),
    ],
)
def test_garbage_from_a_third_party_drafter_is_named_and_nothing_is_lost(tree, words):
    engine = Engine(target(), Faulty(tree))
    with pytest.raises(DraftError, match=words) as caught:
        engine.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=20, ignore_eos=True)
    wanted = Engine(target()).generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=3, ignore_eos=True)
    assert [o.tokens for o in caught.value.partial] == [o.tokens for o in wanted]
    assert {o.finish_reason for o in caught.value.partial} == {"interrupted"}
    assert engine.active == 0
    assert engine.generate([PROMPTS[2]], max_new_tokens=2)[0].rounds == 2, "and the engine stays usable"


def test_a_drafter_that_answers_for_the_wrong_number_of_requests_is_named():
    class Short(Drafter):
        name = "short"

        def propose(self, context):
            return Draft.of([Tree()])

    with pytest.raises(DraftError, match="1 trees for 2 requests"):
        Engine(target(), Short()).generate(PROMPTS[:2], max_new_tokens=4)


def test_interruption_keeps_what_was_said():
    class Impatient(TokenDrafter):
        name = "impatient"

        def guess(self, request):
            if request.round_index == 5:
                raise KeyboardInterrupt
            return Tree()

    engine = Engine(target(), Impatient())
    with pytest.raises(KeyboardInterrupt) as caught:
        engine.generate([PROMPTS[0]], max_new_tokens=30, ignore_eos=True)
    assert len(caught.value.partial[0].tokens) == 5
    assert engine.active == 0


def test_leaving_a_stream_early_frees_its_slot():
    engine = Engine(target(), check_integrity=True)
    stream = engine.stream(PROMPTS[0], max_new_tokens=50, ignore_eos=True)
    next(stream)
    stream.close()
    assert engine.active == 0
    assert engine.generate([PROMPTS[1]], max_new_tokens=3)[0].rounds == 3


def test_cancel_works_for_waiting_and_running_requests():
    engine = Engine(target(), max_batch=1)
    running, waiting = (engine.submit(p, max_new_tokens=30, ignore_eos=True) for p in PROMPTS[:2])
    engine.step()
    assert engine.cancel(waiting).tokens == ()
    assert len(engine.cancel(running).tokens) == 1
    assert engine.step() == []
    with pytest.raises(ConfigError, match="no request with handle"):
        engine.cancel(running)


def test_strict_runs_every_pass_at_one_width(monkeypatch):
    widths = []
    run = Target.run

    def spy(self, block, cache, **options):
        if options.get("logits", True):
            widths.append(block.rows)
        return run(self, block, cache, **options)

    monkeypatch.setattr(Target, "run", spy)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    one = Engine(target(), strict=6).generate([PROMPTS[1]], **options)
    two = Engine(target(), "prompt_lookup:min_ngram=1,draft_len=9", strict=6, stand_down=False).generate(
        [PROMPTS[1]], **options
    )
    assert set(widths) == {6}
    assert one[0].tokens == two[0].tokens
    with pytest.raises(ConfigError, match="adds scouts"):
        Engine(target(), "lookahead", strict=True)
    with pytest.raises(ConfigError, match="at least 2 rows"):
        Engine(target(), strict=-3)


def test_adapters_of_a_drafter_come_off_when_the_engine_closes():
    from outpace.target import GatedLoRA

    class Adapted(TokenDrafter):
        name = "adapted"
        needs = Needs(adapter=True)

        def __init__(self, model):
            self.adapter = GatedLoRA.for_layers(model, ("q_proj",), rank=1)

        def guess(self, request):
            return Tree()

    model = make_model()
    engine = Engine(Target(model), Adapted(model))
    hooked = sum(len(m._forward_hooks) for m in model.modules())
    engine.close()
    assert hooked == 4
    assert sum(len(m._forward_hooks) for m in model.modules()) == 0


def test_timing_accounts_for_every_round():
    engine = Engine(target(), make_drafter("suffix"))
    outputs = engine.generate(PROMPTS[:2], max_new_tokens=12, ignore_eos=True)
    timing = engine.timing
    assert timing.rounds >= max(o.rounds for o in outputs)
    assert timing.total_ms == pytest.approx(timing.draft_ms + timing.pass_ms + timing.walk_ms + timing.other_ms)
    assert 0 < timing.share_outside_pass < 1
    assert all(o.stats.decode_ms > 0 for o in outputs)


@torch.inference_mode()
@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
def test_the_path_is_a_function_of_laws_and_noise_alone(noise):
    """Recompute a sampled text without the engine: plain forwards; inverse CDF of a number, or arg-max with noise."""
    from outpace.laws import Noise, draw

    output = Engine(target(), "layer_skip").generate(
        [PROMPTS[0]], max_new_tokens=15, temperature=0.8, seed=6, ignore_eos=True, noise=noise
    )[0]
    text = list(PROMPTS[0])
    for token in output.tokens:
        logits = target().model(torch.tensor([text])).logits[0, -1].float()
        if noise == "gumbel":
            wanted = int(torch.argmax(logits / 0.8 + Noise(6).gumbel(0, len(text), len(logits))))
        else:
            wanted = draw(torch.softmax(logits / 0.8, 0), Noise(6).uniform(0, len(text)))
        assert wanted == token
        text.append(token)
