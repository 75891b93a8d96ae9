"""Memory and speed of outpace.optim beside torch and other 8-bit optimizers, as ratios measured in one process.

    python benchmarks/optim.py --section step --out step.json      # one section: minutes
    python benchmarks/optim.py                                      # all that this machine can run

Regime: a step streams every stored byte once, so on a GPU the floor is bytes moved over the bandwidth that a large copy
reaches in the same run. Candidates alternate, one step each, after warm-up; times are medians with quartiles. The last
line of the output is the JSON that --out writes.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import platform
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from outpace.optim import FlashAdamW, FlashLion, FlashSGD, release_gradients

GIB = 2**30
# Bytes that a step has to move per parameter, read and written, with bf16 weights and gradients.
MOVED = {"adamw": 7.125 + 5.125, "lion": 6.0625 + 4.0625, "sgd": 6.0625 + 4.0625, "torch": 28.0}
# FlashOptim paper (arXiv 2602.23349), Llama-3.1-8B, FSDP2, no release; sums over the ranks, see docs/optim.md.
PAPER_8B = {"parameters_gib": 15.0, "optimizer_gib": 23.4, "peak_gib": 112.9, "optimizer_step_ms": 11.5}


def parameters(count: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """About `count` numbers as matrices of 4096 columns, with gradients of the same dtype."""
    rows, result = count // 4096, []
    while rows > 0:
        part = min(rows, 4096)
        p = nn.Parameter(torch.empty(part, 4096, dtype=dtype, device=device).normal_(0, 0.02))
        p.grad = torch.empty_like(p).normal_(0, 1e-3)
        result.append(p)
        rows -= part
    return result


def quartiles(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in ms."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": round(middle, 4), "q1_ms": round(low, 4), "q3_ms": round(high, 4)}


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, from the device's clock where it has one."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize()
    return float(start_event.elapsed_time(end_event))


def interleaved(
    calls: dict[str, Callable[[], object]], device: str, repeats: int, warm: int = 3
) -> dict[str, list[float]]:
    """Times of every call, alternating."""
    for _ in range(warm):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(2 * GIB if device == "cuda" else GIB // 4, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, 15)["copy"]
    return 2 * source.numel() / (statistics.median(times) * 1e-3)


def clear() -> None:
    """Give freed memory back, so that sections do not see each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory() -> dict[str, Any]:
    """Bytes per parameter from the allocator: weights, residuals, states, with and without gradients."""
    rows = {}
    for name, make in {
        "FlashAdamW bf16+8": lambda p: FlashAdamW(p),
        "FlashAdamW bf16+16": lambda p: FlashAdamW(p, master="bf16+16"),
        "FlashLion bf16+8": lambda p: FlashLion(p),
        "FlashSGD bf16+8": lambda p: FlashSGD(p, momentum=0.9),
    }.items():
        clear()
        before = torch.cuda.memory_allocated()
        params = parameters(2**28, torch.bfloat16, "cuda")
        optimizer = make(params)
        optimizer.step()
        torch.cuda.synchronize()
        count = sum(p.numel() for p in params)
        whole = (torch.cuda.memory_allocated() - before) / count
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / count
        optimizer.zero_grad()
        released = (torch.cuda.memory_allocated() - before) / count
        rows[name] = {"bytes": round(whole, 4), "peak_in_step": round(peak, 4), "released_bytes": round(released, 4)}
        print(f"{name:22} {whole:7.4f} bytes/parameter  in a step {peak:7.4f}  without gradients {released:7.4f}")
        del params, optimizer
    ours = rows["FlashAdamW bf16+8"]
    rows["reached"] = {"7.13": ours["peak_in_step"] <= 7.13, "5.13 with release": ours["released_bytes"] <= 5.13}
    return rows


