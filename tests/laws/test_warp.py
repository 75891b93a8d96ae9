import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st

from outpace.errors import LawError
from outpace.laws import Noise, NoiseDice, Sampler, Settings

SIZE = 50


def sampler(settings, **options):
    return Sampler(settings, NoiseDice(Noise(0), 0), **options)


def random_logits(seed, size=SIZE, scale=4.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def hf_law(processors, prefix, logits):
    ids = torch.tensor([prefix])
    row = logits[None].clone()
    for processor in processors:
        row = processor(ids, row)
    return torch.softmax(row, -1)[0]


CASES = {
    "temperature": ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
    "top-k": ({"temperature": 1.0, "top_k": 7}, [hf.TopKLogitsWarper(7)]),
    "top-p": ({"temperature": 1.0, "top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
    "min-p": ({"temperature": 1.0, "min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
    "all warpers": (
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        [hf.TemperatureLogitsWarper(1.3), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.02)],
    ),
    "repetition penalty": (
        {"temperature": 1.0, "repetition_penalty": 1.4},
        [hf.RepetitionPenaltyLogitsProcessor(1.4)],
    ),
    "logit bias": (
        {"temperature": 1.0, "logit_bias": {3: 2.5, 9: -4.0}},
        [hf.SequenceBiasLogitsProcessor({(3,): 2.5, (9,): -4.0})],
    ),
    "custom processors": (
        {
            "temperature": 1.0,
            "processors": (hf.NoRepeatNGramLogitsProcessor(2), hf.NoBadWordsLogitsProcessor([[4, 5]])),
        },
        [hf.NoRepeatNGramLogitsProcessor(2), hf.NoBadWordsLogitsProcessor([[4, 5]])],
    ),
}


@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 10**6), prefix=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=12))
def test_law_equals_transformers(name, seed, prefix):
    settings, processors = CASES[name]
    logits = random_logits(seed)
    ours = sampler(Settings(**settings)).law(logits, prefix)
    torch.testing.assert_close(ours, hf_law(processors, prefix, logits), atol=2e-6, rtol=1e-4)


@given(seed=st.integers(0, 10**6), prompt=st.integers(1, 6), output=st.lists(st.integers(0, SIZE - 1), max_size=10))
def test_presence_and_frequency_count_the_output_only(seed, prompt, output):
    logits = random_logits(seed)
    settings = Settings(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.3)
    prefix = [7] * prompt + output
    law = sampler(settings, prompt_length=prompt).law(logits, prefix)
    wanted = logits.clone()
    for token in set(output):
        wanted[token] -= 0.5 + 0.3 * output.count(token)
    torch.testing.assert_close(law, torch.softmax(wanted, 0))


def test_min_new_tokens_forbids_eos_exactly_that_long():
    s = sampler(Settings(temperature=1.0, min_new_tokens=2), prompt_length=3, eos=(1, 4))
    logits = torch.zeros(6)
    for emitted, forbidden in ((0, True), (1, True), (2, False)):
        law = s.law(logits, [0] * (3 + emitted))
        assert (float(law[1]) == 0) == forbidden
        assert (float(law[4]) == 0) == forbidden


def test_top_p_looks_beyond_its_first_thousand_when_it_must():
    flat = torch.zeros(5000)
    law = sampler(Settings(temperature=1.0, top_p=0.89991)).law(flat, [0])
    assert int((law > 0).sum()) == 4500
    assert bool((law[:4500] > 0).all()), "among equals the lower ids stay"


@given(st.integers(0, 10**6))
def test_ties_in_top_p_do_not_depend_on_a_sort(seed):
    coarse = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(seed)).float()
    law = sampler(Settings(temperature=1.0, top_p=0.5)).law(coarse, [0])
    p = torch.softmax(coarse, 0).double()
    order = sorted(range(200), key=lambda i: (-float(p[i]), i))
    kept, mass = set(), 0.0
    for token in order:
        if mass >= 0.5:
            break
        kept.add(token)
        mass += float(p[token])
    found = set(torch.nonzero(law)[:, 0].tolist())
    assert len(found ^ kept) <= 1, "float32 and float64 sums may part at the very edge"
    assert all(p[t] >= min(float(p[k]) for k in kept) for t in found)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([1.0, 5.0, 5.0, 2.0])
    s = sampler(Settings(temperature=0))
    assert s.choose(logits, [0]) == 1
    assert s.law(logits, [0]).tolist() == [0, 1, 0, 0]


def test_bf16_logits_are_warped_in_float32():
    law = sampler(Settings(temperature=0.7)).law(random_logits(1).bfloat16(), [0])
    assert law.dtype == torch.float32
    assert abs(float(law.sum()) - 1) < 1e-6


def test_custom_processors_stay_out_of_the_drafters_law():
    def forbid(ids, scores):
        return scores.index_fill(1, torch.tensor([0]), float("-inf"))

    s = sampler(Settings(temperature=1.0, processors=(forbid,)))
    assert float(s.law(torch.zeros(3), [0])[0]) == 0
    assert float(s.draft_law(torch.zeros(3), [0])[0]) > 0


@pytest.mark.parametrize("logits", [[float("nan"), 0.0], [float("-inf"), float("-inf")]])
def test_a_row_without_a_law_is_an_error_in_words(logits):
    with pytest.raises(LawError, match="give no law"):
        sampler(Settings(temperature=1.0)).law(torch.tensor(logits), [0])
