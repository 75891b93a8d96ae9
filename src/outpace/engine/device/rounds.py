"""The round of `engine.round` with its pieces captured: pass, choice, walk and commit run on the device.

The host is told once per round what was emitted. Plain decoding does not even wait for that: the next round starts
from tensors on the device while the host reads the last one, and what was computed beyond a stop is thrown away.

    upload draft -> [pass graph] -> [walk graph: choose, walk, commit, advance] -> emitted, one copy to the host

Serves plain decoding and drafters that choose their tokens and add no rows, under the path rule, for requests whose
law is greedy or plain temperature sampling; everything else is played by the readable round, on top of the same
captured passes.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch

from outpace.engine.device.kernels import Chooser, advance, walk
from outpace.engine.round import Played, Timing, drafted_trees, record
from outpace.errors import LawError
from outpace.laws import NoiseDice, Stopping, Tree, Walk
from outpace.target import Readout
from outpace.target.fast.entries import keep_entries
from outpace.target.fast.graphs import Captured, FastPass, padded_batch, padded_rows

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters import Context, Drafter, RequestContext
    from outpace.target import BlockCache
    from outpace.target.fast.forward import Inputs

_AHEAD: Final = 1  # rounds of plain decoding that are under way while the host reads the one before


@dataclass(slots=True)
class _Flight:
    """A round that has been launched: where its outcome will be, and when. The next pass overwrites the taps."""

    emitted: Tensor
    taps: dict[str, Tensor]
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]


class _Lane:
    """What walks of one shape write to, and the laws of the requests in it."""

    def __init__(self, batch: int, rows: int, vocabulary: int, device: torch.device) -> None:
        longs: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.chooser = Chooser(batch * rows, vocabulary, device)
        self.emitted = torch.zeros(batch, rows + 1, **longs)
        self.path = torch.zeros(batch, rows, **longs)
        self.counts = torch.zeros(batch, **longs)
        self.temperature = torch.zeros(batch, dtype=torch.float32, device=device)
        self.keys = torch.zeros(2, batch, **longs)  # seeds, requests
        self.results = [torch.zeros(batch, rows + 1, dtype=torch.int64).pin_memory() for _ in range(_AHEAD + 2)]
        self.turn = 0

    def load(self, requests: Sequence[RequestContext]) -> bool:
        """Put the requests' laws on the device; returns whether any of them samples."""
        batch = self.counts.shape[0]
        pad = [0] * (batch - len(requests))
        heats = [r.sampler.settings.temperature for r in requests]
        dice = [r.sampler.dice for r in requests]
        seeds = [_signed(d.noise.seed) for d in dice if isinstance(d, NoiseDice)]
        names = [_signed(d.request) for d in dice if isinstance(d, NoiseDice)]
        self.temperature.copy_(torch.tensor([*heats, *pad], dtype=torch.float32), non_blocking=True)
        self.keys.copy_(torch.tensor([[*seeds, *pad], [*names, *pad]]), non_blocking=True)
        return any(heats)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return word - (1 << 64) if word >= 1 << 63 else word


