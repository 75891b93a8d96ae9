"""The row rule of feature-following networks, T-ALIGN, T-CAUSAL, T-TTT, T-KV, T-FLAGS and T-PARAM of the EAGLE spec."""

import pytest
import torch

from drafters.learned import DIALOGUES, batch_for, fresh
from outpace.drafters.eagle import Eagle, Eagle3
from outpace.drafters.growth import extend
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.rowcache import RowCache, behind, visible
from outpace.drafters.rows import unrolled_losses
from tiny import target

NETS = {
    "eagle": lambda: Eagle(),
    "eagle3": lambda: Eagle3(vocabulary=0),
    "eagle3, two layers": lambda: Eagle3(layers=2, vocabulary=0, fc_norm=False, norm_output=False),
    "mtp": lambda: MTP(vocabulary=0),
    "mtp, hidden first": lambda: MTP(vocabulary=0, order="hidden_embed", chain_norm="none", tap="pre_norm"),
}


class Spy(torch.nn.Module):
    """Stands for a network: notes what every row is given."""

    taps = ("post_norm",)
    regression = 0.0

    def __init__(self, inner):
        super().__init__()
        self.head, self.rotary = inner.head, lambda positions: (self.positions.append(positions), None)
        self.positions, self.seen = [], []

    def fuse(self, features):
        return features

    def forward(self, embedded, feature, cos, sin, attend):
        self.seen.append((embedded, feature))
        return feature + 1

    def readout(self, y):
        return y

    def feedback(self, y):
        return y


def test_align_1_every_row_gets_its_feature_token_position_and_teacher(monkeypatch):
    drafter = fresh(Eagle())
    batch = batch_for(drafter, [DIALOGUES[:2], DIALOGUES[2:]])
    states = torch.arange(batch.tokens.numel(), dtype=torch.float32).view(*batch.shape, 1).expand(-1, -1, 32)
    batch.taps = {"post_norm": states.contiguous()}
    asked = []

    def spy_loss(kind, hidden, head, label, teacher):
        asked.append((hidden[:, 0], label, teacher.rows))
        return hidden.sum(), torch.zeros(hidden.shape[0], dtype=torch.bool)

    monkeypatch.setattr("outpace.drafters.rows.head_loss", spy_loss)
    spy = Spy(drafter.module)
    depths = 3
    drafter.recipe = drafter.recipe.replace(depths=depths)
    unrolled_losses(spy, batch, drafter.recipe.replace(noise=0.0))
    embed, flat, width = target().embed, batch.tokens, batch.shape[1]
    for k in range(depths):
        embedded, feature = spy.seen[k]
        assert torch.equal(embedded[:, : width - 1 - k], embed(flat[:, 1 + k :])), "row t reads token t + 1 + k"
        assert torch.equal(feature, states + k), "step 0: the target's feature t; later: the row's own output"
        assert torch.equal(spy.positions[k], batch.positions + k)
        hidden, label, rows = asked[k]
        slot = (hidden - 1 - k).long()
        assert torch.equal(label, flat.flatten()[slot + 2 + k]), "the label is token t + 2 + k"
        assert torch.equal(rows, slot + 1 + k), "the teacher is the law behind position t + 1 + k"


@pytest.mark.parametrize("prepared", [True, False])
def test_align_2_the_mask_of_a_slot_is_that_of_its_label_and_stays_in_its_document(prepared):
    drafter = fresh(Eagle())
    batch = batch_for(drafter, [DIALOGUES[:2], DIALOGUES[2:]], shifts=range(1, 6) if prepared else ())
    size = batch.shape[1]
    for shift in range(1, 6):
        want = [
            b * size + t
            for b in range(batch.shape[0])
            for t in range(size - shift)
            if batch.answer[b, t + shift] and batch.documents[b, t] == batch.documents[b, t + shift] > 0
        ]
        assert batch.slots_before(shift).tolist() == want
        assert want


