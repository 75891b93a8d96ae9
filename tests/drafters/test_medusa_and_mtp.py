"""What is particular to heads: initial values, index tables, memory, and the language that unmasks a wrong shift."""

import pytest
import torch

from drafters.learned import DIALOGUES, batch_for, fresh
from outpace.drafters.layers import Rotary
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.unroll import Unrolled
from outpace.target.families import part
from tiny import VOCABULARY, target


@pytest.mark.parametrize("projection", ["target", "low_rank", "own"])
@pytest.mark.parametrize("layers", [1, 3])
def test_fresh_medusa_heads_are_the_targets_head_exactly(projection, layers):
    net = fresh(Medusa(heads=3, projection=projection, rank=4, layers=layers, vocabulary=0), awake=False).module
    hidden = torch.randn(5, 32)
    want = target().model.get_output_embeddings()(hidden)
    for head in range(3):
        torch.testing.assert_close(net(hidden)[:, head], want, atol=0, rtol=0)
    blocks = [block.linear.weight for stack in net.blocks for block in stack]
    assert len({weight.data_ptr() for weight in blocks}) == 3 * layers, "every block has weights of its own"


@torch.no_grad()
@pytest.mark.parametrize("order", ["embed_hidden", "hidden_embed"])
def test_fresh_mtp_is_the_last_layer_applied_once_more(order):
    """With the embedding's half of the projection at zero it is exact; it starts a tenth of noise away from that."""
    drafter = fresh(MTP(order=order, vocabulary=0, tap="pre_norm"), awake=False)
    net, model = drafter.module, target().model
    embed = slice(0, 32) if order == "embed_hidden" else slice(32, 64)
    assert float(net.eh_proj.weight[:, embed].abs().max()) < 0.02
    net.eh_proj.weight[:, embed] = 0
    batch = batch_for(drafter, [[DIALOGUES[0]]])
    state = batch.taps["pre_norm"]
    normed = net.hnorm(state)
    rotary = part(model, target().family.rotary)(state, batch.positions)
    mask = torch.full((1, 1, 16, 16), float("-inf")).triu(1)
    want = model.model.layers[-1](normed, attention_mask=mask, position_embeddings=rotary)
    cos, sin = net.rotary(batch.positions)
    ours = net(target().embed(batch.tokens), state, cos, sin, Unrolled(batch, dense=True).attend)
    torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(net.norm.weight, model.model.norm.weight)


@torch.no_grad()
def test_rotary_angles_are_the_targets():
    positions = torch.tensor([[0, 1, 5, 100]])
    cos, sin = Rotary(target(), 8).to(torch.bfloat16)(positions)  # as modules are for decoding
    want = part(target().model, target().family.rotary)(torch.zeros(1, 4, 8), positions)
    torch.testing.assert_close(cos[:, :, 0], want[0])
    torch.testing.assert_close(sin[:, :, 0], want[1])


MAKERS = {
    "medusa": lambda: Medusa(heads=3, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=3, vocabulary=0),
    "mtp": lambda: MTP(vocabulary=0),
}


@pytest.mark.parametrize("name", MAKERS)
def test_index_depth_k_of_slot_t_is_compared_with_token_t_plus_1_plus_k(name, monkeypatch):
    drafter = fresh(MAKERS[name]())
    drafter.recipe = drafter.recipe.replace(depths=3)
    batch = batch_for(drafter, [DIALOGUES[:2], DIALOGUES[2:]])
    asked = []

    def spy(kind, hidden, head, label, teacher, *, weight=None):
        asked.append((label, teacher.rows))
        return hidden.sum(), torch.zeros(hidden.shape[0], dtype=torch.bool)

    module = {"medusa": "medusa.drafter", "mtp_heads": "mtp.parallel", "mtp": "rows"}[name]
    monkeypatch.setattr(f"outpace.drafters.{module}.head_loss", spy)
    losses = drafter.objective(batch)
    flat = batch.tokens.flatten()
    for k, (label, rows) in enumerate(asked, start=1):
        slots = batch.slots_before(1 + k)
        assert torch.equal(label, flat[slots + 1 + k])
        assert torch.equal(rows, slots + k), "the teacher is the law behind position t + k"
    counts = [sum(min(len(d.tokens) - d.prompt, len(d.tokens) - 1 - k) for d in DIALOGUES) for k in (1, 2, 3)]
    assert losses.counts.tolist() == counts


