"""How close a pass comes to the floor: bytes that must be read over the bandwidth measured in the same run.

    python benchmarks/roofline.py                          # passes of both shapes
    python benchmarks/roofline.py --section pass --model 8b
    python benchmarks/roofline.py --section tiles          # which tile sizes suit this GPU (slow: compiles hundreds)
    python benchmarks/roofline.py --section decode,batch --model smollm2,135m,8b --out FILE.json
    python benchmarks/roofline.py --section round --model 8b --out benchmarks/results/roofline_rounds_8b.json
    python benchmarks/roofline.py --section round --model smollm2 --drafters 'FOLDER;suffix' --out FILE.json
    python benchmarks/roofline.py --section prompt --model smollm2 --out FILE.json

Sections: `pass` (milliseconds of a pass by rows and context, fast and through the model's modules), `decode` (tokens
per second of plain decoding beside transformers.generate, real text), `batch` (tokens per second by batch), `round`
(the parts of a drafted round: draft, pass, walk, host; random weights for the shapes), `prompt` (the time to a first
token and its parts, drafters reading the prompt captured and eagerly), `tiles`.
The 8B shape has random weights: what its passes cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from outpace import Engine
from outpace.drafters import Context, make_drafter
from outpace.drafters.checkpoint import find_shipped
from outpace.engine import Timing
from outpace.errors import CheckpointError
from outpace.laws import Tree
from outpace.target import Block, Target

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
        "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 16384,
        "rope_theta": 500000.0, "tie_word_embeddings": False,
    },
}  # fmt: skip


def shape_model(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama-type model of a shape, with random weights, on the GPU."""
    config = transformers.LlamaConfig(**SHAPES[name])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cuda")
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name_ else parameter.normal_(0, 0.02)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config, device=torch.device("cuda"))
    model.tie_weights()
    return model.eval()


def milliseconds(work: Any, repeats: int = 30, warm: int = 5) -> float:
    """Median time of a piece of device work, by events."""
    for _ in range(warm):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def pass_bytes(target: Target, cached: int) -> int:
    """Bytes a pass must read: every weight but the embedding table (a few rows), and the cached keys and values."""
    model = target.model
    seen = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    embed = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight.data_ptr() != embed.data_ptr():
        del seen[embed.data_ptr()]
    config = target.config
    heads = config.num_key_value_heads * config.head_dim
    return sum(seen.values()) + cached * 2 * heads * config.num_hidden_layers * target.dtype.itemsize


