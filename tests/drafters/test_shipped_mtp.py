"""The module a model comes with: read as published, or refused in words."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import StableLmForCausalLM
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaRMSNorm

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.errors import CheckpointError, ConfigError
from outpace.target import Target
from tiny import PROMPTS, make_model


def published(model):
    """transformers' own layer of that form, every weight random."""
    torch.manual_seed(5)
    layer = MtpLayer(model.config, LlamaDecoderLayer, LlamaRMSNorm, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def stored(layer, number):
    """Its tensors under the names of released checkpoints."""
    names = {"post_norm.weight": "shared_head.norm.weight"}
    return {
        f"model.layers.{number}.{names.get(k, k.removeprefix('mtp_block.'))}": v.detach().clone()
        for k, v in layer.state_dict().items()
    }


@pytest.fixture
def folder(tmp_path):
    """A model with such a module: (folder, layer, change), where change(extra, drop) rewrites its tensors."""
    model = make_model(tie_word_embeddings=False)
    layer = published(model)
    model.save_pretrained(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")

    def change(extra=(), drop=""):
        tensors = {**plain, **stored(layer, 4), **dict(extra)}
        kept = {k: v.contiguous() for k, v in tensors.items() if not drop or drop not in k}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})

    change()
    return tmp_path, layer, change


def load(path):
    return Target(LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


@torch.no_grad()
@pytest.mark.parametrize(("copies", "hidden_first"), [(False, False), (True, False), (False, True)])
def test_it_drafts_what_the_published_module_predicts(folder, copies, hidden_first):
    path, layer, change = folder
    if hidden_first:  # the same tensors, joined the other way round
        layer.config.mtp_hidden_states_first = True
        layer.config.save_pretrained(path)
    if copies:
        plain = make_model(tie_word_embeddings=False).state_dict()
        change({
            "model.layers.4.embed_tokens.weight": plain["model.embed_tokens.weight"],
            "model.layers.4.shared_head.head.weight": plain["lm_head.weight"].clone(),
        })  # fmt: skip
    target = load(path)
    engine = Engine(target, "mtp:draw=greedy,draft_len=2,branches=1,nodes=2", stand_down=False, path="readable")
    model = target.model
    ids = torch.tensor([PROMPTS[0]])
    states = model.model(ids).last_hidden_state[:, :-1]  # behind the final norm
    following = ids[:, 1:]
    wanted = []
    for _ in range(2):  # the second token: the module again, on its own output
        length = following.shape[1]
        places = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        y = layer(
            model.model.embed_tokens(following), states, model.model.rotary_emb(states, places), mask, places, None
        )
        wanted.append(int(model.lm_head(y[0, -1]).argmax()))
        states = torch.cat([states, y[:, -1:]], 1)
        following = torch.cat([following, torch.tensor([[wanted[-1]]])], 1)
    drafts = []
    propose = engine.drafter.propose
    engine.drafter.propose = lambda context: drafts.append(propose(context)) or drafts[-1]
    found = engine.generate([PROMPTS[0]], max_new_tokens=20)[0]
    assert list(drafts[0].trees()[0].tokens) == wanted
    assert found.tokens == Engine(target, None).generate([PROMPTS[0]], max_new_tokens=20)[0].tokens


def test_on_a_cpu_it_drafts_a_short_chain_unless_asked(folder):
    target = load(folder[0])
    for spec, shape in (("mtp", (2, 1, 2)), ("mtp:draft_len=4", (4, 6, 24))):
        drafter = make_drafter(spec)
        drafter.fit(target)
        assert (drafter.draft_len, drafter.branches, drafter.nodes) == shape
    with pytest.raises(ConfigError, match="tap=pre_norm was asked for"):
        make_drafter("mtp:tap=pre_norm").fit(target)


def zeros(*shape):
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("extra", "drop", "words"),
    [
        ({"model.layers.4.self_attn.q_norm.weight": zeros(8)}, "", "not a plain one.*q_norm"),
        ({"model.layers.4.self_attn.q_proj.bias": zeros(32)}, "", "biases"),
        ({"model.layers.4.mlp.experts.0.up_proj.weight": zeros(48, 32)}, "layers.4.mlp.up_proj", "experts"),
        ({"model.layers.5.enorm.weight": zeros(32)}, "", "in 2 modules, one per token ahead"),
        ({"model.layers.4.eh_proj.weight": zeros(32, 32)}, "", r"eh_proj.weight is \(32, 32\), where \(32, 64\)"),
        ({"model.layers.4.shared_head.head.weight": zeros(40, 32)}, "", "shared_head.head that is not the target's"),
        ({"mtp.fc.weight": zeros(32, 64)}, "model.layers.4.", r"not supported \(mtp.fc.weight"),
        ({}, "model.layers.4.hnorm", "not hnorm.weight"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(folder, extra, drop, words):
    path, _, change = folder
    change(extra, drop)
    with pytest.raises(CheckpointError, match=words) as refusal:
        make_drafter("mtp").fit(load(path))
    assert "outpace train --drafter mtp" in str(refusal.value)


def test_a_family_outside_the_table_is_refused(tmp_path):
    make_model("stablelm").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.4.enorm.weight": torch.ones(32)}, tmp_path / "model.safetensors")
    target = Target(StableLmForCausalLM.from_pretrained(tmp_path).eval())
    with pytest.raises(CheckpointError, match="model type 'stablelm', are outside the family table"):
        make_drafter("mtp").fit(target)


def test_a_model_without_such_weights_still_asks_for_training(folder):
    path, _, change = folder
    change(drop="model.layers.4.")
    with pytest.raises(CheckpointError, match="has to be trained"):
        make_drafter("mtp").fit(load(path))
    with pytest.raises(CheckpointError, match="has to be trained"):
        make_drafter("mtp").fit(Target(make_model()))