def step(count: int) -> dict[str, Any]:
    """Time of a step against torch's fused AdamW on float32 weights, and against the bandwidth floor."""
    speed = bandwidth("cuda")
    clear()
    print(f"bandwidth of a copy: {speed / 1e12:.3f} TB/s")
    ours, theirs = parameters(count, torch.bfloat16, "cuda"), parameters(count, torch.float32, "cuda")
    flash = FlashAdamW(ours, lr=1e-4)
    fused = torch.optim.AdamW(theirs, lr=1e-4, fused=True)
    times = interleaved({"FlashAdamW": flash.step, "torch.optim.AdamW(fused)": fused.step}, "cuda", 25)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in ours), "copy_bytes_per_s": speed}
    for name, key in (("FlashAdamW", "adamw"), ("torch.optim.AdamW(fused)", "torch")):
        floor = result["parameters"] * MOVED[key] / speed * 1e3
        result[name] = quartiles(times[name]) | {"floor_ms": round(floor, 4)}
        result[name]["share_of_floor"] = round(floor / result[name]["ms"], 4)
        print(
            f"{name:26} {result[name]['ms']:8.3f} ms  floor {floor:7.3f} ms  share {result[name]['share_of_floor']:.1%}"
        )
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    result["ratio"] = round(statistics.median(ratios), 4)
    print(f"ratio of the pairs: {result['ratio']:.3f} (reach 0.6)")
    del fused, theirs, flash
    clear()
    others: tuple[tuple[str, str, Any, dict[str, Any]], ...] = (
        ("FlashAdamW residual=ulp", "adamw", FlashAdamW, {"residual": "ulp"}),
        ("FlashLion", "lion", FlashLion, {}),
        ("FlashSGD", "sgd", FlashSGD, {"momentum": 0.9}),
    )
    for name, key, cls, settings in others:
        optimizer = cls(ours, lr=1e-4, **settings)
        floor = result["parameters"] * MOVED[key] / speed * 1e3
        row = quartiles(interleaved({key: optimizer.step}, "cuda", 15)[key]) | {"floor_ms": round(floor, 4)}
        row["share_of_floor"] = round(floor / row["ms"], 4)
        result[name] = row
        print(f"{name:26} {row['ms']:8.3f} ms  floor {floor:7.3f} ms  share {row['share_of_floor']:.1%}")
        del optimizer
        clear()
    return result


def tune(count: int) -> dict[str, Any]:
    """Step time of each rule for every shape of program, to choose the constants in `fused/launch.py` by."""
    from outpace.optim.fused import launch

    rows: dict[str, Any] = {}
    names = ("GROUPS", "WARPS", "TILES", "STAGES", "REGISTERS")
    kept = {name: getattr(launch, name) for name in names}
    params = parameters(count, torch.bfloat16, "cuda")
    shapes = [
        (16, 1, 16, 1, None),
        (16, 1, 4, 1, None),
        (16, 1, 64, 1, None),
        (16, 1, 16, 1, 96),
        (16, 1, 16, 1, 80),
        (16, 1, 16, 2, None),
        (16, 1, 16, 2, 128),
        (16, 1, 16, 3, None),
        (32, 2, 16, 1, None),
        (32, 2, 16, 2, None),
        (64, 4, 4, 1, None),
        (64, 4, 16, 1, None),
        (64, 4, 16, 2, None),
        (128, 8, 4, 1, None),
        (8, 1, 32, 1, None),
        (32, 4, 16, 1, None),
        (32, 1, 16, 1, None),
    ]
    for cls, settings in ((FlashAdamW, {}), (FlashLion, {}), (FlashSGD, {"momentum": 0.9})):
        optimizer = cls(params, lr=1e-4, **settings)
        for shape in shapes if cls is FlashAdamW else shapes[::4]:
            for name, value in zip(names, shape, strict=True):
                setattr(launch, name, value)
            label = cls.__name__ + "".join(f" {name.lower()}={value}" for name, value in zip(names, shape, strict=True))
            try:
                row = quartiles(interleaved({"x": optimizer.step}, "cuda", 7, warm=2)["x"])
            except Exception as problem:
                print(f"{label}: {problem!r}")
                continue
            rows[label] = row
            print(f"{label:70} {row['ms']:8.3f} ms")
        del optimizer
        clear()
    for name, value in kept.items():
        setattr(launch, name, value)
    return rows


