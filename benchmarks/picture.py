"""Draw the README's picture from a real run: an answer coloured by round, and the race that produced it.

python benchmarks/picture.py        # writes docs/assets/compare.svg; under a minute on two cores
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from rich.console import Console

from outpace import Engine, Settings, Target
from outpace.bench import load_suite
from outpace.cli.compare import COLUMNS, race, row, warm_up
from outpace.cli.render import legend, segments, show_rounds, table, verdict
from outpace.engine import Auditor, encode

OUT = Path(__file__).resolve().parent.parent / "docs" / "assets" / "compare.svg"


def main() -> None:
    """Race plain decoding and suffix drafts on a code edit, record the terminal, save it."""
    torch.set_num_threads(2)
    target = Target.from_pretrained("smollm2")
    tokenizer = target.tokenizer
    settings = Settings(max_new_tokens=96, temperature=0.8, seed=7)
    engines = {"plain": Engine(target), "suffix": Engine(target, "suffix")}
    text = next(q.turns[0] for q in load_suite("mini").questions if q.id == "code-1")
    ids = encode(target, text)
    warm_up(list(engines.values()), ids, settings)
    laps = race(engines, ids, settings)
    finding = Auditor(target, settings).judge(laps["plain"].output, laps["suffix"].output, prompt=0, request=0)
    with Path("/dev/null").open("w") as nowhere:
        on = Console(record=True, force_terminal=True, width=100, file=nowhere)
        on.print("$ outpace generate --compare --drafter suffix --temperature 0.8 --seed 7", style="dim")
        on.print(f'  "{text.splitlines()[0]} ..."\n', style="dim")
        show_rounds(
            segments(laps["suffix"].output, lambda found: tokenizer.decode(list(found), skip_special_tokens=True)), on
        )
        on.print(f"\n{legend(on)}")
        on.print(table(COLUMNS, [row(name, lap, laps["plain"]) for name, lap in laps.items()]))
        on.print(verdict(finding))
        OUT.parent.mkdir(parents=True, exist_ok=True)
        picture = on.export_svg(title="SmolLM2-135M-Instruct, bfloat16, two CPU threads")
        OUT.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))  # loads nothing from elsewhere
    print(
        f"{OUT.relative_to(OUT.parent.parent.parent)}: {laps['suffix'].speed(laps['plain']):.2f}x, {verdict(finding)}"
    )


if __name__ == "__main__":
    main()
