"""The parity audit: equal where the engine is right, a near tie where noise decides, a bug where there is one."""

import dataclasses
import json
import math

import pytest
import torch

from outpace.drafters import make_drafter
from outpace.engine import Auditor, Engine, audit
from outpace.engine.audit import _boundary, spacing, summary
from outpace.errors import ConfigError
from outpace.laws import Noise, NoiseDice, Sampler, Settings
from outpace.target import Target
from tiny import PROMPTS, make_model

LONG = {"max_new_tokens": 40, "seed": 3, "ignore_eos": True}
DRAFTER = "prompt_lookup:min_ngram=1,draft_len=6"
LAWS = {
    "greedy": {},
    "sampled": {"temperature": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.3, "min_p": 0.05},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.2},
    "uniform": {"temperature": 0.8, "noise": "uniform"},
    "uniform top-k": {"temperature": 1.0, "top_k": 5, "noise": "uniform"},
    "uniform top-p": {"temperature": 1.0, "top_p": 0.9, "noise": "uniform"},
    "uniform min-p": {"temperature": 1.3, "min_p": 0.05, "noise": "uniform"},
}


class Shifted(Target):
    """A target with a bug: passes that verify a draft number their rows one too high."""

    def run(self, block, cache, *, taps=(), logits=True):
        if logits and block.rows > 1:
            block = dataclasses.replace(block, positions=block.positions + 1)
        return super().run(block, cache, taps=taps, logits=logits)


class Noisy(Target):
    """A target whose wide passes add a little to the logits of odd ids: rounding, written large enough to be seen."""

    noise = 0.0

    def run(self, block, cache, *, taps=(), logits=True):
        read = super().run(block, cache, taps=taps, logits=logits)
        if read.logits is None or block.rows == 1:
            return read
        odd = torch.arange(self.vocabulary) % 2 == 1
        return dataclasses.replace(read, logits=read.logits + self.noise * odd)


