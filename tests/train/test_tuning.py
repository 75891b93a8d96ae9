"""Training target and heads together: gradients, schedule, what is saved, what it decodes, how it continues."""

import json

import pytest
import torch
from safetensors.torch import load_file

from drafters.learned import DIALOGUES, batch_for
from outpace import Engine
from outpace.drafters import make_drafter
from outpace.drafters.medusa import Medusa
from outpace.drafters.medusa.joint import risen
from outpace.errors import ConfigError
from outpace.target import Target, run_packed, save_target, tuned_by, tuned_copy
from outpace.train.evaluate import drift, simulate
from tiny import FAMILIES, GENERIC, PROMPTS, target
from train.corpora import HELD_OUT, LINES, TESTS, corpus, run_in_two, trainer

CHAIN = ((0,), (0, 0), (0, 0, 0))


def medusa(**options):
    return Medusa(**{"heads": 3, "nodes": 3, "paths": CHAIN, "vocabulary": 0, "tune_rank": 4, **options})


def started(drafter, *, name="llama", shaken=False):
    drafter.initialise(target(name), seed=1)
    drafter.recipe = drafter.recipe.replace(depths=3)
    if shaken:
        shake(drafter.tuning.adapter)
    return drafter


def shake(adapter, size=0.05):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def gradients(drafter, batch):
    losses = drafter.objective(batch)
    losses.total.backward()
    found = [[p.grad for p in part.parameters()] for part in (drafter.module, drafter.tuning.adapter)]
    return losses, found


def test_the_loss_reaches_heads_and_trunk_and_nothing_else():
    drafter = started(medusa(), shaken=True)
    losses, (heads, trunk) = gradients(drafter, batch_for(drafter, [DIALOGUES]))
    assert all(g is not None and bool(g.any()) for g in [*heads, *trunk])
    assert float(losses.extra["kl"]) > 0
    assert all(p.grad is None for p in target().model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3", "stablelm"])
def test_a_fresh_adapter_without_weight_on_the_heads_is_no_loss_at_all(name):
    """Fused, modular and foreign passes: with and without a fresh adapter they say the same."""
    drafter = started(medusa(rise="linear"), name=name)
    batch = batch_for(drafter, [DIALOGUES])
    batch.share = 0.0
    losses, (heads, trunk) = gradients(drafter, batch)
    assert abs(float(losses.extra["kl"])) < 1e-6
    assert abs(float(losses.total.detach())) < 1e-5
    assert all(float(g.abs().max()) < 1e-6 for g in [*heads, *trunk])


def test_the_heads_weight_rises_with_the_run():
    places = (0.0, 0.5, 1.0)
    assert [risen("constant", x) for x in places] == [1, 1, 1]
    assert [risen("linear", x) for x in places] == [0, 0.5, 1]
    assert [risen("sine", x) for x in places] == pytest.approx([0, 0.5**0.5, 1])
    drafter = started(medusa(rise="sine", head_weight=0.3), shaken=True)
    batch = batch_for(drafter, [DIALOGUES])
    found = {}
    for batch.share in places:
        found[batch.share] = float(drafter.objective(batch).total.detach())
    law = found[0.0]
    assert (found[0.5] - law) / (found[1.0] - law) == pytest.approx(0.5**0.5, rel=1e-4)
    now = run_packed(target(), batch, ("post_norm",), drafter.tuning.adapter)["post_norm"].flatten(0, 1)
    assert found[1.0] - law == pytest.approx(0.3 * float(drafter.head_losses(batch, now).total.detach()), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FAMILIES, *GENERIC])
def test_a_tuned_copy_is_the_target_under_its_adapter(name):
    """Merged weights against the adapter on every row, in the pass of training and in a plain one."""
    drafter = started(medusa(), name=name, shaken=True)
    adapter, batch = drafter.tuning.adapter, batch_for(drafter, [DIALOGUES])
    before = {key: value.clone() for key, value in target(name).model.state_dict().items()}
    tuned = tuned_copy(target(name), adapter, "tuned")
    want = run_packed(target(name), batch, ("post_norm",), adapter)["post_norm"]
    head = tuned.model.get_output_embeddings()
    want = head(want)[0]
    close = {"atol": 2e-3 * float(want.abs().max()), "rtol": 2e-3}
    torch.testing.assert_close(head(run_packed(tuned, batch, ("post_norm",))["post_norm"])[0], want, **close)
    alone = tuned.model(torch.tensor([DIALOGUES[0].tokens]), use_cache=False).logits[0]
    scale = getattr(tuned.config, "logit_scale", 1.0)
    torch.testing.assert_close(alone, scale * want[: len(DIALOGUES[0].tokens)], **close)
    original = target(name).model(torch.tensor([DIALOGUES[0].tokens]), use_cache=False).logits[0]
    assert float((alone - original).abs().max()) > 20 * close["atol"], "it says something else"
    assert all(torch.equal(before[key], value) for key, value in target(name).model.state_dict().items())
    assert tuned_by(target(name)) is None
    assert tuned_by(tuned)["from"] == target(name).name


