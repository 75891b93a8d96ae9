"""Drafts in captured rounds on a CUDA device: the text of plain decoding, the drafts of the readable drafter."""

import copy

import pytest
import torch

from outpace import Engine
from outpace.drafters import Context, RequestContext
from outpace.drafters.eagle import Eagle, Eagle2, Eagle3
from outpace.drafters.growth import DEFAULT_PATHS
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.ptp import Ptp
from outpace.laws import Noise, NoiseDice, Sampler, Settings
from outpace.target import Target
from spies import paths_laid, served, trees_proposed
from tiny import PROMPTS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAKERS = {
    "eagle3": lambda: Eagle3(draft_len=4, branches=3, nodes=12, vocabulary=30),
    "eagle3 chain": lambda: Eagle3(draft_len=4, branches=1, nodes=4, layers=2, vocabulary=0),
    "eagle3 3.0": lambda: Eagle3(
        draft_len=4, branches=2, nodes=8, vocabulary=30, fc_norm=False, norm_output=False, norm_before_residual=True
    ),
    "eagle": lambda: Eagle(paths=DEFAULT_PATHS[:9]),
    "eagle2": lambda: Eagle2(draft_len=4, branches=3, nodes=12),
    "mtp": lambda: MTP(draft_len=4, branches=2, nodes=8, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=2, nodes=6, vocabulary=30),
    "medusa": lambda: Medusa(heads=2, nodes=6, vocabulary=30),
    "ptp": lambda: Ptp(**SLOTS, branches=3, nodes=12, budget=9, vocabulary=30),
    "ptp chain": lambda: Ptp(**SLOTS, branches=1, nodes=4, budget=60),
}
SLOTS = {"mode": "mask", "sampler": "eagle", "slots": 4, "rank": 5}


@pytest.fixture(autouse=True)
def ieee():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def target():
    return Target(make_model().cuda(), path="fast")


