"""Rows behind a frozen context: the training pass must be the decoding pass, for every family, and leak nowhere."""

import pytest
import torch

from outpace.errors import UnsupportedError
from outpace.target import Block, GatedLoRA, Scouts, Spans, Target, read, run_behind
from tiny import FAMILIES, PROMPTS, make_model

DOCUMENTS = [PROMPTS[4], PROMPTS[0], PROMPTS[2]]
SLOTS = 3


@pytest.fixture(params=FAMILIES)
def target(request):
    return Target(make_model(request.param, dtype=torch.float64).requires_grad_(False))


@pytest.fixture(scope="module")
def exact_llama():
    return Target(make_model(dtype=torch.float64, max_position_embeddings=512).requires_grad_(False))


def adapter_of(target, seed=0):
    adapter = GatedLoRA.for_all_layers(target.model, rank=2).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return adapter


def packed():
    """Two rows: two documents and padding, one document."""
    rows = [[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[2]]]
    tokens, documents, positions = (torch.zeros(2, 24, dtype=torch.int64) for _ in range(3))
    for b, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, 1):
            tokens[b, at : at + len(document)] = torch.tensor(document)
            documents[b, at : at + len(document)] = number
            positions[b, at : at + len(document)] = torch.arange(len(document))
            at += len(document)
        positions[b, at:] = torch.arange(24 - at)
    return tokens, documents, positions


STARTS = torch.tensor([[2, 9, 17], [1, 4, 6]])


def run(target, adapter, embeds, tokens, documents, positions, kernel="dense"):
    reading = read(target, tokens, documents, positions, kernel)
    at = (positions.gather(1, STARTS)[..., None] + torch.arange(SLOTS)).flatten(1)
    rows = run_behind(target, reading, embeds, at, Spans.of(STARTS, documents), adapter, kernel)
    return reading, rows


