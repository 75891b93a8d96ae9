"""The loop: overfitting reaches the maximum, simulation predicts decoding, resume is exact, ranks agree."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from outpace import Engine
from outpace.engine import total
from outpace.errors import CheckpointError, ConfigError
from outpace.train.evaluate import decode, simulate
from outpace.train.states import FOLDER, latest_state
from tiny import PROMPTS, target
from train.corpora import HELD_OUT, LINES, MAKERS, SRC, TESTS, corpus, run_in_two, trainer

OVERFIT = {
    "eagle3": {"depths": 4, "lr": 6e-3},
    "eagle": {"depths": 4, "lr": 4e-3, "noise": 0.0},
    "mtp": {"depths": 4, "lr": 6e-3},
    "mtp_heads": {"lr": 6e-3},
    "medusa": {"depths": 3, "lr": 2e-2},
    "ptp": {"depths": 4, "lr": 6e-3},
}


@pytest.mark.parametrize("name", MAKERS)
def test_overfit_eight_dialogues_decode_near_the_maximum_and_as_simulated(name, tmp_path):
    """T-OVERFIT: catches more mismatch between training and decoding than any other test."""
    documents = corpus(tmp_path / "c", max_new_tokens=24)
    run = trainer(MAKERS[name](), documents, tmp_path / "o", recipe={"loss": "hard", **OVERFIT[name]}, steps=200)
    drafter = run.run()
    engine = Engine(target(), drafter, stand_down=False, max_batch=8)
    outputs = engine.generate(PROMPTS, max_new_tokens=24)
    plain = Engine(target(), max_batch=8).generate(PROMPTS, max_new_tokens=24)
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]
    depth = drafter.recipe.depths if name in ("medusa", "mtp_heads") else drafter.draft_len
    reached = total([o.stats for o in outputs]).emitted_per_round
    # what a drafter that is always right would reach: the last round of an answer is cut short
    most = sum(len(o.tokens) for o in outputs) / sum(-(-len(o.tokens) // (depth + 1)) for o in outputs)
    assert reached >= 0.9 * most, f"{reached:.2f} of {most:.2f}"
    if name == "ptp":
        drafter.density = float(depth)  # a window at every place, as decoding has one wherever a walk ends
    assert simulate(drafter, outputs, depth=depth) == pytest.approx(reached, rel=0.05)


@pytest.mark.parametrize("name", ["eagle3", "mtp", "medusa"])
def test_simulation_predicts_decoding_of_a_half_trained_drafter(name, tmp_path):
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8))
    drafter = trainer(MAKERS[name](), documents, tmp_path / "o", recipe={"lr": 3e-3}, steps=40).run()
    found = decode(drafter, [[*p, 2] for p in PROMPTS], max_new_tokens=40)
    depth = {"medusa": 3}.get(name, 4)
    assert 1.05 < found.emitted_per_round < depth + 0.5
    assert simulate(drafter, found.outputs, depth=depth) == pytest.approx(found.emitted_per_round, rel=0.05)


def test_a_run_may_begin_with_what_another_one_ended_with(tmp_path):
    documents = corpus(tmp_path / "c")
    first = trainer(MAKERS["eagle3"](), documents, tmp_path / "first", recipe={"lr": 6e-3}, steps=10).run()
    more = trainer(MAKERS["eagle3"](), documents, tmp_path / "more", begin_with=str(tmp_path / "first"))
    for name, value in more.drafter.module.state_dict().items():
        kept = first.module.state_dict()[name]
        assert torch.equal(value, kept.bfloat16().to(value.dtype) if value.is_floating_point() else kept), name
    assert more.drafter.provenance == {}, "it has a history of its own"
    more.run()
    begun = more.drafter.provenance["settings"]["begin_with"]
    assert begun == str(tmp_path / "first")


@pytest.mark.parametrize("optimizer", ["adamw", "flash"])
def test_resume_equals_a_run_that_was_never_stopped(optimizer, tmp_path):
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8), lines=[*LINES, HELD_OUT])
    options = {"steps": 12, "optimizer": optimizer, "eval_every": 5, "eval_tokens": 8}
    recipe = {"noise": 0.05, "tokens_per_step": 384}
    whole = trainer(MAKERS["eagle3"](), documents, tmp_path / "whole", recipe=recipe, **options)
    whole.run()
    part = trainer(MAKERS["eagle3"](), documents, tmp_path / "part", recipe=recipe, **options, **{"save_every": 1})
    step = part._step

    def stop(*given):
        step(*given)
        if part.step == 7:
            raise KeyboardInterrupt

    part._step = stop
    with pytest.raises(KeyboardInterrupt):
        part.run()
    again = trainer(MAKERS["eagle3"](), documents, tmp_path / "part", recipe=recipe, **options)
    assert again.resume()
    assert again.step == 7
    again.run()
    for ours, want in zip(again.drafter.weights().items(), whole.drafter.weights().items(), strict=True):
        assert ours[0] == want[0]
        assert torch.equal(ours[1], want[1]), ours[0]


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from outpace.train import Corpus
from train.corpora import MAKERS, trainer
run = trainer(MAKERS["mtp"](), Corpus.load(sys.argv[1]), sys.argv[2], recipe={"tokens_per_step": 256}, steps=30,
              save_every=2)
run.resume()
step = run._step
def spoken(*given):
    step(*given)
    print(run.step, float(run.objective.losses.total), flush=True)
run._step = spoken
run.run()
"""