def test_rising_and_rates_reach_the_loop(tmp_path):
    """Heads learn 1 / tune_lr times as fast, and a batch knows how far the run is."""
    documents = corpus(tmp_path / "c", max_new_tokens=12)
    run = trainer(medusa(rise="linear", tune_lr=0.1), documents, tmp_path / "o", steps=4)
    shares, step = [], run._model.forward

    def spy(batch):
        shares.append(batch.share)
        return step(batch)

    run._model.forward = spy
    run.run()
    heads, trunk = (group["lr"] for group in run.optimizer.param_groups)
    assert trunk == pytest.approx(0.1 * heads)
    assert sorted(set(shares)) == pytest.approx([0, 0.25, 0.5, 0.75])
    assert "kl" in run.curves[-1]["extra"]


def test_heads_of_a_target_trained_along_are_accepted_more_often(tmp_path):
    """Equal steps, heads and texts: states that are made for the heads say more of what follows.

    The texts are those of the original, walked as rounds would be: what a tuned random model says by itself is new to
    its heads, and eight dialogues teach them nothing about it.
    """
    documents = corpus(tmp_path / "c", max_new_tokens=24)
    answers = Engine(target(), max_batch=8).generate(PROMPTS, max_new_tokens=24)
    recipe = {"depths": 3, "lr": 1e-2, "loss": "hard"}
    reached = {}
    for name, options in (("frozen", {"tune_rank": 0}), ("joint", {"tune_rank": 8, "tune_lr": 1.0})):
        drafter = trainer(medusa(**options), documents, tmp_path / name, recipe=recipe, steps=60).run()
        reached[name] = simulate(drafter, answers, depth=3)
    assert reached["joint"] > reached["frozen"] + 0.2, reached


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(trainer, drafter, folder) of a short joint run with held-out prompts."""
    folder = tmp_path_factory.mktemp("joint")
    documents = corpus(folder / "c", max_new_tokens=24, lines=[*LINES, HELD_OUT])
    options = {"steps": 20, "eval_every": 10, "eval_tokens": 12}
    run = trainer(medusa(tune_lr=1.0), documents, folder / "o", recipe={"depths": 3, "lr": 5e-3}, **options)
    return run, run.run(), folder / "o"


def test_what_is_saved_names_both_and_how_far_the_target_moved(trained):
    _, drafter, folder = trained
    config = json.loads((folder / "config.json").read_text())
    tuned = config["target"]["tuned"]
    assert config["target"]["name"] == str(folder / "target")
    assert tuned["from"] == target().name
    assert config["provenance"]["target"] == str(folder / "target")
    said = config["provenance"]["tuned"]
    assert said["adapter"] == tuned["adapter"]
    assert said["mean_kl"] > 0
    assert 0 <= said["greedy_agreement"] <= 1
    assert said["tokens"] == 12
    assert not [key for key in load_file(folder / "model.safetensors") if "adapter" in key]
    assert "adapter" not in " ".join(drafter.module.state_dict())
    assert drafter.tuning is None
    stored = json.loads((folder / "target" / "config.json").read_text())
    assert stored["outpace_tuned"] == tuned
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_drift_of_a_target_from_itself_is_nothing(trained):
    _, drafter, _ = trained
    same = drift(target(), target(), PROMPTS[:3], max_new_tokens=8)
    assert (same.mean_kl, same.greedy_agreement) == (0.0, 1.0)
    moved = drift(target(), drafter.target, PROMPTS[:3], max_new_tokens=8)
    assert moved.mean_kl > 1e-4
    assert moved.tokens == same.tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.7, "top_k": 6}])
def test_the_tuned_medusa_changes_no_token_of_the_tuned_target(trained, options):
    _, drafter, folder = trained
    loaded = Medusa.from_pretrained(folder)
    plain = Engine(drafter.target, max_batch=8, check_integrity=True).generate(PROMPTS, max_new_tokens=24, **options)
    engine = Engine(drafter.target, loaded, stand_down=False, max_batch=8, check_integrity=True)
    ours = engine.generate(PROMPTS, max_new_tokens=24, **options)
    assert [o.tokens for o in ours] == [o.tokens for o in plain]
    assert sum(o.stats.drafted for o in ours) > 0


def test_used_on_another_target_it_warns(trained):
    _, drafter, folder = trained
    with pytest.warns(UserWarning, match=r"tuned from .*, and this is .*accepted less often"):
        Medusa.from_pretrained(folder).fit(target())
    plain = make_drafter("medusa:heads=3,vocabulary=0")
    plain.initialise(target())
    plain.save_pretrained(folder.parent / "plain")
    with pytest.warns(UserWarning, match="accepted less often"):
        Medusa.from_pretrained(folder.parent / "plain").fit(drafter.target)


def test_a_tuned_target_is_an_ordinary_folder(trained, tmp_path, model_dir):
    _, drafter, folder = trained
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "target")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, drafter.target.model(ids).logits)
    whole = Target.from_pretrained(model_dir, dtype=torch.float32, device="cpu")
    save_target(whole, tmp_path / "t")
    save_target(whole, tmp_path / "t")  # in place of the one before
    again = Target.from_pretrained(tmp_path / "t", dtype=torch.float32, device="cpu")
    assert again.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("optimizer", ["adamw", "flash"])
def test_a_joint_run_continues_as_if_it_had_never_stopped(optimizer, tmp_path):
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8), max_new_tokens=16, lines=[*LINES, HELD_OUT])
    options = {"steps": 8, "optimizer": optimizer, "eval_every": 3, "eval_tokens": 4}
    recipe = {"depths": 3, "tokens_per_step": 256}
    make = lambda out, **more: trainer(  # noqa: E731
        medusa(rise="linear"), documents, tmp_path / out, recipe=recipe, **options, **more
    )
    whole, part = make("whole"), make("part", save_every=1)
    losses, again_losses = [], []
    listen(whole, losses)
    whole.run()
    listen(part, [], stop=5)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    again = make("part")
    assert again.resume()
    assert again.step == 5
    listen(again, again_losses)
    again.run()
    assert again_losses == losses[5:]
    for ours, want in zip(again.objective.state_dict().items(), whole.objective.state_dict().items(), strict=True):
        assert ours[0] == want[0]
        assert torch.equal(ours[1], want[1]), ours[0]
    assert any(name.startswith("adapter") for name in whole.objective.state_dict())
    one, two = (load_file(tmp_path / name / "target" / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def listen(run, losses, stop=0):
    step = run._step

    def spoken(*given):
        step(*given)
        losses.append(float(run.objective.losses.total.detach()))
        if run.step == stop:
            raise KeyboardInterrupt

    run._step = spoken


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("medusa:tune_rank=-1", "0 .*or a rank such as 32"),
        ("medusa:head_weight=0.1", "stays frozen here; add tune_rank=32"),
        ("medusa:rise=linear", "stays frozen here"),
        ("medusa:tune_rank=4,rise=up", "unknown rise 'up'"),
        ("medusa:tune_rank=4,head_weight=0", "must be positive"),
        ("medusa:tune_rank=4,tune_lr=-1", "must be positive"),
    ],
)
def test_options_without_sense_or_effect_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        make_drafter(spec)


RANKS = """
import sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from outpace.train import Corpus
from outpace.train.ranks import Ranks
from train.corpora import trainer
from train.test_tuning import medusa
with Ranks.joined() as ranks:
    trainer(medusa(), Corpus.load(sys.argv[1]), sys.argv[2], recipe={"rows": 1, "depths": 3}, steps=3,
            save_every=1, parallel=sys.argv[4], ranks=ranks, eval_tokens=4).run()
"""


def test_two_processes_tune_as_one(tmp_path):
    """Sharded, so that adapter and tuned copy are gathered; `test_loop` has the rest."""
    documents = corpus(tmp_path / "c", temperatures=(0.0, 0.8), lines=[*LINES, HELD_OUT])
    trainer(medusa(), documents, tmp_path / "one", recipe={"rows": 1, "depths": 3}, steps=3, eval_tokens=4).run()
    run_in_two(RANKS, tmp_path / "c", tmp_path / "two", TESTS, "fsdp")
    for file in ("model.safetensors", "target/model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name].float(), value.float(), atol=2e-3, rtol=2e-2)
