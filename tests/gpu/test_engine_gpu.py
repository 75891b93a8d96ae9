"""The promise on a CUDA device: outright in float32, up to near ties in bfloat16."""

import copy

import pytest
import torch

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.drafters.draft_model import DraftModel
from outpace.target import Block, Target
from spies import served
from tiny import DRAFTERS, FAMILIES, PROMPTS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    torch.backends.cuda.matmul.allow_tf32 = False
    big = make_model(request.param)
    return request.param, Target(copy.deepcopy(big).cuda())


def drafter_for(name, target):
    if name.startswith("draft_model"):
        draw = name.split()[1]
        return DraftModel(model=Target(copy.deepcopy(target.model)), draft_len=4, draw=draw)
    return DRAFTERS[name](target)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_path_equality_in_float32(pair, drafter, temperature):
    _, target = pair
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 3}
    wanted = Engine(target, check_integrity=True).generate(PROMPTS[:3], **options)
    engine = Engine(target, drafter_for(drafter, target), stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS[:3], **options)] == [o.tokens for o in wanted]


def test_cuda_and_cpu_tell_the_same_text(pair):
    """Same noise on every device; float32 laws differ in the last bits, which these seeds do not hit."""
    name, target = pair
    options = {"max_new_tokens": 20, "temperature": 0.9, "seed": 3}
    cpu = Engine(Target(make_model(name))).generate(PROMPTS[:3], **options)
    assert [o.tokens for o in Engine(target).generate(PROMPTS[:3], **options)] == [o.tokens for o in cpu]


@torch.inference_mode()
def test_noise_is_the_same_on_every_device():
    from outpace.laws import Noise

    request, position = torch.arange(5)[:, None], torch.arange(1000)
    noise = Noise(2**63 + 5)
    assert torch.equal(noise.grid(request.cuda(), position.cuda()).cpu(), noise.grid(request, position))


@torch.inference_mode()
def test_bf16_tree_rows_are_near_plain_passes():
    model = make_model(dtype=torch.bfloat16, hidden_size=256, head_dim=64, vocab_size=512, sharpness=1.5).cuda()
    target = Target(model)
    cache = target.new_cache()
    target.prefill(PROMPTS[0], cache)
    read = target.run(Block.chain([[9, 5, 6, 7]], cache.lengths, target.device), cache)
    plain = model(torch.tensor([[*PROMPTS[0], 9, 5, 6, 7]], device="cuda"), use_cache=False).logits[0, -4:]
    scale = plain.abs().max()
    assert float((read.logits[0] - plain).abs().max() / scale) < 0.03


def test_bf16_engine_runs_every_drafter():
    target = Target(make_model(dtype=torch.bfloat16, sharpness=2.0).cuda())
    for spec in ("prompt_lookup:min_ngram=1", "suffix", "lookahead", "layer_skip"):
        output = Engine(target, make_drafter(spec), stand_down=False, check_integrity=True).generate(
            PROMPTS[:3], max_new_tokens=16, temperature=1.0
        )
        assert all(len(o.tokens) <= 16 for o in output)


# --- the captured loop against the readable one


