"""The proof itself, the golden values of the field, and the mistakes it must catch."""

import pytest
import torch

from outpace.errors import ConfigError, DraftError
from outpace.laws import Draft, Noise, Sampler, Settings, Tree, find_rule
from outpace.laws.certificate import CASES, Case, TableModel, certify, certify_broken, expected_emitted, explore
from outpace.laws.certificate.broken import BROKEN_CHAINS, BROKEN_TREES
from outpace.laws.dice import Key, NoiseDice
from outpace.laws.noise import Stream

A = (TableModel.constant((0.5, 0.3, 0.2)), TableModel.constant((0.2, 0.3, 0.5)))
B = (
    TableModel.markov((0.5, 0.3, 0.2), [(0.7, 0.2, 0.1), (0.1, 0.6, 0.3), (0.25, 0.25, 0.5)]),
    TableModel.markov((0.4, 0.4, 0.2), [(0.5, 0.4, 0.1), (0.3, 0.3, 0.4), (0.2, 0.2, 0.6)]),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_keeps_the_law(case):
    (finding,) = certify([case], models=3)
    assert finding.holds, f"distance {finding.distance:.3e} over {finding.outcomes} outcomes"


def test_every_broken_rule_is_caught():
    findings = certify_broken()
    assert {f.name for f in findings} == set(BROKEN_CHAINS) | set(BROKEN_TREES)
    assert [f.name for f in findings if not f.holds] == []


@pytest.mark.parametrize(
    ("models", "rule", "expected"),
    [
        (A, "token", (1.7, 2.19, 2.533, 2.7731)),
        (A, "block", (1.7, 2.25, 2.695, 3.0635)),
        (B, "token", (1.9, 2.61, 3.18, 3.6402)),
        (B, "block", (1.9, 2.64, 3.278, 3.8405)),
    ],
    ids=["A token", "A block", "B token", "B block"],
)
def test_expected_emitted_of_chains(models, rule, expected):
    for depth, value in enumerate(expected, start=1):
        assert expected_emitted(*models, Case("", rule, depth)) == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(
    ("models", "branching", "depth", "without", "independent", "match"),
    [
        (A, 2, 1, 1.82, 1.76, 1.5),
        (A, 2, 2, 2.4924, 2.3376, 1.75),
        (A, 3, 2, 3, None, 3),
        (B, 1, 2, 2.61, 2.61, 1.85),
        (B, 2, 1, 1.9666666667, 1.94, 1.8),
        (B, 2, 2, 2.8684920635, 2.761, 2.37),
    ],
    ids=["A 2 1", "A 2 2", "A 3 2", "B 1 2", "B 2 1", "B 2 2"],
)
def test_expected_emitted_of_trees(models, branching, depth, without, independent, match):
    shape = {"rule": "tree", "depth": depth, "branching": branching}
    assert expected_emitted(*models, Case("", **shape, kind="without_replacement")) == pytest.approx(without, abs=1e-9)
    if independent is not None:  # twelve independent draws would be half a million drafts
        assert expected_emitted(*models, Case("", **shape)) == pytest.approx(independent, abs=1e-9)
    top = Case("", "path", depth, branching, mode="top-k")
    assert expected_emitted(*models, top) == pytest.approx(match, abs=1e-9)


def test_block_verification_rescues_what_the_paper_says():
    """Sun et al. 2024: 10/9 accepted drafts token by token, 11/9 as a block."""
    p, q = TableModel.constant((1 / 3, 2 / 3)), TableModel.constant((2 / 3, 1 / 3))
    assert expected_emitted(p, q, Case("", "token", 2)) == pytest.approx(1 + 10 / 9)
    assert expected_emitted(p, q, Case("", "block", 2)) == pytest.approx(1 + 11 / 9)


def test_sharing_the_number_beats_neither_rejection_nor_is_it_worse_than_chance():
    """A drafter that reads the path's number: matched mass is the overlap of the two CDFs' intervals."""
    p, q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
    overlap = (min(0.5, 0.2) - 0) + max(0, min(0.8, 0.5) - max(0.5, 0.2)) + (1 - max(0.8, 0.5))
    got = expected_emitted(*A, Case("", "path", 1, mode="own number"))
    assert got == pytest.approx(1 + overlap)
    assert sum(p) == pytest.approx(sum(q))


def test_explorer_visits_every_outcome_once_with_its_probability():
    def program(dice):
        first = dice.draw(torch.tensor([0.5, 0.0, 0.5]), Key(Stream.PATH, 0))
        again = dice.draw(torch.tensor([0.25, 0.75]), Key(Stream.PATH, 0))  # the same number: consistent answers
        return first, again, dice.accept(1.0, 4.0, Key(Stream.ACCEPT, 0))

    outcomes = explore(program)
    found = {}
    for probability, outcome in outcomes:
        found[outcome] = found.get(outcome, 0) + probability
    assert found == pytest.approx(
        {(0, 0, True): 1 / 16, (0, 0, False): 3 / 16, (0, 1, True): 1 / 16, (0, 1, False): 3 / 16,
         (2, 1, True): 1 / 8, (2, 1, False): 3 / 8}
    )  # fmt: skip
    assert len(found) == len(outcomes)


def test_greedy_settings_make_every_rule_the_path():
    sampler = Sampler(Settings(temperature=0), NoiseDice(Noise(0), 0))
    logits = torch.tensor([[0.0, 2, 1], [3.0, 0, 0], [0.0, 0, 5]])
    laws = torch.full((3, 3), 1 / 3)
    tree = Tree.chain([1, 0], kind="iid", laws=laws)
    walks = {find_rule(name)(tree, logits, sampler, [0], 0) for name in ("path", "token", "block", "tree")}
    assert [walk.tokens for walk in walks] == [(1, 0, 2)]


def test_rules_refuse_what_they_cannot_verify():
    sampler = Sampler(Settings(temperature=1), NoiseDice(Noise(0), 0))
    fork = Tree([0, 1], [-1, -1], "iid", torch.full((3, 3), 1 / 3))
    for name in ("token", "block"):
        with pytest.raises(DraftError, match="verifies chains"):
            find_rule(name)(fork, torch.zeros(3, 3), sampler, [0], 0)
    with pytest.raises(DraftError, match="without the laws"):
        find_rule("token")(Tree([0], [-1], "iid"), torch.zeros(2, 3), sampler, [0], 0)
    with pytest.raises(ConfigError, match="did you mean 'token'"):
        find_rule("tokens")


def test_drafts_may_be_empty():
    sampler = Sampler(Settings(temperature=1), NoiseDice(Noise(0), 0))
    tokens = {
        find_rule(n)(Tree(), torch.zeros(1, 4), sampler, [2], 5).tokens for n in ("path", "token", "block", "tree")
    }
    assert len(tokens) == 1
    assert Draft.of([Tree(), Tree()]).width == 0
