"""How a draft tree grows: tensors in, tensors out, static shapes, no wait for the device.

A shape is either fixed in advance (a set of rank tuples: EAGLE-1, Medusa) or found while drafting (EAGLE-2: the best
`branches` nodes of each depth are expanded, and of all that was born the most probable stay). A chain is the thinnest
tree. Values are sums of log probabilities in float32, and every choice is stable: a child never has more value than its
parent and stands behind it, so the nodes that stay are always a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from outpace.drafters.rowcache import behind, visible
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.heads import DraftHead
    from outpace.drafters.rowcache import RowCache
    from outpace.drafters.rows import Embed, RowNet

Ranks = tuple[int, ...]
Hear = Callable[["Tensor", int], "Tensor"]
"""What outputs [B, F, H] of a depth become once something else has been heard; the root's are of depth 1."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a tree that is found while drafting.

    Attributes:
        depth: deepest drafted token (D). branches: children per expanded node and nodes expanded per depth (k); 1 is
            a chain. nodes: drafted nodes sent to the target, the root not counted.
    """

    depth: int
    branches: int
    nodes: int

    def __post_init__(self) -> None:
        if self.depth < 1 or self.branches < 1 or self.nodes < 1:
            raise ConfigError(
                f"a draft tree needs draft_len, branches and nodes of at least 1, got {self.depth}, {self.branches} "
                f"and {self.nodes}"
            )

    @property
    def born(self) -> int:
        """Nodes generated, of which at most `nodes` stay."""
        return self.branches + (self.depth - 1) * self.branches**2

    @property
    def width(self) -> int:
        """Nodes of the draft."""
        return min(self.nodes, self.born)

    @property
    def scratch(self) -> int:
        """Entries of the drafter's cache the growth writes."""
        return self.branches * (self.depth - 1)


class Draws(NamedTuple):
    """The path's numbers, for drafts at a temperature.

    Attributes:
        temperature: [B] float32, 0 for greedy requests.
        race: [B, D or more, Vd] float32, the Gumbel noise of draft ids at each position ahead, zero for requests it
            does not decide; None where it decides none.
        u: [B, D] float32: the number of each position ahead; None where no request looks one up in its law.
        looked_up: [B] float32: the temperature of requests whose number is, 0 for the others.
        coupling: how sure the token drawn with u is to be the path's, beyond its probability.
    """

    temperature: Tensor
    race: Tensor | None
    u: Tensor | None
    looked_up: Tensor
    coupling: float


def children(logits: Tensor, count: int, draws: Draws | None = None, depth: int = 1) -> tuple[Tensor, Tensor]:
    """The `count` best next tokens of each row: (log probability, draft id), [B, F, count] each, best first.

    logits: [B, F, Vd]. With draws, a law close to the target's turns the path's numbers into the same token, so they
    say more than the law does. Gumbel noise is added to the logits as the target will add it to its own: the softmax of
    the sum is, measured, how likely a token is to be the path's. Where a number is looked up, the token that the law
    gives at it counts as `coupling` more probable.
    """
    scores = logits.float()
    if draws is not None:
        heat = draws.temperature.masked_fill(draws.temperature <= 0, 1.0)
        scores = scores / heat[:, None, None]
        if draws.race is not None:
            scores = scores + draws.race[:, depth - 1, None]
    if draws is not None and draws.u is not None:
        p = torch.softmax(scores, -1)
        cumulated = torch.cumsum(p, -1)
        number = (draws.u[:, depth - 1, None, None] * cumulated[..., -1:]).expand(*p.shape[:2], 1).contiguous()
        drawn = torch.searchsorted(cumulated, number, right=True).clamp_max(p.shape[-1] - 1)
        share = (draws.coupling * (draws.looked_up > 0))[:, None, None]
        p = (1 - share) * p
        p = p.scatter_add(2, drawn, share.expand_as(drawn))
        best, ids = torch.topk(p, count, -1)
        return best.log().clamp_max(0), ids
    best, ids = torch.topk(scores, count, -1)
    return (best - torch.logsumexp(scores, -1, keepdim=True)).clamp_max(0), ids


