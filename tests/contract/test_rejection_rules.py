"""The rejection rules on the real decoding path: the law of what comes out, sampled, with the odds written down."""

import pytest
import torch
from scipy import stats

from outpace import Engine
from outpace.drafters.draft_model import DraftModel
from outpace.errors import ConfigError
from outpace.target import Target
from tiny import make_model

SIZE = 3
RUNS = 3000  # detects a law at total variation distance 0.08 with power 0.99 over 27 cells


@pytest.fixture(scope="module")
def pair():
    shape = {"vocab_size": SIZE, "eos_token_id": None, "num_hidden_layers": 2, "sharpness": 4.0}
    return Target(make_model(seed=1, **shape)), Target(make_model(seed=2, **shape))


def exact_law(target, prompt):
    law = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.float64)
    for a in range(SIZE):
        for b in range(SIZE):
            logits = target.model(torch.tensor([[*prompt, a, b]])).logits[0].double()
            p = torch.softmax(logits[len(prompt) - 1 :], -1)
            law[a, b] = p[0, a] * p[1, b] * p[2]
    return law.flatten()


@torch.inference_mode()
@pytest.mark.parametrize("rule", ["path", "token", "block", "tree"])
def test_sampled_text_follows_the_targets_law(pair, rule):
    """Three tokens, 27 cells, chi-square: fails by chance once in 10^4 runs of the test (the seed is fixed)."""
    target, small = pair
    prompt = [0, 1]
    counts = torch.zeros(SIZE**3, dtype=torch.float64)
    engine = Engine(
        target, DraftModel(model=small, draft_len=3, draw="own"), rule=rule, max_batch=500, stand_down=False
    )
    for start in range(0, RUNS, 500):
        for request in range(start, start + 500):
            engine.submit([*prompt], temperature=1.0, max_new_tokens=3, seed=17, request=request)
        while engine.active:
            for progress in engine.step():
                if progress.chunk.output:
                    a, b, c = progress.chunk.output.tokens
                    counts[(a * SIZE + b) * SIZE + c] += 1
    law = exact_law(target, prompt)
    rare = law * RUNS < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]) if bool(rare.any()) else counts
    expected = torch.cat([law[~rare], law[rare].sum()[None]]) * RUNS if bool(rare.any()) else law * RUNS
    assert int(counts.sum()) == RUNS
    assert stats.chisquare(observed.numpy(), expected.numpy(), sum_check=False).pvalue > 1e-4


def test_rejection_rules_are_law_and_path_is_path(pair):
    target, small = pair
    for rule, guarantee in (("path", "path"), ("token", "law"), ("block", "law"), ("tree", "law")):
        engine = Engine(target, DraftModel(model=small, draw="own"), rule=rule)
        assert engine.generate([[0]], temperature=1.0, max_new_tokens=2)[0].guarantee == guarantee
        assert engine.generate([[0]], temperature=0.0, max_new_tokens=2)[0].guarantee == "path"


@pytest.mark.parametrize("rule", ["token", "block", "tree"])
def test_a_drafter_that_chooses_is_refused_by_a_rejection_rule(pair, rule):
    with pytest.raises(ConfigError, match="use rule='path'"):
        Engine(pair[0], "prompt_lookup", rule=rule)


def test_rejection_rules_are_reproducible_in_a_batch(pair):
    target, small = pair
    outputs = []
    for max_batch in (1, 4):
        engine = Engine(
            target, DraftModel(model=small, draw="own"), rule="block", max_batch=max_batch, stand_down=False
        )
        outputs.append([o.tokens for o in engine.generate([[0], [1, 2], [2]], temperature=1.0, max_new_tokens=12)])
    assert outputs[0] == outputs[1]
