"""Prompts read in captured pieces of static shape: what the eager reading leaves, whoever sat there before."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.drafters import Context, RequestContext
from outpace.drafters.device import fused
from outpace.drafters.device.following import FollowingDraft
from outpace.drafters.eagle import Eagle, Eagle2, Eagle3
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.laws import Noise, NoiseDice, Sampler, Settings
from uncaptured import uncaptured_target

MAKERS = {
    "eagle": lambda: Eagle(),
    "eagle3": lambda: Eagle3(draft_len=3, branches=2, nodes=6, layers=2, vocabulary=30, taps=("in:0", "in:1")),
    "eagle3 3.0": lambda: Eagle3(
        draft_len=3, branches=2, nodes=6, fc_norm=False, norm_output=False, norm_before_residual=True,
        taps=("in:0", "in:1"),
    ),
    "eagle3 normed fc": lambda: Eagle3(
        draft_len=3, branches=2, nodes=6, fc_norm=False, norm_before_fc=True, taps=("in:0", "in:1")
    ),
    "eagle2": lambda: Eagle2(draft_len=3, branches=2, nodes=5),
    "mtp": lambda: MTP(draft_len=3, branches=2, nodes=6, vocabulary=0),
    "mtp 2": lambda: MTP(draft_len=3, branches=2, nodes=6, order="hidden_embed", chain_norm="none", tap="pre_norm"),
    "mtp_heads": lambda: MTPHeads(heads=2, nodes=5, vocabulary=30),
}  # fmt: skip


@pytest.fixture
def _unfused(monkeypatch):
    """Readings by the functions of `growth`: the interpreter takes long over fused kernels."""
    monkeypatch.setattr(fused, "device_draft", FollowingDraft)


class Reader:
    """A drafter that reads prompts and rounds without an engine."""

    def __init__(self, drafter, target):
        self.drafter, self.context = drafter, Context(target, None)

    def start(self, tokens, taps, remaining=40):
        sampler = Sampler(Settings(), NoiseDice(Noise(0), 0), prompt_length=len(tokens), eos=())
        request = RequestContext(list(tokens), len(tokens), sampler, remaining)
        self.context.requests.append(request)
        self.drafter.start(self.context, request, taps)
        return request

    def kept(self):
        """Per request: keys, values, the last output, and how many rows."""
        cache, found = self.drafter.cache, []
        for seat in self.drafter.seats.order(self.context):
            rows = cache.lengths[seat]
            assert rows == int(cache.at[seat])
            found.append((cache.keys[:, seat, :, :rows], cache.values[:, seat, :, :rows], cache.top[seat], rows))
        return found


def readers(name, monkeypatch, **changes):
    """The same drafter twice: one captures its readings, one does not."""
    target = uncaptured_target(monkeypatch, max_position_embeddings=2048, **changes)
    drafter = MAKERS[name]()
    drafter.initialise(target, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    twin = drafter.for_decoding()
    return Reader(drafter, target), Reader(twin, target.through("readable"))


def prompt(drafter, length, seed):
    """Tokens, and taps as a prefill gives them: of all tokens but the root."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (length,), generator=generator).tolist()
    size = drafter.target.hidden_size
    taps = {name: torch.randn(1, length - 1, size, generator=generator) for name in drafter.module.taps}
    return tokens, taps if length > 1 else {}


def assert_same(ours, theirs):
    """The two have kept the same, up to the order in which products of other widths add up."""
    pairs = zip(ours.kept(), theirs.kept(), strict=True)
    for (*mine, rows), (*wanted, same) in pairs:
        assert rows == same
        for one, two in zip(mine, wanted, strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)


