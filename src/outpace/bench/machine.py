"""What figures depend on: the machine, its load, its versions, and how fast it can read weights at all."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers

import outpace

if TYPE_CHECKING:
    from outpace.target import Target

_READ_BYTES: Final = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(frozen=True, slots=True)
class Floor:
    """No pass over the weights can be faster than reading them once.

    Attributes:
        gb_per_s: measured read bandwidth (10^9 bytes). weight_bytes: read by one pass. ms: their quotient.
    """

    gb_per_s: float
    weight_bytes: int

    @property
    def ms(self) -> float:
        """Shortest time of a pass."""
        return self.weight_bytes / self.gb_per_s / 1e6

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"gb_per_s": self.gb_per_s, "weight_bytes": self.weight_bytes, "ms": self.ms}


def measure_floor(target: Target) -> Floor:
    """Read a buffer larger than any cache a few times; the best is the machine's."""
    device = target.device
    count = _READ_BYTES["cuda" if device.type == "cuda" else "cpu"] // 4
    data = torch.ones(count, device=device)
    other = torch.empty_like(data)
    best = 0.0
    for _ in range(6):
        best = max(
            best, 4 * count / _seconds(data.sum, device), 8 * count / _seconds(lambda: other.copy_(data), device)
        )
    return Floor(best / 1e9, target.weight_bytes)


def _seconds(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What must be the same for two sessions to be one run: no load, no clocks, no time."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "outpace": outpace.__version__,
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def describe_state(device: torch.device) -> dict[str, Any]:
    """What may change while a run lasts: load, clocks, power and temperature, as far as the machine tells."""
    found: dict[str, Any] = {
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    }
    if device.type == "cuda":
        for name, read in (
            ("clock_mhz", torch.cuda.clock_rate),
            ("power_w", lambda d: round(torch.cuda.power_draw(d) / 1e3, 1)),
            ("temperature_c", torch.cuda.temperature),
        ):
            try:
                found[name] = read(device)
            except Exception:  # the package nvidia-ml-py, rights, or the sensor is missing: each has its own error
                found[name] = None
    return found


def describe_target(target: Target) -> dict[str, Any]:
    """The model, as far as figures depend on it."""
    return {
        "name": target.name,
        "model_type": target.config.model_type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "layers": target.layers_total,
        "hidden_size": target.hidden_size,
        "vocabulary": target.vocabulary,
        "path": "fast" if target.fast is not None else f"readable ({target.path_reason})",
        "widened": getattr(target.config, "widened_from", None),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
