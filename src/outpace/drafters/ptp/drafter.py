"""The drafter: numbers go in as scouts, the next draft comes out of the same pass.

What a round does, per request: `propose` hands over the draft read in the round before; `scouts` adds groups of slots
behind the nodes at which the walk may end; `observe` reads the group behind the node at which it did end. Behind
EAGLE-3's network `observe` keeps the group's states, and `propose` grows a tree that hears them (`ptp.eagle`). The
arithmetic is in `rows`, on tensors; here it meets requests.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from weakref import WeakKeyDictionary

import torch
from torch import nn

from outpace.drafters.ahead import deciding_dice, foresee_races, race_at
from outpace.drafters.base import Context, Needs, RequestContext
from outpace.drafters.eagle import Eagle3
from outpace.drafters.growth import Plan
from outpace.drafters.heads import choose_ids, special_ids
from outpace.drafters.learning import Batch, LearnedDrafter, Losses, Recipe
from outpace.drafters.ptp import rows
from outpace.drafters.ptp.calibration import BINS, GREEDY_NUMBER, Agreement, Calibration
from outpace.drafters.ptp.checks import ReadMode, check_options
from outpace.drafters.ptp.eagle import EagleSampler
from outpace.drafters.ptp.encodings import find_encoding
from outpace.drafters.ptp.mismatch import mismatch
from outpace.drafters.ptp.modes import ModeName, find_mode
from outpace.drafters.ptp.module import PtpModule
from outpace.drafters.ptp.objective import Task, check_loss, compare_presets, joint_objective, objective, replay
from outpace.drafters.ptp.paths import Paths, prune, spread, tree_paths
from outpace.drafters.ptp.sampler import SamplerName, follow
from outpace.errors import ConfigError, UnsupportedError
from outpace.laws import Draft, NoiseDice, Sampler, Settings, Walk
from outpace.target import Kernel, Scouts, read

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.ptp.device import SlotDraft
    from outpace.target import GatedLoRA, Readout, Target
    from outpace.target.widen import Widening

_AHEAD = 128  # numbers of a request fetched at once

# Rows pay until they cost more than they bring; measured per device type (docs/methods/ptp.md).
_BUDGET = {"cpu": 16, "cuda": 48}
_MIN_GAIN = {"cpu": 0.05, "cuda": 0.0}
_EAGLE_BUDGET = 1
_GPU_DEPTH = 4  # a deeper level costs a round more than its tokens are worth (docs/log.md)
_GPU_NODES = 30  # with the root and a slot 32 rows: a tile of the kernels of few rows


@dataclass(eq=False)
class _State:
    """What is remembered of a request between rounds.

    Attributes:
        numbers: its path's numbers from position 0 on, as far as fetched (float64, on the host).
        paths: next draft.
        heard: [n, H], states of the slots behind the last walk, if it had any.
    """

    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    paths: Paths = field(default_factory=dict)
    heard: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The scouts of the round in flight.

    Attributes:
        ends: per request, the main row at which each accepted path would end.
        branch, slot, used: [B, S], see `rows`. predicted: [B, S], index of the token each slot predicts.
    """

    ends: list[dict[tuple[int, ...], int]]
    branch: Tensor
    slot: Tensor
    used: Tensor
    predicted: Tensor