def twin_model():
    """Ids 2k and 2k + 1 have the same logits, so every greedy choice is an exact tie between two ids."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[0::2]
    return model


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("drafter", [DRAFTER, "layer_skip"])
def test_a_right_drafter_is_equal(law, drafter):
    report = audit(Target(make_model()), drafter, PROMPTS[:4], **LONG, **law)
    assert [finding.verdict for finding in report.findings] == ["equal"] * 4
    assert [finding.common for finding in report.findings] == [40] * 4
    assert report.holds
    assert report.stats.emitted == 160
    assert report.stats.drafted > 0


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_shifted_positions_are_a_bug(law):
    report = audit(Shifted(make_model()), DRAFTER, PROMPTS, **LONG, **law)
    assert not report.holds
    found = [f.difference for f in report.findings if f.verdict == "differs"]
    assert found
    for difference in found:
        assert difference.gap > difference.allowed or difference.below_max > difference.allowed
    # the control has wide passes too, and shows the same bug without a drafter
    assert any(finding.verdict == "differs" for finding in report.control)


def test_exact_ties_that_noise_flips_are_near_ties():
    target = Noisy(twin_model())
    target.noise = 1e-7
    report = audit(target, DRAFTER, PROMPTS, **LONG)
    parted = [finding for finding in report.findings if finding.difference is not None]
    assert parted
    assert {finding.verdict for finding in parted} == {"near tie"}
    assert report.holds
    for finding in parted:
        difference = finding.difference
        assert difference.test == "arg-max"
        assert difference.other == difference.plain + 1
        assert difference.gap == 0
        assert 0 < difference.eps < 1e-4
        assert difference.reference.startswith("float32")


def test_a_flip_far_beyond_the_noise_is_a_bug():
    target = Noisy(make_model())
    target.noise = 2.0
    report = audit(target, DRAFTER, PROMPTS, **LONG)
    assert not report.holds
    assert summary(report.findings)["largest_gap"] > 1e-3


def outputs_that_part(target, settings, at, token):
    """Plain decoding, and a copy that emitted `token` at position `at`."""
    plain = Engine(target, None).generate([PROMPTS[0]], settings)[0]
    return plain, dataclasses.replace(plain, tokens=(*plain.tokens[:at], token, *plain.tokens[at + 1 :]))


def test_a_number_just_beside_the_boundary_is_a_near_tie_and_one_inside_is_not():
    """Every position of a text is tried: near tie exactly where u lies within the derived tolerance of the boundary."""
    target = Target(make_model())
    settings = Settings(temperature=0.8, noise="uniform", **LONG)
    auditor = Auditor(target, settings)
    plain = Engine(target, None).generate([PROMPTS[0]], settings)[0]
    prompt = list(plain.prompt_tokens)
    for at, token in enumerate(plain.tokens):
        prefix = [*prompt, *plain.tokens[:at]]
        logits = target.model(torch.tensor([prefix]), use_cache=False).logits[0, -1].detach().double()
        cdf = torch.softmax(logits / 0.8, 0).cumsum(0)
        u = Noise(settings.seed).uniform(0, len(prefix))
        if token + 1 >= target.vocabulary:
            continue
        _, other = outputs_that_part(target, settings, at, token + 1)
        found = auditor.judge(plain, other)
        eps = 4 * spacing(float(logits.abs().max()), torch.float32)
        boundary = float(cdf[token])
        assert found.common == at
        assert found.difference.u == u
        assert found.difference.boundary == pytest.approx(boundary, abs=1e-6)
        assert found.difference.gap == pytest.approx(boundary - u, abs=1e-6)
        assert found.difference.allowed <= math.tanh(eps / 0.8 / 4) + 1e-6
        assert (found.verdict == "near tie") == (boundary - u <= found.difference.allowed)


@pytest.mark.parametrize(
    "law", [{}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}], ids=str
)
def test_the_tolerance_covers_every_flip_that_logit_noise_of_its_size_can_make(law):
    """Perturb logits at random so that no difference moves by more than eps; whatever token swaps must be a near tie.

    Noise of 0.25 is large, so that many of the 300 draws flip and the bound is really tried.
    """
    generator = torch.Generator().manual_seed(5)
    eps, flips = 0.25, 0
    for request in range(300):
        settings = Settings(temperature=0.7, noise="uniform", **law)
        sampler = Sampler(settings, NoiseDice(Noise(1), request, settings.noise))
        logits = 3 * torch.randn(30, generator=generator)
        noise = eps * (torch.rand(30, generator=generator) < 0.5)
        first, second = sampler.choose(logits, [1, 2]), sampler.choose(logits + noise, [1, 2])
        if first == second:
            continue
        flips += 1
        u = Noise(1).uniform(request, 2)
        boundary, gap, allowed = _boundary(logits, [1, 2], sampler, (first, second), u, eps + 1e-6)
        assert gap <= allowed, (request, first, second, u, boundary)
    assert flips >= 8


def test_a_token_outside_the_support_is_a_bug():
    target = Target(make_model())
    settings = Settings(temperature=0.8, top_k=2, **LONG)
    plain = Engine(target, None).generate([PROMPTS[0]], settings)[0]
    prefix = [*plain.prompt_tokens, *plain.tokens[:5]]
    worst = int(target.model(torch.tensor([prefix]), use_cache=False).logits[0, -1].argmin())
    _, other = outputs_that_part(target, settings, 5, worst)
    assert Auditor(target, settings).judge(plain, other).verdict == "differs"


def test_an_output_that_ends_early_is_a_bug():
    target = Target(make_model())
    settings = Settings(**LONG)
    plain = Engine(target, None).generate([PROMPTS[0]], settings)[0]
    short = dataclasses.replace(plain, tokens=plain.tokens[:10])
    finding = Auditor(target, settings).judge(plain, short)
    assert (finding.verdict, finding.common, finding.difference.test) == ("differs", 10, "ending")
    assert finding.difference.other is None
    reason = dataclasses.replace(plain, finish_reason="eos")
    assert Auditor(target, settings).judge(plain, reason).verdict == "differs"
    assert Auditor(target, settings).judge(plain, plain).verdict == "equal"


def test_half_precision_is_judged_in_float32_or_says_why_not():
    target = Target(twin_model().to(torch.bfloat16))
    settings = Settings(**LONG)
    plain = Engine(target, None).generate([PROMPTS[0]], settings)[0]
    other = dataclasses.replace(plain, tokens=(*plain.tokens[:3], plain.tokens[3] ^ 1, *plain.tokens[4:]))
    finding = Auditor(target, settings).judge(plain, other)
    assert finding.verdict == "near tie"
    assert finding.difference.reference == "float32"
    assert target.dtype == torch.bfloat16  # a copy was upcast, not the model
    small = Auditor(target, settings, float32_limit=1000).judge(plain, other)
    assert "would exceed" in small.difference.reference


def test_reports_are_plain_data():
    report = audit(Shifted(make_model()), DRAFTER, PROMPTS[:3], **LONG, temperature=0.7)
    again = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert again["holds"] is False
    assert again["summary"]["prompts"] == 3
    assert sum(again["summary"][verdict] for verdict in ("equal", "near tie", "differs")) == 3
    assert all(str(f.difference) for f in report.findings if f.difference is not None)


def test_spacing():
    assert spacing(20.0, torch.bfloat16) == 0.125
    assert spacing(16.0, torch.bfloat16) == 0.125
    assert spacing(15.9, torch.bfloat16) == 0.0625
    assert 4 * spacing(31.0, torch.float16) == pytest.approx(0.0625)
    assert spacing(1.0, torch.float32) == 2.0**-23


def test_what_cannot_be_audited_is_refused():
    target = Target(make_model())
    with pytest.raises(ConfigError, match="none"):
        audit(target, "none", PROMPTS)
    with pytest.raises(ConfigError, match="no prompt"):
        audit(target, make_drafter("suffix"), [])
    with pytest.raises(ConfigError, match="view"):
        audit(target.view([0, 1]), "suffix", PROMPTS)
    with pytest.raises(ConfigError, match="temperature"):
        audit(target, "suffix", PROMPTS, temprature=0.5)
