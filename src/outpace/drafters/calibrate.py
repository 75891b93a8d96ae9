"""Which fixed tree suits a drafter: counted on text the target wrote, not assumed.

For every slot of a calibration text, the rank of the true token in the drafter's list at each depth is known. How often
a whole tuple of ranks occurs is the chance that its node is accepted; that is estimated jointly, and by a product of
per-depth rates only where a tuple was seen too rarely. Source: Cai et al. 2024 (Medusa), section 2.3.3, with joint
frequencies. How much of the tree pays on a machine is measured there (`drafters.shapes`).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import torch

from outpace.drafters.growth import Ranks, best_paths
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_RARE: Final = 30  # a tuple seen less often is estimated by the product of its depths' rates


def count_ranks(logits: Tensor, label: Tensor, count: int) -> Tensor:
    """Rank of each label among the `count` best of its row, [n] int64; `count` where it is not among them.

    logits: [n, Vd]; label: [n] draft ids, -1 where there is none.
    """
    best = torch.topk(logits, count, -1).indices
    found = best == label[:, None]
    return torch.where(found.any(-1), found.long().argmax(-1), count)


def path_values(ranks: Tensor, usable: Tensor, count: int, nodes: int) -> list[tuple[Ranks, float]]:
    """(rank tuple, chance that its node is accepted) of the `nodes` best, most likely first.

    ranks: [K, n] from `count_ranks` (`count`: none); usable: [K, n] bool, whether depth d of a slot has a label.

    Raises:
        ConfigError: if there is nothing to count.
    """
    slots = usable[-1].nonzero()[:, 0] if bool(usable[-1].any()) else usable[0].nonzero()[:, 0]
    if not slots.shape[0]:
        raise ConfigError("nothing to calibrate a tree on: no slot of the text has a label")
    table = ranks[:, slots].T.tolist()
    seen: Counter[Ranks] = Counter()
    for row in table:
        path: Ranks = ()
        for rank in row:
            if rank == count:
                break
            path = (*path, rank)
            seen[path] += 1
    rates = []
    for depth in range(ranks.shape[0]):
        of_depth = ranks[depth, usable[depth]]
        rates.append([float((of_depth == r).float().mean()) if of_depth.numel() else 0.0 for r in range(count)])
    total = len(table)
    values = {path: hits / total for path, hits in seen.items() if hits >= _RARE}
    for path, value in best_paths(rates, 4 * nodes):
        if path not in values and (len(path) == 1 or path[:-1] in values):
            ceiling = 1.0 if len(path) == 1 else values[path[:-1]]
            rare = _RARE / total if total else 0.0
            values[path] = min(value, ceiling, rare)
    chosen = sorted(values.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    kept: dict[Ranks, float] = {}
    for path, value in chosen:
        if len(kept) < nodes and (len(path) == 1 or path[:-1] in kept):
            kept[path] = value
    return list(kept.items())
