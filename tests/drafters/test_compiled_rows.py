"""Compiled networks that follow rows read, draft and keep what their modules do, on a CPU that has them."""

import pytest
import torch

from outpace import Engine
from outpace.drafters.eagle import Eagle, Eagle2, Eagle3
from outpace.drafters.growth import Draws, Plan, born, extend, grow_fixed
from outpace.drafters.mtp import MTP
from outpace.drafters.rowcache import RowCache, bucket
from outpace.target import Target
from outpace.target.native.build import why_not
from outpace.target.skinny import Eight
from tiny import PROMPTS, learned, make_model

pytestmark = pytest.mark.skipif(why_not(torch.float32, "rows") is not None, reason=str(why_not(torch.float32, "rows")))
LARGE = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 640, "vocab_size": 600}
TREE = {"draft_len": 4, "branches": 3, "nodes": 12}
MAKERS = {
    "eagle": lambda: Eagle(),
    "eagle2, no bias": lambda: Eagle2(**TREE, bias=False),
    "eagle3": lambda: Eagle3(**TREE, vocabulary=500),
    "eagle3, all words": lambda: Eagle3(**TREE, vocabulary=0),
    "eagle3, two blocks, one norm": lambda: Eagle3(
        **TREE, layers=2, fc_norm=False, norm_before_fc=True, norm_before_residual=True
    ),
    "eagle3 as published": lambda: Eagle3(**TREE, fc_norm=False, norm_output=False, vocabulary=500),
    "mtp": lambda: MTP(**TREE, vocabulary=500),
    "mtp, raw states": lambda: MTP(**TREE, order="hidden_embed", chain_norm="none"),
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def large(request):
    return Target(make_model(**LARGE).to(request.param))


def some_draws(net, batch, depth, *, greedy):
    """Noise for all requests but the first where `greedy`."""
    torch.manual_seed(5)
    race = -torch.log(-torch.log(torch.rand(batch, depth, net.head.size).clamp(1e-6, 1 - 1e-6)))
    heat = torch.full((batch,), 0.7)
    if greedy:
        race[0], heat[0] = 0, 0
    return Draws(heat, race, None, torch.zeros(batch), 0.6)


def drafted(drafter, *, compiled, draws, batch=2):
    """Rows of two readings and a growth behind them: what stands in the cache, and the growth."""
    net, target = drafter.module, drafter.target
    kept, net.compiled = net.compiled, net.compiled if compiled else None
    try:
        dtype = torch.float32 if compiled else next(net.parameters()).dtype
        cache = RowCache.empty(
            net.layers, net.shape.key_heads, net.shape.head_size, net.top_size, device=target.device, dtype=dtype
        )
        cache.reserve(slots=3, capacity=256)
        torch.manual_seed(3)
        for rows, counts, slots in ((150, (150,), (1,)), (7, (7, 4), None), (2, (1, 0), None)):
            count = torch.tensor(counts)
            features = torch.randn(len(counts), rows, len(net.taps) * target.hidden_size).to(target.dtype)
            tokens = torch.randint(0, target.vocabulary, (len(counts), rows))
            extend(
                net, target.embed, cache, features, tokens, count, 256 if rows > 100 else bucket(170),
                None if slots is None else torch.tensor(slots),
            )  # fmt: skip
        given = None if draws is None else some_draws(net, batch, 5, greedy=draws == "some")
        if isinstance(drafter.shape, Plan):
            grown = born(net, target.embed, cache, drafter.shape, batch, 256, given)
        else:
            grown = grow_fixed(net, target.embed, cache, drafter.shape, batch, 256, given)
        return cache, grown
    finally:
        net.compiled = kept


@pytest.mark.parametrize("draws", [None, "all", "some"])
@pytest.mark.parametrize("name", MAKERS)
def test_float32_weights_give_what_the_modules_give(large, name, draws, monkeypatch):
    """Without rounded weights the two agree up to the order of sums, node for node.

    Tokens could differ only where two candidates are nearer than that; none of the 12 or 39 nodes here is.
    """
    if large.dtype != torch.float32:
        pytest.skip("large bfloat16 weights are decoded compiled only in eight bits")
    monkeypatch.setenv("OUTPACE_INT8", "off")
    drafter = learned(large, MAKERS[name]()).for_decoding()
    assert drafter.module.compiled is not None
    with torch.no_grad():
        (cache, ours), (wanted_cache, wanted) = (drafted(drafter, compiled=c, draws=draws) for c in (True, False))
    assert torch.equal(cache.at, wanted_cache.at)
    for slot, length in enumerate(cache.at.tolist()):
        for kind in ("keys", "values"):
            found, theirs = (getattr(c, kind)[:, slot, :, :length] for c in (cache, wanted_cache))
            torch.testing.assert_close(found, theirs, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(cache.top, wanted_cache.top, atol=5e-4, rtol=1e-3)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])
    if len(ours) == 3:
        torch.testing.assert_close(ours[2], wanted[2], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_rounded_weights_give_what_modules_with_these_weights_give(large, name):
    """Rounding is rounding once: of weights that have been rounded before, nothing is lost."""
    drafter = learned(large, MAKERS[name]())
    with torch.no_grad():
        for weight in drafter.module.parameters():
            if weight.dim() == 2:
                eight = Eight(weight, None)
                weight.copy_(eight.rounded.float() * eight.scales[:, None])
        copy = drafter.for_decoding()
        assert copy.module.compiled is not None
        cache, _ = drafted(copy, compiled=True, draws=None)
        wanted, _ = drafted(copy, compiled=False, draws=None)
    for found, theirs in ((cache.top[:2], wanted.top[:2]), (cache.keys[:, :2, :, :5], wanted.keys[:, :2, :, :5])):
        apart = float((found.float() - theirs.float()).norm() / theirs.float().norm())
        assert apart < (1e-4 if large.dtype == torch.float32 else 0.02)


def test_only_what_decodes_is_compiled_and_only_where_it_can_be(large, monkeypatch):
    drafter = learned(large, MAKERS["eagle3"]())
    assert drafter.module.compiled is None, "what trains runs its modules"
    copy = drafter.for_decoding()
    assert copy.module.compiled is not None
    assert copy.cache.top.dtype == torch.float32
    assert all(getattr(m, "eight", None) is None for m in copy.module.midlayer.modules()), "weights are rounded once"
    assert copy.module.state_dict().keys() == drafter.module.state_dict().keys(), "checkpoints stay as they were"
    monkeypatch.setenv("OUTPACE_NATIVE", "off")
    copy = drafter.for_decoding()
    assert copy.module.compiled is None
    assert copy.cache.top.dtype == large.dtype


@pytest.mark.parametrize("noise", ["gumbel", "uniform"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_text_is_plain_decodings(large, name, noise):
    """In batches, trees included, whoever chooses a token: numbers that are looked up are not for compiled choices."""
    options = {"max_new_tokens": 16, "temperature": 0.9, "seed": 2, "ignore_eos": True, "noise": noise}
    wanted = Engine(large).generate(PROMPTS[:3], **options)
    drafter = learned(large, MAKERS[name]()).for_decoding()
    ours = Engine(large, drafter, stand_down=False, check_integrity=True).generate(PROMPTS[:3], **options)
    assert [o.tokens for o in ours] == [o.tokens for o in wanted]
    assert sum(o.stats.drafted for o in ours) > 0


def test_a_vocabulary_smaller_than_a_piece_gives_all_its_tokens():
    """More tokens wanted than a piece of the vocabulary holds, several rows, greedy: the modules' order."""
    small = Target(make_model(**{**LARGE, "vocab_size": 300}))
    drafter = learned(small, Eagle3(draft_len=2, branches=16, nodes=40, vocabulary=20)).for_decoding()
    with torch.no_grad():
        y = torch.randn(2, 3, 256)
        net = drafter.module
        values, ids = net.compiled.best(y, 20, None, 1)
    assert torch.equal(ids.sort(-1).values, net.head.ids.expand_as(ids))
    assert bool((values[..., :-1] >= values[..., 1:]).all())
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(2, 3))