@torch.inference_mode()
@pytest.mark.parametrize("name", MAKERS)
def test_a_captured_reading_keeps_what_the_eager_one_does(name, monkeypatch):
    """Lengths on both sides of borders, one longer than two pieces, one of a single token."""
    ours, theirs = readers(name, monkeypatch)
    monkeypatch.setattr("outpace.drafters.follower.PREFILL_CHUNK", 12)
    lengths = [9, 1, 10, 2, 31]
    for seed, length in enumerate(lengths):
        tokens, taps = prompt(ours.drafter, length, seed)
        for reader in (ours, theirs):
            reader.start(tokens, taps)
        assert_same(ours, theirs)
    assert [rows for *_, rows in ours.kept()] == [length - 1 for length in lengths]


@torch.inference_mode()
@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize("length", [500, 513, 1100])
def test_long_prompts_are_read_in_pieces(length, monkeypatch):
    ours, theirs = readers("eagle3", monkeypatch)
    for reader in (ours, theirs):
        reader.start(*prompt(ours.drafter, length, length))
    assert_same(ours, theirs)


@pytest.mark.usefixtures("_unfused")
@torch.inference_mode()
def test_shapes_are_captured_once_and_serve_every_seat(monkeypatch):
    ours, theirs = readers("eagle3", monkeypatch)
    capture = ours.context.target.fast.capture
    lengths = (20, 40, 70, 21)

    def serve(seed):
        for length in lengths:
            for reader in (ours, theirs):
                reader.start(*prompt(ours.drafter, length, seed + length))
            assert_same(ours, theirs)
        for leaves in (1, 0):  # seats are taken up in another order
            for reader in (ours, theirs):
                del reader.context.requests[leaves]
        for length in (22, 39):
            for reader in (ours, theirs):
                reader.start(*prompt(ours.drafter, length, seed + length))
        assert_same(ours, theirs)
        for reader in (ours, theirs):
            reader.context.requests.clear()
            reader.drafter.seats.update(reader.context)

    serve(1)
    before = capture.graphs
    serve(100)
    assert capture.graphs == before
    ours.drafter.cache.reserve(capacity=4096)
    serve(200)
    assert capture.graphs > before, "the cache has moved"
    assert len(ours.drafter.device_draft()._readings[ours.context.target.fast]) <= 3, "graphs of a cache that is gone"


@pytest.mark.usefixtures("_unfused")
@torch.inference_mode()
def test_padding_never_reads_what_another_request_left(monkeypatch):
    ours, theirs = readers("eagle3", monkeypatch)
    tokens, taps = prompt(ours.drafter, 32, 1)
    ours.start(tokens, {name: tap * float("nan") for name, tap in taps.items()})
    ours.context.requests.clear()
    for reader in (ours, theirs):
        reader.start(*prompt(ours.drafter, 27, 2))
    for tensors in (ours.drafter.cache.keys, ours.drafter.cache.values):
        assert tensors[:, 0, :, :32].isfinite().all()
    assert_same(ours, theirs)


@pytest.mark.usefixtures("_unfused")
@torch.inference_mode()
@pytest.mark.parametrize("beyond", [0, 3])
def test_rows_owed_by_several_requests_are_read_at_once(beyond, monkeypatch):
    ours, theirs = readers("eagle3", monkeypatch)
    generator = torch.Generator().manual_seed(6)
    for reader in (ours, theirs):
        for seed, length in enumerate((9, 30, 5, 12)):
            reader.start(*prompt(ours.drafter, length, seed))
    size = len(ours.drafter.module.taps) * ours.drafter.target.hidden_size
    for number, count in ((0, 2), (1, 9), (3, 4), (1, 1)):
        features, tokens = torch.randn(count, size, generator=generator), list(range(count))
        for reader in (ours, theirs):
            reader.drafter.owe(reader.context.requests[number], features, tokens)
    for reader in (ours, theirs):
        reader.drafter.read_owed(reader.context, beyond=beyond)
    assert_same(ours, theirs)
    assert [rows for *_, rows in ours.kept()] == [8 + (0 if beyond else 2), 39, 4, 15]
    assert [ours.drafter.owes(request) for request in ours.context.requests] == [2 if beyond else 0, 0, 0, 0]
