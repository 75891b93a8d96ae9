"""Shapes of drafts: what is counted is what decoding finds, costs decide, and the choice is kept where it belongs."""

import json

import pytest
import torch

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.drafters.eagle import Eagle, Eagle3
from outpace.drafters.growth import DEFAULT_PATHS
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.ptp import Ptp
from outpace.drafters.shapes import Grown, Shape, device_name, keep_shape, read_shape, tried
from outpace.errors import ConfigError, UnsupportedError
from outpace.train import tune_shapes
from outpace.train.evaluate import decode, replay
from outpace.train.tune import Costs, measure
from tiny import PROMPTS, learned, target

MAKERS = {
    "medusa": lambda: Medusa(heads=3, nodes=20, vocabulary=0),
    "mtp": lambda: MTP(draft_len=3, branches=3, nodes=16, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=2, nodes=12, vocabulary=30),
    "eagle": lambda: Eagle(paths=DEFAULT_PATHS[:16]),
    "eagle3": lambda: Eagle3(draft_len=3, branches=3, nodes=12, vocabulary=30),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_shape_reaches_in_decoding_what_was_counted(name):
    drafter = learned("llama", MAKERS[name]())
    said = decode(drafter, PROMPTS[:3], max_new_tokens=40).outputs
    copy = drafter.for_decoding()
    shapes = tried([copy.grown(replay(copy, one), len(one.prompt_tokens) - 2) for one in said])
    assert len({json.dumps(shape.options) for shape, _ in shapes}) == len(shapes)
    assert max(emitted for _, emitted in shapes) > 1.1, "too little is accepted for this test to see anything"
    for shape, emitted in shapes[:: max(1, len(shapes) // 5)]:
        engine = Engine(target("llama"), drafter.reshaped(shape.options), stand_down=False)
        outputs = engine.generate(PROMPTS[:3], max_new_tokens=40)
        assert [one.tokens for one in outputs] == [one.tokens for one in said], "no shape changes the text"
        rounds = sum(one.rounds for one in outputs)
        assert sum(len(one.tokens) for one in outputs) / rounds == pytest.approx(emitted)


def test_a_fixed_tree_keeps_its_order_until_enough_was_seen():
    """Node (1,) is right more often than (0,); a handful of hits is chance, many are not."""
    paths = [(0,), (1,), (0, 0)]
    for times, best in ((1, [[0]]), (20, [[1]])):
        right = torch.tensor([[True, False, False], [False, True, False], [False, True, False]] * times)
        tree = Grown({}, right, None, [1, 1, 2], 3, paths, [(0,), (0, 0), (1,)])
        shapes = {shape.nodes: shape.options["paths"] for shape, _ in tried([[tree]])}
        assert shapes[1] == best
        assert sorted(shapes[3]) == [[0], [0, 0], [1]]


def test_a_drafter_without_such_a_tree_says_so():
    drafter = learned("llama", Ptp(rank=4, min_gain=0))
    with pytest.raises(UnsupportedError, match="'ptp' has no tree whose shape could be tuned"):
        tune_shapes(drafter, PROMPTS[:1], max_new_tokens=4)
    with pytest.raises(ConfigError, match="nothing to tune on"):
        tune_shapes(drafter, [])


def test_a_round_costs_pass_law_and_drafting():
    costs = Costs(law=0.5, rest=0.25, passes={0: 10.0, 4: 12.0}, drafting={"g": [(1, 1.0), (5, 3.0)]})
    assert costs.plain == 10.75
    assert costs.round(Shape({}, 4, "g", 3), 2.0) == 12.0 + 2 * 0.5 + 2.0
    one = Costs(law=0.5, rest=0.25, passes={0: 10.0, 4: 12.0}, drafting={"g": [(1, 1.0), (1, 1.0)]})
    assert one.round(Shape({}, 4, "g", 1), 1.0) == 13.5


@pytest.mark.parametrize(("per_node", "largest"), [(0.0, True), (50.0, False)])
def test_the_fastest_shape_is_small_where_rows_cost_and_large_where_they_do_not(monkeypatch, per_node, largest):
    drafter = learned("llama", MAKERS["medusa"]())

    def measured(drafter, shapes, prompt, rounds):
        passes = {nodes: 10.0 + per_node * nodes for nodes in (0, *(shape.nodes for shape in shapes))}
        return Costs(law=0.1, rest=0.0, passes=passes, drafting={"fixed": [(1, 0.0), (20, 0.0)]})

    monkeypatch.setattr("outpace.train.tune.measure", measured)
    found = tune_shapes(drafter, PROMPTS[:3], max_new_tokens=40)
    assert [one.speedup for one in found] == sorted((one.speedup for one in found), reverse=True)
    most = max(one.emitted_per_round for one in found)
    assert (found[0].emitted_per_round == most) if largest else (found[0].nodes == 1 and found[0].speedup < 1)


def test_costs_are_measured_for_every_shape_that_is_tried():
    drafter = learned("llama", MAKERS["eagle3"]())
    shapes = [Shape({"branches": 1, "draft_len": n, "nodes": n}, n, "1", n) for n in (1, 2, 3)]
    costs = measure(drafter, shapes, PROMPTS[0], 3)
    assert set(costs.passes) == {0, 1, 2, 3}
    assert [steps for steps, _ in costs.drafting["1"]] == [1, 3]
    assert all(costs.round(shape, 1.0) > 0 for shape in shapes)
    assert costs.plain > 0


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A checkpoint and an empty cache."""
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    drafter = learned("llama", MAKERS["eagle3"]())
    drafter.save_pretrained(tmp_path / "mine", dtype=torch.float32)
    return tmp_path / "mine"


def shape_of(spec, on):
    drafter = make_drafter(spec)
    drafter.fit(on)
    return drafter.draft_len, drafter.branches, drafter.nodes


def test_a_choice_is_used_for_this_drafter_target_and_device_alone(stored, monkeypatch):
    on = target("llama")
    chosen = {"branches": 1, "draft_len": 2, "nodes": 2}
    assert shape_of(str(stored), on) == (3, 3, 12)
    path = keep_shape(stored, on, {"options": chosen})
    assert read_shape(stored, on) == chosen
    assert shape_of(str(stored), on) == (2, 1, 2)
    assert shape_of(f"{stored}:nodes=5", on) == (3, 3, 5), "what is asked for by name goes before"
    as_stored = Eagle3.as_stored(stored)
    as_stored.fit(on)
    assert (as_stored.draft_len, as_stored.nodes) == (3, 12), "tuning starts from the whole tree"
    assert shape_of(str(stored), target("llama", torch.float64)) == (3, 3, 12)
    monkeypatch.setattr("outpace.drafters.shapes.device_name", lambda _: "another")
    assert shape_of(str(stored), on) == (3, 3, 12)
    monkeypatch.undo()
    monkeypatch.setenv("OUTPACE_CACHE", str(path.parents[1]))
    path.write_text("{broken")
    assert shape_of(str(stored), on) == (3, 3, 12), "a file that cannot be read is no choice"


def test_nothing_is_kept_where_no_cache_is(stored, monkeypatch):
    monkeypatch.setenv("OUTPACE_CACHE", "off")
    assert keep_shape(stored, target("llama"), {"options": {"nodes": 1}}) is None
    assert read_shape(stored, target("llama")) is None
    blocked = stored / "a_file"
    blocked.write_text("")
    monkeypatch.setenv("OUTPACE_CACHE", str(blocked))
    assert keep_shape(stored, target("llama"), {"options": {"nodes": 1}}) is None
    assert "threads" in device_name(target("llama"))