def awake(drafter, target):
    drafter.initialise(target, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return drafter


def drafts_laid(engine, monkeypatch):
    """Read the rows of a pass back behind every captured round; the graphs are those of steady state."""
    from outpace.engine.device.rounds import DeviceRounds

    found = {}
    round_graph = DeviceRounds._round_graph

    def spy(self, cache, inputs, lane, entries, taps, draft):
        graph = round_graph(self, cache, inputs, lane, entries, taps, draft)

        def replay():
            committed = (inputs.lengths + 1).tolist()  # a walk moves roots and lengths on, and leaves the nodes
            left = graph()
            torch.cuda.synchronize()
            for b, request in enumerate(engine._context.requests if draft is not None else ()):
                found[request.sampler.dice.request, committed[b]] = paths_laid(inputs, b)
            return left

        return replay

    monkeypatch.setattr(DeviceRounds, "_round_graph", spy)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", MAKERS)
def test_captured_drafts_are_those_of_propose(target, name, count, temperature, monkeypatch):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 5, "ignore_eos": True}
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[5]][:count]
    wanted = Engine(target, path="readable").generate(prompts, **options)
    drafter = awake(MAKERS[name](), target)
    readable = drafter.for_decoding()
    said = trees_proposed(readable)
    read = Engine(target, readable, path="readable", stand_down=False).generate(prompts, **options)
    engine = Engine(target, drafter, path="fast", stand_down=False, check_integrity=True)
    monkeypatch.setattr(drafter, "propose", None)  # not to be called
    with monkeypatch.context() as patch:
        found = drafts_laid(engine, patch)
        outputs = engine.generate(prompts, **options)
    assert [o.tokens for o in outputs] == [o.tokens for o in wanted]
    shared = {key for key in found.keys() & said.keys() if found[key] and said[key]}
    assert len(shared) >= 8 * count
    different = [key for key in shared if found[key] != said[key]]
    assert len(different) <= 0.05 * len(shared), "beyond what near ties explain"
    emitted = [sum(len(o.rounds_detail) for o in which) for which in (outputs, read)]
    assert abs(emitted[0] - emitted[1]) <= 0.1 * emitted[1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", MAKERS)
def test_requests_join_and_leave_captured_drafts(target, name, temperature):
    options = {"temperature": temperature, "seed": 5}
    lengths = [3, 30, 9, 17, 1, 25, 8, 12]
    wanted = [
        Engine(target, path="readable").generate(p, max_new_tokens=n, request=i, **options)[0].tokens
        for i, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    engine = Engine(target, awake(MAKERS[name](), target), path="fast", max_batch=3, check_integrity=True)
    for stand_down in (False, True):
        engine.pace.enabled = stand_down
        assert served(engine, PROMPTS, lengths, **options) == wanted


@pytest.mark.parametrize("name", ["eagle3", "mtp_heads", "medusa", "ptp"])
def test_steady_state_captures_nothing(target, name):
    engine = Engine(target, awake(MAKERS[name](), target), path="fast", stand_down=False)
    options = {"max_new_tokens": 60, "ignore_eos": True}
    for temperature in (0.0, 0.8):
        engine.generate(PROMPTS[:3], temperature=temperature, **options)
    before = target.fast.capture.graphs
    for temperature in (0.0, 0.8):
        engine.generate(PROMPTS[:3], temperature=temperature, **options)
    assert target.fast.capture.graphs == before


@torch.inference_mode()
@pytest.mark.parametrize("name", ["eagle3", "eagle3 3.0", "eagle", "mtp", "mtp_heads"])
def test_captured_readings_keep_what_eager_ones_do(name):
    """Both sides of a border, two pieces, one token, in one batch; once the cache no longer grows, none is captured."""
    target = Target(make_model(max_position_embeddings=2048).cuda(), path="fast")
    drafter = awake(MAKERS[name](), target)
    twin = drafter.for_decoding()
    pairs = [(drafter, Context(target, None)), (twin, Context(target.through("readable"), None))]
    generator = torch.Generator().manual_seed(7)
    for turn in range(3):
        before = target.fast.capture.graphs
        for _, context in pairs:
            context.requests.clear()
        for length in (33, 1, 34, 70, 700):
            tokens = torch.randint(0, 40, (length,), generator=generator).tolist()
            taps = {
                tap: torch.randn(1, length - 1, target.hidden_size, generator=generator).cuda()
                for tap in drafter.module.taps
            }
            for one, context in pairs:
                sampler = Sampler(Settings(), NoiseDice(Noise(0), 0), prompt_length=length, eos=())
                request = RequestContext(tokens, length, sampler, 40)
                context.requests.append(request)
                one.start(context, request, taps)
        for seat in range(5):
            rows = drafter.cache.lengths[seat]
            assert rows == twin.cache.lengths[seat] == int(drafter.cache.at[seat]) == int(twin.cache.at[seat])
            for ours, wanted in (
                (drafter.cache.keys[:, seat, :, :rows], twin.cache.keys[:, seat, :, :rows]),
                (drafter.cache.values[:, seat, :, :rows], twin.cache.values[:, seat, :, :rows]),
                (drafter.cache.top[seat], twin.cache.top[seat]),
            ):
                torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
        assert turn < 2 or target.fast.capture.graphs == before


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_a_second_prompt_of_a_shape_captures_nothing_and_waits_for_its_first_tokens_alone(target, name):
    engine = Engine(target, awake(MAKERS[name](), target), path="fast", stand_down=False)
    options = {"max_new_tokens": 8, "ignore_eos": True}
    engine.generate(PROMPTS[0], **options)
    before = target.fast.capture.graphs
    engine.submit(PROMPTS[0], **options)
    torch.cuda.set_sync_debug_mode("error")  # of operations; the round's event, which is waited for, is none
    try:
        progress = engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert progress[0].chunk.round.tokens
    assert target.fast.capture.graphs == before


def test_a_sequence_that_outgrows_the_drafters_cache_goes_on():
    target = Target(make_model(max_position_embeddings=2048).cuda(), path="fast")
    options = {"max_new_tokens": 700, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    wanted = Engine(target, path="readable").generate(PROMPTS[:2], **options)
    engine = Engine(target, awake(MAKERS["eagle3"](), target), stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS[:2], **options)] == [o.tokens for o in wanted]


def test_no_room_for_a_draft_names_the_shape_and_leaves_the_engine_usable(target, monkeypatch):
    from outpace.errors import OutOfMemoryError
    from outpace.target.fast import graphs

    engine = Engine(target, awake(MAKERS["eagle3"](), target), path="fast", stand_down=False)
    captured = graphs.Captured
    wanted = Engine(target).generate(PROMPTS[0], max_new_tokens=20)[0].tokens

    class Full(captured):
        def __init__(self, work, pool, warm=None):
            if warm is not None:  # readings, drafts and walks
                raise torch.OutOfMemoryError("CUDA out of memory.")
            super().__init__(work, pool, warm)

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "Captured", Full)
        with pytest.raises(OutOfMemoryError, match=r"reading of 1 x \d+ rows.*[Ll]ower max_batch"):
            engine.generate(PROMPTS[0], max_new_tokens=4)
    assert engine.generate(PROMPTS[0], max_new_tokens=20)[0].tokens == wanted


def test_bf16_chains_have_the_text_of_plain_decoding():
    changes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640, "vocab_size": 512}
    model = make_model(dtype=torch.bfloat16, sharpness=1.5, max_position_embeddings=2048, **changes).cuda()
    target = Target(copy.deepcopy(model), path="fast")
    drafter = awake(Eagle3(draft_len=5, branches=1, nodes=5, vocabulary=256), target).for_decoding()
    options = {"max_new_tokens": 100, "ignore_eos": True}
    for temperature in (0.0, 0.8):
        for seed in range(3):
            wanted = Engine(target).generate([PROMPTS[0] * 9], seed=seed, temperature=temperature, **options)
            found = Engine(target, drafter, stand_down=False).generate(
                [PROMPTS[0] * 9], seed=seed, temperature=temperature, **options
            )
            assert [o.tokens for o in found] == [o.tokens for o in wanted], (seed, temperature)