def rivals(count: int) -> dict[str, Any]:
    """Other memory-saving AdamWs, where installed: step time and bytes per parameter, interleaved with ours."""

    def flashoptim(params: list[nn.Parameter]) -> Any:
        return importlib.import_module("flashoptim").FlashAdamW(params, lr=1e-4, master_weight_bits=24)

    def torchao(params: list[nn.Parameter]) -> Any:
        return importlib.import_module("torchao.optim").AdamW8bit(params, lr=1e-4, bf16_stochastic_round=True)

    def bitsandbytes(params: list[nn.Parameter]) -> Any:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit(params, lr=1e-4)

    rows: dict[str, Any] = {}
    for name, make in {"flashoptim": flashoptim, "torchao": torchao, "bitsandbytes": bitsandbytes}.items():
        clear()
        params: list[nn.Parameter] = []
        try:
            before = torch.cuda.memory_allocated()
            params = parameters(count, torch.bfloat16, "cuda")
            other = make(params)
            other.step()
            torch.cuda.synchronize()
            size = (torch.cuda.memory_allocated() - before) / sum(p.numel() for p in params)
            mine = FlashAdamW(parameters(count, torch.bfloat16, "cuda"), lr=1e-4)
            times = interleaved({"ours": mine.step, "theirs": other.step}, "cuda", 15)
            version = getattr(importlib.import_module(name), "__version__", "unknown")
            rows[name] = {side: quartiles(times[side]) for side in times} | {
                "bytes": round(size, 4),
                "version": version,
            }
            rows[name]["ratio"] = round(
                statistics.median(a / b for a, b in zip(times["ours"], times["theirs"], strict=True)), 4
            )
            print(
                f"{name:14} {version:10} {rows[name]['theirs']['ms']:8.3f} ms, {size:6.3f} bytes/parameter; "
                f"ours {rows[name]['ours']['ms']:8.3f} ms, ratio {rows[name]['ratio']:.3f}"
            )
            del mine, other
        except Exception as problem:
            rows[name] = {"not_run": repr(problem)}
            print(f"{name:14} not run: {problem!r}")
    return rows


