"""Which shape of draft pays on a machine: all shapes of a drafter tried at once on a text, and their choices kept.

A drafter's full tree is grown at every place of a text the target wrote. A smaller tree of the same growth holds the
nodes of most worth, so one growth tells what every smaller one would have had accepted, jointly, place by place; from
that the rounds of each shape are walked. Knows no clock: what a shape costs is measured by `outpace.train.tune`. Its
choice is kept in the user's cache (`OUTPACE_CACHE`), for this drafter, target and device alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from outpace.caches import cache_folder
from outpace.drafters.checkpoint import CONFIG, describe_target

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.growth import Ranks
    from outpace.target import Target

_LOG: Final = logging.getLogger("outpace")
_FOLDER: Final = "shapes"  # in the user's cache
_RARE: Final = 30  # a node of a fixed tree that was right less often keeps the place its drafter gave it
SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # nodes that are tried


@dataclass(frozen=True, slots=True)
class Shape:
    """Decoding options, and what decides their cost.

    Attributes:
        options: of the drafter. nodes: that the target verifies. growth, steps: drafting costs of one growth lie on a
            line over its steps.
    """

    options: Mapping[str, Any]
    nodes: int
    growth: str
    steps: int


@dataclass(eq=False)
class Grown:
    """A growth at n places of one text, all its nodes by depth.

    Attributes:
        options: decoding options that name the growth.
        right: [n, N] bool: the node lies on the text's path. value: [n, N]: what the drafter thinks of it; None for a
            tree fixed in advance, whose nodes are worth what they are found to be.
        depth: [N] of each node. most: nodes of the largest draft that is considered.
        paths: the tuples of a fixed tree, in the order of its nodes. given: the same as its drafter gave them, best
            first.
    """

    options: dict[str, Any]
    right: Tensor
    value: Tensor | None
    depth: list[int]
    most: int
    paths: Sequence[Ranks] = ()
    given: Sequence[Ranks] = ()

    @classmethod
    def of(
        cls,
        options: dict[str, Any],
        tokens: Tensor,
        parents: Tensor,
        value: Tensor | None,
        *,
        following: Tensor,
        most: int,
        paths: Sequence[Ranks] = (),
        given: Sequence[Ranks] = (),
    ) -> Grown:
        """From trees (tokens, parents, value: [n, N]) and the text behind each place (following: [n, D], -1: none)."""
        above = parents[0].tolist()
        depth: list[int] = []
        for parent in above:
            depth.append(1 if parent < 0 else depth[parent] + 1)
        right = torch.zeros_like(tokens, dtype=torch.bool)
        for node, level in enumerate(depth):
            parent = parents[:, node]
            so_far = (parent < 0) | right.gather(1, parent.clamp_min(0)[:, None])[:, 0]
            right[:, node] = so_far & (tokens[:, node] == following[:, level - 1])
        return cls(options, right.cpu(), None if value is None else value.float().cpu(), depth, most, paths, given)


def text_behind(tokens: Tensor, start: int, depth: int) -> Tensor:
    """[T] -> [n, depth]: the tokens behind the root of each place t = start .. T - 3, whose root is t + 1."""
    padded = torch.nn.functional.pad(tokens, (0, depth), value=-1)
    return padded[start + 2 :].unfold(0, depth, 1)[: tokens.shape[0] - 2 - start]


def tried(texts: Sequence[Sequence[Grown]]) -> list[tuple[Shape, float]]:
    """Every shape with the tokens per round it would have reached: texts[i] holds each growth of one text."""
    return [found for growth in zip(*texts, strict=True) for found in _tried(growth)]


def _tried(texts: Sequence[Grown]) -> Iterator[tuple[Shape, float]]:
    first = texts[0]
    depth = torch.tensor(first.depth)
    worth = _worth(first, torch.stack([text.right.sum(0) for text in texts]).sum(0))
    deepest = [first.depth[-1]] if first.value is None else list(range(1, first.depth[-1] + 1))
    for most in deepest:
        among = int((depth <= most).sum())
        ranks = []
        for text in texts:
            value = worth.expand_as(text.right) if text.value is None else text.value
            order = torch.sort(value[:, :among], dim=-1, descending=True, stable=True).indices
            ranks.append(order.argsort(-1))
        limit = min(among, first.most)
        for nodes in [n for n in SIZES if n < limit] + [limit]:
            if nodes < most and first.value is not None:
                continue  # no path as deep as that would stay
            lengths = []
            for text, rank in zip(texts, ranks, strict=True):
                stays = text.right[:, :among] & (rank < nodes)
                lengths.append((stays * depth[:among]).amax(-1).tolist())
            if first.value is None:
                best: list[int] = torch.sort(worth, descending=True, stable=True).indices[:nodes].tolist()
                options = {**first.options, "paths": [list(first.paths[i]) for i in best], "nodes": nodes}
                yield Shape(options, nodes, "fixed", nodes), _walked(lengths)
            else:
                options = {**first.options, "draft_len": most, "nodes": nodes}
                yield Shape(options, nodes, str(first.options), most), _walked(lengths)


def _worth(tree: Grown, hits: Tensor) -> Tensor:
    """[N] int64, what puts the nodes of a fixed tree in order: hits where they are many, else the drafter's order.

    A parent has no fewer hits than its children, and stands before them in that order.
    """
    if tree.value is not None:
        return hits
    place = {tuple(path): number for number, path in enumerate(tree.given)}
    behind = [max(place[path[: n + 1]] for n in range(len(path))) for path in tree.paths]
    return torch.where(hits >= _RARE, hits, -1 - torch.tensor(behind))


def _walked(lengths: Sequence[Sequence[int]]) -> float:
    """Tokens per round, a round beginning where the last one ended: lengths[i][t] drafted tokens accepted at t."""
    rounds = tokens = 0
    for text in lengths:
        at = 0
        while at < len(text):
            step = min(text[at] + 1, len(text) - at)
            at, tokens, rounds = at + step, tokens + step, rounds + 1
    return tokens / max(rounds, 1)


# What was chosen --------------------------------------------------------------------------------------------------


def read_shape(source: Path, target: Target) -> dict[str, Any] | None:
    """Decoding options chosen for a checkpoint on this device, or None."""
    folder = cache_folder()
    if folder is None or not (folder / _FOLDER).is_dir():
        return None
    path = _place(folder, source, target)
    try:
        options: dict[str, Any] = json.loads(path.read_text())["options"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _LOG.info("the shape kept in %s is not used: %s", path, error)
        return None
    return options


def keep_shape(source: Path, target: Target, document: Mapping[str, Any]) -> Path | None:
    """Keep a choice: {"options": decoding options, ...figures}. Returns where; None if nothing is kept here."""
    folder = cache_folder()
    if folder is None:
        return None
    path = _place(folder, source, target)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(document, indent=2) + "\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _LOG.info("the shape is not kept: %s", error)
        return None
    return path


def device_name(target: Target) -> str:
    """What costs depend on: the device, and the threads of a CPU."""
    if target.device.type == "cuda":
        return torch.cuda.get_device_name(target.device)
    return f"{target.device.type}, {torch.get_num_threads()} threads"


def _place(folder: Path, source: Path, target: Target) -> Path:
    made_for = {**describe_target(target), "dtype": str(target.dtype), "device": device_name(target)}
    digest = hashlib.sha256((source / CONFIG).read_bytes())
    digest.update(json.dumps(made_for, sort_keys=True).encode())
    return folder / _FOLDER / f"{source.name}-{digest.hexdigest()[:16]}.json"