class DeviceRounds:
    """Plays rounds on the device for one engine."""

    def __init__(self, fast: FastPass, layer_ids: tuple[int, ...]) -> None:
        self.fast = fast
        self._layer_ids = layer_ids
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._hosts: dict[int, Tensor] = {}
        self._graphs: WeakKeyDictionary[BlockCache, dict[Any, Captured]] = WeakKeyDictionary()
        self._flying: deque[_Flight] = deque()
        self._loaded: list[RequestContext] = []
        self._sampled = False

    @staticmethod
    def serves(drafter: Drafter | None) -> bool:
        """Whether drafts of this drafter can be verified here: it chooses its tokens and adds no rows."""
        if drafter is None:
            return True
        return drafter.kind == "deterministic" and not (drafter.needs.scouts or drafter.needs.adapter)

    def takes(self, context: Context) -> bool:
        """Whether every request's law can be drawn from here, within the positions that the rotary tables hold."""
        longest = max(context.cache.lengths[: len(context.requests)])
        if longest + 2 * 64 > self.fast.positions_limit:
            return False
        return all(r.sampler.plain and isinstance(r.sampler.dice, NoiseDice) for r in context.requests)

    def forget(self) -> None:
        """Throw rounds under way aside: the batch has changed."""
        for flight in self._flying:
            flight.events[2].synchronize()
        self._flying.clear()
        self._loaded = []

    def play(self, context: Context, drafter: Drafter | None, stoppings: Sequence[Stopping], timing: Timing) -> Played:
        """Play one round for every request of the context; see `engine.round.play_round`.

        Raises:
            DraftError: if the drafter proposed something that is not a draft.
            LawError: if a request's logits give no law.
            OutOfMemoryError: if there is no room for a graph of this shape.
        """
        started = perf_counter()
        requests = context.requests
        trees: list[Tree] = [Tree()] * len(requests)
        if drafter is not None and any(r.speculate and r.depth_limit for r in requests):
            trees = drafted_trees(context, drafter, 0)
        drafted = perf_counter()
        taps = drafter.needs.taps if drafter is not None else frozenset()
        if any(len(tree) for tree in trees):
            self.forget()
            self._launch_drafted(context, trees, taps)
        else:
            self._launch_plain(context, taps, alone=drafter is not None)
        flight = self._flying.popleft()
        flight.events[2].synchronize()
        read = flight.emitted.tolist()
        walks, verdicts = [], []
        for row, tree, stopping in zip(read[: len(requests)], trees, stoppings, strict=True):
            tokens = row[1 : row[0] + 1]
            if min(tokens) < 0:
                self.forget()
                raise LawError(
                    "the target's logits give no law (NaN, or all tokens forbidden); check the model's dtype"
                )
            verdict = stopping.feed(tokens)
            nodes = _nodes(tree, tokens)
            one = Walk(nodes[: verdict.kept - 1], tuple(tokens[: verdict.kept]))
            walks.append(one)
            verdicts.append(verdict)
        for b, one in enumerate(walks):
            context.cache.lengths[b] += len(one.tokens)
        if drafter is not None:
            taken = {name: value[: len(requests)] for name, value in flight.taps.items()}
            drafter.observe(context, walks, Readout(None, None, taken))
        rounds, reached = record(requests, trees, walks, stoppings)
        ended = perf_counter()
        before, between, after = flight.events
        pass_ms, walk_ms = before.elapsed_time(between), between.elapsed_time(after)
        timing.rounds += 1
        timing.draft_ms += 1e3 * (drafted - started)
        timing.pass_ms += pass_ms
        timing.walk_ms += walk_ms
        timing.other_ms += max(0.0, 1e3 * (ended - drafted) - pass_ms - walk_ms)
        return Played(rounds, verdicts, reached, 1e3 * (ended - started))

    def _launch_plain(self, context: Context, taps: frozenset[str], *, alone: bool) -> None:
        """Keep rounds of one row under way; `alone`: only this one, since a draft may follow."""
        requests, cache = context.requests, context.cache
        batch = padded_batch(len(requests))
        inputs, lane = self.fast.inputs(batch, 1), self._lane(batch, 1)
        same = len(self._loaded) == len(requests) and all(map(operator.is_, self._loaded, requests))
        if not self._flying or not same:
            self.forget()
            self._sampled = lane.load(requests)
            lengths = cache.lengths[: len(requests)]
            self._upload(inputs, [[r.root] for r in requests], [[-2]] * len(requests), [[n] for n in lengths], lengths)
            self._loaded = list(requests)
        most = 1 if alone else min(1 + _AHEAD, max(r.remaining for r in requests))
        while len(self._flying) < most:
            entries = max(cache.lengths[: len(requests)]) + len(self._flying) + 1
            self._launch(cache, inputs, lane, entries, batch, taps)

    def _launch_drafted(self, context: Context, trees: list[Tree], taps: frozenset[str]) -> None:
        requests, cache = context.requests, context.cache
        batch = padded_batch(len(requests))
        rows = padded_rows(1 + max(len(tree) for tree in trees))
        inputs, lane = self.fast.inputs(batch, rows), self._lane(batch, rows)
        self._sampled = lane.load(requests)
        tokens, parents, positions = [], [], []
        lengths = cache.lengths[: len(requests)]
        for request, tree, length in zip(requests, trees, lengths, strict=True):
            pad = rows - 1 - len(tree)
            tokens.append([request.root, *tree.tokens, *([0] * pad)])
            parents.append([-2, *(parent + 1 for parent in tree.parents), *([-2] * pad)])
            positions.append([length, *(length + depth for depth in tree.depths()), *([length] * pad)])
        self._upload(inputs, tokens, parents, positions, lengths)
        self._launch(cache, inputs, lane, max(lengths) + rows, batch, taps)

    def _upload(
        self,
        inputs: Inputs,
        tokens: list[list[int]],
        parents: list[list[int]],
        positions: list[list[int]],
        lengths: list[int],
    ) -> None:
        """Fill all static tensors of a shape with one copy."""
        host = self._hosts.get(id(inputs))
        if host is None:
            host = self._hosts[id(inputs)] = torch.zeros(inputs.flat.shape, dtype=torch.int64).pin_memory()
        rows, spare = inputs.main, inputs.batch - len(tokens)
        flat: list[int] = []
        for part, filler in ((tokens, 0), (parents, -2), (positions, 0)):
            for row in part:
                flat.extend(row)
            flat.extend([filler] * (rows * spare))
        flat.extend(lengths)
        flat.extend([0] * spare)
        flat.extend(range(inputs.batch))
        start = inputs.offsets[5]
        host[:start] = torch.tensor(flat)
        if inputs.bits is not None:
            words = inputs.bits.shape[1]
            packed: list[int] = []
            for row_parents in [*parents, *([[-2] * rows] * spare)]:
                seen: list[int] = []
                for at, parent in enumerate(row_parents):
                    seen.append((seen[parent] if parent >= 0 else 0) | (1 << at))
                for mask in seen:
                    packed.extend((mask >> (32 * word)) & 0xFFFFFFFF for word in range(words))
            view = host[start:].view(torch.int32)
            view[: len(packed)] = torch.tensor(packed, dtype=torch.int64).to(torch.int32)
        inputs.flat.copy_(host, non_blocking=True)

    def _lane(self, batch: int, rows: int) -> _Lane:
        key = (batch, rows)
        if key not in self._lanes:
            with torch.inference_mode(False):
                self._lanes[key] = _Lane(batch, rows, self.fast.plan.vocabulary, self.fast.plan.device)
        return self._lanes[key]

    def _launch(
        self, cache: BlockCache, inputs: Inputs, lane: _Lane, entries: int, batch: int, taps: frozenset[str]
    ) -> None:
        """Start one round on the tensors of a shape."""
        cache.reserve(slots=batch, capacity=entries)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        events[0].record()
        outputs = self.fast.launch(inputs, cache, entries=entries, layer_ids=self._layer_ids, taps=taps)
        events[1].record()
        assert outputs.logits is not None  # asked for
        self._walk(cache, inputs, lane, outputs.logits)
        result = lane.results[lane.turn]
        lane.turn = (lane.turn + 1) % len(lane.results)
        result.copy_(lane.emitted, non_blocking=True)
        events[2].record()
        self._flying.append(_Flight(result, outputs.taps, (events[0], events[1], events[2])))

    def _walk(self, cache: BlockCache, inputs: Inputs, lane: _Lane, logits: Tensor) -> None:
        graphs = self._graphs.setdefault(cache, {})
        key = (cache.generation, id(inputs), logits.data_ptr(), self._sampled)
        if key not in graphs:
            for old in [k for k in graphs if k[0] != cache.generation]:
                del graphs[old]
            table, like, sampled = cache.table(), cache.tensors()[0][0], self._sampled

            def work(emitted: Tensor, path: Tensor, counts: Tensor, keep: Tensor, ahead: Inputs) -> None:
                chosen = lane.chooser(
                    logits, lane.temperature, lane.keys[0], lane.keys[1], ahead.positions, sampled=sampled
                )
                walk(ahead.tokens, ahead.parents, chosen, emitted, path, counts)
                if inputs.main > 1:
                    keep_entries(table, like, path, keep, ahead.lengths, ahead.slots)
                advance(emitted, counts, ahead.tokens, ahead.positions, ahead.lengths)

            def warm() -> None:  # on copies, and keeping nothing: running twice would commit twice
                spare = type(inputs).empty(inputs.batch, inputs.main, inputs.flat.device, chain=False)
                work(lane.emitted.clone(), lane.path.clone(), lane.counts.clone(), torch.zeros_like(lane.counts), spare)

            graphs[key] = self.fast.capture_work(
                lambda: work(lane.emitted, lane.path, lane.counts, lane.counts, inputs),
                f"a walk over {inputs.batch} x {inputs.main} rows",
                warm,
            )
        graphs[key]()


def _nodes(tree: Tree, tokens: Sequence[int]) -> tuple[int, ...]:
    """The nodes that a walk passed, from what it emitted (the last token is the target's own)."""
    children = tree.children()
    nodes: list[int] = []
    node = -1
    for token in tokens[:-1]:
        node = next(child for child in children[node + 1] if tree.tokens[child] == token)
        nodes.append(node)
    return tuple(nodes)
