"""T-LAYER and T-NORM of the EAGLE spec, on packed rows of every family."""

import pytest
import torch

from outpace.errors import ConfigError, UnsupportedError
from outpace.train import features, loop
from outpace.train.features import KeptRows, read_taps
from outpace.train.packing import Document, assemble
from tiny import FAMILIES, GENERIC, target
from train.corpora import MAKERS, corpus, trainer

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


SHAPE = (24, 32)  # tokens of a row, width


def kept(**options):
    return KeptRows(SHAPE, torch.float32, torch.device("cpu"), ("post_norm", "in:2"), **options)


def made(rows):
    """States that name their row."""
    states = torch.arange(24 * 32).view(SHAPE)
    return {
        name: torch.stack([states + 1000.0 * row + at for row in rows]) for at, name in enumerate(("in:2", "post_norm"))
    }


def spied():
    """`made`, and the rows it was asked for."""
    asked = []

    def compute(rows):
        asked.append(list(rows))
        return made(rows)

    return asked, compute


EACH = 2 * 24 * 32 * 4  # bytes of a row


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_rows_that_were_kept_are_not_computed_again(tier, tmp_path):
    store, (asked, compute) = kept(**{tier: 3 * EACH}, folder=tmp_path / "run"), spied()
    for rows in ([4, 0], [2, 4], [7, 0, 2], [7]):
        found = store.read(rows, compute)
        assert all(torch.equal(found[name], wanted) for name, wanted in made(rows).items())
    assert asked == [[4, 0], [2], [7], [7]], "no room for a fourth row"
    assert len(store) == 3
    assert (tmp_path / "run").exists() == (tier == "disk")


def test_memory_comes_first_then_disk_and_a_continued_run_finds_its_files(tmp_path):
    (tmp_path / "features" / "other").mkdir(parents=True)
    folder = tmp_path / "features" / "run"
    store, (asked, compute) = kept(memory=EACH, disk=2 * EACH, folder=folder), spied()
    store.read([1, 2, 3, 4], compute)
    assert len(store) == 3
    assert sorted(file.name for file in folder.iterdir()) == ["2.safetensors", "3.safetensors"]
    assert not (tmp_path / "features" / "other").exists(), "another run's"
    (folder / "3.safetensors").write_bytes(b"half a fi")
    again, (asked, compute) = kept(disk=2 * EACH, folder=folder), spied()
    found = again.read([3, 2], compute)
    assert asked == [[3]]
    assert all(torch.equal(found[name], wanted) for name, wanted in made([3, 2]).items())


def test_a_full_disk_and_too_much_memory_are_said(tmp_path, monkeypatch):
    store = kept(disk=EACH, folder=tmp_path / "run")
    monkeypatch.setattr(features, "save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(ConfigError, match=r"No space left.*lower --keep-disk-gib"):
        store.read([0], made)
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr(features, "_free_memory", lambda: 2**30)
    with pytest.raises(ConfigError, match=r"keep 2\.0 GiB .* 1\.0 GiB are free"):
        kept(memory=2**31)


@pytest.mark.parametrize("name", ["eagle3", "medusa"])
def test_a_run_that_keeps_features_is_the_run_that_does_not(name, tmp_path, monkeypatch):
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8))
    options = {"recipe": {"tokens_per_step": 256, "row_length": 64, "rows": 2}, "steps": 12}
    plain = trainer(MAKERS[name](), documents, tmp_path / "plain", **options)
    plain.run()
    keeping = trainer(MAKERS[name](), documents, tmp_path / "keeping", keep_gib=0.1, **options)
    read, rows = loop.read_taps, []
    monkeypatch.setattr(loop, "read_taps", lambda batch, taps: rows.extend(batch.rows) or read(batch, taps))
    keeping.run()
    assert keeping.features_bytes < 0.1 * 2**30
    assert sorted(set(rows)) == sorted(rows), "no row was computed twice"
    assert len(rows) == len(keeping.packing.rows) < 12 * keeping.rows_per_step
    for key, weight in plain.drafter.weights().items():
        torch.testing.assert_close(keeping.drafter.weights()[key], weight)
