"""Laws with a history on the device: `Sampler.scores` at every node, and texts that stay in its rounds."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace import Engine
from outpace.drafters import RequestContext
from outpace.drafters.medusa import Medusa
from outpace.engine import engine as engine_module
from outpace.engine.device import lanes
from outpace.engine.device.history import ENDS, History
from outpace.errors import OutOfMemoryError
from outpace.laws import Noise, NoiseDice, Sampler, Settings, Tree
from spies import served_each
from tiny import PROMPTS
from uncaptured import uncaptured_target

LAWS = [
    {"temperature": 0.9, "repetition_penalty": 1.4},
    {"presence_penalty": 0.7, "frequency_penalty": 0.3, "min_new_tokens": 4},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "logit_bias": {7: 4.0, 11: -30.0}, "min_new_tokens": 3, "noise": "uniform"},
]


def context_of(tokens, prompt_length, law, number):
    settings = Settings(**law)
    dice = NoiseDice(Noise(3), number, settings.noise)
    sampler = Sampler(settings, dice, prompt_length=prompt_length, eos=(1, 5))
    return RequestContext(tokens, prompt_length, sampler, remaining=20)


@torch.inference_mode()
def test_scores_at_every_node_are_the_samplers_before_and_behind_a_walk():
    vocabulary, rows = 1500, 6  # two tiles
    tree = Tree([4, 9, 9, 4, 1400], [-1, 0, 1, -1, 3])
    ways = [[], [4], [4, 9], [4, 9, 9], [4], [4, 1400]]  # from the root to each node
    texts = [([3, 4, 9, 1400, 9, 8], 4), ([6, 5, 5], 2), ([2, 2, 9], 3), ([7, 11, 1400, 1400], 3)]
    requests = [context_of(list(t), n, law, i) for i, ((t, n), law) in enumerate(zip(texts, LAWS, strict=True))]
    history = History(5, rows, vocabulary, torch.device("cpu"))  # room for one request more than there are
    history.load(requests)
    logits = 3 * torch.randn(5, rows, vocabulary, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[r.root, *tree.tokens] for r in requests] + [[0] * rows])
    parents = torch.tensor([[-2, *(p + 1 for p in tree.parents)]] * 4 + [[-2] * rows])

    def check():
        depths = torch.tensor([0, *tree.depths()])
        positions = torch.stack([r.position + depths for r in requests] + [0 * depths])
        found = history.score(logits, tokens, parents, positions.flatten())
        for b, request in enumerate(requests):
            for node, way in enumerate(ways):
                wanted = request.sampler.scores(logits[b, node], [*request.tokens, *way])
                torch.testing.assert_close(found[b, node], wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[4], logits[4])

    check()
    emitted = torch.zeros(5, rows + 4, dtype=torch.int64)
    said = [[9, 9, 4], [1400], [8, 7], [11, 11], []]
    for row, new in zip(emitted, said, strict=True):
        row[0], row[1 : 1 + len(new)] = len(new), torch.tensor(new, dtype=torch.int64)
    history.count(emitted, history.counts)
    for request, new in zip(requests, said, strict=False):
        request.tokens.extend(new)
    tokens[:4, 0] = torch.tensor([r.root for r in requests])
    check()


def test_what_the_device_cannot_do_is_left_to_the_readable_round():
    assert History.serves(context_of([3, 4], 1, LAWS[0], 0))
    assert not History.serves(context_of([3, 4], 1, {"processors": (lambda ids, scores: scores,)}, 0))
    many = context_of([3, 4], 1, LAWS[0], 0)
    many.sampler.eos = tuple(range(ENDS + 1))
    assert not History.serves(many)


@pytest.mark.parametrize(("drafter", "laws"), [(None, LAWS), ("medusa", LAWS[:2])], ids=["plain", "medusa"])
def test_texts_with_a_history_stay_on_the_device(drafter, laws, monkeypatch):
    """Beside one another and beside laws without; requests leave at different rounds, so counts are loaded anew."""
    target = uncaptured_target(monkeypatch)
    options = [{"max_new_tokens": 4 + 2 * i, "seed": 5, "request": i, **law} for i, law in enumerate(laws)]
    plain = Engine(target, path="readable")
    wanted = [plain.generate(p, **o)[0].tokens for p, o in zip(PROMPTS, options, strict=False)]
    made = None
    if drafter:
        made = Medusa(heads=2, nodes=5, vocabulary=30)
        made.initialise(target, seed=3)
    engine = Engine(target, made, stand_down=False, check_integrity=True)
    monkeypatch.setattr(engine_module, "play_round", None)  # not to be called
    assert served_each(engine, PROMPTS, options) == wanted


def test_no_room_for_scores_is_an_error_that_names_the_shape_and_leaves_the_engine_usable(monkeypatch):
    target = uncaptured_target(monkeypatch)
    engine, options = Engine(target), {"max_new_tokens": 3, "ignore_eos": True}

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "History", full)
        with pytest.raises(OutOfMemoryError, match=r"scores of 1 x 1 rows.*Lower max_batch"):
            engine.generate(PROMPTS[0], repetition_penalty=1.2, **options)
    wanted = Engine(target, path="readable").generate(PROMPTS[0], repetition_penalty=1.2, **options)
    assert engine.generate(PROMPTS[0], repetition_penalty=1.2, **options)[0].tokens == wanted[0].tokens
