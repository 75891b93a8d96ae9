"""Checkpoints of learned drafters: round trips, refusals, what ships."""

import json

import pytest
import torch

from drafters.learned import fresh
from outpace import Engine
from outpace.drafters import checkpoint, make_drafter
from outpace.drafters.eagle import Eagle, Eagle3
from outpace.drafters.learning import Recipe
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.errors import CheckpointError, ConfigError
from outpace.target import Target
from tiny import PROMPTS, make_model, target

MAKERS = {
    "medusa": lambda: Medusa(heads=2, projection="low_rank", rank=4, vocabulary=30),
    "mtp": lambda: MTP(vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=2, vocabulary=30),
    "eagle": lambda: Eagle(),
    "eagle3": lambda: Eagle3(layers=2, vocabulary=30, head="own"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_drafter_drafts_as_it_did(name, tmp_path):
    drafter = fresh(MAKERS[name]())
    drafter.provenance = {"command": "this"}
    drafter.save_pretrained(tmp_path, dtype=torch.float32)
    loaded = make_drafter(str(tmp_path))
    assert type(loaded) is type(drafter)
    assert loaded.provenance == {"command": "this"}
    options = {"max_new_tokens": 12, "ignore_eos": True}
    runs = [Engine(target(), one, stand_down=False).generate(PROMPTS[:3], **options) for one in (drafter, loaded)]
    assert [o.rounds_detail for o in runs[0]] == [o.rounds_detail for o in runs[1]]
    assert sum(o.stats.drafted for o in runs[0]) > 0


def test_decoding_options_may_change_and_others_may_not(tmp_path):
    fresh(Eagle3(vocabulary=30)).save_pretrained(tmp_path)
    changed = make_drafter(f"{tmp_path}:draft_len=3,branches=1,nodes=3,draw=greedy")
    assert (changed.draft_len, changed.branches, changed.draw) == (3, 1, "greedy")
    assert not changed.needs.noise
    for option in ("layers=2", "vocabulary=20"):
        with pytest.raises(ConfigError, match="of a trained 'eagle3' cannot be changed"):
            make_drafter(f"{tmp_path}:{option}")


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    fresh(Eagle3(vocabulary=30)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="number of layers 4"):
        Engine(Target(make_model(num_hidden_layers=2)), str(tmp_path))
    with pytest.raises(CheckpointError, match="holds drafter 'eagle3', not 'eagle'"):
        Eagle.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not match its options: missing"):
        Engine(target(), str(tmp_path))
    with pytest.raises(ConfigError, match="named by its folder"):
        make_drafter(str(tmp_path / "nothing"))


def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    drafter = fresh(MTP(vocabulary=0))
    drafter.save_pretrained(tmp_path)
    with torch.no_grad():
        drafter.module.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not saved.*norm"):
        drafter.save_pretrained(tmp_path)
    make_drafter(str(tmp_path)).fit(target())


def test_an_untrained_drafter_says_how_to_train_it():
    with pytest.raises(CheckpointError, match=r"has to be trained.*outpace train --drafter eagle3"):
        Engine(target(), "eagle3")


def test_a_drafter_that_ships_is_found_by_name_for_its_target_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "ZOO", tmp_path)
    fresh(Eagle3(layers=2, vocabulary=30)).save_pretrained(tmp_path / "tiny" / "eagle3")
    drafter = make_drafter("eagle3:branches=2,nodes=5")
    engine = Engine(target(), drafter, stand_down=False)
    assert (drafter.layers, drafter.vocabulary, drafter.branches) == (2, 30, 2), "trained options are the checkpoint's"
    assert engine.generate(PROMPTS[0], max_new_tokens=5)[0].stats.drafted
    with pytest.raises(ConfigError, match=r"eagle3:layers=1 was asked for.*trained with 2"):
        Engine(target(), "eagle3:layers=1")
    with pytest.raises(CheckpointError, match="has to be trained"):
        Engine(Target(make_model(num_hidden_layers=2)), "eagle3")
    with pytest.raises(CheckpointError, match="make another one"):
        drafter.fit(Target(make_model()))


def test_recipes_refuse_what_they_do_not_know():
    assert Recipe().replace(lr=1.0).lr == 1.0
    with pytest.raises(ConfigError, match="did you mean 'warmup'"):
        Recipe().replace(warm_up=0.1)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Eagle3(norm_before_fc=True),
        lambda: Eagle3(layers=0),
        lambda: Eagle3(head="other"),
        lambda: Eagle3(draw="own"),
        lambda: Eagle3(coupling=1.0),
        lambda: MTP(tap="embed"),
        lambda: MTP(order="other"),
        lambda: Medusa(heads=0),
        lambda: Medusa(projection="none"),
    ],
)
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        bad()
