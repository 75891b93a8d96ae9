"""The training loop: one for every drafter that learns.

    for step:  rows -> batch -> taps of the frozen target -> drafter.objective -> backward -> clip -> optimiser

Knows no drafter. Waits for the device only where figures are shown, and where a run is saved or evaluated.
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from outpace.drafters.layers import compile_halves
from outpace.errors import ConfigError
from outpace.target import save_target
from outpace.target.fast.wide import COMPILED_ROWS
from outpace.train.evaluate import Drift, decode, drift, replay
from outpace.train.features import KeptRows, read_taps, row_bytes
from outpace.train.packing import Packing
from outpace.train.provenance import describe_run
from outpace.train.ranks import Parallel, Ranks
from outpace.train.schedule import Progress, rate
from outpace.train.states import latest_state, load_state, read_state, save_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from outpace.drafters.learning import Batch, LearnedDrafter, Losses
    from outpace.engine import Output
    from outpace.target import Target
    from outpace.train.corpus import Corpus
    from outpace.train.show import Reporter

OptimizerName = Literal["flash", "adamw"]
TUNED: Final = "target"  # folder of the tuned target, inside the drafter's
_SHOWN_EVERY = 10  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How long, how often, how.

    Attributes:
        steps, minutes: length of the run; neither: `recipe.epochs` passes over the corpus. Both: refused.
        seed: of initial weights, row order and noise.
        optimizer: "flash" (float32 weights, 8-bit moments; outpace.optim) or "adamw" (float32, torch).
        parallel: "ddp" or "fsdp", with several processes.
        eval_every: steps between evaluations by the decode loop, 0 for one at the end. eval_prompts, eval_tokens: how
            many held-out prompts, how many tokens each.
        begin_with: folder of a trained drafter, or name of one that ships, whose weights to begin with; empty: none.
        save_every: steps between states to resume from; 0: only at the end of an interrupted run.
        keep_gib, keep_disk_gib: host memory, and disk, of each process, in which states of the target are kept for the
            next epoch (`features.KeptRows`); 0 for none.
    """

    steps: int = 0
    minutes: float = 0.0
    seed: int = 0
    optimizer: OptimizerName = "flash"
    parallel: Parallel = "ddp"
    eval_every: int = 500
    eval_prompts: int = 32
    eval_tokens: int = 128
    begin_with: str = ""
    save_every: int = 500
    keep_gib: float = 0.0
    keep_disk_gib: float = 0.0

    def __post_init__(self) -> None:
        if self.steps and self.minutes:
            raise ConfigError("give steps or minutes, not both")
        if self.steps < 0 or self.minutes < 0:
            raise ConfigError("steps and minutes must be positive")
        if self.keep_gib < 0 or self.keep_disk_gib < 0:
            raise ConfigError("keep_gib and keep_disk_gib must be 0 or more")
        if self.optimizer not in ("flash", "adamw"):
            raise ConfigError(f"optimizer must be flash or adamw, got {self.optimizer!r}")


@dataclass(slots=True)
class Figures:
    """Sums since the last line was shown, on the device."""

    loss: Tensor
    sums: Tensor
    counts: Tensor
    hits: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0
    steps: int = 0
    tokens: int = 0

    @classmethod
    def none(cls, depths: int, device: torch.device) -> Figures:
        """Nothing yet."""
        zeros = torch.zeros(depths, device=device)
        return cls(torch.zeros((), device=device), zeros, zeros.clone(), zeros.clone())

    def add(self, losses: Losses) -> None:
        """A batch's."""
        self.loss += losses.total.detach()
        self.sums += losses.sums
        self.counts += losses.counts
        self.hits += losses.hits
        self.batches += 1
        for name, value in losses.extra.items():
            self.extra[name] = self.extra.get(name, torch.zeros_like(self.loss)) + value.detach().float()