def launch(documents, out):
    environment = {**os.environ, "PYTHONPATH": f"{SRC}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, documents, out, TESTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip


def test_losses_after_kill_9_are_those_of_an_undisturbed_run(tmp_path):
    corpus(tmp_path / "c")
    want = dict(line.split() for line in launch(tmp_path / "c", tmp_path / "whole").communicate()[0].splitlines())
    assert len(want) == 30
    child = launch(tmp_path / "c", tmp_path / "killed")
    after = random.Random(time.time_ns()).randint(5, 20)
    seen = {}
    for line in child.stdout:
        seen.update([line.split()])
        if len(seen) == after:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    rest = launch(tmp_path / "c", tmp_path / "killed").communicate()[0]
    seen_again = dict(line.split() for line in rest.splitlines())
    assert len(seen_again) < 30, "it went on, and did not start anew"
    assert {**seen, **seen_again} == want, f"killed after step {after}"


def test_a_run_is_not_continued_as_another_one(tmp_path):
    documents = corpus(tmp_path / "c")
    trainer(MAKERS["mtp"](), documents, tmp_path / "o", steps=4, save_every=2).run()
    assert latest_state(tmp_path / "o") is not None
    assert len(list((tmp_path / "o" / FOLDER).iterdir())) == 1, "older states are gone"
    for changed, words in (({"recipe": {"lr": 9.0}}, "another recipe"), ({"seed": 4}, "another seed")):
        with pytest.raises(ConfigError, match=words):
            trainer(MAKERS["mtp"](), documents, tmp_path / "o", **changed).resume()
    state = latest_state(tmp_path / "o") / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world": 4}))
    with pytest.raises(CheckpointError, match="made by 4 processes, and there are 1"):
        trainer(MAKERS["mtp"](), documents, tmp_path / "o", steps=4).resume()


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    run = trainer(MAKERS["mtp"](), corpus(tmp_path / "c"), tmp_path / "o", steps=4)
    with torch.no_grad():
        run.drafter.module.norm.weight[0] = float("nan")
    with pytest.raises(ConfigError, match="lower the learning rate"):
        run.run()


def test_impossible_runs_are_refused(tmp_path):
    documents = corpus(tmp_path / "c", max_new_tokens=5)
    for bad in ({"steps": 5, "minutes": 1.0}, {"optimizer": "sgd"}, {"minutes": -1.0}):
        with pytest.raises(ConfigError):
            trainer(MAKERS["mtp"](), documents, tmp_path / "o", **{"steps": 0, **bad})
    with pytest.raises(ConfigError, match="less than a row"):
        trainer(MAKERS["mtp"](), documents, tmp_path / "o", recipe={"tokens_per_step": 64})
    with pytest.raises(ConfigError, match="there is one"):
        trainer(MAKERS["mtp"](), documents, tmp_path / "o", parallel="fsdp")


def test_evaluation_uses_held_out_prompts_and_keeps_the_curve(tmp_path):
    documents = corpus(tmp_path / "c", lines=[*LINES, HELD_OUT])
    run = trainer(MAKERS["medusa"](), documents, tmp_path / "o", steps=6, eval_every=3, eval_tokens=10)
    drafter = run.run()
    steps = [point["step"] for point in run.curves if "emitted_per_round" in point]
    assert steps[0] == 3
    assert steps[-1] == 6
    assert drafter.provenance["corpus"]["documents"] == len(documents)
    assert drafter.provenance["curves"][-1]["emitted_per_round"] >= 1
    assert drafter.paths, "the tree was calibrated on what the target said"
    saved = json.loads((tmp_path / "o" / "config.json").read_text())
    assert [tuple(path) for path in saved["options"]["paths"]] == list(drafter.paths)


RANKS = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from outpace.train import Corpus
from outpace.train.ranks import Ranks
from train.corpora import MAKERS, trainer
with Ranks.joined() as ranks:
    trainer(MAKERS["eagle3"](), Corpus.load(sys.argv[1]), sys.argv[2], recipe={"rows": 1, "depths": 2}, steps=3,
            save_every=1, parallel=sys.argv[4], ranks=ranks).run()
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(parallel, tmp_path):
    """T-DP: sums over one global number of answer tokens, so the split of rows does not matter."""
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8))
    trainer(MAKERS["eagle3"](), documents, tmp_path / "one", recipe={"rows": 1, "depths": 2}, steps=3).run()
    run_in_two(RANKS, tmp_path / "c", tmp_path / "two", TESTS, parallel)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name].float(), value.float(), atol=2e-3, rtol=2e-2)
