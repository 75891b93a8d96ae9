"""What a drafter does in rounds that stay on the device: a piece of work in front of the pass, and one behind it.

    draft(...)  -> tokens, parents      the engine lays them into the pass's rows
    place(...)                          scouts behind them, for a drafter that has some
    the pass                            the target, with taps
    collect(...)                        behind choosing, walking and committing

All of it is one graph: pieces launch kernels on tensors that keep their place and never wait for the device, so that
the engine may launch a round before the host has read the last one. The host's side of the drafter learns of it through
four verbs: `join` (these requests, in this order), `launched`, `settle` (a round has been read), `leave` (the host
takes over again).

A round that was launched ahead and thrown away has read what the round before it left: those rows are committed and
stay. What it left itself is forgotten.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context
    from outpace.drafters.growth import Draws
    from outpace.drafters.heads import DraftHead
    from outpace.target import GatedLoRA
    from outpace.target.fast.forward import Inputs


class DraftKey(NamedTuple):
    """What a captured draft holds for, besides its shape.

    Attributes:
        generation: of the tensors of the drafter's cache; graphs of another one are stale.
        reach: entries of that cache it can read.
    """

    generation: int
    reach: int


class DeviceDraft(ABC):
    """Drafts that are made on the device, all requests of a batch at once.

    Attributes:
        depth: deepest token of a draft. nodes: nodes of every draft, the same in all rounds.
        coupling: see `growth.Draws`; None where the path's numbers are not looked at. head: whose ids they are for.
        scouts: rows added to every request of a pass. adapter: that of these rows. reads: how many of the path's
            numbers ahead `place` is to be given.
    """

    depth: int
    nodes: int
    coupling: float | None
    head: DraftHead
    scouts: int = 0
    adapter: GatedLoRA | None = None
    reads: int = 0

    @abstractmethod
    def join(self, context: Context, batch: int) -> None:
        """Take over from the host, with what it owes: request b of the context is row b of the drafts to come.

        batch: rows of a draft; those behind the context's requests are empty.
        """

    @abstractmethod
    def reserve(self, ahead: int) -> DraftKey:
        """Make room for one more draft behind `ahead` rounds the host has not read yet."""

    @abstractmethod
    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """Read what is owed, and draft: (tokens, parents), [batch, nodes] int64, parents before children, -1: the root.

        A token of -1 is no node. Captured; `warm`: called to warm up, and has to leave no traces.
        """

    def place(  # noqa: B027  # most drafters have no scouts
        self, inputs: Inputs, rows: Tensor, heat: Tensor, numbers: Tensor | None
    ) -> None:
        """Write the scouts of a pass: their positions, whom they see, their embeddings. Captured, behind `draft`.

        inputs: of the pass, the draft's nodes in its main rows, node v of request b in row rows[b, v]. heat: [batch]
        float32, temperatures. numbers: [batch, reads] float32, the path's, from the one behind the root's on.
        """

    @abstractmethod
    def collect(
        self, taps: Mapping[str, Tensor], path: Tensor, emitted: Tensor, counts: Tensor, *, warm: bool = False
    ) -> None:
        """Keep what the next draft reads of a round. Captured, behind the walk; `warm` as above.

        taps: of the pass, [batch, R + scouts, H] each; path: [batch, R] int64, accepted rows, the root first; emitted:
        [batch, R] int64, the tokens behind them (-1: there was no law); counts: [batch] int64, how many.
        """

    @abstractmethod
    def launched(self, ahead: int) -> None:
        """A draft has been launched, with `ahead` rounds under way that the host has not read."""

    @abstractmethod
    def settle(self, emitted: Sequence[Sequence[int]], ahead: int) -> None:
        """The host has read a round: what it emitted per request, and how many rounds were launched since."""

    @abstractmethod
    def leave(self) -> None:
        """Hand over to the host: whatever is owed and unread becomes its own. Rounds under way are thrown away."""