def embeds_of(target, seed=3):
    shape = (2, STARTS.shape[1] * SLOTS, target.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.inference_mode()
def test_reading_packed_documents_is_reading_each(target):
    tokens, documents, positions = packed()
    hidden = read(target, tokens, documents, positions).hidden
    logits = target.model.get_output_embeddings()(hidden)
    for document, (b, at) in zip(DOCUMENTS, [(0, 0), (0, len(DOCUMENTS[0])), (1, 0)], strict=True):
        alone = target.model(torch.tensor([document]), use_cache=False).logits[0]
        torch.testing.assert_close(logits[b, at : at + len(document)], alone, atol=1e-9, rtol=0)


@torch.inference_mode()
def test_windows_of_training_are_scouts_of_decoding(target):
    """Each window run in a pass of its own, behind a cache, with the rows before it as main rows."""
    tokens, documents, positions = packed()
    adapter, embeds = adapter_of(target), embeds_of(target)
    _, rows = run(target, adapter, embeds, tokens, documents, positions)
    found = target.model.get_output_embeddings()(rows.hidden)
    with target.adapted(adapter):
        for b in range(2):
            for w, start in enumerate(STARTS[b].tolist()):
                first = int((documents[b] == documents[b, start]).nonzero()[0])
                context = tokens[b, first:start].tolist()
                cache = target.new_cache()
                target.prefill(context[:-1], cache)
                window = slice(w * SLOTS, (w + 1) * SLOTS)
                visible = torch.cat([torch.ones(SLOTS, 1), torch.ones(SLOTS, SLOTS).tril()], 1).bool()
                scouts = Scouts(
                    (len(context) + torch.arange(SLOTS))[None], visible[None], embeds=embeds[b : b + 1, window],
                    adapter=adapter,
                )  # fmt: skip
                root = Block.chain([context[-1:]], cache.lengths, target.device)
                scouted = target.run(Block(root.tokens, root.positions, None, scouts), cache).scout_logits
                torch.testing.assert_close(found[b, window], scouted[0], atol=1e-9, rtol=0)


@torch.inference_mode()
def test_what_a_window_cannot_see_does_not_change_it(target):
    tokens, documents, positions = packed()
    adapter, embeds = adapter_of(target), embeds_of(target)
    reading, rows = run(target, adapter, embeds, tokens, documents, positions)
    w, start = 1, int(STARTS[0, 1])
    mine = slice(w * SLOTS, (w + 1) * SLOTS)

    def difference(tokens=tokens, embeds=embeds, where=mine):
        changed = run(target, adapter, embeds, tokens, documents, positions)[1]
        return float((changed.hidden[0, where] - rows.hidden[0, where]).abs().max())

    later = tokens.clone()
    later[0, start:] = 11
    assert difference(tokens=later) == 0, "real tokens from its start on"
    elsewhere = embeds.clone()
    elsewhere[0, : w * SLOTS] = 5
    elsewhere[0, (w + 1) * SLOTS :] = 5
    assert difference(embeds=elsewhere) == 0, "other windows"
    middle = embeds.clone()
    middle[0, w * SLOTS + 1] += 1
    assert difference(embeds=middle, where=slice(w * SLOTS, w * SLOTS + 1)) == 0, "slots after one"
    assert difference(embeds=middle, where=slice(w * SLOTS + 2, w * SLOTS + 3)) > 1e-6, "and what it sees does"
    earlier = tokens.clone()
    earlier[0, start - 1] = 11
    assert difference(tokens=earlier) > 1e-6
    other = tokens.clone()
    other[0, : len(DOCUMENTS[0])] = 11
    last = slice(2 * SLOTS, 3 * SLOTS)
    assert difference(tokens=other, where=last) == 0, "another document of the row"
    again = read(target, tokens, documents, positions)
    assert torch.equal(again.hidden, reading.hidden), "and real rows see no slot at all"


@torch.inference_mode()
def test_windows_run_slot_by_slot_are_windows_run_at_once(target):
    tokens, documents, positions = packed()
    adapter, embeds = adapter_of(target), embeds_of(target)
    reading, whole = run(target, adapter, embeds, tokens, documents, positions)
    at, count = whole.positions.view(2, -1, SLOTS), STARTS.shape[1]
    spans, earlier = Spans.of(STARTS, documents), None
    for part in (slice(0, 2), slice(2, 3)):
        rows = run_behind(
            target, reading, embeds.unflatten(1, (count, SLOTS))[:, :, part].flatten(1, 2), at[:, :, part].flatten(1),
            spans, adapter, earlier=earlier,
        )  # fmt: skip
        earlier = rows if earlier is None else earlier.grown(rows, count)
    torch.testing.assert_close(earlier.hidden, whole.hidden, atol=1e-9, rtol=0)
    assert torch.equal(earlier.positions, whole.positions)


def test_spans_are_ranges_of_documents_and_rows_of_windows():
    _, documents, _ = packed()
    seen = Spans.of(STARTS, documents).mask(24, 9, 9)
    for b in range(2):
        for row in range(9):
            w, start = row // SLOTS, int(STARTS[b, row // SLOTS])
            for key in range(33):
                own = key - 24
                wanted = (key < start and documents[b, key] == documents[b, start]) or (
                    own // SLOTS == w and own <= row
                )
                assert bool(seen[b, row, key]) == wanted


def test_gradients_reach_adapter_and_embeddings_and_nothing_else(target):
    tokens, documents, positions = packed()
    adapter, embeds = adapter_of(target), embeds_of(target).requires_grad_()
    _, rows = run(target, adapter, embeds, tokens, documents, positions)
    rows.hidden.sum().backward()
    assert bool((embeds.grad.abs().sum(-1) > 0).all())
    assert all(float(p.grad.abs().sum()) > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in target.model.parameters())


def test_models_outside_the_table_are_refused_with_the_reason():
    target = Target(make_model("stablelm"))
    with pytest.raises(UnsupportedError, match="scouts cannot be trained for it"):
        read(target, *packed())