class Ptp(LearnedDrafter):
    """Draft dependent tokens jointly from the path's own random numbers.

    Shaping the weights:

    Args:
        mode: "one_hot" (O-PTP: slots learn the token their numbers decide), "categorical" (C-PTP: slots learn its law,
            given the numbers before) or "mask" (slots without numbers: the multi-token baseline).
        slots: longest window; drafting beyond it is drafting beyond what was trained.
        encoding: of numbers, see `ENCODINGS`.
        rank: of the adapter, on every linear layer but the head. scale: its low-rank part is multiplied by this.
        temperature, top_k, top_p, min_p: the sampling under which numbers mean something; top_k 0, top_p 1 and min_p 0
            truncate nothing. Text decoded at other settings is the same as without a drafter, but fewer drafts hit.
        any_temperature: slots are told the temperature, and learn from documents of any; `temperature` is then unused.
        sampler: what reads the token before the predicted one behind the slots: "none"; "chain", a small network that
            passes what it chose along the group (`ptp.sampler`); "eagle", EAGLE-3's network, which grows trees and
            drafts without slots too (`ptp.eagle`). sampler_size: units of the inner layer that hears slots; 0: as many
            as a state has.
        vocabulary: tokens of the sampler's draft vocabulary, the most frequent of the corpus; 0, or more than there
            are: all. A token outside is never drafted; the text does not depend on it.

    Training only:

    Args:
        density: slots per token of a batch.
        beta: numbers lie in their intervals as Beta(beta, beta); 1 is uniform.
        inverse: learn without a teacher (categorical only).
        attention: of training: "fused" (a kernel) or "dense"; "auto" is fused on CUDA, dense elsewhere.
        bare: weight of a second loss, of slots without the sampler.

    Decoding:

    Args:
        budget: most slots per request and pass; 0 takes what was measured to pay on the target's device, and behind
            EAGLE-3's network one.
        min_gain: expected tokens a row must bring to be run, as a slot or as a draft token; negative: as measured.
        branches: candidates per position; above 1, drafts are trees of them. With a chain, all but the likeliest of
            each position are leaves, for what follows was asked behind the likeliest.
        nodes: most tokens of a draft; 0 for `budget`, or with sampler="eagle" for draft_len. draft_len: most along a
            path; 0 for as many as slots allow.
        read: how laws are read at temperature > 0: "path" (drawn with the position's own noise), "argmax", or "auto":
            "path", but where numbers are looked up (uniform noise) by slots that carry none and have no sampler.
        adaptive: go on calibrating while decoding. Off by default: drafts (never text) would depend on earlier ones.
    """

    name: ClassVar[str] = "ptp"
    decoding: ClassVar[frozenset[str]] = frozenset(
        {
            "density",
            "beta",
            "inverse",
            "attention",
            "bare",
            "budget",
            "min_gain",
            "branches",
            "nodes",
            "draft_len",
            "read",
            "adaptive",
        }
    )
    default_recipe: ClassVar[Recipe] = Recipe(lr=1e-3, loss="hard", depths=8, decay=0.9, clip=1.0, weight_decay=0.0)
    needs = Needs(scouts=True, noise=True, adapter=True)
    module: PtpModule

    def __init__(
        self,
        *,
        mode: ModeName = "one_hot",
        slots: int = 8,
        encoding: str = "anchors",
        rank: int = 32,
        scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        any_temperature: bool = False,
        sampler: SamplerName = "none",
        sampler_size: int = 0,
        vocabulary: int = 0,
        density: float = 1.0,
        beta: float = 1.0,
        inverse: bool = False,
        attention: Kernel | Literal["auto"] = "auto",
        bare: float = 0.0,
        budget: int = 0,
        min_gain: float = -1.0,
        branches: int = 1,
        nodes: int = 0,
        draft_len: int = 0,
        read: ReadMode = "auto",
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.shape = find_mode(mode)
        find_encoding(encoding)
        self.mode: ModeName = mode
        self.slots = slots
        self.encoding = encoding
        self.rank = rank
        self.scale = scale
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.any_temperature = any_temperature
        self.sampler: SamplerName = sampler
        self.sampler_size, self.vocabulary = sampler_size, vocabulary
        self.density, self.beta, self.inverse, self.bare = density, beta, inverse, bare
        self.attention: Kernel | Literal["auto"] = attention
        self.budget, self.min_gain = budget, min_gain
        self.branches, self.nodes = branches, nodes
        self.draft_len = draft_len
        self.read: ReadMode = read
        self.adaptive = adaptive
        self._eagle: EagleSampler | None = None
        self._device: SlotDraft | None = None
        check_options(self)
        self._ask()
        self._ids: Tensor | None = None
        self.recipe = self.default_recipe.replace(
            depths=slots, loss="soft" if self.shape.law and not inverse else "hard"
        )
        self._states: WeakKeyDictionary[RequestContext, _State] = WeakKeyDictionary()
        self._plan: _Plan | None = None
        self._trust: list[float] = []
        self._warned: set[object] = set()

    def _ask(self) -> None:
        """What a pass has to give: with a sampler states, not logits."""
        taps = frozenset() if self.sampler == "none" else frozenset({"post_norm"})
        if self._eagle is not None:
            taps |= frozenset(self._eagle.net.taps)
        self.needs = Needs(taps=taps, scouts=True, noise=True, adapter=True)

    @property
    def preset(self) -> Settings:
        """The sampling under which the numbers mean something."""
        return Settings(
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p if self.top_p < 1 else None,
            min_p=self.min_p or None,
            noise="uniform" if self.shape.reads else "gumbel",
        )

    @property
    def adapter(self) -> GatedLoRA | None:  # type: ignore[override]
        """The adapter of its slots, once it has weights."""
        return self.module.adapter if self._fitted is not None else None

    @property
    def evaluation(self) -> Settings:
        """The preset, at temperature 1 where slots are told any."""
        return self.preset.replace(temperature=1.0) if self.any_temperature else self.preset

    @property
    def training_taps(self) -> frozenset[str]:
        """Those of EAGLE-3's network, and of its teacher; none without: the objective runs the target itself."""
        return frozenset() if self.sampler != "eagle" else self.needs.taps

    @property
    def shifts(self) -> tuple[int, ...]:
        """EAGLE-3's; none without it: windows start where they like."""
        return () if self.sampler != "eagle" else tuple(range(2, self.recipe.depths + 2))

    @classmethod
    def suited(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Behind EAGLE-3's network, as many rows as cost what one does, one of them a slot: 4 on a CPU, 32 on a GPU."""
        if options.get("sampler") != "eagle":
            return dict(options)
        if device.type == "cpu":
            return {**options, "draft_len": 2, "branches": 1, "nodes": 2}
        return {**options, "draft_len": options["draft_len"] or _GPU_DEPTH, "nodes": min(options["nodes"], _GPU_NODES)}

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Choose the draft vocabulary."""
        if 0 < self.vocabulary < target.vocabulary:
            self._ids = choose_ids(counts, self.vocabulary, special_ids(target))

    def build(self, target: Target) -> PtpModule:
        """Fresh weights: an adapter that changes nothing yet, and embeddings in the midst of the tokens'."""
        self.shape = find_mode(self.mode)
        self._ask()
        if self.sampler == "eagle" and target.family is None:
            raise UnsupportedError(
                f"ptp:sampler=eagle reads states between layers, and {target.config.model_type} is outside the family "
                "table (outpace.target.families); use sampler=chain or sampler=none, which read the top alone"
            )
        module = PtpModule(
            target,
            self.shape,
            slots=self.slots,
            encoding=self.encoding,
            rank=self.rank,
            scale=self.scale,
            any_temperature=self.any_temperature,
            sampler=self.sampler,
            sampler_size=self.sampler_size,
            vocabulary=self.vocabulary,
            ids=self._ids,
        )
        return module.to(target.device)

    def objective(self, batch: Batch) -> Losses:
        """Losses per slot, or per depth of EAGLE-3's network, see `ptp.objective`."""
        if self.sampler == "eagle":
            return joint_objective(batch, self.module, self.shape, self._task(), self.recipe)
        with torch.autocast(batch.tokens.device.type, enabled=False):  # laws need float32 and better, and say so
            return objective(batch, self.module, self.shape, self._task())

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Count, on answers of the target, how far guesses reach and how far to trust them."""
        found, agreement = Calibration(self.slots - self.shape.silent), Agreement()
        device, task = self.target.device, self._task()
        for batch in batches:
            if self.sampler != "eagle":
                replay(batch, self.module, self.shape, task, found.to(device), agreement.to(device))
            elif not task.any_temperature:
                reading = read(batch.target, batch.tokens, batch.documents, batch.positions, task.kernel)
                compare_presets(batch, reading, task, agreement.to(device))
        if self.sampler != "eagle":  # whose drafts say how sure they are; how far they reach was counted in training
            self.module.calibration = found
        self.module.agreement = agreement
        self.ready(self.target)

    def take_options(self, other: Self) -> None:
        """Decode as another one does: what it counted comes along."""
        for mine, theirs in (
            (self.module.calibration, other.module.calibration),
            (self.module.agreement, other.module.agreement),
        ):
            mine.load_state_dict(theirs.state_dict())
        super().take_options(other)

    @property
    def _from_any_text(self) -> bool:
        """Whether windows may start in text of any temperature: slots are told it, or nothing depends on it."""
        return self.any_temperature or (self.sampler == "eagle" and not self.shape.reads)

    def part_for(self, name: str) -> tuple[nn.Module, dict[str, Any]] | None:
        """Its own weights, or those of EAGLE-3's network, which has the default shape."""
        if name != "eagle3" or self.module.net is None:
            return super().part_for(name)
        return self.module.net, Eagle3(vocabulary=self.vocabulary).shaping()

    def _task(self) -> Task:
        recipe = self.recipe
        if recipe.depths > self.slots:
            raise ConfigError(f"depths={recipe.depths} goes beyond slots={self.slots}; pass slots={recipe.depths} too")
        if self.sampler != "eagle":  # whose network learns laws as EAGLE-3's does, by any loss there is
            check_loss(recipe.loss, self.shape, self.preset, self.inverse)
        return Task(
            slots=recipe.depths,
            density=self.density,
            preset=self.preset,
            any_temperature=self._from_any_text,
            beta=self.beta,
            inverse=self.inverse,
            loss=recipe.loss,
            decay=recipe.decay,
            draws=self._draws,
            kernel=None if self.attention == "auto" else self.attention,
            bare=self.bare,
        )

    def widened(self, widening: Widening, target: Target) -> Self:
        """As any learned drafter; and slots enter with the constants that every token's embedding has there."""
        wide = super().widened(widening, target)
        start = widening.small.hidden_size
        with torch.no_grad():
            wide.module.embedding.bias[start : start + widening.constants] = widening.constant
        if self.module.net is not None and wide.module.net is not None:
            wide.module.net.taps = self.module.net.taps  # layers were added on top: the same ones are read
            wide.ready(target)
        return wide

    def ready(self, target: Target) -> None:
        """Read the calibration."""
        self._states = WeakKeyDictionary()
        self._calibrate()
        self._eagle = self._device = None
        if self.sampler == "eagle":
            assert self.module.net is not None
            assert self.module.join is not None
            depth = self.draft_len or self.slots
            plan = Plan(depth=depth, branches=self.branches, nodes=self.nodes or depth)
            self._eagle = EagleSampler(self.module.net, self.module.join, target, plan, greedy=self.read == "argmax")
        self._ask()
        device = target.device.type
        alone = self._eagle is None
        self._most = self.budget or (_BUDGET.get(device, _BUDGET["cuda"]) if alone else _EAGLE_BUDGET)
        self._width = (self.nodes or self._most) if self._eagle is None else self._eagle.plan.width
        self.least = self.min_gain if self.min_gain >= 0 else (_MIN_GAIN.get(device, 0.0) if alone else 0.0)

    def _calibrate(self) -> None:
        self._trust = self.module.calibration.trust()
        survival = self.module.calibration.survival()
        self._hazard = [b / a for a, b in zip([1.0, *survival[:-1]], survival, strict=True)]
        self.worths = torch.tensor(rows.worth(survival[: self.draft_len or None], self.shape.silent))

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Look whether the request samples as this drafter was trained to."""
        self._states[request] = _State()
        self._warn(request.sampler.settings)
        if self._eagle is not None:
            self._eagle.start(context, request, taps)

    def propose(self, context: Context) -> Draft:
        """What the last pass's slots said, pruned to what is likely to be reached."""
        if self._eagle is not None:
            heard = {request: self._state(request).heard for request in context.requests}
            for request, paths in self._eagle.paths(context, heard).items():
                self._state(request).paths = paths
        trees = []
        for request in context.requests:
            paths = self._state(request).paths if request.speculate else {}
            trees.append(prune(paths, request.depth_limit, self.least, self._width))
        return Draft.of(trees)

    def scouts(self, context: Context, draft: Draft) -> Scouts | None:
        """Groups of slots behind the nodes at which the walk may end, best first within the budget."""
        self._plan = None
        target, requests = context.target, context.requests
        active = [r.speculate and r.depth_limit > 1 and self.slots_say_something(r.sampler) for r in requests]
        if not any(active):
            return None
        trees = draft.trees()
        confidence = torch.zeros(len(trees), draft.width)
        ends: list[dict[tuple[int, ...], int]] = []
        for b, (request, tree) in enumerate(zip(requests, trees, strict=True)):
            paths = tree_paths(tree)
            known = self._state(request).paths
            ends.append({(): 0} | {path: node + 1 for node, path in enumerate(paths)})
            for node, path in enumerate(paths):
                confidence[b, node] = known.get(path, self._hazard[min(len(path), len(self._hazard)) - 1])
        parents = torch.where(draft.valid, draft.parents, -1).cpu()
        ancestors = rows.lineage(parents)
        chances = rows.walk_ends(confidence, parents, ancestors)
        limits = [request.scout_limit for request in requests if request.scout_limit is not None]
        branch, slot, gain = rows.allocate(chances, self.worths, min([self._most, *limits]))
        used = (gain > self.least) & torch.tensor(active)[:, None]
        count = int(used.sum(1).max()) if used.shape[1] else 0
        if count == 0:
            return None
        branch, slot, used = branch[:, :count], slot[:, :count], used[:, :count]
        root = torch.tensor([request.position for request in requests])
        positions, carried, sees = rows.scout_rows(root, ancestors, branch, slot, used, self.shape)
        self._plan = _Plan(ends, branch, slot, used, carried + self.shape.lead)
        numbers = self._numbers(requests, carried).to(target.device)
        heats = torch.tensor([r.sampler.settings.temperature for r in requests], device=target.device)
        embeds = self.module.embed(numbers, heats)
        return Scouts(
            positions.to(target.device),
            sees.to(target.device),
            embeds=embeds,
            adapter=self.module.adapter,
            logits=self.sampler == "none",
        )

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Read the group behind the node where each walk ended: the next draft."""
        plan, self._plan = self._plan, None
        if self.adaptive:
            self._learn(context.requests, walks)
        for request in context.requests:
            self._state(request).paths, self._state(request).heard = {}, None
        if self._eagle is not None:
            self._eagle.observe(context, walks, read)
        if plan is None:
            return
        ended = torch.tensor([ends.get(walk.tokens[:-1], -1) for ends, walk in zip(plan.ends, walks, strict=True)])
        rows_of, present = rows.group_rows(plan.branch, plan.slot, plan.used, ended, self.worths.shape[0])
        silent = self.shape.silent
        rows_of, present = rows_of[:, silent:], present[:, silent:]
        depths = present.sum(1).tolist()
        longest = max(depths)
        if longest == 0:
            return
        rows_of = rows_of[:, :longest]
        if self._eagle is not None:
            states = read.taps["post_norm"]
            main = states.shape[1] - plan.branch.shape[1]
            for b, (request, depth) in enumerate(zip(context.requests, depths, strict=True)):
                self._state(request).heard = states[b, rows_of[b, :depth].to(states.device) + main]
            return
        predicted = plan.predicted.gather(1, rows_of)
        guesses, scores = self._guess(context, walks, read, rows_of, ended, predicted, plan.branch.shape[1])
        for request, depth, tokens, said in zip(
            context.requests, depths, guesses.tolist(), scores.tolist(), strict=True
        ):
            if depth:
                trusted = [[self._trust[min(int(score * BINS), BINS - 1)] for score in row] for row in said[:depth]]
                most = self._most if self.branches > 1 else depth
                self._state(request).paths = spread(tokens[:depth], trusted, most, leaves=self.sampler == "chain")

    def _guess(
        self,
        context: Context,
        walks: Sequence[Walk],
        read: Readout,
        group: Tensor,
        ended: Tensor,
        predicted: Tensor,
        count: int,
    ) -> tuple[Tensor, Tensor]:
        """What the slots of a group [B, M] say, best first: (tokens, scores), each [B, M, branches].

        group: which of the `count` slots of the pass. ended: [B], the main row at which each walk ended. predicted:
        [B, M], positions.
        """
        requests, module = context.requests, self.module
        draws = [self.draws(request.sampler) for request in requests]
        drawn = self._numbers(requests, predicted)
        race = self._race(requests, predicted)
        at = torch.arange(len(walks))[:, None]
        if module.sampler is None:
            assert read.scout_logits is not None  # asked for
            device = read.scout_logits.device
            logits, numbers = read.scout_logits[at.to(device), group.to(device)], drawn.to(device)
            logits = logits if race is None else logits.float() + race
            found = [
                rows.read_out(logits[b], numbers[b] if draw else None, min(self.branches, logits.shape[-1]))
                for b, draw in enumerate(draws)
            ]
            tokens, scores = zip(*found, strict=True)
            return torch.stack(tokens), torch.stack(scores)
        states = read.taps["post_norm"]
        device, main = states.device, states.shape[1] - count
        newest = torch.tensor([walk.tokens[-1] for walk in walks], device=device)
        return follow(
            module.sampler,
            context.target,
            module.head,
            states[at.to(device), group.to(device) + main],
            newest,
            states[at[:, 0].to(device), ended.clamp_min(0).to(device)],
            drawn.to(device),
            draws,
            self.branches,
            race,
        )

    def device_draft(self) -> SlotDraft | None:
        """The same in captured rounds, behind EAGLE-3's network; otherwise, and while it learns, the host does it."""
        if self._eagle is None or self.adaptive:
            return None
        if self._device is None or not self._device.holds():
            from outpace.drafters.ptp.device import SlotDraft
            from outpace.drafters.ptp.placing import fits

            inner, slots = self._eagle.follower.device_draft(), self.worths.shape[0]
            served = fits(inner.nodes, slots)
            self._device = SlotDraft(self, inner, self._eagle.join, self._most) if served else None
        return self._device

    def take_heard(self, request: RequestContext) -> Tensor | None:
        """States of the slots behind a request's last walk [n, H], which are not kept any longer."""
        state = self._state(request)
        heard, state.heard = state.heard, None
        return heard

    def keep_heard(self, request: RequestContext, states: Tensor) -> None:
        """Keep states [n, H] for a request's next draft."""
        self._state(request).heard = states if len(states) else None

    def slots_say_something(self, sampler: Sampler) -> bool:
        """Not where EAGLE-3's network can do without them, and they carry numbers that decide nothing."""
        return self._eagle is None or not self.shape.reads or deciding_dice(sampler, "gumbel") is None

    def draws(self, sampler: Sampler) -> bool:
        """Whether slots are read by drawing from their laws with the path's numbers, not by arg-max."""
        return self._draws and not sampler.greedy and deciding_dice(sampler, "gumbel") is None

    def _race(self, requests: Sequence[RequestContext], predicted: Tensor) -> Tensor | None:
        """Gumbel noise of predicted positions [B, M] for the ids the laws are over, zero where it decides nothing.

        [B, M, Vd] float32; None where it decides for nobody, or where slots predict tokens, or are to be read by
        arg-max.
        """
        device, head = self.target.device, self.module.head
        dice = [deciding_dice(request.sampler, "gumbel") for request in requests]
        if not any(dice) or not self.shape.law or self.read == "argmax":
            return None
        vocabulary = self.target.vocabulary
        ids = None if head is None or not head.reduced else head.ids
        found = torch.zeros(*predicted.shape, vocabulary if ids is None else len(ids), device=device)
        foresee_races(requests, predicted.tolist(), vocabulary, device)
        for row, positions, one in zip(found, predicted.tolist(), dice, strict=True):
            if one is not None:
                row.copy_(race_at(one, positions, vocabulary, ids, device))
        return found

    @property
    def _draws(self) -> bool:
        auto = self.shape.reads or self.sampler != "none"
        return self.shape.law and (self.read == "path" or (self.read == "auto" and auto))

    def _state(self, request: RequestContext) -> _State:
        return self._states.setdefault(request, _State())

    def _numbers(self, requests: Sequence[RequestContext], index: Tensor) -> Tensor:
        """The path's numbers at indices [B, n] of each request, float64 on the host; 0.5 where greedy decides."""
        result = torch.full(index.shape, GREEDY_NUMBER, dtype=torch.float64)
        for b, request in enumerate(requests):
            dice = request.sampler.dice
            if request.sampler.greedy or not isinstance(dice, NoiseDice):
                continue
            state, last = self._state(request), int(index[b].max())
            have = state.numbers.shape[0]
            if last >= have:
                fresh = torch.arange(have, max(last + 1, len(request.tokens)) + _AHEAD)
                identity = dice.request - (1 << 64 if dice.request >= 1 << 63 else 0)  # the same 64 bits, signed
                state.numbers = torch.cat([state.numbers, dice.noise.grid(torch.tensor(identity), fresh)])
            result[b] = state.numbers[index[b]]
        return result

    def _learn(self, requests: Sequence[RequestContext], walks: Sequence[Walk]) -> None:
        """Count what became of the drafts (of the likeliest path of each)."""
        depths = len(self._hazard)
        scores, right, tried = (torch.zeros(len(walks), depths) for _ in range(3))
        for b, (request, walk) in enumerate(zip(requests, walks, strict=True)):
            path: tuple[int, ...] = ()
            known = self._state(request).paths
            for depth in range(depths):
                following = [p for p in known if len(p) == depth + 1 and p[:-1] == path]
                if not following or depth >= len(walk.tokens):
                    break
                path = max(following, key=lambda p: known[p])
                tried[b, depth], scores[b, depth] = 1, known[path]
                right[b, depth] = float(path[-1] == walk.tokens[depth])
        counts = self.module.calibration
        counts.reached.mul_(0.999)
        counts.passed.mul_(0.999)
        alive = torch.cumprod(right * tried, 1)
        before = torch.cat([torch.ones_like(alive[:, :1]), alive[:, :-1]], 1) * tried
        counts.reached.add_(before.sum(0).to(counts.reached))
        counts.passed.add_(alive.sum(0).to(counts.passed))
        self._calibrate()

    def _warn(self, settings: Settings) -> None:
        """Once per kind of difference from what was trained: drafts will hit less often."""
        key = (settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.noise)
        drawn = self._draws and settings.temperature > 0 and self.sampler != "eagle"  # whose law is the model's own
        if key in self._warned or not (self.shape.reads or drawn):
            return
        self._warned.add(key)
        words = mismatch(
            settings,
            self.preset,
            reads=self.shape.reads,
            alone=self._eagle is None,
            any_temperature=self.any_temperature,
            agreement=self.module.agreement,
        )
        if words is not None:
            warnings.warn(words, stacklevel=2)