def extend(
    net: RowNet,
    embed: Embed,
    cache: RowCache,
    features: Tensor,
    tokens: Tensor,
    count: Tensor,
    width: int,
    slots: Tensor | None = None,
) -> None:
    """Read rows of verified features and keep them; `cache.top` then predicts the first drafted token.

    features: [B, W, taps * H]; tokens: [B, W] int64, the token after each feature; count: [B] int64, how many rows of
    each request are real (0 leaves the request as it was); width: entries attention reads; slots: [B] int64, where the
    requests sit, each elsewhere; None: in the first B.
    """
    batch, rows = tokens.shape
    at = cache.at[:batch] if slots is None else cache.at[slots]
    if net.compiled is not None:
        y = net.compiled.read(cache, embed(tokens), at, width, features=features, slots=slots)
        keep_last(cache, y, at, count, slots)
        return
    sees = torch.ones(rows, rows, dtype=torch.bool, device=at.device).tril().expand(batch, -1, -1)
    embedded = embed(tokens)
    z = net.fuse(features)
    mask = visible(at, sees, width, z.dtype)
    cos, sin = net.rotary(at[:, None] + torch.arange(rows, device=at.device))
    y = net(embedded, z, cos, sin, behind(cache, at, 0, mask, width, slots))
    keep_last(cache, y, at, count, slots)


def keep_last(cache: RowCache, y: Tensor, at: Tensor, count: Tensor, slots: Tensor | None) -> None:
    """Keep rows just written: `count` [B] of each request behind `at` [B], with outputs y [B, R, H]; slots as above."""
    last = y.gather(1, (count - 1).clamp_min(0)[:, None, None].expand(-1, 1, y.shape[2]))[:, 0].to(cache.top.dtype)
    where = slice(count.shape[0]) if slots is None else slots
    cache.top[where] = torch.where(count[:, None] > 0, last, cache.top[where])
    cache.at[where] = at + count


def grow(
    net: RowNet, embed: Embed, cache: RowCache, plan: Plan, batch: int, width: int, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens, parents), [B, plan.width] int64 each, breadth first: the tree behind each request's kept rows."""
    tokens, parents, _ = kept(*born(net, embed, cache, plan, batch, width, draws), plan.width)
    return tokens, parents


def born(
    net: RowNet,
    embed: Embed,
    cache: RowCache,
    plan: Plan,
    batch: int,
    width: int,
    draws: Draws | None = None,
    hear: Hear | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, parents, values), [B, plan.born] each: all nodes generated, of which `grow` keeps the best.

    A plan of less depth generates the first of them.
    """
    k = plan.branches
    top = cache.top[:batch, None]
    device = top.device
    if hear is not None:
        top = hear(top, 1)
    values, ids = _following(net, top, k, draws, 1)
    tokens = ids[:, 0]  # [B, k]: depth 1
    value = values[:, 0]
    every_token, every_value = [tokens], [value]
    every_parent = [torch.full_like(tokens, -1)]
    frontier = torch.arange(k, device=device).expand(batch, -1)  # birth index of the nodes to expand
    z = _feedback(net, top).expand(-1, k, -1)
    eye = torch.eye(k, dtype=torch.bool, device=device).expand(batch, -1, -1)
    sees = eye
    for depth in range(2, plan.depth + 1):
        y = _step(net, embed, cache, tokens, z, sees, depth - 1, width)
        if hear is not None:
            y = hear(y, depth)
        values, ids = _following(net, y, k, draws, depth)
        born_token = ids.flatten(1)  # [B, k * k]
        born_value = (value[..., None] + values).flatten(1)
        born_parent = frontier.repeat_interleave(k, 1)
        every_token.append(born_token)
        every_value.append(born_value)
        every_parent.append(born_parent)
        if depth == plan.depth:
            break
        best = _best(born_value, k)
        value, tokens = born_value.gather(1, best), born_token.gather(1, best)
        frontier = best + k + (depth - 2) * k * k
        slot = best // k  # which frontier node each new one hangs on
        z = _feedback(net, y).gather(1, slot[..., None].expand(-1, -1, y.shape[2]))
        sees = torch.cat([sees.gather(1, slot[..., None].expand(-1, -1, sees.shape[2])), eye], 2)
    return torch.cat(every_token, 1), torch.cat(every_parent, 1), torch.cat(every_value, 1)


def _step(
    net: RowNet, embed: Embed, cache: RowCache, tokens: Tensor, z: Tensor, sees: Tensor, depth: int, width: int
) -> Tensor:
    """Run the nodes of one depth: tokens [B, F], features of their parents z [B, F, H], sees [B, F, S]."""
    batch, rows = tokens.shape
    at = cache.at[:batch]
    if net.compiled is not None:
        return net.compiled.read(cache, embed(tokens), at, width, states=z, sees=sees, ahead=depth - 1)
    mask = visible(at, sees, width, z.dtype)
    cos, sin = net.rotary((at + depth - 1)[:, None].expand(-1, rows))
    y: Tensor = net(embed(tokens), z, cos, sin, behind(cache, at, sees.shape[2] - rows, mask, width))
    return y


def _following(net: RowNet, y: Tensor, count: int, draws: Draws | None, depth: int) -> tuple[Tensor, Tensor]:
    """`children` of outputs y [B, F, H], as target ids."""
    if net.compiled is not None and (draws is None or draws.u is None):
        return net.compiled.best(y, count, draws, depth)
    values, ids = children(net.head(net.readout(y)), count, draws, depth)
    return values, net.head.to_target(ids)


def _feedback(net: RowNet, y: Tensor) -> Tensor:
    """What the next depth reads of outputs [B, F, H]; compiled networks make it of them themselves."""
    return y if net.compiled is not None else net.feedback(y)


def _best(value: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the largest values [B, n], earlier ones first among equals."""
    if count == value.shape[1] == 1:
        return torch.zeros_like(value, dtype=torch.int64)
    return torch.sort(value, dim=-1, descending=True, stable=True).indices[:, :count]