@pytest.mark.parametrize("drafter", [None, "prompt_lookup:min_ngram=1,branches=3,draft_len=5", "suffix"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_captured_loop_emits_what_the_readable_one_does(pair, drafter, temperature):
    _, target = pair
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 11}
    wanted = Engine(target, drafter, path="readable", stand_down=False).generate(PROMPTS, **options)
    engine = Engine(target, drafter, path="fast", stand_down=False, check_integrity=True)
    found = engine.generate(PROMPTS, **options)
    assert [o.tokens for o in found] == [o.tokens for o in wanted]
    assert [o.stats.accepted_at for o in found] == [o.stats.accepted_at for o in wanted]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_requests_join_and_leave_the_captured_loop(pair, temperature):
    _, target = pair
    options = {"temperature": temperature, "seed": 5}
    lengths = [3, 30, 9, 17, 1, 25, 8, 12]
    wanted = [
        Engine(target, path="readable").generate(p, max_new_tokens=n, request=i, **options)[0].tokens
        for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    engine = Engine(target, path="fast", max_batch=3, check_integrity=True)
    assert served(engine, PROMPTS, lengths, **options) == wanted


def test_a_sequence_that_outgrows_its_bucket_goes_on():
    target = Target(make_model(max_position_embeddings=2048).cuda())
    options = {"max_new_tokens": 700, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    wanted = Engine(target, path="readable").generate(PROMPTS[:2], **options)
    engine = Engine(target, "suffix", path="fast", stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS[:2], **options)] == [o.tokens for o in wanted]
    before = target.fast.capture.graphs
    assert [o.tokens for o in engine.generate(PROMPTS[:2], **options)] == [o.tokens for o in wanted]
    assert target.fast.capture.graphs == before  # steady state captures nothing


def test_bf16_chains_are_equal_bit_for_bit():
    changes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640, "vocab_size": 512}
    model = make_model(dtype=torch.bfloat16, sharpness=1.5, max_position_embeddings=2048, **changes).cuda()
    target = Target(model)
    options = {"max_new_tokens": 200, "temperature": 0.8, "ignore_eos": True}
    for seed in range(8):
        wanted = Engine(target).generate([PROMPTS[0] * 9], seed=seed, **options)
        found = Engine(target, "prompt_lookup:min_ngram=1", stand_down=False).generate(
            [PROMPTS[0] * 9], seed=seed, **options
        )
        assert [o.tokens for o in found] == [o.tokens for o in wanted], seed


@pytest.mark.parametrize("drafter", [None, "prompt_lookup:min_ngram=1,branches=3,draft_len=5"])
@pytest.mark.parametrize(
    "law", [{"top_p": 0.8}, {"top_k": 7, "noise": "uniform"}, {"top_p": 0.95, "min_p": 0.05}], ids=str
)
def test_truncated_laws_stay_on_the_device(pair, law, drafter, monkeypatch):
    from outpace.engine import engine as engine_module

    _, target = pair
    options = {"max_new_tokens": 40, "temperature": 1.1, "seed": 11, **law}
    wanted = Engine(target, path="readable").generate(PROMPTS, **options)
    engine = Engine(target, drafter, path="fast", stand_down=False, check_integrity=True)
    monkeypatch.setattr(engine_module, "play_round", None)  # not to be called
    assert [o.tokens for o in engine.generate(PROMPTS, **options)] == [o.tokens for o in wanted]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "law", [{"top_k": 50}, {"top_p": 0.9}, {"top_p": 0.999, "top_k": 3000}, {"min_p": 0.02}], ids=str
)
def test_a_large_vocabulary_is_truncated_as_warp_does(law, dtype):
    from outpace.engine.device.truncation import Cutter, Truncation
    from outpace.laws import Settings, warp
    from truncated import kept_ids

    logits = (2.5 * torch.randn(2, 3, 151_936, generator=torch.Generator().manual_seed(0))).to("cuda", dtype)
    laws = [Settings(temperature=heat, **law) for heat in (0.7, 1.3)]
    cut = Truncation.room(2, logits.device)
    by = cut.load(laws)
    cutter = Cutter(8, 151_936, logits.device)
    cutter(logits, torch.tensor([0.7, 1.3], device="cuda"), cut, by)
    for b, one in enumerate(laws):
        wanted, mass = warp(logits[b].float(), one) > 0, torch.softmax(logits[b].double() / one.temperature, -1)
        for row in range(3):
            found = kept_ids(logits[b, row], int(cutter.cuts[3 * b + row]), int(cutter.lasts[3 * b + row]))
            assert float(mass[row][found != wanted[row]].sum()) < 1e-6


@pytest.mark.parametrize("drafter", [None, "prompt_lookup:min_ngram=1,branches=3,draft_len=5"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_laws_with_a_history_stay_on_the_device(pair, temperature, drafter, monkeypatch):
    from outpace.engine import engine as engine_module

    _, target = pair
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 3, "min_new_tokens": 5}
    options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": {7: 2.0}}
    wanted = Engine(target, path="readable").generate(PROMPTS, **options)
    engine = Engine(target, drafter, path="fast", stand_down=False, check_integrity=True)
    monkeypatch.setattr(engine_module, "play_round", None)  # not to be called
    assert [o.tokens for o in engine.generate(PROMPTS, **options)] == [o.tokens for o in wanted]


def test_processors_take_the_readable_round_over_captured_passes(pair):
    _, target = pair
    options = {"max_new_tokens": 20, "temperature": 0.9, "seed": 3, "processors": (lambda ids, scores: scores / 2,)}
    wanted = Engine(target, path="readable").generate(PROMPTS[:3], **options)
    assert [o.tokens for o in Engine(target, "suffix").generate(PROMPTS[:3], **options)] == [o.tokens for o in wanted]


def test_no_room_is_an_error_that_names_the_shape_and_leaves_the_engine_usable(monkeypatch):
    from outpace.errors import OutOfMemoryError
    from outpace.target.fast import graphs

    target = Target(make_model().cuda(), path="fast")
    engine = Engine(target)
    assert target.captured is not None  # opened now: what fails is a pass, not its pool

    class Full:
        def __init__(self, *_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "Captured", Full)
        with pytest.raises(OutOfMemoryError, match=r"1 x \d+ rows.*[Ll]ower max_batch"):
            engine.generate(PROMPTS[0], max_new_tokens=4)
    assert len(engine.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)[0].tokens) == 4