@pytest.mark.parametrize("rows", [1, 8, 17, 40])
@pytest.mark.parametrize("shape", [(512, 256), (4096, 4096), (1024, 14336), (130, 608)])
def test_products_in_eight_bits_are_those_of_the_weights_they_stand_for(rows, shape):
    from outpace.target.fast.linear import Follow, choose_tile, gated_linear, linear
    from outpace.target.fast.plan import Projection
    from outpace.target.skinny import in_eight_bits

    generator = torch.Generator("cuda").manual_seed(rows)
    make = lambda *size: torch.randn(*size, generator=generator, device="cuda").bfloat16()  # noqa: E731
    width, depth = shape
    x, weight, residual, gamma = make(rows, depth), make(width, depth) / depth**0.5, make(rows, width), make(width)
    numbers, scales = in_eight_bits(weight)
    wanted = x.double() @ (numbers.double() * scales.double()[:, None]).T
    assert 1e-3 < float((wanted - x.double() @ weight.double().T).norm() / wanted.norm()) < 0.02
    projection = Projection(numbers, None, scales)
    tile, follow = choose_tile(numbers), Follow(gamma, 0.0)
    out, scaled = linear(x, projection, tile=tile, residual=residual, follow=follow, pdl=True)
    gate, up = wanted.chunk(2, 1)
    inner = gated_linear(x, projection, tile=choose_tile(numbers, 2), gelu=False, pdl=True)
    for found, exact in (
        (out, wanted + residual.double()),
        (scaled.rows, out.double() * gamma.double()),
        (scaled.squares.sum(1), out.double().square().sum(1)),
        (inner, torch.nn.functional.silu(gate) * up),
    ):
        assert float((found.double() - exact).norm() / exact.norm()) < 3e-3


@pytest.mark.parametrize("branches", [1, 3])
def test_drafts_in_eight_bits_have_the_text_of_plain_decoding(branches, monkeypatch):
    from outpace.drafters.device import plan

    changes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640, "vocab_size": 512}
    model = make_model(dtype=torch.bfloat16, sharpness=1.5, max_position_embeddings=2048, **changes).cuda()
    target = Target(model, path="fast")
    options = {"max_new_tokens": 60, "ignore_eos": True, "seed": 1}
    emitted = {}
    for bits, least in ((16, plan._LEAST), (8, 1)):
        monkeypatch.setattr(plan, "_LEAST", least)
        drafter = awake(Eagle3(draft_len=4, branches=branches, nodes=4, vocabulary=256), target).for_decoding()
        engine = Engine(target, drafter, stand_down=False, check_integrity=True)
        for temperature in (0.0, 0.8):
            wanted = Engine(target).generate(PROMPTS[:3], temperature=temperature, **options)
            found = engine.generate(PROMPTS[:3], temperature=temperature, **options)
            assert branches > 1 or [o.tokens for o in found] == [o.tokens for o in wanted]
            emitted[bits, temperature] = sum(len(o.rounds_detail) for o in found)
        assert drafter.device_draft().drafted.head.weight.dtype == (torch.int8 if bits == 8 else torch.bfloat16)
        assert drafter.device_draft().plan.head.weight.dtype == torch.bfloat16
    for temperature in (0.0, 0.8):
        assert abs(emitted[8, temperature] - emitted[16, temperature]) <= 0.1 * emitted[16, temperature]