def kept(tokens: Tensor, parents: Tensor, value: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` nodes of most value, in order of birth, parents renumbered: tokens, parents and values [B, count].

    tokens, parents, value: [B, n], parents before children, a child's value never above its parent's.
    """
    batch, born = tokens.shape
    if count == born:
        return tokens, parents, value
    order = _best(value, count).sort(-1).values
    number = torch.full_like(parents, -1).scatter(1, order, torch.arange(count, device=order.device).expand(batch, -1))
    parent = parents.gather(1, order)
    renumbered = torch.where(parent < 0, parent, number.gather(1, parent.clamp_min(0)))
    return tokens.gather(1, order), renumbered, value.gather(1, order)


@dataclass(frozen=True, slots=True)
class _Level:
    """One depth of a fixed tree, as index tensors: nothing of it depends on what is drafted.

    Attributes:
        slot: [n] which expanded node of the depth above each node hangs on. rank: [n] which of its children it is.
        pick: [F] those of the n nodes that are expanded. sees: [F, S] which scratch entries each of them sees.
    """

    slot: Tensor
    rank: Tensor
    pick: Tensor
    sees: Tensor


class FixedTree:
    """A tree of rank tuples fixed in advance: node (i_1, .., i_m) is the i_m-th best token behind (i_1, .., i_{m-1}).

    Attributes:
        paths: the tuples, by depth, then in order. parents: [n] index of each node's parent, -1 for the root.
        depth: of the deepest. ranks: how many children are asked for per node. levels: index tensors per depth.

    Raises:
        ConfigError: if the set is empty, or not closed under prefixes.
    """

    def __init__(self, paths: Iterable[Ranks], device: torch.device | str = "cpu") -> None:
        self.paths = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(self.paths)}
        orphan = next((path for path in self.paths if len(path) > 1 and path[:-1] not in index), None)
        if not self.paths or not all(self.paths) or orphan is not None:
            what = f"{orphan} has no parent in it" if orphan else "this one is empty"
            raise ConfigError(f"a fixed tree is a set of rank tuples closed under prefixes, and {what}")
        above = [index.get(path[:-1], -1) for path in self.paths]
        self.parents = torch.tensor(above, device=device)
        self.depth = len(self.paths[-1])
        self.ranks = 1 + max(max(path) for path in self.paths)
        self.levels = list(self._levels(above, device))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def width(self) -> int:
        """Nodes of the draft."""
        return len(self.paths)

    @property
    def scratch(self) -> int:
        """Entries of the drafter's cache its growth writes: one per node with children."""
        return sum(level.pick.shape[0] for level in self.levels)

    def _levels(self, above: list[int], device: torch.device | str) -> Iterator[_Level]:
        expanded = [-1]
        column: dict[int, int] = {}
        for depth in range(1, self.depth + 1):
            nodes = [i for i, path in enumerate(self.paths) if len(path) == depth]
            grown = [i for i in nodes if i in above]
            slot = [expanded.index(above[i]) for i in nodes]
            column |= {node: len(column) + i for i, node in enumerate(grown)}
            sees = torch.zeros(len(grown), len(column), dtype=torch.bool)
            for row, node in enumerate(grown):
                while node >= 0:
                    sees[row, column[node]] = True
                    node = above[node]
            yield _Level(
                torch.tensor(slot, device=device),
                torch.tensor([self.paths[i][-1] for i in nodes], device=device),
                torch.tensor([nodes.index(i) for i in grown], dtype=torch.int64, device=device),
                sees.to(device),
            )
            expanded = grown


def grow_fixed(
    net: RowNet, embed: Embed, cache: RowCache, tree: FixedTree, batch: int, width: int, draws: Draws | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens, parents), [B, len(tree)] int64 each: the same shape for every request."""
    top = cache.top[:batch]
    y = top[:, None]
    _, ids = _following(net, y, tree.ranks, draws, 1)
    tokens: list[Tensor] = []
    for depth, level in enumerate(tree.levels, start=1):
        tokens.append(ids[:, level.slot, level.rank])
        if not level.pick.shape[0]:
            break
        z = _feedback(net, y)[:, level.slot[level.pick]]
        sees = level.sees.expand(batch, -1, -1)
        y = _step(net, embed, cache, tokens[-1][:, level.pick], z, sees, depth, width)
        _, ids = _following(net, y, tree.ranks, draws, depth + 1)
    return torch.cat(tokens, 1), tree.parents.expand(batch, -1)


def best_paths(rates: Sequence[Sequence[float]], nodes: int) -> list[tuple[Ranks, float]]:
    """The rank tuples of most probability, with it: greedy, closed under prefixes by construction.

    rates[d][r]: how often the r-th best token of depth d + 1 is right, given that those before are. A heap holds the
    next sibling of every node taken and its first child (Medusa, section on tree construction; O(n log n)).
    """
    taken: list[tuple[Ranks, float]] = []
    heap: list[tuple[float, Ranks, float]] = []

    def offer(path: Ranks, above: float) -> None:
        depth, rank = len(path) - 1, path[-1]
        if depth < len(rates) and rank < len(rates[depth]) and rates[depth][rank] > 0:
            heapq.heappush(heap, (-above * rates[depth][rank], path, above))

    offer((0,), 1.0)
    while heap and len(taken) < nodes:
        value, path, above = heapq.heappop(heap)
        taken.append((path, -value))
        offer((*path[:-1], path[-1] + 1), above)
        offer((*path, 0), -value)
    return taken


# From rates typical of heads on frozen targets (Medusa: heads 1 to 5 of a 7B model; EAGLE: above them): what a drafter
# uses before it has been calibrated.
_RATES = ((0.65, 0.14, 0.06, 0.03, 0.02),) * 5
DEFAULT_PATHS: Final[tuple[Ranks, ...]] = tuple(path for path, _ in best_paths(_RATES, 63))


def grow_ranked(logits: Tensor, head: DraftHead, tree: FixedTree, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
    """(tokens, parents), [B, len(tree)]: every node of a depth takes its token from that depth's one list.

    logits: [B, K, Vd], one row per depth ahead.
    """
    tokens = []
    for depth, level in enumerate(tree.levels, start=1):
        _, ids = children(logits[:, depth - 1 : depth], tree.ranks, draws, depth)
        tokens.append(head.to_target(ids[:, 0, level.rank]))
    return torch.cat(tokens, 1), tree.parents.expand(logits.shape[0], -1)
