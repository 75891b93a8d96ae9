"""Passes captured as CUDA graphs, one per shape, behind `Target.run`.

A pass of hundreds of small kernels costs the host milliseconds to launch and the device a fraction of that to run;
a graph is launched at once. Graphs are captured when a shape is first met, kept, and share one pool of memory. The
length of the cache is no part of the shape: attention reads the lengths from the device, and only the number of
pieces keys are split into (a power of two) is fixed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch

from outpace.errors import OutOfMemoryError, UnsupportedError
from outpace.target.block import Block, Readout
from outpace.target.fast.forward import Forward, Inputs, Outputs
from outpace.target.fast.launch import dependent_launch
from outpace.target.fast.linear import is_float
from outpace.target.fast.plan import Plan, joined_names, make_plan
from outpace.target.fast.tree_attention import splits_for

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.cache import BlockCache
    from outpace.target.model import Target

_LOG: Final = logging.getLogger("outpace")
_BATCHES: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_ROWS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def padded_rows(rows: int) -> int:
    """Rows a captured pass has where `rows` are wanted: few shapes, little waste."""
    return next((size for size in _ROWS if size >= rows), -(-rows // 512) * 512)


def padded_batch(requests: int) -> int:
    """Requests a captured pass has where `requests` are live; the others are empty slots."""
    return next((size for size in _BATCHES if size >= requests), -(-requests // 128) * 128)


def bucket(entries: int) -> int:
    """Entries of the cache a captured pass can read where `entries` are used: a power of two, at least 256."""
    return 1 << max(8, (entries - 1).bit_length())


@dataclass(slots=True)
class Capture:
    """What capturing has cost: reported apart from run time."""

    graphs: int = 0
    seconds: float = 0.0


class PassKey(NamedTuple):
    """What a captured pass holds for.

    Attributes:
        generation: of the tensors of the cache; graphs of another one are stale. reach: entries of it that can be read.
        inputs, adapter: their `id`; what they name is kept as long as the graph.
    """

    generation: int
    inputs: int
    reach: int
    layer_ids: tuple[int, ...]
    taps: frozenset[str]
    logits: bool
    scout_logits: bool
    adapter: int | None


class Captured:
    """A piece of device work as a graph: run once to warm up, captured, then replayed.

    Args:
        work: launches kernels on tensors that keep their place; its result keeps its place too.
        pool: memory shared with other graphs.
        warm: what to run to warm up, where running `work` itself would leave traces.
    """

    def __init__(self, work: Callable[[], Any], pool: Any, warm: Callable[[], Any] | None = None) -> None:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            (warm or work)()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(self._graph, pool=pool):
            self.result = work()

    def __call__(self) -> Any:
        """Replay; the result is overwritten by the next replay."""
        self._graph.replay()
        return self.result


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector off: it may free a graph of an engine long gone, and that breaks a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class FastPass:
    """Passes of one model through fused kernels and graphs.

    Args:
        target: the model; `view`s of it share this object and say which layers they run.

    Raises:
        UnsupportedError: if the model or the device cannot take this path, with the reason.
    """

    captured = True

    def __init__(self, target: Target) -> None:
        if target.device.type != "cuda":
            raise UnsupportedError(f"captured passes need a CUDA device; this model is on {target.device}")
        if not is_float(target.dtype):
            raise UnsupportedError(f"no fast kernels for {target.dtype}")
        if torch.cuda.get_device_capability(target.device)[0] < 8:
            raise UnsupportedError("fast kernels need compute capability 8.0 or later")
        self.plan: Plan = make_plan(target)
        self.names = joined_names(target)
        self.capture = Capture()
        self._anchors: list[Captured] = []
        self._open_pool()
        self.positions_limit = next(iter(self.plan.rotary.values()))[0].shape[0]
        self._forward = Forward(
            self.plan, target.model.get_input_embeddings(), self.names, dependent_launch(target.device)
        )
        self._inputs: dict[tuple[int, int, int, bool], Inputs] = {}
        self._graphs: WeakKeyDictionary[BlockCache, dict[Any, Captured]] = WeakKeyDictionary()

    def inputs(self, batch: int, rows: int, scouts: int = 0, *, chain: bool = False) -> Inputs:
        """The static tensors of a shape; `rows` main rows and `scouts` scout rows per request."""
        key = (batch, rows, scouts, chain)
        if key not in self._inputs:
            with torch.inference_mode(False):
                shape = (batch, scouts, self.plan.hidden)
                embeds = torch.zeros(shape, dtype=self.plan.dtype, device=self.plan.device) if scouts else None
                self._inputs[key] = Inputs.empty(batch, rows, self.plan.device, chain=chain, embeds=embeds)
        return self._inputs[key]

    def passing(
        self,
        inputs: Inputs,
        cache: BlockCache,
        *,
        entries: int,
        layer_ids: tuple[int, ...],
        taps: Collection[str] = (),
        logits: bool = True,
        scout_logits: bool = False,
        adapter: GatedLoRA | None = None,
    ) -> tuple[PassKey, Callable[[], Outputs]]:
        """The pass of this shape as a piece of work to capture, and what it holds for.

        entries: cache entries in use, the block's rows included.
        """
        plan = self.plan
        cache.prepare(plan.key_heads, plan.head_size, plan.dtype, plan.device)
        key = PassKey(
            cache.generation, id(inputs), bucket(entries), layer_ids, frozenset(taps), logits, scout_logits,
            id(adapter) if adapter is not None else None,
        )  # fmt: skip

        def work() -> Outputs:
            return self._forward(
                inputs, cache.tensors(), splits=splits_for(key.reach), layer_ids=layer_ids, taps=taps, logits=logits,
                scout_logits=scout_logits, adapter=adapter,
            )  # fmt: skip

        return key, work

    def graph(self, inputs: Inputs, cache: BlockCache, **how: Any) -> Captured:
        """`passing`, captured if it was not; its result, `Outputs`, is overwritten by its next replay.

        Raises:
            OutOfMemoryError: naming the shape; nothing is lost, smaller shapes still run.
        """
        key, work = self.passing(inputs, cache, **how)
        graphs = self._graphs.setdefault(cache, {})
        found = graphs.get(key)
        if found is None:
            for old in [k for k in graphs if k.generation != key.generation]:
                del graphs[old]  # their cache tensors are gone
            what = f"a pass of {inputs.batch} x {inputs.rows} rows behind up to {key.reach} entries"
            found = graphs[key] = self.capture_work(work, what)
        return found

    def _open_pool(self) -> None:
        """Memory for the graphs to come; a pool lives by its graphs, so one stays."""
        self.pool = torch.cuda.graph_pool_handle()
        self._anchors.append(Captured(lambda: torch.zeros(1, device=self.plan.device), self.pool))
        self._pool_is_broken = False

    def capture_work(self, work: Callable[[], Any], what: str, warm: Callable[[], Any] | None = None) -> Captured:
        """Capture a piece of work into the shared pool.

        Raises:
            OutOfMemoryError: if there is no room for it.
        """
        started = perf_counter()
        try:
            if self._pool_is_broken:
                self._open_pool()
            self._pool_is_broken = True  # what fails inside may leave it recording
            made = Captured(work, self.pool, warm)
            self._pool_is_broken = False
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(
                f"no GPU memory to capture {what}: {str(error).splitlines()[0]} Lower max_batch, the draft's length "
                "or max_new_tokens; the engine stays usable"
            ) from error
        self.capture.graphs += 1
        self.capture.seconds += perf_counter() - started
        _LOG.info("captured %s in %.2f s", what, perf_counter() - started)
        return made

    def fits(self, block: Block, cache: BlockCache) -> bool:
        """Whether a block can take this path; others go through the model's modules."""
        scouts = block.scouts
        if scouts is not None and scouts.enter > 0:
            return False
        rows = block.rows + (scouts.count if scouts else 0)
        longest = max(cache.lengths[block.first : block.first + block.tokens.shape[0]])
        return longest + padded_rows(rows) <= self.positions_limit

    def run(
        self,
        block: Block,
        cache: BlockCache,
        *,
        layer_ids: tuple[int, ...],
        taps: Collection[str],
        logits: bool,
    ) -> Readout:
        """See `Target.run`. Results are copies, so that they outlive the next pass."""
        batch, rows = block.tokens.shape
        scouts = block.scouts
        count = scouts.count if scouts is not None else 0
        chain = block.sees is None and scouts is None
        wide, many = padded_rows(rows + count) - count, padded_batch(batch)
        inputs = self.inputs(many, wide, count, chain=chain)
        lengths = cache.lengths[block.first : block.first + batch]
        entries = max(lengths) + wide + count
        cache.reserve(slots=block.first + many)
        cache.open(block.first, batch, wide + count)
        placed = [*lengths, *([0] * (many - batch)), *range(block.first, block.first + many)]
        inputs.flat[inputs.offsets[3] : inputs.offsets[5]].copy_(torch.tensor(placed), non_blocking=True)
        self._fill(inputs, block, wide)
        try:
            outputs: Outputs = self.graph(
                inputs, cache, entries=entries, layer_ids=layer_ids, taps=taps, logits=logits,
                scout_logits=scouts is not None and scouts.logits,
                adapter=scouts.adapter if scouts is not None else None,
            )()  # fmt: skip
        except OutOfMemoryError:
            cache.drop()
            raise

        def keep(values: Tensor) -> Tensor:
            values = values[:batch]
            return values.clone() if wide == rows else torch.cat([values[:, :rows], values[:, wide:]], 1)

        return Readout(
            outputs.logits[:batch, :rows].clone() if outputs.logits is not None else None,
            outputs.scout_logits[:batch].clone() if outputs.scout_logits is not None else None,
            {name: keep(value) for name, value in outputs.taps.items()},
        )

    def _fill(self, inputs: Inputs, block: Block, wide: int) -> None:
        """Copy a block into the static tensors; padding rows repeat the root's position and see themselves."""
        batch, rows = block.tokens.shape
        many = inputs.batch
        scouts = block.scouts
        count = scouts.count if scouts is not None else 0
        total = wide + count
        inputs.tokens[:batch, :rows] = block.tokens
        inputs.tokens[:batch, rows:] = 0
        positions = inputs.positions.view(many, total)
        positions[:batch, :rows] = block.positions
        positions[:batch, rows:wide] = block.positions[:, :1]
        positions[batch:] = 0
        if scouts is not None:
            assert inputs.embeds is not None
            positions[:batch, wide:] = scouts.positions
            new = scouts.embeds if scouts.embeds is not None else self._forward.embed(scouts.tokens)
            inputs.embeds[:batch] = new
        if inputs.bits is None:
            return
        device = inputs.bits.device
        sees = torch.eye(total, dtype=torch.bool, device=device).repeat(many, 1, 1)
        main = block.sees
        if main is None:
            main = torch.ones(rows, rows, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
        sees[:batch, :rows, :rows] = main
        if scouts is not None:
            sees[:batch, wide:, :rows] = scouts.sees[:, :, :rows]
            sees[:batch, wide:, wide:] = scouts.sees[:, :, rows:]
        inputs.bits.copy_(pack_bits(sees).view(many * total, -1))


def pack_bits(sees: Tensor) -> Tensor:
    """[B, N, N] bool -> [B, N, ceil(N / 32)] int32, bit j of word w for row 32 w + j."""
    batch, rows, count = sees.shape
    words = -(-count // 32)
    padded = torch.zeros(batch, rows, words * 32, dtype=torch.int64, device=sees.device)
    padded[:, :, :count] = sees
    weights = torch.ones((), dtype=torch.int64, device=sees.device) << torch.arange(32, device=sees.device)
    packed = (padded.view(batch, rows, words, 32) * weights).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
