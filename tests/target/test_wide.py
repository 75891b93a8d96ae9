"""Passes over many rows through joined weights: the modules' numbers and gradients, compiled once for all layers."""

import pytest
import torch

from outpace.target import GatedLoRA, Spans, Target, read, run_behind
from outpace.target.fast import wide as wide_module
from outpace.target.fast.wide import wide_pass
from tiny import FAMILIES, make_model

TOKENS = torch.arange(2 * 12).view(2, 12) % 50
DOCUMENTS = torch.tensor([[1] * 7 + [2] * 5, [1] * 12])
POSITIONS = torch.tensor([[*range(7), *range(5)], [*range(12)]])


def rows_behind(target, adapter, embeds):
    reading = read(target, TOKENS, DOCUMENTS, POSITIONS)
    where = torch.tensor([[5, 6, 7], [3, 4, 5]])
    spans = Spans.of(torch.full((2, 3), 3), DOCUMENTS)
    rows = run_behind(target, reading, embeds, where, spans, adapter)
    return reading.hidden, rows.hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_the_modules_numbers_and_gradients(family):
    model = make_model(family, dtype=torch.float64).requires_grad_(False)
    adapter = GatedLoRA.for_all_layers(model, rank=2).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    found = {}
    for path in ("readable", "auto"):
        target = Target(model, path=path)
        assert (wide_pass(target, 12) is None) == (path == "readable")
        embeds = torch.randn(2, 3, target.hidden_size, generator=generator.manual_seed(2), dtype=torch.float64)
        embeds.requires_grad_()
        hidden, rows = rows_behind(target, adapter, embeds)
        leaves = [embeds, *adapter.parameters()]
        found[path] = [hidden, rows, *torch.autograd.grad((rows * rows.detach().cos()).sum(), leaves)]
    for ours, wanted in zip(found["auto"], found["readable"], strict=True):
        # angles come from tables in the model's dtype, norms are float32 in both
        torch.testing.assert_close(ours, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_weights_that_learn_take_the_modules():
    target = Target(make_model())
    assert wide_pass(target, 12) is None
    with torch.no_grad():
        assert wide_pass(target, 12) is not None


def test_positions_beyond_the_tables_take_the_modules():
    target = Target(make_model(max_position_embeddings=64).requires_grad_(False))
    assert wide_pass(target, 64) is not None
    assert wide_pass(target, 65) is None


def test_one_compilation_serves_all_layers(monkeypatch):
    """With the graphs of the compiler run as they are traced."""
    traced = []

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    def compiled(function, **options):
        assert options == {"fullgraph": True, "dynamic": False}
        return original(function, backend=backend, **options)

    original = torch.compile
    model = make_model(num_hidden_layers=4).requires_grad_(False)
    adapter = GatedLoRA.for_all_layers(model, rank=2)
    target = Target(model)
    embeds = torch.randn(2, 3, target.hidden_size, requires_grad=True)
    wanted = rows_behind(target, adapter, embeds)
    monkeypatch.setattr(torch, "compile", compiled)
    halves = wide_module._halves.__wrapped__(compiled=True)
    monkeypatch.setattr(wide_module, "_halves", lambda _: halves)
    for ours, one in zip(rows_behind(target, adapter, embeds), wanted, strict=True):
        torch.testing.assert_close(ours, one)
    assert len(traced) == 4  # two halves, read without an adapter and behind with one