@pytest.mark.parametrize("name", NETS)
def test_ttt_the_unrolled_objective_is_real_drafting_one_step_after_the_other(name):
    """Losses and gradients: every row by itself, true rows first, then its own steps behind a cache."""
    drafter = fresh(NETS[name]())
    net, depths = drafter.module, 3
    drafter.recipe = drafter.recipe.replace(depths=depths, noise=0.0)
    batch = batch_for(drafter, [DIALOGUES[:2], DIALOGUES[2:]], length=28)
    losses = drafter.objective(batch)
    losses.total.backward()
    parallel = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()

    embed = target().embed
    features = torch.cat([batch.taps[tap] for tap in net.taps], -1)
    head = target().model.get_output_embeddings().weight
    sums = [torch.zeros(()) for _ in range(depths)]
    for b, start, document in ((0, 0, DIALOGUES[0]), (0, 16, DIALOGUES[1]), (1, 0, DIALOGUES[2])):
        ids = torch.tensor(document.tokens)
        z = net.fuse(features[b : b + 1, start : start + len(ids)])
        for t in range(len(ids) - 2):
            kept = {}

            def attend(layer, q, k, v, kept=kept):
                """Plain causal attention over everything seen so far."""
                keys, values = kept.get(layer, (k[:, :0], v[:, :0]))
                kept[layer] = keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
                spread = [x.repeat_interleave(2, 2).transpose(1, 2) for x in (keys, values)]
                rows, total = q.shape[1], keys.shape[1]
                mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
                out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *spread, attn_mask=mask)
                return out.transpose(1, 2)

            cos, sin = net.rotary(torch.arange(t + 1)[None])
            y = net(embed(ids[1 : t + 2])[None], z[:, : t + 1], cos, sin, attend)[:, -1:]
            for k in range(depths):
                label = t + 2 + k
                if label >= len(ids):
                    break
                if label >= document.prompt:
                    state = batch.taps["post_norm"][b, start + label - 1]
                    p = torch.softmax(state @ head.T, -1)
                    sums[k] = sums[k] - (p * torch.log_softmax(net.head(net.readout(y[0, 0])), -1)).sum()
                    if net.regression:
                        gap = torch.nn.functional.smooth_l1_loss(y[0, 0], state)
                        sums[k] = sums[k] + net.regression * gap
                if k + 1 < depths and label < len(ids):
                    cos, sin = net.rotary(torch.tensor([[t + 1 + k]]))
                    y = net(embed(ids[label])[None, None], net.feedback(y), cos, sin, attend)
    torch.testing.assert_close(losses.sums, torch.stack(sums).detach(), atol=1e-4, rtol=1e-5)
    total = sum(w * s for w, s in zip(drafter.recipe.weights, sums, strict=True)) / batch.answers
    total.backward()
    for key, parameter in net.named_parameters():
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(parallel[key], parameter.grad, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", [*NETS, "mtp_heads"])
def test_packed_documents_lose_what_they_lose_apart(name):
    drafter = fresh({**NETS, "mtp_heads": lambda: MTPHeads(heads=2, vocabulary=0)}[name]())
    drafter.recipe = drafter.recipe.replace(depths=2, noise=0.0)
    together = drafter.objective(batch_for(drafter, [DIALOGUES[:2]], length=30))
    apart = [drafter.objective(batch_for(drafter, [[d]])) for d in DIALOGUES[:2]]
    torch.testing.assert_close(together.sums, sum(one.sums for one in apart), atol=1e-4, rtol=1e-5)
    assert torch.equal(together.counts, sum(one.counts for one in apart))


@pytest.mark.parametrize("name", NETS)
def test_causal_a_changed_row_changes_no_row_before_it(name):
    drafter = fresh(NETS[name]())
    net = drafter.module
    batch = batch_for(drafter, [[DIALOGUES[0]]])
    features = torch.cat([batch.taps[tap] for tap in net.taps], -1)
    changed, place = features.clone(), 7
    changed[:, place] += 1
    outputs = []
    for given in (features, changed):
        cache = RowCache.empty(net.layers, 2, 8, 32, device=torch.device("cpu"), dtype=torch.float32)
        cache.reserve(slots=1)
        mask = visible(cache.at, torch.ones(16, 16, dtype=torch.bool).tril()[None], 128, torch.float32)
        cos, sin = net.rotary(torch.arange(16)[None])
        with torch.no_grad():
            outputs.append(
                net(target().embed(batch.tokens), net.fuse(given), cos, sin, behind(cache, cache.at, 0, mask, 128))
            )
    differs = (outputs[0] - outputs[1]).abs().amax(-1)[0] > 0
    assert not differs[:place].any()
    assert differs[place:].all()


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
def test_kv_reading_in_chunks_is_reading_at_once(name):
    drafter = fresh(NETS[name]())
    net = drafter.module
    batch = batch_for(drafter, [[DIALOGUES[0]]])
    features = torch.cat([batch.taps[tap] for tap in net.taps], -1)[:, :15]
    tokens = batch.tokens[:, 1:]
    tops = []
    for cuts in ([15], [4, 1, 6, 4], [1] * 15):
        cache = RowCache.empty(net.layers, 2, 8, 32, device=torch.device("cpu"), dtype=torch.float32)
        cache.reserve(slots=1)
        at = 0
        for size in cuts:
            padded = torch.zeros(1, 15, features.shape[2])
            padded[:, :size] = features[:, at : at + size]
            ids = torch.zeros(1, 15, dtype=torch.int64)
            ids[:, :size] = tokens[:, at : at + size]
            extend(net, target().embed, cache, padded, ids, torch.tensor([size]), 128)
            cache.advance([size])
            at += size
        tops.append((cache.top.clone(), cache.keys[:, 0, :, :15].clone(), cache.values[:, 0, :, :15].clone()))
    for other in tops[1:]:
        for a, b in zip(tops[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


FLAGS = [
    {"norm_before_residual": True},
    {"norm_output": False},
    {"fc_norm": False},
    {"fc_norm": False, "norm_before_fc": True},
    {"layers": 2},
    {"head": "own"},
    {"intermediate": 64},
    {"taps": ("in:1", "post_norm")},
]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: "-".join(flag))
def test_flags_each_changes_what_comes_out(flag):
    losses = []
    for options in ({}, flag):
        drafter = fresh(Eagle3(vocabulary=0, **options))
        drafter.recipe = drafter.recipe.replace(depths=2)
        losses.append(drafter.objective(batch_for(drafter, [DIALOGUES])).sums)
    assert not torch.allclose(*losses, rtol=1e-4)


def count(shape):
    """Trainable parameters of EAGLE-1 (section 2.2): fc, attention, MLP, one norm."""
    h, heads, key_heads, size, i = shape
    return 2 * h * h + h + h * size * (2 * heads + 2 * key_heads) + 3 * h * i + h


@pytest.mark.parametrize(
    ("billions", "shape"),
    [
        (0.24, (4096, 32, 32, 128, 11008)),
        (0.37, (5120, 40, 40, 128, 13824)),
        (0.99, (8192, 64, 8, 128, 28672)),
        (0.25, (4096, 32, 8, 128, 14336)),
    ],
)
def test_param_the_published_sizes(billions, shape):
    assert count(shape) / 1e9 == pytest.approx(billions, abs=0.0051)
    drafter = fresh(Eagle())
    ours = sum(p.numel() for p in drafter.module.parameters())
    assert ours == count((32, 4, 2, 8, 48))
