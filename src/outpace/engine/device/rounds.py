"""The round of `engine.round` with its pieces captured: draft, pass, choice, walk and commit run on the device.

The host is told once per round what was emitted, and does not even wait for that: the next round starts from tensors on
the device while the host reads the last one, and what was computed beyond a stop is thrown away.

    [draft graph: read what is owed, grow, lay, place scouts] -> [pass graph]
        -> [walk graph: choose, walk, commit, advance, collect] -> emitted, one copy to the host

Without a drafter there is no draft graph. A drafter that drafts on the host uploads a tree instead, and the host waits.
Serves plain decoding and drafters that choose their tokens, with scouts where they draft on the device, under the path
rule, for all sampling settings but processors of the user's; everything else is played by the readable round, on top of
the same captured passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.growth import Draws
from outpace.engine.device.drafts import WIDEST, lay, numbers_ahead, race_ahead
from outpace.engine.device.history import History
from outpace.engine.device.kernels import Chance, advance, walk
from outpace.engine.device.lanes import AHEAD, Course, Flight, Lane, fill, host_tensor
from outpace.engine.round import Outcome, Played, Timing, drafted_trees, record
from outpace.errors import LawError
from outpace.laws import NoiseDice, Stopping, Tree, Verdict, Walk
from outpace.target import Readout
from outpace.target.fast.entries import keep_entries
from outpace.target.fast.graphs import Captured, FastPass, padded_batch, padded_rows

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters import Context, Drafter
    from outpace.drafters.device import DeviceDraft, DraftKey
    from outpace.target import BlockCache
    from outpace.target.fast.forward import Inputs


class DeviceRounds:
    """Plays rounds on the device for one engine.

    Args:
        fast: the model's captured passes. layer_ids: layers that run.
    """

    def __init__(self, fast: FastPass, layer_ids: tuple[int, ...]) -> None:
        self.fast = fast
        self._layer_ids = layer_ids
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._hosts: dict[int, Tensor] = {}
        self._walks: WeakKeyDictionary[BlockCache, dict[Any, Captured]] = WeakKeyDictionary()
        self._drafts: WeakKeyDictionary[DeviceDraft, dict[Any, Captured]] = WeakKeyDictionary()
        self._flying: deque[Flight] = deque()
        self._course: Course | None = None
        self._chance = Chance(uniform=False, gumbel=False)

    @staticmethod
    def serves(drafter: Drafter | None) -> bool:
        """Whether drafts of this drafter can be verified here: it chooses its tokens, and places scouts here if any."""
        if drafter is None:
            return True
        alone = not (drafter.needs.scouts or drafter.needs.adapter)
        return drafter.kind == "deterministic" and (alone or _device_draft(drafter) is not None)

    def takes(self, context: Context) -> bool:
        """Whether every request's law can be made here, within the positions that the rotary tables hold."""
        longest = max(context.cache.lengths[: len(context.requests)])
        if longest + 2 * 64 > self.fast.positions_limit:
            return False
        return all(History.serves(r) and isinstance(r.sampler.dice, NoiseDice) for r in context.requests)

    def forget(self) -> None:
        """Throw rounds under way aside, and let the host take over: the batch has changed."""
        for flight in self._flying:
            flight.marks[-1].synchronize()
        self._flying.clear()
        if self._course is not None and self._course.draft is not None:
            self._course.draft.leave()
        self._course = None

    def play(self, context: Context, drafter: Drafter | None, stoppings: Sequence[Stopping], timing: Timing) -> Played:
        """Play one round for every request of the context; see `engine.round.play_round`.

        Raises:
            DraftError: if the drafter proposed something that is not a draft.
            LawError: if a request's logits give no law.
            OutOfMemoryError: if there is no room for a graph of this shape.
        """
        started = perf_counter()
        requests = context.requests
        wanted = drafter is not None and any(r.speculate and r.depth_limit for r in requests)
        taps = drafter.needs.taps if drafter is not None else frozenset()
        draft = _device_draft(drafter)
        under_way = bool(self._flying) and self._course is not None and self._course.serves(requests, draft)
        trees: list[Tree] | None = None
        drafted_ms = 0.0
        try:
            if draft is not None and (wanted or under_way):
                self._launch_ahead(context, draft, taps, wanted=wanted)
            else:
                trees = [Tree()] * len(requests)
                if wanted and drafter is not None:
                    self.forget()
                    trees = drafted_trees(context, drafter, 0)
                    drafted_ms = 1e3 * (perf_counter() - started)
                self._launch(context, trees, taps, alone=drafter is not None)
        except BaseException:
            self.forget()
            raise
        flight = self._flying.popleft()
        before = perf_counter()
        flight.marks[0].synchronize()  # prompts are read behind the host's back: the round's own time begins here
        prompts_ms = 1e3 * (perf_counter() - before)
        flight.marks[-1].synchronize()
        read = flight.emitted.tolist()
        outcomes, verdicts, walks = self._outcomes(read[: len(requests)], trees, stoppings)
        for b, outcome in enumerate(outcomes):
            context.cache.lengths[b] += len(outcome.tokens)
        if trees is None and draft is not None:
            draft.settle([outcome.tokens for outcome in outcomes], len(self._flying))
        elif drafter is not None:
            taken = {name: value[: len(requests)] for name, value in flight.taps.items()}
            drafter.observe(context, walks, Readout(None, None, taken))
        rounds = record(requests, outcomes, stoppings)
        total_ms = 1e3 * (perf_counter() - started) - prompts_ms
        spans = [one.elapsed_time(two) for one, two in zip(flight.marks, flight.marks[1:], strict=False)]
        timing.prefill_ms += prompts_ms
        timing.rounds += 1
        timing.draft_ms += drafted_ms + spans[0]
        timing.pass_ms += spans[1]
        timing.walk_ms += spans[2]
        timing.other_ms += max(0.0, total_ms - drafted_ms - sum(spans))
        return Played(rounds, verdicts, [outcome.reached for outcome in outcomes], total_ms)

    def _outcomes(
        self, read: list[list[int]], trees: list[Tree] | None, stoppings: Sequence[Stopping]
    ) -> tuple[list[Outcome], list[Verdict], list[Walk]]:
        """What rows of `emitted` say, cut at stops; walks where the host knows the trees."""
        outcomes, verdicts, walks = [], [], []
        for b, (row, stopping) in enumerate(zip(read, stoppings, strict=True)):
            count, tokens = row[0], row[1 : row[0] + 1]
            drafted, deepest, went_on = row[-3:]
            if min(tokens) < 0:
                self.forget()
                raise LawError(
                    "the target's logits give no law (NaN, or all tokens forbidden); check the model's dtype"
                )
            verdict = stopping.feed(tokens)
            kept = verdict.kept
            reached = kept - 1 + (kept < count or bool(went_on))
            outcomes.append(Outcome(tuple(tokens[:kept]), drafted, deepest, reached))
            verdicts.append(verdict)
            if trees is not None:
                walks.append(Walk(_nodes(trees[b], tokens)[: kept - 1], tuple(tokens[:kept])))
        return outcomes, verdicts, walks

    def _launch_ahead(self, context: Context, draft: DeviceDraft, taps: frozenset[str], *, wanted: bool) -> None:
        """Keep rounds with drafts of the device under way; finish what is, where no more is wanted."""
        requests, cache = context.requests, context.cache
        batch, rows = padded_batch(len(requests)), padded_rows(1 + draft.nodes + draft.scouts) - draft.scouts
        inputs, lane = self.fast.inputs(batch, rows, draft.scouts), self._lane(batch, rows)
        flags = [r.speculate for r in requests]
        course = self._course if self._course is not None and self._course.serves(requests, draft) else None
        changed = course is None or course.speculate != flags
        if course is not None and self._flying and (changed or not wanted):
            return
        if changed:
            self.forget()
            draft.join(context, batch)
            self._chance = lane.load(requests)
            lengths = cache.lengths[: len(requests)]
            tokens = [[r.root, *([0] * (rows - 1))] for r in requests]
            self._upload(inputs, tokens, [[-2] * rows] * len(requests), [[n] * rows for n in lengths], lengths)
            self._course = Course(list(requests), flags, draft)
        most = min(1 + AHEAD, max(r.remaining for r in requests))
        while len(self._flying) < most:
            behind = len(self._flying) * (draft.depth + 1)
            entries = max(cache.lengths[: len(requests)]) + behind + inputs.rows
            self._fly(cache, inputs, lane, entries, taps, draft)

    def _launch(self, context: Context, trees: list[Tree], taps: frozenset[str], *, alone: bool) -> None:
        """Start a round with trees of the host; unless `alone`, since a draft may follow, keep more under way."""
        requests, cache = context.requests, context.cache
        batch, rows = padded_batch(len(requests)), padded_rows(1 + max(len(tree) for tree in trees))
        inputs, lane = self.fast.inputs(batch, rows), self._lane(batch, rows)
        lengths = cache.lengths[: len(requests)]
        if not self._flying or self._course is None or not self._course.serves(requests, None) or rows > 1:
            self.forget()
            self._chance = lane.load(requests)
            tokens, parents, positions = [], [], []
            for request, tree, length in zip(requests, trees, lengths, strict=True):
                pad = rows - 1 - len(tree)
                tokens.append([request.root, *tree.tokens, *([0] * pad)])
                parents.append([-2, *(parent + 1 for parent in tree.parents), *([-2] * pad)])
                positions.append([length, *(length + depth for depth in tree.depths()), *([length] * pad)])
            self._upload(inputs, tokens, parents, positions, lengths)
            self._course = Course(list(requests), [], None)
        most = 1 if alone else min(1 + AHEAD, max(r.remaining for r in requests))
        while len(self._flying) < most:
            self._fly(cache, inputs, lane, max(lengths) + len(self._flying) + rows, taps, None)

    def _upload(
        self,
        inputs: Inputs,
        tokens: list[list[int]],
        parents: list[list[int]],
        positions: list[list[int]],
        lengths: list[int],
    ) -> None:
        host = self._hosts.get(id(inputs))
        if host is None:
            host = self._hosts[id(inputs)] = host_tensor(inputs.flat)
        fill(host, inputs, tokens, parents, positions, lengths)

    def _lane(self, batch: int, rows: int) -> Lane:
        key = (batch, rows)
        if key not in self._lanes:
            with torch.inference_mode(False):
                self._lanes[key] = Lane(batch, rows, self.fast.plan.vocabulary, self.fast.plan.device)
        return self._lanes[key]

    def _fly(
        self,
        cache: BlockCache,
        inputs: Inputs,
        lane: Lane,
        entries: int,
        taps: frozenset[str],
        draft: DeviceDraft | None,
    ) -> None:
        """Start one round on the tensors of a shape. All is captured before anything is launched."""
        cache.reserve(slots=inputs.batch, capacity=entries)
        drafting = None if draft is None else self._draft_graph(draft, inputs, lane)
        passing = self.fast.graph(
            inputs, cache, entries=entries, layer_ids=self._layer_ids, taps=taps,
            adapter=None if draft is None else draft.adapter,
        )  # fmt: skip
        walking = self._walk_graph(cache, inputs, lane, passing.result, draft)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
        marks[0].record()
        if draft is not None and drafting is not None:
            drafting()
            draft.launched(len(self._flying))
        marks[1].record()
        outputs = passing()
        marks[2].record()
        walking()
        result = lane.next_result()
        result.copy_(lane.emitted, non_blocking=True)
        marks[3].record()
        self._flying.append(Flight(result, outputs.taps, marks))

    def _draft_graph(self, draft: DeviceDraft, inputs: Inputs, lane: Lane) -> Captured:
        key = draft.reserve(len(self._flying))
        graphs = self._drafts.setdefault(draft, {})
        shape = (key, id(inputs), self._chance)
        if shape not in graphs:
            for old in [k for k in graphs if k[0].generation != key.generation]:
                del graphs[old]
            work = self._draft_work(draft, key, inputs, lane)
            graphs[shape] = self.fast.capture_work(
                lambda: work(warm=False),
                f"drafts of {inputs.batch} x {draft.nodes} nodes behind up to {key.reach} rows",
                lambda: work(warm=True),
            )
        return graphs[shape]

    def _draft_work(self, draft: DeviceDraft, key: DraftKey, inputs: Inputs, lane: Lane) -> Callable[..., None]:
        chance, vocabulary = self._chance, self.fast.plan.vocabulary

        def work(*, warm: bool) -> None:
            draws = None
            if (chance.uniform or chance.gumbel) and draft.coupling is not None:
                where = inputs.lengths, draft.depth
                draws = Draws(
                    lane.temperature,
                    race_ahead(lane.keys, *where, draft.head) if chance.gumbel else None,
                    numbers_ahead(lane.keys, *where) if chance.uniform else None,
                    lane.temperature.masked_fill(lane.keys.kinds > 0, 0.0) if chance.gumbel else lane.temperature,
                    draft.coupling,
                )
            tokens, parents = draft.draft(key, inputs.batch, draws, warm=warm)
            rows = lay(tokens, parents, draft.depth, lane.room, vocabulary, inputs)
            if draft.scouts:
                numbers = numbers_ahead(lane.keys, inputs.lengths, draft.reads) if draft.reads else None
                draft.place(inputs, rows, lane.temperature, numbers)

        return work

    def _walk_graph(
        self, cache: BlockCache, inputs: Inputs, lane: Lane, outputs: Any, draft: DeviceDraft | None
    ) -> Captured:
        logits: Tensor = outputs.logits
        graphs = self._walks.setdefault(cache, {})
        key = (cache.generation, id(inputs), logits.data_ptr(), self._chance, draft)
        if key not in graphs:
            for old in [k for k in graphs if k[0] != cache.generation]:
                del graphs[old]
            table, like, chance = cache.table(), cache.tensors()[0][0], self._chance

            history = lane.history if chance.history else None

            def work(
                emitted: Tensor, path: Tensor, counts: Tensor, keep: Tensor, room: Tensor, ahead: Inputs, *, warm: bool
            ) -> None:
                scores, positions = logits, ahead.main_positions
                if history is not None:
                    scores = history.score(logits, ahead.tokens, ahead.parents, positions)
                chosen = lane.chooser(scores, lane.temperature, lane.truncation, lane.keys, positions, chance=chance)
                walk(ahead.tokens, ahead.parents, positions, chosen, emitted, path, counts)
                if history is not None:
                    history.count(emitted, history.counts.clone() if warm else history.counts)
                if inputs.main > 1:
                    keep_entries(table, like, path, keep, ahead.lengths, ahead.slots)
                advance(emitted, counts, room, ahead.tokens, ahead.positions, ahead.lengths)
                if draft is not None:
                    draft.collect(outputs.taps, path, emitted[:, 1 : 1 + inputs.main], counts, warm=warm)

            def on_copies() -> None:  # on copies, and keeping nothing: running twice would commit twice
                spare = type(inputs).empty(inputs.batch, inputs.main, inputs.flat.device, chain=False)
                emitted, path, counts = lane.emitted.clone(), lane.path.clone(), lane.counts.clone()
                work(emitted, path, counts, torch.zeros_like(counts), lane.room.clone(), spare, warm=True)

            graphs[key] = self.fast.capture_work(
                lambda: work(lane.emitted, lane.path, lane.counts, lane.counts, lane.room, inputs, warm=False),
                f"a walk over {inputs.batch} x {inputs.main} rows",
                on_copies,
            )
        return graphs[key]


def _device_draft(drafter: Drafter | None) -> DeviceDraft | None:
    """How a drafter drafts on the device, where its trees can be laid there."""
    draft = drafter.device_draft() if drafter is not None else None
    return draft if draft is not None and draft.nodes + draft.scouts < WIDEST else None


def _nodes(tree: Tree, tokens: Sequence[int]) -> tuple[int, ...]:
    """The nodes that a walk passed, from what it emitted (the last token is the target's own)."""
    children = tree.children()
    nodes: list[int] = []
    node = -1
    for token in tokens[:-1]:
        node = next(child for child in children[node + 1] if tree.tokens[child] == token)
        nodes.append(node)
    return tuple(nodes)