def time_passes(name: str, target: Target, cases: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Milliseconds of captured passes, (batch, rows, context) each, beside the floor and the model's own modules.

    The floor is that of a copy right behind each, at the clocks the pass had.
    """
    rows_out = []
    with torch.inference_mode():
        for batch, rows, context in cases:
            cache = target.new_cache(slots=batch, capacity=context + 512)
            plan = target.captured.plan
            cache.prepare(plan.key_heads, plan.head_size, plan.dtype, plan.device)
            for keys, values in cache.tensors():
                keys.normal_()
                values.normal_()
            cache.lengths[:] = [context] * batch
            trees = [Tree(list(range(5, 4 + rows)), [max(-1, (i - 1) // 2) for i in range(rows - 1)])] * batch
            block = Block.of([7] * batch, trees, cache.lengths, target.device)
            inputs = target.captured.inputs(batch, rows)
            target.captured._fill(inputs, block, rows)
            inputs.lengths.copy_(torch.tensor(cache.lengths))

            fast = target.captured.graph(inputs, cache, entries=context + rows, layer_ids=target.layer_ids)

            def slow(block: Any = block, cache: Any = cache) -> None:
                target.through("readable").run(block, cache)
                cache.drop()

            ms, rate = milliseconds(fast, warm=40), bandwidth()
            floor = 1e3 * pass_bytes(target, batch * context) / rate
            modules = milliseconds(slow, repeats=5, warm=1) if batch * rows <= 64 else None
            row = {"model": name, "batch": batch, "rows": rows, "context": context, "ms": ms, "floor_ms": floor,
                   "of_floor": ms / floor, "copy_bytes_per_second": rate, "modules_ms": modules}  # fmt: skip
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            rows_out.append(row)
            del cache
    return rows_out


CANDIDATES = [
    (8, 128, 2, 5), (8, 256, 4, 4), (16, 64, 2, 6), (16, 64, 4, 8), (16, 128, 2, 4), (16, 128, 2, 6), (16, 128, 4, 4),
    (16, 128, 4, 6), (16, 256, 2, 4), (16, 256, 4, 3), (16, 256, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3),
    (32, 128, 4, 4), (32, 128, 4, 6), (32, 128, 8, 4), (64, 64, 4, 5), (64, 128, 4, 3),
]  # fmt: skip


def tile_job(shape: str, kind: str, rows: int, number: int, copies: int, pdl: bool) -> Any:
    """A closure that launches one kernel `copies` times on different weights, or None if it does not compile."""
    from outpace.target.fast import linear as fast
    from outpace.target.fast.plan import Projection

    s = SHAPES[shape]
    h, inner, size = s["hidden_size"], s["intermediate_size"], s["head_dim"]
    heads, key_heads = s["num_attention_heads"], s["num_key_value_heads"]
    tile = fast.Tile(*CANDIDATES[number], early=pdl)
    n, k = {"qkv": ((heads + 2 * key_heads) * size, h), "out": (h, h), "gate_up": (2 * inner, h), "down": (h, inner),
            "head": (s["vocab_size"], h)}[kind]  # fmt: skip
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = [Projection(torch.randn(n, k, **options) * 0.02) for _ in range(copies)]
    x = torch.randn(rows, k, **options)
    parts = max(1, k // 16)
    scaled = fast.Scaled(x, torch.ones(rows, parts, dtype=torch.float32, device="cuda"))
    follow = fast.Follow(torch.ones(h, **options), 0.0)
    residual = torch.randn(rows, h, **options)
    query = torch.empty(rows, heads, size, **options)
    keys = torch.empty(1, key_heads, 512, size, **options)
    values = torch.empty_like(keys)
    table = torch.ones(1024, size // 2, **options)
    longs = torch.zeros(rows, dtype=torch.int64, device="cuda")
    common: dict[str, Any] = {"tile": tile, "eps": 1e-5, "pdl": pdl}

    def work() -> None:
        for weight in weights:
            if kind == "qkv":
                fast.query_key_value(
                    scaled, weight, query, keys, values, (table, table), longs, longs[:1], longs[:1], **common
                )
            elif kind == "gate_up":
                fast.gated_linear(scaled, weight, gelu=False, **common)
            elif kind in ("out", "down"):
                fast.linear(x, weight, residual=residual, follow=follow, **common)
            else:
                fast.linear(scaled, weight, **common)

    return work, n * k * 2


def compile_tiles(part: int, parts: int, shapes: list[str]) -> None:
    """Compile a share of the candidates into Triton's cache (one process of many)."""
    jobs = [(s, k, r, c) for s in shapes for k in ("qkv", "out", "gate_up", "down", "head") for r in (1, 32)
            for c in range(len(CANDIDATES))]  # fmt: skip
    for shape, kind, rows, number in jobs[part::parts]:
        for pdl in (True, False):
            try:
                tile_job(shape, kind, rows, number, 1, pdl)[0]()
            except Exception as error:  # a tile too large for this GPU is no candidate
                print(shape, kind, rows, CANDIDATES[number], type(error).__name__, file=sys.stderr)
    torch.cuda.synchronize()


def tiles(rate: float, shapes: list[str]) -> list[dict[str, Any]]:
    """Microseconds of each product with each candidate tile, weights cold, launches captured."""
    from outpace.target.fast.graphs import Captured

    workers = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, __file__, "--section", "compile", "--shapes", ",".join(shapes)]
    with ThreadPoolExecutor(workers) as pool:
        parts = [[*command, "--part", f"{i}/{workers}"] for i in range(workers)]
        list(pool.map(lambda one: subprocess.run(one, check=False), parts))  # noqa: S603  # this very script
    found = []
    pool_handle = torch.cuda.graph_pool_handle()
    for shape in shapes:
        for kind in ("qkv", "out", "gate_up", "down", "head"):
            for rows in (1, 32):
                timed = []
                for number in range(len(CANDIDATES)):
                    for pdl in (True, False):
                        size = 2 * SHAPES[shape]["hidden_size"] ** 2
                        copies = 2 if kind == "head" else max(4, min(60, (200 << 20) // size))
                        try:
                            work, count = tile_job(shape, kind, rows, number, copies, pdl)
                            replay = Captured(work, pool_handle)
                            us = 1e3 * milliseconds(replay, repeats=8, warm=2) / copies
                        except Exception as error:  # as above
                            torch.cuda.synchronize()
                            print(shape, kind, rows, CANDIDATES[number], repr(error)[:100], file=sys.stderr)
                            continue
                        timed.append((us, CANDIDATES[number], pdl))
                        del work, replay
                timed.sort()
                floor = 1e6 * count / rate
                best = ", ".join(f"{us:.1f} {tile}{' pdl' if pdl else ''}" for us, tile, pdl in timed[:5])
                print(f"{shape} {kind} rows {rows}: floor {floor:.1f} us; best {best}", flush=True)
                found.append({"shape": shape, "kind": kind, "rows": rows, "floor_us": floor, "timed": timed})
    return found


def decode(name: str, engine: Engine, new: int = 128) -> list[dict[str, Any]]:
    """Tokens per second of plain decoding, beside transformers.generate as it comes and with a static cache."""
    prompt = "Write a short story about a lighthouse keeper who finds a map."
    options = {"max_new_tokens": new, "ignore_eos": True}
    rows = []

    def ours(which: Engine) -> tuple[float, tuple[int, ...]]:
        start = perf_counter()
        output = which.generate(prompt, **options)[0]
        return len(output.tokens) / (perf_counter() - start), output.tokens

    model, tokenizer = engine.target.model, engine.target.tokenizer
    ids = torch.tensor([list(engine.generate(prompt, max_new_tokens=1)[0].prompt_tokens)], device="cuda")

    def theirs(**extra: Any) -> tuple[float, tuple[int, ...]]:
        start = perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=tokenizer.eos_token_id, **extra,
        )  # fmt: skip
        torch.cuda.synchronize()
        return (out.shape[1] - ids.shape[1]) / (perf_counter() - start), tuple(out[0, ids.shape[1] :].tolist())

    methods = {
        "outpace": lambda: ours(engine),
        "outpace, readable loop": lambda: ours(Engine(engine.target, path="readable")),
        "transformers.generate": lambda: theirs(),
        "transformers.generate, static cache, compiled": lambda: theirs(cache_implementation="static"),
    }
    speeds: dict[str, list[float]] = {k: [] for k in methods}
    texts: dict[str, tuple[int, ...]] = {}
    for method in methods.values():
        method()  # captures, compiles
    for _ in range(3):
        for key, method in methods.items():
            speed, texts[key] = method()
            speeds[key].append(speed)
    for key, values in speeds.items():
        same = next((i for i, (a, b) in enumerate(zip(texts[key], texts["outpace"], strict=True)) if a != b), new)
        row = {"model": name, "method": key, "tokens_per_second": statistics.median(values), "same_tokens": same}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def batches(name: str, target: Target, rate: float, sizes: tuple[int, ...] = (1, 8, 32, 128)) -> list[dict[str, Any]]:
    """Tokens per second of plain decoding by batch size."""
    rows = []
    for size in sizes:
        engine = Engine(target, max_batch=size)
        prompts = [[(7 * i + j) % 1000 + 100 for j in range(64)] for i in range(size)]
        seconds = {}
        for count in (256, 16, 256):  # the first one captures
            start = perf_counter()
            engine.generate(prompts, max_new_tokens=count, ignore_eos=True)
            seconds[count] = perf_counter() - start
        elapsed = seconds[256] - seconds[16]
        speed = size * 240 / elapsed
        floor = pass_bytes(target, size * 200) / rate
        row = {"model": name, "batch": size, "tokens_per_second": speed, "ms_per_round": 1e3 * elapsed / 240,
               "floor_ms": 1e3 * floor, "share_of_floor": floor * 240 / elapsed}  # fmt: skip
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


DRAFTED = (
    "eagle3:draft_len=4,branches=1,nodes=4,vocabulary=16384", "eagle3:draft_len=5,branches=4,nodes=15,vocabulary=16384",
    "eagle3:draft_len=6,branches=8,nodes=31,vocabulary=16384", "eagle2:draft_len=5,branches=4,nodes=15",
    "mtp:draft_len=5,branches=4,nodes=15,vocabulary=16384", "medusa:heads=4,nodes=15,vocabulary=16384",
)  # fmt: skip


def fitted(spec: str, target: Target) -> Any:
    """A drafter for a target: its trained weights, with their vocabulary, where some ship; else random ones."""
    name, _, options = spec.partition(":")
    if find_shipped(name, target) is not None:
        options = ",".join(option for option in options.split(",") if not option.startswith("vocabulary="))
    drafter: Any = make_drafter(f"{name}:{options}")
    try:
        drafter.fit(target)
    except CheckpointError:
        drafter.initialise(target)
        drafter = drafter.for_decoding()
    return drafter


LAWS: dict[str, dict[str, Any]] = {
    "0": {"temperature": 0.0}, "0.8": {"temperature": 0.8}, "0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "0.8, repetition 1.1": {"temperature": 0.8, "repetition_penalty": 1.1},
}  # fmt: skip


def round_parts(name: str, target: Target, specs: list[str], new: int = 200) -> list[dict[str, Any]]:
    """Milliseconds of the parts of a round, per drafter (and for plain decoding), law and batch.

    draft_ms, pass_ms, walk_ms: on the device, by events. round_ms: wall clock over rounds. host_ms: what is left of it.
    """
    rows = []
    prompt = [(7 * j) % 1000 + 100 for j in range(512)]
    for spec in ["plain", *specs]:
        engine = Engine(target, None if spec == "plain" else fitted(spec, target), stand_down=False)
        for law, batch in (*((law, 1) for law in LAWS), ("0.8", 4)):
            options = {"max_new_tokens": new, "ignore_eos": True, **LAWS[law]}
            engine.generate([prompt] * batch, **options)  # captures
            graphs = target.captured.capture.graphs
            engine.timing = timing = Timing()
            started = perf_counter()
            outputs = engine.generate([prompt] * batch, **options)
            wall = (1e3 * (perf_counter() - started) - timing.prefill_ms) / timing.rounds
            parts = {part: getattr(timing, part) / timing.rounds for part in ("draft_ms", "pass_ms", "walk_ms")}
            row = {"model": name, "drafter": spec, "law": law, "batch": batch, **parts,
                   "round_ms": wall, "host_ms": wall - sum(parts.values()), "outside_pass": 1 - parts["pass_ms"] / wall,
                   "emitted_per_round": statistics.fmean(o.emitted_per_round for o in outputs),
                   "captures": target.captured.capture.graphs - graphs}  # fmt: skip
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            rows.append(row)
    return rows


def prompt_parts(name: str, target: Target, specs: list[str], repeats: int = 20) -> list[dict[str, Any]]:
    """Milliseconds to the first token, per drafter (and for plain decoding) and length of the prompt.

    prefill_ms: until the device has read the prompt; of it reading_ms is the drafter's, between two events (on a queue
    that the host does not keep full, its own time). draft_ms, pass_ms, walk_ms: of the first round. other_ms: the
    host's. reading: "captured", or "eager", as through modules.
    """
    rows = []
    cases = [("plain", ""), *((spec, how) for spec in specs for how in ("captured", "eager"))]
    for spec, how in cases:
        drafter = None if spec == "plain" else fitted(spec, target)
        engine = Engine(target, drafter, stand_down=False)
        marks: list[Any] = []
        if drafter is not None:
            time_starts(drafter, marks)
        if how == "eager":
            read_eagerly(drafter, target)
        for length in (64, 256, 1024):
            ids = [(7 * j) % 1000 + 100 for j in range(length)]
            found: dict[str, list[float]] = {}
            graphs = 0
            for turn in range(repeats + 3):
                if turn == 3:  # all is captured
                    graphs = target.captured.capture.graphs
                engine.timing = timing = Timing()
                marks.clear()
                torch.cuda.synchronize()
                start = perf_counter()
                uid = engine.submit(ids, max_new_tokens=64, ignore_eos=True)
                engine.step()
                ttft = 1e3 * (perf_counter() - start)
                engine.cancel(uid)
                torch.cuda.synchronize()
                parts = {"ttft_ms": ttft, "reading_ms": sum(one.elapsed_time(two) for one, two in marks)}
                parts |= {p: getattr(timing, p) for p in ("prefill_ms", "draft_ms", "pass_ms", "walk_ms", "other_ms")}
                for part, value in parts.items() if turn >= 3 else ():
                    found.setdefault(part, []).append(value)
            row = {"model": name, "drafter": spec, "reading": how, "prompt": length,
                   **{part: statistics.median(values) for part, values in found.items()},
                   "captures": target.captured.capture.graphs - graphs}  # fmt: skip
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            rows.append(row)
        engine.close()
    return rows


def time_starts(drafter: Any, marks: list[Any]) -> None:
    """Put two events around each reading of a prompt."""
    start = drafter.start

    def timed(*args: Any) -> None:
        one, two = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        one.record()
        start(*args)
        two.record()
        marks.append((one, two))

    drafter.start = timed


def read_eagerly(drafter: Any, target: Target) -> None:
    """Let a drafter read prompts as it does beside the model's own modules."""
    read = drafter._read
    modules = target.through("readable")
    drafter._read = lambda context, rows, static, slots: read(
        Context(modules, context.cache), rows, static, slots=slots
    )


def main() -> None:
    """Run the chosen sections and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", default="pass")
    parser.add_argument("--model", default="135m,8b", help="135m, 8b (random weights), or smollm2 for decode")
    parser.add_argument("--shapes", default="135m,8b")
    parser.add_argument("--drafters", default="", help="for round and prompt: specs or folders, by semicolons")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.json")
    options = parser.parse_args()
    sections = options.section.split(",")
    if "compile" in sections:
        part, _, parts = options.part.partition("/")
        compile_tiles(int(part), int(parts), options.shapes.split(","))
        return
    rate = bandwidth()
    about = {
        "device": torch.cuda.get_device_name(), "copy_bytes_per_second": rate, "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": shlex.join(sys.argv[1:]),
    }  # fmt: skip
    print(json.dumps(about), flush=True)
    result: dict[str, Any] = {"about": about}
    if "tiles" in sections:
        result["tiles"] = tiles(rate, options.shapes.split(","))
    models = options.model.split(",")
    for name in models:
        if name in SHAPES and {"pass", "batch"} & set(sections):
            target = Target(shape_model(name), name=name)
            cases = [(1, 1, 512), (1, 8, 512), (1, 16, 512), (1, 32, 512), (1, 64, 512), (1, 32, 8000), (8, 1, 512)]
            cases += [(32, 1, 512), (128, 1, 512)] if name == "135m" else [(32, 1, 512)]
            if "pass" in sections:
                result.setdefault("pass", []).extend(time_passes(name, target, cases))
            if "batch" in sections:
                sizes = (1, 8, 32, 128) if name == "135m" else (1, 8, 32)
                result.setdefault("batch", []).extend(batches(name, target, rate, sizes))
            del target
            torch.cuda.empty_cache()
    if "round" in sections:
        specs = options.drafters.split(";") if options.drafters else list(DRAFTED)
        for name in models:
            target = Target(shape_model(name), name=name) if name in SHAPES else Target.from_pretrained(
                name, device="cuda"
            )  # fmt: skip
            result.setdefault("round", []).extend(round_parts(name, target, specs))
            del target
            torch.cuda.empty_cache()
    if "prompt" in sections:
        specs = options.drafters.split(";") if options.drafters else ["eagle3", "mtp"]
        for name in models:
            target = Target(shape_model(name), name=name) if name in SHAPES else Target.from_pretrained(
                name, device="cuda"
            )  # fmt: skip
            result.setdefault("prompt", []).extend(prompt_parts(name, target, specs))
            del target
            torch.cuda.empty_cache()
    if "decode" in sections and "smollm2" in models:
        result["decode"] = decode("smollm2", Engine.from_pretrained("smollm2", device="cuda"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
