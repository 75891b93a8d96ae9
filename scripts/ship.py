"""Put a trained drafter into the zoo: src/outpace/zoo/TARGET/DRAFTER, with a config that names no folder of a machine.

    python scripts/ship.py runs/eagle3 smollm2 [--commit HASH]

The target gets its alias for a name, paths in the recorded command their last part, and curves are thinned. The weights
are refused if they are larger than a zoo's drafter may be.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from outpace.drafters.checkpoint import CONFIG, WEIGHTS, ZOO, read_config

LARGEST = 25_000_000  # bytes
POINTS = 40  # of a curve


def nameless(command: str, target: str, alias: str) -> str:
    """A recorded command with the target's alias, and of every other path its last part."""
    words = [alias if word == target else word for word in command.split()]
    words[0] = "outpace"
    return " ".join(Path(word).name if word.startswith("/") else word for word in words)


def thinned(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th point of training, all evaluations."""
    training = [point for point in curves if "loss" in point]
    step = max(1, -(-len(training) // POINTS))
    kept = {id(point) for point in [*training[::step], *training[-1:]]}
    return [point for point in curves if "loss" not in point or id(point) in kept]


def main() -> None:
    """Copy one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("alias", help="of the target, smollm2")
    parser.add_argument("--commit", help="of the code that trained it, where the run could not see it")
    options = parser.parse_args()
    config = read_config(options.run)
    size = (options.run / WEIGHTS).stat().st_size
    if size > LARGEST:
        raise SystemExit(f"{size} bytes of weights; a drafter of the zoo has at most {LARGEST}")
    target, provenance = config["target"]["name"], config["provenance"]
    config["target"]["name"] = provenance["target"] = options.alias
    provenance["command"] = nameless(provenance["command"], target, options.alias)
    provenance["commit"] = options.commit or provenance["commit"]
    provenance["curves"] = thinned(provenance["curves"])
    folder = ZOO / options.alias / config["drafter"]
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(options.run / WEIGHTS, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    print(f"{folder}: {size} bytes")


if __name__ == "__main__":
    main()
