"""On CPU in bfloat16 a row's logits are the same bits whatever rides beside it, where passes are not compiled.

This pins down three facts about PyTorch's kernels (see outpace.target.attention and BlockCache.attended). If a new
release breaks one, this test says so before a user's text changes.
"""

import pytest
import torch

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.laws import Tree
from outpace.target import Block, Target
from tiny import learned, make_model

SHAPES = {
    "three query heads a group": {
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "head_dim": 64,
    },
    "one": {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256, "head_dim": 64},
    "four": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "head_dim": 64},
}
ROWS = [2, 3, 4, 5, 7, 8, 9, 11, 12, 16, 17, 22, 24]


@pytest.fixture(autouse=True, scope="module")
def _uncompiled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPACE_NATIVE", "off")
        yield


@pytest.fixture(scope="module", params=SHAPES)
def target(request):
    shape = {**SHAPES[request.param], "num_hidden_layers": 3, "intermediate_size": 768, "vocab_size": 2048}
    model = make_model(dtype=torch.bfloat16, sharpness=1.5, max_position_embeddings=2048, **shape)
    found = Target(model)
    if not (found.pairs_rows and torch.cpu._is_avx512_bf16_supported()):
        pytest.skip("this CPU has no AVX-512 bfloat16 products; the kernels it uses instead make no such promise")
    return found


def text(length, size):
    return torch.randint(0, size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.inference_mode()
@pytest.mark.parametrize("length", [3, 60, 126, 300, 505])
def test_logits_do_not_depend_on_the_rows_beside(target, length):
    ids = text(length + 40, target.vocabulary)
    cache = target.new_cache()
    target.prefill(ids[:length], cache)
    limit = cache.attended(length + 2)
    known = None
    for rows in [row for row in ROWS if length + row <= limit]:
        logits = target.run(Block.chain([ids[length : length + rows]], cache.lengths, target.device), cache).logits
        cache.drop()
        known = logits if known is None or rows > known.shape[1] else known
        common = min(rows, known.shape[1])
        assert torch.equal(logits[:, :common], known[:, :common]), f"{rows} rows behind {length} tokens"


@torch.inference_mode()
def test_the_first_path_of_a_tree_is_a_chain(target):
    ids = text(80, target.vocabulary)
    cache = target.new_cache()
    target.prefill(ids[:60], cache)
    tree = Tree([ids[61], ids[62], 5, 6], [-1, 0, -1, 0])
    branching = target.run(Block.of([ids[60]], [tree], cache.lengths, target.device), cache).logits
    cache.drop()
    chain = target.run(Block.chain([ids[60:63]], cache.lengths, target.device), cache).logits
    assert torch.equal(branching[:, :3], chain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bf16_text_is_the_same_with_and_without_drafts(target, temperature):
    """Bit for bit, over 150 sampled tokens with drafts that are often wrong: no near tie can flip."""
    prompt = text(24, 40)
    want = Engine(target).generate([prompt], max_new_tokens=150, temperature=temperature, seed=5)[0]
    for spec in ("layer_skip:draft_len=5", "prompt_lookup:min_ngram=1,draft_len=12"):
        got = Engine(target, spec, stand_down=False).generate(
            [prompt], max_new_tokens=150, temperature=temperature, seed=5
        )[0]
        assert got.tokens == want.tokens
    assert got.stats.drafted > 0


def test_strict_makes_batches_equal_too(target):
    prompts = [text(n, 40) for n in (5, 140, 30)]
    alone = [
        Engine(target, strict=True).generate([p], max_new_tokens=40, temperature=1.0, request=3)[0] for p in prompts
    ]
    engine = Engine(target, "prompt_lookup:min_ngram=1", strict=True, stand_down=False)
    batch = engine.generate(prompts, max_new_tokens=40, temperature=1.0, request=3)
    assert [o.tokens for o in batch] == [o.tokens for o in alone]


@pytest.mark.parametrize("spec", ["ptp:mode=mask,rank=4,min_gain=0,budget=64", "lookahead"])
def test_scouts_stay_among_the_entries_that_plain_decoding_reads(spec, monkeypatch):
    """Whatever the processor: past a multiple of 128 entries attention takes another kernel, for main rows too."""
    target = Target(make_model(dtype=torch.bfloat16, max_position_embeddings=512).requires_grad_(False))
    assert target.pairs_rows
    drafter = learned(target, spec, shaken=True) if spec.startswith("ptp") else make_drafter(spec)
    passes, run = [], Target.run

    def watch(self, block, cache, **options):
        scouts = 0 if block.scouts is None else block.scouts.positions.shape[1]
        passes.append((cache.lengths[0], block.rows, scouts, cache.attended(cache.lengths[0] + 2)))
        return run(self, block, cache, **options)

    monkeypatch.setattr(Target, "run", watch)
    engine = Engine(target, drafter, stand_down=False, path="readable")
    engine.generate([[5, 6, 7, 8] * 20], max_new_tokens=120, ignore_eos=True)
    engine.close()
    rounds = [one for one in passes if one[1] >= 2]
    assert all(length + rows + scouts <= reach for length, rows, scouts, reach in rounds)
    assert sum(scouts > 0 for *_, scouts, _ in rounds) > len(rounds) / 2
    assert any(scouts == 0 or length + rows + scouts == reach for length, rows, scouts, reach in rounds), "none was cut"
