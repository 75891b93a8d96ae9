"""The benchmark and widening on a CUDA device: built there, timed there, the same text there."""

import pytest
import torch

from fakes import row
from outpace import Engine, Target
from outpace.bench import BenchConfig, Question, Suite, Widened, bench
from outpace.target.widen import Shape, Widening, widen
from tiny import PROMPTS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE = Shape(
    hidden_size=96, intermediate_size=112, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=3,
    head_dim=16, vocab_size=64,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_widened_on_the_device(dtype):
    small = make_model("llama", sharpness=3.0).cuda()
    widen(small, LARGE, dtype, "cuda")  # what the libraries keep for themselves is theirs from now on
    before = torch.cuda.memory_allocated()
    large = widen(small, LARGE, dtype, "cuda")
    size = LARGE.parameters * torch.empty(0, dtype=dtype).element_size()
    assert torch.cuda.memory_allocated() - before < 2 * size + (8 << 20)
    ids = torch.tensor([PROMPTS[0]], device="cuda")
    with torch.inference_mode():
        want, found = small(ids).logits[0], large(ids).logits[0].float()
    assert bool((found[:, 40:] == float("-inf")).all())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * float(want.abs().max())
    assert float((want - found[:, :40]).abs().max()) <= tolerance


def test_a_run_on_the_device_knows_its_floor_its_memory_and_its_text(spoken_cuda):
    questions = Suite("own", tuple(Question(i, str(i), "chat", (f"abc abc {i}",), "chat") for i in range(4)), "", "")
    config = BenchConfig(
        drafters=("prompt_lookup:min_ngram=1", "suffix"), stock=("transformers",), modes=("fixed",), max_new_tokens=16,
        repetitions=2, bootstrap=200, warm_up_runs=3, ceilings=True, replays=1,
    )  # fmt: skip
    result = bench(spoken_cuda, config, questions)
    assert result["floor"]["gb_per_s"] > 100
    for method in result["cells"][0]["methods"]:
        assert method["parity"]["differs"] == 0, method["name"]
        assert method["peak_bytes"] > 0
        assert method["ttft_ms"]["p50"] > 0
    assert row(result, "ceiling: always right")["emitted_per_round"] > 3


def test_a_widened_target_is_measured_with_its_drafters(spoken_cuda):
    widening = Widening(spoken_cuda.model, LARGE)
    large = Target(widen(spoken_cuda.model, LARGE, torch.float32, "cuda"), spoken_cuda.tokenizer)
    questions = Suite("own", tuple(Question(i, str(i), "chat", (f"abc abc {i}",), "chat") for i in range(3)), "", "")
    config = BenchConfig(drafters=("suffix",), stock=(), modes=("fixed",), max_new_tokens=16, repetitions=1, replays=0)
    result = bench(large, config, questions, widened=Widened(spoken_cuda, widening))
    assert "widened to the shape" in result["target"]["widened"]
    assert row(result, "suffix")["parity"]["differs"] == 0
    said = [Engine(t).generate(PROMPTS, max_new_tokens=16, ignore_eos=True) for t in (spoken_cuda, large)]
    assert [o.tokens for o in said[0]] == [o.tokens for o in said[1]]


@pytest.fixture
def spoken_cuda(model_dir):
    torch.backends.cuda.matmul.allow_tf32 = False
    return Target.from_pretrained(model_dir, dtype=torch.float32, device="cuda")
