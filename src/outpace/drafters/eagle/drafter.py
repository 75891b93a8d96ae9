"""EAGLE's drafters: which network, which taps, which tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from outpace.drafters.eagle.nets import EagleNet, FusedNet
from outpace.drafters.follower import FollowingDrafter, GuessMode
from outpace.drafters.growth import DEFAULT_PATHS, Ranks
from outpace.drafters.heads import HeadKind, choose_ids, special_ids
from outpace.drafters.learning import Recipe
from outpace.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target


class Eagle(FollowingDrafter):
    """EAGLE-1: continue the target's top feature; a fixed tree.

    Args:
        draft_len, branches, nodes, paths, draw, coupling: see `FollowingDrafter`; `paths` is the fixed tree.
        bias: the input map has a bias. regression: weight of the feature loss against the token loss (published: 10).
    """

    name: ClassVar[str] = "eagle"
    decoding: ClassVar[frozenset[str]] = frozenset({"draft_len", "branches", "nodes", "paths", "draw", "coupling"})
    default_recipe: ClassVar[Recipe] = Recipe(lr=5e-4, depths=1, noise=0.1)

    def __init__(
        self,
        *,
        draft_len: int = 5,
        branches: int = 4,
        nodes: int = 25,
        paths: Sequence[Ranks] = DEFAULT_PATHS[:25],
        draw: GuessMode = "path",
        coupling: float = 0.6,
        bias: bool = True,
        regression: float = 10.0,
    ) -> None:
        super().__init__(draft_len=draft_len, branches=branches, nodes=nodes, paths=paths, draw=draw, coupling=coupling)
        self.bias, self.regression = bias, regression

    def build(self, target: Target) -> EagleNet:
        """One block of the target's shape."""
        return EagleNet(target, bias=self.bias, regression=self.regression).to(target.device)


class Eagle2(Eagle):
    """EAGLE-2: the same network; the tree is grown by confidence, and the most probable nodes are kept."""

    name: ClassVar[str] = "eagle2"

    def __init__(
        self,
        *,
        draft_len: int = 6,
        branches: int = 8,
        nodes: int = 32,
        draw: GuessMode = "path",
        coupling: float = 0.6,
        bias: bool = True,
        regression: float = 10.0,
    ) -> None:
        super().__init__(
            draft_len=draft_len, branches=branches, nodes=nodes, paths=(), draw=draw, coupling=coupling, bias=bias,
            regression=regression,
        )  # fmt: skip


class Eagle3(FollowingDrafter):
    """EAGLE-3: fused states, training-time test, a draft vocabulary; chains and dynamic trees.

    Args:
        draft_len, branches, nodes, draw, coupling: see `FollowingDrafter`.
        taps: states to fuse, () for those entering layers 2, L // 2 and L - 3.
        layers, intermediate, head, norm_before_residual, norm_before_fc, fc_norm, norm_output: see `FusedNet`.
        vocabulary: tokens of the draft vocabulary, the most frequent of the corpus; 0, or more than there are: all.
    """

    name: ClassVar[str] = "eagle3"
    decoding: ClassVar[frozenset[str]] = frozenset({"draft_len", "branches", "nodes", "draw", "coupling"})
    default_recipe: ClassVar[Recipe] = Recipe(lr=1e-3, depths=6)

    def __init__(
        self,
        *,
        draft_len: int = 6,
        branches: int = 8,
        nodes: int = 32,
        draw: GuessMode = "path",
        coupling: float = 0.6,
        taps: Sequence[str] = (),
        layers: int = 1,
        intermediate: int = 0,
        head: HeadKind = "target",
        vocabulary: int = 32_768,
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = True,
        norm_output: bool = True,
    ) -> None:
        super().__init__(draft_len=draft_len, branches=branches, nodes=nodes, draw=draw, coupling=coupling)
        if norm_before_fc and fc_norm:
            raise ConfigError("norm_before_fc and fc_norm exclude one another; set one of them to false")
        if head not in ("target", "own"):
            raise ConfigError(f"head must be target or own, got {head!r}")
        if layers < 1 or vocabulary < 0 or intermediate < 0:
            raise ConfigError("layers must be at least 1, vocabulary and intermediate 0 (the target's) or more")
        self.taps = tuple(taps)
        self.layers, self.intermediate, self.head, self.vocabulary = layers, intermediate, head, vocabulary
        self.norm_before_residual, self.norm_before_fc = norm_before_residual, norm_before_fc
        self.fc_norm, self.norm_output = fc_norm, norm_output
        self._ids: Tensor | None = None

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Choose the draft vocabulary."""
        if 0 < self.vocabulary < target.vocabulary:
            self._ids = choose_ids(counts, self.vocabulary, special_ids(target))

    def build(self, target: Target) -> FusedNet:
        """The network for a target of the family table (its inner states are needed)."""
        return self.network(target, self._ids)

    def network(self, target: Target, ids: Tensor | None) -> FusedNet:
        """The same with draft ids [vocabulary] given, or None for the first ones.

        Raises:
            UnsupportedError: for a model outside the family table.
        """
        if target.family is None:
            raise UnsupportedError(
                f"{self.name} reads states between layers, and {target.config.model_type} is outside the family table; "
                "see outpace.target.families to add a row, or use medusa, which reads the top alone"
            )
        return FusedNet(
            target,
            taps=self.taps or default_taps(target.layers_total),
            layers=self.layers,
            intermediate=self.intermediate,
            head=self.head,
            vocabulary=self.vocabulary,
            ids=ids,
            norm_before_residual=self.norm_before_residual,
            norm_before_fc=self.norm_before_fc,
            fc_norm=self.fc_norm,
            norm_output=self.norm_output,
        ).to(target.device)


def default_taps(layers: int) -> tuple[str, ...]:
    """The states entering layers 2, L // 2 and L - 3; of a model too small for that, three different ones."""
    chosen = (2, layers // 2, layers - 3) if layers >= 8 else (0, layers // 2, layers - 1)
    return tuple(f"in:{k}" for k in dict.fromkeys(chosen))
