"""The round of `engine.round` captured as one graph: draft, pass, choice, walk and commit run on the device.

The host is told once per round what was emitted, and does not even wait for that: the next round starts from tensors on
the device while the host reads the last one, and what was computed beyond a stop is thrown away.

    [draft: read what is owed, grow, lay, place scouts] -> [pass]
        -> [choose, walk, advance, emitted to the host's memory, commit, collect]

Without a drafter there is no draft. A drafter that drafts on the host uploads a tree instead, and the host waits.
Between the parts the device notes its clock, beside what was emitted: events of a graph would be those of the next
round by the time that the host reads them.

Serves plain decoding and drafters that choose their tokens, with scouts where they draft on the device, under the path
rule, for all sampling settings but processors of the user's; everything else is played by the readable round, on top of
captured passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.growth import Draws
from outpace.engine.device.drafts import WIDEST, lay, noise_ahead, numbers_ahead
from outpace.engine.device.history import History
from outpace.engine.device.kernels import Chance
from outpace.engine.device.lanes import AHEAD, Course, Flight, Lane, fill, host_tensor
from outpace.engine.round import Outcome, Played, Timing, drafted_trees, record
from outpace.errors import LawError
from outpace.laws import NoiseDice, Stopping, Tree, Verdict, Walk
from outpace.target import Readout
from outpace.target.fast.entries import keep_entries
from outpace.target.fast.graphs import Captured, FastPass, PassKey, padded_batch, padded_rows
from outpace.target.fast.launch import dependent_launch

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters import Context, Drafter
    from outpace.drafters.device import DeviceDraft, DraftKey
    from outpace.engine.device.kernels import Trail
    from outpace.target import BlockCache
    from outpace.target.fast.forward import Inputs, Outputs


class RoundKey(NamedTuple):
    """What a captured round holds for: its pass, what decides its tokens, and what drafts in it."""

    passes: PassKey
    chance: Chance
    draft: DeviceDraft | None
    drafts: DraftKey | None

    def outdates(self, other: RoundKey) -> bool:
        """Whether tensors of the other round's caches are gone, seen from this one."""
        if other.passes.generation != self.passes.generation:
            return True
        if self.drafts is None or other.drafts is None or other.draft is not self.draft:
            return False
        return other.drafts.generation != self.drafts.generation


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
        self._graphs: WeakKeyDictionary[BlockCache, dict[RoundKey, Captured]] = WeakKeyDictionary()
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
            flight.end.synchronize()
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
                resting = not wanted and not taps and all(r.rest for r in requests)
                self._launch(context, trees, taps, alone=drafter is not None and not resting)
        except BaseException:
            self.forget()
            raise
        flight = self._flying.popleft()
        before = perf_counter()
        flight.begin.synchronize()  # prompts are read behind the host's back: the round's own time begins here
        prompts_ms = 1e3 * (perf_counter() - before)
        flight.end.synchronize()
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
        spans = flight.spans()
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
        """Start a round with trees of the host; unless `alone`, since a draft may follow, keep more under way.

        The next round's taps overwrite those of the one before: who reads them is alone.
        """
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
        graph = self._round_graph(cache, inputs, lane, entries, taps, draft)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        left = graph()
        end.record()
        if draft is not None:
            draft.launched(len(self._flying))
        self._flying.append(Flight(*lane.next_place(), left, draft is not None, begin, end))

    def _round_graph(
        self,
        cache: BlockCache,
        inputs: Inputs,
        lane: Lane,
        entries: int,
        taps: frozenset[str],
        draft: DeviceDraft | None,
    ) -> Captured:
        """A round; its result, the taps that the host's drafter will observe, is overwritten by the next replay."""
        drafts = None if draft is None else draft.reserve(len(self._flying))
        passes, passing = self.fast.passing(
            inputs, cache, entries=entries, layer_ids=self._layer_ids, taps=taps,
            adapter=None if draft is None else draft.adapter,
        )  # fmt: skip
        key = RoundKey(passes, self._chance, draft, drafts)
        graphs = self._graphs.setdefault(cache, {})
        if key not in graphs:
            for old in [k for k in graphs if key.outdates(k)]:
                del graphs[old]  # their cache tensors are gone
            what = f"rounds of {inputs.batch} x {inputs.rows} rows behind up to {passes.reach} entries"
            if draft is not None and drafts is not None:
                what += f", with drafts of {draft.nodes} nodes behind up to {drafts.reach} rows"

            def work(trail: Trail, ahead: Inputs, *, warm: bool) -> dict[str, Tensor]:
                noise = None
                if draft is not None and drafts is not None:
                    noise = self._draft(draft, drafts, inputs, lane, warm=warm)
                    trail.stamp(0)
                outputs = passing()
                trail.stamp(1)
                self._walk(cache, ahead, lane, trail, outputs, draft, noise, warm=warm)
                trail.stamp(2)
                return outputs.taps if draft is None else {}

            def on_copies() -> None:  # and keeping nothing: running twice would commit twice
                spare = type(inputs).empty(inputs.batch, inputs.main, inputs.flat.device, chain=False)
                work(lane.trail.copies(), spare, warm=True)

            graphs[key] = self.fast.capture_work(lambda: work(lane.trail, inputs, warm=False), what, on_copies)
        return graphs[key]

    def _draft(self, draft: DeviceDraft, key: DraftKey, inputs: Inputs, lane: Lane, *, warm: bool) -> Tensor | None:
        """Draft, and lay what was drafted into the rows of the pass; returns the noise its walk will need, if any."""
        chance, vocabulary = self._chance, self.fast.plan.vocabulary
        draws = noise = race = None
        if (chance.uniform or chance.gumbel) and draft.coupling is not None:
            if chance.gumbel:
                noise, race = noise_ahead(lane.keys, inputs.lengths, draft.depth + 1, vocabulary, draft.head)
            draws = Draws(
                lane.temperature,
                race,
                numbers_ahead(lane.keys, inputs.lengths, draft.depth) if chance.uniform else None,
                lane.looked_up,
                draft.coupling,
            )
        tokens, parents = draft.draft(key, inputs.batch, draws, warm=warm)
        rows = lay(tokens, parents, draft.depth, lane.trail.room, vocabulary, inputs)
        if draft.scouts:
            numbers = numbers_ahead(lane.keys, inputs.lengths, draft.reads) if draft.reads else None
            draft.place(inputs, rows, lane.temperature, numbers)
        return noise

    def _walk(
        self,
        cache: BlockCache,
        inputs: Inputs,
        lane: Lane,
        trail: Trail,
        outputs: Outputs,
        draft: DeviceDraft | None,
        noise: Tensor | None,
        *,
        warm: bool,
    ) -> None:
        """Choose, walk, commit, and keep what the next draft reads; `warm`: nothing is committed or kept."""
        scores, positions, chance = outputs.logits, inputs.main_positions, self._chance
        assert scores is not None
        if chance.history:
            scores = lane.history.score(scores, inputs.tokens, inputs.parents, positions)
        lane.chooser(
            scores, lane.temperature, lane.truncation, lane.keys, positions, inputs, trail, chance=chance,
            noise=noise,
        )  # fmt: skip
        if chance.history:
            counts = lane.history.counts
            lane.history.count(trail.emitted, counts.clone() if warm else counts)
        if inputs.main > 1:
            counts = torch.zeros_like(trail.counts) if warm else trail.counts
            keep_entries(
                cache.table(), cache.tensors()[0][0], trail.path, counts, trail.starts, inputs.slots,
                pdl=dependent_launch(counts.device),
            )  # fmt: skip
        if draft is not None:
            draft.collect(outputs.taps, trail.path, trail.emitted[:, 1 : 1 + inputs.main], trail.counts, warm=warm)


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