@dataclass(slots=True)
class Clocked:
    """Where a step's time goes, by device events where there is a device that works ahead."""

    device: torch.device
    marks: list[Any] = field(default_factory=list)

    def mark(self) -> None:
        """Now."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def feature_share(self) -> float:
        """Share of the time between marks 0, 1, 2 (features, rest), 0, 1, 2, ... that was spent on features."""
        features = whole = 0.0
        for a, b, c in zip(self.marks[::3], self.marks[1::3], self.marks[2::3], strict=False):
            if self.device.type == "cuda":
                features, whole = features + a.elapsed_time(b), whole + a.elapsed_time(c)
            else:
                features, whole = features + (b - a), whole + (c - a)
        self.marks.clear()
        return features / whole if whole else 0.0


class _Objective(nn.Module):
    """What data parallel wrappers take hold of: the drafter's module and what it tunes, called by its objective."""

    def __init__(self, drafter: LearnedDrafter) -> None:
        super().__init__()
        self.module = drafter.module
        self.adapter = None if drafter.tuning is None else drafter.tuning.adapter
        self._drafter = (drafter,)
        self.losses: Losses | None = None

    def forward(self, batch: Batch) -> Tensor:
        """The loss; the rest stays in `losses`."""
        self.losses = self._drafter[0].objective(batch)
        return self.losses.total


