"""T-LAYER and T-NORM of the EAGLE spec, on packed rows of every family."""

import pytest
import torch

from outpace.errors import ConfigError, UnsupportedError
from outpace.train.features import Ring, read_taps
from outpace.train.packing import Document, assemble
from tiny import FAMILIES, GENERIC, target

DOCUMENTS = [[5, 6, 7, 8, 9, 5, 6, 7, 11, 12, 30, 31, 32, 20], [3, 4, 5, 3, 4], [10] * 9]
PLACES = [(0, 0), (0, 14), (1, 0)]


def packed(name):
    a, b, c = (Document(ids, 2) for ids in DOCUMENTS)
    return assemble([[a, b], [c]], 24, target(name))


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, *GENERIC])
def test_taps_of_packed_documents_are_those_of_each_alone(name):
    model, batch = target(name).model, packed(name)
    inside = target(name).family is not None
    wanted = ("in:0", "in:2", "out:1", "pre_norm", "post_norm", "embed") if inside else ("post_norm",)
    found = read_taps(batch, wanted)
    assert set(found) == set(wanted)
    for (row, start), ids in zip(PLACES, DOCUMENTS, strict=True):
        span = (row, slice(start, start + len(ids)))
        out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        close = {"atol": 2e-4, "rtol": 2e-4}
        torch.testing.assert_close(model.get_output_embeddings()(found["post_norm"][span]), out.logits[0], **close)
        if inside:
            for tap, state in (("in:0", 0), ("in:2", 2), ("out:1", 2), ("embed", 0)):
                torch.testing.assert_close(found[tap][span], out.hidden_states[state][0], **close)
            assert model.config._attn_implementation_internal != "outpace_packed", "left as it was"


def test_what_a_model_cannot_give_is_refused():
    with pytest.raises(UnsupportedError, match="outside the family table"):
        read_taps(packed("stablelm"), ("in:2",))
    with pytest.raises(ConfigError, match="unknown tap"):
        read_taps(packed("llama"), ("layer 2",))
    assert read_taps(packed("llama"), ()) == {}


def test_a_ring_keeps_the_newest_within_its_bound(tmp_path):
    ring = Ring(tmp_path, 1 << 20)
    taps = {"in:2": torch.randn(2, 100, 256), "post_norm": torch.randn(2, 100, 256)}  # 400 KiB
    for name in "abc":
        ring.put(name, {tap: value + ord(name) for tap, value in taps.items()})
    assert ring.get("a", torch.device("cpu")) is None
    for name in "bc":
        kept = ring.get(name, torch.device("cpu"))
        assert torch.equal(kept["in:2"], taps["in:2"] + ord(name))
    assert ring.bytes <= 1 << 20
    assert Ring(tmp_path, 1 << 20).get("c", torch.device("cpu")) is not None, "found again by another run"
    ring.put("huge", {"x": torch.zeros(1 << 19)})
    assert ring.get("b", torch.device("cpu")) is not None, "what can never fit pushes nothing out"
    with pytest.raises(ConfigError, match="at least 1 MiB"):
        Ring(tmp_path, 10)
