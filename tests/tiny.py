"""Tiny randomly initialised models of every family, and drafters around them. Not a test."""

import functools

import torch
import transformers as hf

from outpace.drafters import make_drafter
from outpace.drafters.draft_model import DraftModel
from outpace.drafters.eagle import Eagle
from outpace.drafters.growth import DEFAULT_PATHS
from outpace.target import Target

VOCABULARY = 40
EOS = 1

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}

FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": 7}),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"use_sliding_window": False}),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {}),
    "gemma3": (hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, {"sliding_window": 7, "num_hidden_layers": 7}),
    "olmo2": (hf.Olmo2Config, hf.Olmo2ForCausalLM, {}),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {"sliding_window": None}),
}
GENERIC = {
    "stablelm": (hf.StableLmConfig, hf.StableLmForCausalLM, {}),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, {}),
    "cohere2": (hf.Cohere2Config, hf.Cohere2ForCausalLM, {"sliding_window": 7, "logit_scale": 1.0}),
}


def make_model(name="llama", *, seed=0, sharpness=5.0, dtype=torch.float32, **changes):
    """A random model; `sharpness` scales its weights (the head more): laws neither flat nor one-hot."""
    config_class, model_class, extra = {**FAMILIES, **GENERIC}[name]
    config = config_class(**{**SHAPE, **extra, **changes})
    with torch.inference_mode(False), torch.random.fork_rng():  # shared models outlive the test that asks first
        torch.manual_seed(seed)
        model = model_class(config).to(dtype).eval()
    with torch.inference_mode(False), torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpness)
        model.get_output_embeddings().weight.mul_(3)
    return model


@functools.cache
def target(name="llama", dtype=torch.float32):
    """A shared target of a family, frozen as training freezes it: no test leaves gradients to another."""
    return Target(make_model(name, dtype=dtype).requires_grad_(False))


@functools.cache
def small_target(name="llama", dtype=torch.float32):
    """A draft model: the first layer of `target(name)` under the same embedding and head."""
    big = make_model(name, dtype=dtype)
    layers = 1 if name != "gemma3" else 2
    small = make_model(name, dtype=dtype, num_hidden_layers=layers, layer_types=None) if name == "gemma3" else None
    small = small or make_model(name, dtype=dtype, num_hidden_layers=layers)
    known = small.state_dict().keys()
    small.load_state_dict({k: v.clone() for k, v in big.state_dict().items() if k in known})
    return Target(small)


def learned(name, spec, *, shaken=False):
    """A learned drafter with its initial weights: it guesses badly, and must not change a token.

    shaken: every weight random, also those that start at zero (the up-projections of an adapter).
    """
    drafter = make_drafter(spec) if isinstance(spec, str) else spec
    drafter.initialise(name if isinstance(name, Target) else target(name), seed=3)
    if shaken:
        generator = torch.Generator().manual_seed(4)
        for parameter in drafter.module.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return drafter


DRAFTERS = {
    "prompt_lookup": lambda name: make_drafter("prompt_lookup:min_ngram=1,draft_len=6"),
    "prompt_lookup tree": lambda name: make_drafter("prompt_lookup:min_ngram=1,branches=3,draft_len=5"),
    "suffix": lambda name: make_drafter("suffix:min_probability=0.05"),
    "draft_model path": lambda name: DraftModel(model=small_target(name), draft_len=4),
    "draft_model greedy": lambda name: DraftModel(model=small_target(name), draft_len=4, draw="greedy"),
    "draft_model own": lambda name: DraftModel(model=small_target(name), draft_len=4, draw="own"),
    "layer_skip": lambda name: make_drafter("layer_skip:draft_len=3"),
    "lookahead": lambda name: make_drafter("lookahead"),
    "ptp one-hot": lambda name: learned(name, "ptp:rank=4,min_gain=0", shaken=True),
    "ptp categorical": lambda name: learned(name, "ptp:mode=categorical,rank=4,min_gain=0", shaken=True),
    "ptp mask": lambda name: learned(name, "ptp:mode=mask,rank=4,min_gain=0", shaken=True),
    "ptp tree": lambda name: learned(
        name, "ptp:rank=4,min_gain=0,branches=3,budget=24,adaptive=true,any_temperature=true", shaken=True
    ),
    "ptp mask sampler": lambda name: learned(name, "ptp:mode=mask,rank=4,min_gain=0,sampler=chain", shaken=True),
    "ptp categorical sampler": lambda name: learned(
        name, "ptp:mode=categorical,rank=4,min_gain=0,sampler=chain,vocabulary=30", shaken=True
    ),
    "ptp tree sampler": lambda name: learned(
        name, "ptp:rank=4,min_gain=0,branches=3,budget=24,sampler=chain,sampler_size=24", shaken=True
    ),
    "ptp eagle": lambda name: learned(
        name,
        "ptp:mode=mask,rank=4,slots=4,min_gain=0,branches=3,nodes=10,budget=12,sampler=eagle,vocabulary=30",
        shaken=True,
    ),
    "ptp categorical eagle": lambda name: learned(
        name, "ptp:mode=categorical,rank=4,slots=4,min_gain=0,sampler=eagle,vocabulary=30", shaken=True
    ),
    "medusa": lambda name: learned(name, "medusa:heads=3,nodes=12,vocabulary=30"),
    "mtp": lambda name: learned(name, "mtp:draft_len=3,branches=2,nodes=6,vocabulary=0"),
    "mtp_heads": lambda name: learned(name, "mtp_heads:heads=2,nodes=6,vocabulary=30"),
    "eagle": lambda name: learned(name, Eagle(paths=DEFAULT_PATHS[:9])),
    "eagle2": lambda name: learned(name, "eagle2:draft_len=3,branches=3,nodes=8"),
    "eagle3": lambda name: learned(name, "eagle3:draft_len=4,branches=3,nodes=10,vocabulary=30"),
    "eagle3 chain": lambda name: learned(name, "eagle3:draft_len=4,branches=1,nodes=4,layers=2,vocabulary=0"),
    "merged": lambda name: make_drafter("prompt_lookup+suffix+lookahead"),
}

INSIDE = (
    "layer_skip",
    "mtp_heads",
    "eagle3",
    "ptp eagle",
    "ptp categorical eagle",
)  # look between layers, so need a family of the table

PROMPTS = [
    [5, 6, 7, 8, 9, 5, 6, 7],
    [3, 4, 5, 3, 4, 5, 3, 4],
    [10, 11, 12, 10, 11, 12, 10],
    [20],
    [30, 2, 30, 2, 30, 2, 30, 2, 30, 2, 17, 18],
    [8, 8, 8, 8],
    [13, 25, 36, 7, 19, 22],
    [33, 34],
]