@pytest.mark.parametrize("name", MAKERS)
def test_causal_by_perturbation(name):
    """A changed token changes depth k of slot t iff it stands at or before t (mtp: t + k)."""
    drafter = fresh(MAKERS[name]())
    drafter.recipe = drafter.recipe.replace(depths=2)
    net = drafter.module
    place = 7
    outputs = []
    for swap in (False, True):
        tokens = list(DIALOGUES[0].tokens)
        if swap:
            tokens[place] = 25
        document = type(DIALOGUES[0])(tokens, 4)
        batch = batch_for(drafter, [[document]])
        with torch.no_grad():
            if name == "medusa":
                logits = net(batch.taps["post_norm"])[0].transpose(0, 1)
            else:
                cos, sin = net.rotary(batch.positions)
                unrolled = Unrolled(batch, dense=True)
                if name == "mtp_heads":
                    y = net(target().embed(batch.tokens), batch.taps["pre_norm"], cos, sin, unrolled.attend)
                    logits = net.head(net.readout(y))[0].transpose(0, 1)
                else:
                    z, found = batch.taps["post_norm"], []
                    for step in range(2):
                        ids = torch.nn.functional.pad(batch.tokens, (0, 1 + step))[:, 1 + step :]
                        cos, sin = net.rotary(batch.positions + step)
                        y = net(target().embed(ids), z, cos, sin, unrolled.attend)
                        found.append(net.head(net.readout(y))[0])
                        z = net.feedback(y)
                    logits = torch.stack(found)
        outputs.append(logits)
    differs = (outputs[0] - outputs[1]).abs().amax(-1) > 0
    for k in (1, 2):
        ahead = k if name == "mtp" else 0
        slots = torch.arange(16)
        want = slots + ahead >= place
        want &= slots + ahead < 16  # behind the end of the document there is no token to read
        assert torch.equal(differs[k - 1, : 16 - ahead], want[: 16 - ahead])


def cyclic(steps=400):
    """A language in which x_t = f(x_{t-1}) with distinct offsets: a label shifted by one cannot be learned."""
    order = [5, 9, 2, 30, 11, 17, 3, 25]
    return [order[i % len(order)] for i in range(steps)]


@pytest.mark.parametrize("name", MAKERS)
def test_every_depth_learns_a_cyclic_language(name):
    own = {"medusa": lambda: Medusa(heads=3, projection="own", vocabulary=0)}
    drafter = fresh({**MAKERS, **own}[name](), awake=False)
    drafter.recipe = drafter.recipe.replace(depths=3, loss="hard")
    document = type(DIALOGUES[0])(cyclic(60), 3)
    batch = batch_for(drafter, [[document]])
    parameters = list(drafter.module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    before = {k: v.clone() for k, v in target().model.state_dict().items()}
    for _ in range(200):
        losses = drafter.objective(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        if torch.equal(losses.hits, losses.counts):
            break
    assert torch.equal(losses.hits, losses.counts), f"hits {losses.hits.tolist()} of {losses.counts.tolist()}"
    after = target().model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the trunk is frozen, bit for bit"


@torch.no_grad()
def test_calibration_finds_the_ranks_the_heads_are_right_at():
    """Heads that know the cyclic language but for an offset of one rank: the tree must hold rank 1."""
    drafter = fresh(Medusa(heads=2, nodes=2, vocabulary=0), awake=False)
    document = type(DIALOGUES[0])(cyclic(120), 3)
    batch = batch_for(drafter, [[document]])
    successor = dict(zip(cyclic(9), cyclic(10)[1:], strict=False))
    wrong = torch.eye(VOCABULARY)[0]

    def states(number, hidden):
        logits = torch.zeros(hidden.shape[0], VOCABULARY)
        for row, at in enumerate(batch.slots_before(number + 2).tolist()):
            token = int(batch.tokens.flatten()[at])
            for _ in range(number + 2):
                token = successor[token]
            logits[row, token] = 1.0
        return logits + 2 * wrong, torch.eye(VOCABULARY)

    drafter.module.states = states
    drafter.calibrate([batch])
    assert set(drafter.paths) == {(1,), (1, 1)}