class Layer(nn.Module):
    """One layer of the Llama-3.1-8B shape."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, width]."""

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head)).transpose(1, 2) for p in (self.q, self.k, self.v))
        repeat = self.heads // self.kv_heads
        k, v = turn(k).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        x = x + self.o(F.scaled_dot_product_attention(turn(q), k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A decoder of the Llama-3.1-8B shape, or a smaller one."""

    def __init__(self, layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def loss(self, tokens: Tensor) -> Tensor:
        """Next-token loss; the logits exist for 512 positions at a time."""
        x = self.embedding(tokens[:, :-1])
        size, length = self.layers[0].head // 2, x.shape[1]
        angles = torch.outer(
            torch.arange(length, device=x.device), 500000.0 ** (-torch.arange(size, device=x.device) / size)
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False)
        x, targets = self.norm(x).flatten(0, 1), tokens[:, 1:].flatten()

        def part(h: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(self.head(h).float(), t, reduction="sum")

        parts = [
            checkpoint(part, h, t, use_reentrant=False) for h, t in zip(x.split(512), targets.split(512), strict=True)
        ]
        return torch.stack(parts).sum() / targets.numel()


def full(shape: tuple[int, ...], budget_gb: float, steps: int) -> dict[str, Any]:
    """A full fine-tuning step of the 8B shape on one GPU held to `budget_gb`: release, checkpointing, sequence 2048."""
    clear()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_gb * 1e9 / total))
    try:
        with torch.device("meta"):
            model = Decoder(*shape)
        model = model.bfloat16().to_empty(device="cuda")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(1.0) if "norm" in name else p.normal_(0, 0.02)
        count = sum(p.numel() for p in model.parameters())
        optimizer = FlashAdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
        optimizer.prepare()
        kinds = {k: round(v / GIB, 2) for k, v in optimizer.memory_report().items()}
        release_gradients(model, optimizer, max_norm=1.0)
        torch.cuda.reset_peak_memory_stats()
        times, losses = [], []
        for seed in range(steps + 2):
            tokens = torch.randint(0, shape[-1], (1, 2049), generator=torch.Generator().manual_seed(seed % 2)).cuda()

            def one(tokens: Tensor = tokens) -> None:
                loss = model.loss(tokens)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())

            taken = timed(one, "cuda")
            if seed >= 2:
                times.append(taken)
        peak = torch.cuda.max_memory_allocated()
        middle = statistics.median(times)
        result = {
            "parameters": count,
            "budget_gb": budget_gb,
            "peak_gib": round(peak / GIB, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
            "held_gib": kinds,
            "step_ms": round(middle, 1),
            "tokens_per_s": round(2048 / middle * 1e3, 1),
            "losses": [round(loss.item(), 4) for loss in losses],
            "paper": PAPER_8B,
        }
        if any(not math.isfinite(loss) for loss in result["losses"]) or optimizer.take_held():
            result["trouble"] = "a loss or an update was not finite"
        print(json.dumps(result, indent=1))
        return result
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def small(_count: int) -> dict[str, Any]:
    """A model of many small tensors, where launches and Python dominate: 400 tensors of 65 to 65 536 elements.

    Times are of the host and the device together, waiting for both; gradients are new tensors at every step, as they
    are in training, so that addresses change.
    """

    def make() -> list[nn.Parameter]:
        shapes = [(256, 256), (256,), (65,), (128, 300)] * 100
        return [nn.Parameter(torch.randn(s, device="cuda").bfloat16()) for s in shapes]

    rows: dict[str, Any] = {}
    optimizers: dict[str, tuple[list[nn.Parameter], Any]] = {}
    for name, make_optimizer in (
        ("FlashAdamW", lambda p: FlashAdamW(p)),
        ("torch.optim.AdamW(foreach)", lambda p: torch.optim.AdamW(p, foreach=True)),
        ("torch.optim.AdamW(fused)", lambda p: torch.optim.AdamW(p, fused=True)),
    ):
        params = make()
        optimizers[name] = (params, make_optimizer(params))
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(20):
        for name, (params, optimizer) in optimizers.items():
            for p in params:
                p.grad = torch.randn_like(p)
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            if repeat >= 4:
                times[name].append((time.perf_counter() - start) * 1e3)
    for name, values in times.items():
        rows[name] = quartiles(values)
        print(f"{name:28} {rows[name]['ms']:8.3f} ms for 400 tensors")
    return rows


def cpu(count: int) -> dict[str, Any]:
    """Time and bytes on the CPU, against torch's foreach AdamW on float32 weights."""
    rows: dict[str, Any] = {"threads": torch.get_num_threads(), "parameters": count // 4096 * 4096}
    ours, theirs = parameters(count, torch.bfloat16, "cpu"), parameters(count, torch.float32, "cpu")
    flash, plain = FlashAdamW(ours, lr=1e-4), torch.optim.AdamW(theirs, lr=1e-4, foreach=True)
    times = interleaved({"FlashAdamW": flash.step, "torch.optim.AdamW(foreach)": plain.step}, "cpu", 5, warm=1)
    held = flash.memory_report()["total"] / rows["parameters"]
    states = sum(t.numel() * t.element_size() for s in plain.state.values() for t in s.values() if t.ndim)
    their_bytes = states / rows["parameters"] + 8
    for name, size in (("FlashAdamW", held), ("torch.optim.AdamW(foreach)", their_bytes)):
        rows[name] = quartiles(times[name]) | {"bytes": round(size, 4)}
        print(f"{name:28} {rows[name]['ms']:10.1f} ms  {size:7.4f} bytes/parameter")
    rows["ratio"] = round(statistics.median(a / b for a, b in zip(*times.values(), strict=True)), 3)
    print(f"ratio of the pairs: {rows['ratio']}")
    return rows


LLAMA_8B = (32, 4096, 32, 8, 14336, 128256)
TINY = (2, 256, 4, 2, 512, 1000)


def main() -> None:
    """Run the sections asked for and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["memory", "step", "tune", "rivals", "small", "full", "cpu"]
    parser.add_argument("--section", action="append", choices=names, help="may be given several times; default: all")
    parser.add_argument("--parameters", type=int, default=None, help="elements for step, tune, rivals (1e9), cpu (1e8)")
    parser.add_argument("--budget-gb", type=float, default=80.0, help="GPU memory the full section may use")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in the full section, to try it out")
    parser.add_argument("--out", type=Path, help="file for the JSON line")
    asked = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(0) if on_gpu else platform.processor() or platform.machine(),
    }
    if on_gpu:
        report["triton"] = importlib.import_module("triton").__version__
    big, failed = asked.parameters or 10**9, False
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": memory,
        "step": lambda: step(big),
        "tune": lambda: tune(min(big, 10**9)),
        "rivals": lambda: rivals(big),
        "small": lambda: small(big),
        "full": lambda: full(TINY if asked.tiny else LLAMA_8B, asked.budget_gb, 5),
        "cpu": lambda: cpu(asked.parameters or 10**8),
    }
    for name in asked.section or names:
        if name != "cpu" and not on_gpu:
            print(f"-- {name}: not run, needs a CUDA device")
            continue
        print(f"-- {name}")
        clear()
        try:
            report[name] = sections[name]()
        except Exception as problem:
            failed = True
            report[name] = {"failed": repr(problem)}
            traceback.print_exc()
    line = json.dumps(report)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(line + "\n")
    print(line)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