class Trainer:
    """Trains a drafter on a corpus of its target.

    Args:
        target: frozen for the run; its parameters must not require gradients afterwards either. A drafter that tunes
            it learns an adapter, and what it is for in the end is a tuned copy, saved beside it (`served`).
        drafter: not yet fitted; gets initial weights, or those of the run in `out` that is continued.
        corpus: what the target wrote.
        out: folder for the drafter, and for states to resume from.
        settings: length and so on. The drafter's `recipe` says the rest.
        ranks: this process among all.
        reporter: who shows figures; None is silence.

    Raises:
        ConfigError, CheckpointError: if corpus, drafter and target do not belong together.
    """

    def __init__(
        self,
        target: Target,
        drafter: LearnedDrafter,
        corpus: Corpus,
        out: str | Path,
        settings: TrainSettings | None = None,
        *,
        ranks: Ranks | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.target, self.drafter, self.corpus = target, drafter, corpus
        self.out = Path(out)
        self.settings = settings or TrainSettings()
        self.ranks = ranks or Ranks()
        self.reporter = reporter
        self.recipe = drafter.recipe
        corpus.check_fit(target)
        target.model.requires_grad_(False)
        self.packing = Packing.of(corpus, self.recipe.row_length, seed=self.settings.seed)
        self.rows_per_step = self._rows_per_step()
        self.steps_per_epoch = max(1, len(self.packing.rows) // self.rows_per_step)
        drafter.prepare(corpus.answer_counts(target.vocabulary), target)
        drafter.initialise(target, seed=self.settings.seed)
        if self.settings.begin_with:
            drafter.begin_with(self.settings.begin_with)
        self.objective = _Objective(drafter)
        if target.device.type == "cuda" and self.recipe.rows * self.recipe.row_length >= COMPILED_ROWS:
            compile_halves(drafter.module)
        self._model = self.ranks.wrap(self.objective, self.settings.parallel)
        self.optimizer = self._make_optimizer()
        self.kept = self._make_kept()
        self.step = 0
        self.curves: list[dict[str, Any]] = []
        self.progress = Progress(self._steps(), 60 * self.settings.minutes)
        self._elapsed = 0.0
        self._said: list[Output] = []
        self._drift: Drift | None = None
        self._tuned: tuple[int, Target] | None = None

    @property
    def served(self) -> Path | None:
        """The folder of the tuned target, the model to be served with the drafter; None where none is tuned."""
        return None if self.drafter.tuning is None else self.out / TUNED

    def _rows_per_step(self) -> int:
        recipe, world = self.recipe, self.ranks.world
        if recipe.tokens_per_step < recipe.row_length:
            raise ConfigError(
                f"tokens_per_step={recipe.tokens_per_step} is less than a row of {recipe.row_length}; raise it, or "
                "shorten rows"
            )
        rows = min(recipe.tokens_per_step // recipe.row_length, len(self.packing.rows))
        if rows < world:
            raise ConfigError(f"{rows} rows a step cannot be shared by {world} processes; raise tokens_per_step")
        return rows - rows % world

    def _steps(self) -> int:
        if self.settings.steps or self.settings.minutes:
            return self.settings.steps
        return max(1, round(self.recipe.epochs * self.steps_per_epoch))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        tuning = self.drafter.tuning
        parts = [(self.objective.module, 1.0), *([] if tuning is None else [(tuning.adapter, tuning.lr)])]
        parameters = [{"params": [p for p in part.parameters() if p.requires_grad]} for part, _ in parts]
        if not parameters[0]["params"]:
            raise ConfigError(f"drafter {self.drafter.name!r} has nothing to train")
        self._lr_shares = [share for _, share in parts]
        recipe = self.recipe
        if self.settings.optimizer == "adamw":
            fused = self.target.device.type == "cuda"
            return torch.optim.AdamW(
                parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=fused
            )
        from outpace.optim import FlashAdamW

        # float32 weights stay as they are (the module casts where it computes); the moments take two bytes, not eight
        return FlashAdamW(parameters, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, master="fp32")

    @property
    def features_bytes(self) -> int:
        """Bytes of all states the objective reads of the corpus."""
        return len(self.packing.rows) * row_bytes(*self._states())

    def _states(self) -> tuple[tuple[int, int], torch.dtype, int]:
        return (
            (self.recipe.row_length, self.target.hidden_size),
            self.target.dtype,
            len(self.drafter.training_taps),
        )

    def _make_kept(self) -> KeptRows | None:
        settings, taps = self.settings, self.drafter.training_taps
        if not (settings.keep_gib or settings.keep_disk_gib) or not taps:
            return None
        shape, dtype, _ = self._states()
        about = [self.corpus.digest, *shape, str(dtype), *sorted(taps), settings.seed, self.ranks.rank]
        name = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        return KeptRows(
            shape, dtype, self.target.device, taps,
            memory=int(settings.keep_gib * 2**30), disk=int(settings.keep_disk_gib * 2**30),
            folder=self.out / f"features-{self.ranks.rank}" / name,
        )  # fmt: skip

    # The run -------------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Continue the run in `out`, if there is one."""
        found = latest_state(self.out)
        if found is None:
            return False
        state = read_state(found)
        self._check_same_run(state)
        load_state(found, self.objective, self.optimizer, self.ranks)
        self.step = state["step"]
        self.curves = state["curves"]
        self._elapsed = state["elapsed"]
        self.progress = Progress(**state["progress"])
        return True

    def run(self) -> LearnedDrafter:
        """Train to the end, save the drafter, return it ready to decode. Interrupting saves a state first."""
        started = time.perf_counter() - self._elapsed
        figures = Figures.none(self.recipe.depths, self.target.device)
        clock = Clocked(self.target.device)
        shown_at, shown_step = time.perf_counter(), self.step
        batches = _Prefetched(self._batches(self.step))
        try:
            while not self.progress.over:
                self._step(batches, figures, clock)
                if self.step % _SHOWN_EVERY == 0 or self.progress.over or self.step - shown_step == 1 == self.step:
                    self._synchronise()
                    now = time.perf_counter()
                    self._elapsed = now - started
                    pace = self.ranks.agree((now - shown_at) / (self.step - shown_step))
                    if self.step > 1 or not self.settings.minutes:
                        self.progress.plan(self.ranks.agree(self._elapsed), pace)
                    self._show(figures, pace, clock)
                    figures = Figures.none(self.recipe.depths, self.target.device)
                    shown_at, shown_step = time.perf_counter(), self.step
                if self._due(self.settings.save_every):
                    self._save_state()
                if self._due(self.settings.eval_every) and not self.progress.over:
                    self._evaluate()
                    self._tuned = None  # a copy of the model, which steps need no more
                    self._elapsed = time.perf_counter() - started
                    shown_at, shown_step = time.perf_counter(), self.step
        except KeyboardInterrupt:
            self._save_state()
            raise
        finally:
            batches.close()
        self._evaluate()
        self._calibrate()
        self._compare()
        self._save(time.perf_counter() - started)
        return self.drafter.for_decoding(target=self._target_now())

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _step(self, batches: _Prefetched, figures: Figures, clock: Clocked) -> None:
        """One optimiser step over this process's rows."""
        torch.manual_seed((self.settings.seed << 32) + self.step * self.ranks.world + self.ranks.rank)
        lr = rate(self.recipe, self.progress.share)
        for group, share in zip(self.optimizer.param_groups, self._lr_shares, strict=True):
            group["lr"] = share * lr
        pieces: Sequence[Batch] = next(batches)
        for number, batch in enumerate(pieces):
            clock.mark()
            batch.taps = self._taps(batch)
            batch.share = self.progress.share
            clock.mark()
            with self.ranks.quiet(self._model, last=number == len(pieces) - 1), self._autocast():
                loss = self._model(batch)
            loss.backward()
            clock.mark()
            assert self.objective.losses is not None
            figures.add(self.objective.losses)
            figures.tokens += batch.tokens.numel()
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.advance()
        figures.steps += 1
        self.step += 1

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.target.dtype not in (torch.bfloat16, torch.float16):
            return nullcontext()
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16)

    def _taps(self, batch: Batch) -> dict[str, Tensor]:
        wanted = self.drafter.training_taps
        if self.kept is None:
            return read_taps(batch, wanted)

        def compute(rows: list[int]) -> dict[str, Tensor]:
            return read_taps(self.packing.batch(rows, self.target, shifts=(), answers=1.0), wanted)

        return self.kept.read(batch.rows, compute)

    def _batches(self, step: int) -> Iterator[list[Batch]]:
        """This process's batches of every step from `step` on, for ever."""
        ranks, recipe = self.ranks, self.recipe
        order, known = None, -1
        while True:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != known:
                order, known = self.packing.order(epoch, self.settings.seed), epoch
            assert order is not None
            rows = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
            answers = float(self.packing.answers[rows].sum()) / ranks.world
            own = rows[ranks.rank :: ranks.world].tolist()
            yield [
                self.packing.batch(
                    own[i : i + recipe.rows], self.target, shifts=self.drafter.shifts, answers=max(answers, 1.0)
                )
                for i in range(0, len(own), recipe.rows)
            ]
            step += 1

    # Figures, files ------------------------------------------------------------------------------------------------

    def _show(self, figures: Figures, pace: float, clock: Clocked) -> None:
        ranks = self.ranks
        sums, counts, hits = (ranks.sum(x).clamp_min(0) for x in (figures.sums, figures.counts, figures.hits))
        loss = float(ranks.sum(figures.loss)) / ranks.world / max(figures.steps, 1)
        per_depth = (sums / counts.clamp_min(1)).tolist()
        rates = (hits / counts.clamp_min(1)).tolist()
        point = {
            "step": self.step,
            "share": round(self.progress.share, 5),
            "loss": loss,
            "depth_loss": [round(x, 5) for x in per_depth],
            "hit_rate": [round(x, 5) for x in rates],
            "lr": rate(self.recipe, self.progress.share),
            "tokens_per_second": round(figures.tokens * ranks.world / max(figures.steps, 1) / pace),
            "feature_share": round(clock.feature_share(), 4),
            "memory_gib": round(_memory(self.target.device), 3),
            "seconds_left": round(max(0, self.progress.left) * pace, 1),
        }
        if figures.extra:
            count = ranks.world * max(figures.batches, 1)
            point["extra"] = {name: round(float(ranks.sum(value)) / count, 6) for name, value in figures.extra.items()}
        if not math.isfinite(loss):
            raise ConfigError(
                f"the loss is {loss} at step {self.step}; lower the learning rate (--lr {self.recipe.lr / 3:g}). The "
                f"last state in {self.out} is from before"
            )
        self.curves.append(point)
        if self.reporter is not None and ranks.first:
            self.reporter.point(point)

    def _target_now(self) -> Target:
        """What the drafter is for after this step: a tuned copy, kept for the step, or the target itself.

        Every process must ask at once.
        """
        if self.served is None:
            return self.target
        if self._tuned is None or self._tuned[0] != self.step:
            self._tuned = None  # one copy at a time
            self._tuned = self.step, self.drafter.tuned_target(str(self.served))
        return self._tuned[1]

    def _evaluate(self) -> None:
        prompts = self.corpus.held_out[: self.settings.eval_prompts]
        if not prompts:
            return
        weights, target = self.drafter.weights(), self._target_now()  # gathered by all, decoded by the first
        if self.ranks.first:
            found = decode(
                self.drafter,
                prompts,
                max_new_tokens=self.settings.eval_tokens,
                settings=self.drafter.evaluation,
                weights=weights,
                target=target,
            )
            self._said = found.outputs
            point = {"step": self.step, **found.as_dict()}
            self.curves.append(point)
            if self.reporter is not None:
                self.reporter.evaluation(point)
        self.ranks.wait()

    def _calibrate(self) -> None:
        """Let a copy of the drafter fit its decoding options to what the target said last; take them over."""
        weights, target = self.drafter.weights(), self._target_now()  # gathered by all
        changed = False
        if self._said and self.ranks.first:
            copy = self.drafter.for_decoding(weights, target)
            heat = copy.evaluation.temperature
            copy.calibrate([replay(copy, output, temperature=heat) for output in self._said])
            changed = copy.options() != self.drafter.options()
            self.drafter.take_options(copy)
        if self.ranks.agree(float(changed)):
            self._evaluate()

    def _compare(self) -> None:
        """Say how far a tuned target has moved, on held-out prompts."""
        prompts = self.corpus.held_out[: self.settings.eval_prompts]
        if self.served is None or not prompts:
            return
        tuned = self._target_now()
        if self.ranks.first:
            self._drift = drift(self.target, tuned, prompts, max_new_tokens=self.settings.eval_tokens)
            point = {"step": self.step, **asdict(self._drift)}
            self.curves.append(point)
            if self.reporter is not None:
                self.reporter.drift(point)
        self.ranks.wait()

    def _save_state(self) -> None:
        self._synchronise()
        state = {
            "step": self.step,
            "curves": self.curves,
            "elapsed": self._elapsed,
            "progress": asdict(self.progress),
            "run": self._fingerprint(),
        }
        save_state(self.out, self.objective, self.optimizer, state, self.ranks)

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "drafter": self.drafter.name,
            "options": self.drafter.shaping(),
            "begin_with": self.settings.begin_with,
            "corpus": self.corpus.digest,
            "recipe": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()},
            "seed": self.settings.seed,
            "optimizer": self.settings.optimizer,
        }

    def _check_same_run(self, state: dict[str, Any]) -> None:
        ours = self._fingerprint()
        for key, value in ours.items():
            theirs = state["run"].get(key)
            if theirs != value:
                raise ConfigError(
                    f"{str(self.out)!r} holds a run with another {key} ({theirs!r}, now {value!r}); give the same, or "
                    "start anew in another folder (--out)"
                )

    def _save(self, seconds: float) -> None:
        weights, target = self.drafter.weights(), self._target_now()
        self.drafter.provenance = describe_run(
            target=target,
            corpus=self.corpus,
            recipe=asdict(self.recipe),
            settings=asdict(self.settings),
            steps=self.step,
            seconds=seconds,
            device=self.target.device,
            curves=self.curves,
            drift=None if self._drift is None else asdict(self._drift),
        )
        if self.ranks.first:
            if self.served is not None:
                save_target(target, self.served)
            self.drafter.save_pretrained(self.out, weights=weights, target=target)
        self.ranks.wait()

    def _synchronise(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)


class _Prefetched:
    """The next few items of an iterator, made by a thread."""

    def __init__(self, source: Iterator[Any], ahead: int = 4) -> None:
        self._items: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(source,), daemon=True)
        self._thread.start()

    def _fill(self, source: Iterator[Any]) -> None:
        try:
            for item in source:
                while not self._stop.is_set():
                    try:
                        self._items.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if self._stop.is_set():
                    return
        except BaseException as error:  # handed to whoever waits
            self._items.put(error)

    def __next__(self) -> Any:
        item = self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        self._thread.join()


def _memory(device: torch.device) -> float:
    """Peak GiB of the device, or of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
