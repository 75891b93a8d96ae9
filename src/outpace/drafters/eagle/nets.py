"""The two networks: one that imitates the target's top feature (EAGLE-1 and 2), one that fuses several (EAGLE-3).

Both follow the row rule (`drafters.rows`): embedding of the token first, feature second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from outpace.drafters.heads import DraftHead, HeadKind
from outpace.drafters.layers import MLP, Attention, Block, RMSNorm, Rotary, Shape, copy_norm, finish, initialise
from outpace.drafters.rows import RowNet
from outpace.target.skinny import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.plan import RowPlan
    from outpace.drafters.layers import Attend
    from outpace.target import Target


class EagleNet(RowNet):
    """EAGLE-1: u = fc [e; F], one block without a norm in front, and its output imitates the next feature.

    F is the post-norm state the target's head reads; there is no norm behind the block and no head of its own.

    Args:
        target: of these sizes. bias: fc has one (LLaMA-2 releases do, LLaMA-3 releases do not).
        regression: weight of the feature loss (Smooth L1) against the token loss.
    """

    def __init__(self, target: Target, *, bias: bool, regression: float) -> None:
        super().__init__()
        self.shape = Shape.of(target)
        self.layers = 1
        self.taps = ("post_norm",)
        self.regression = regression
        self.fc = Linear(2 * self.shape.hidden, self.shape.hidden, bias=bias)
        self.block = Block(self.shape, normed_input=False)
        self.rotary = Rotary(target, self.shape.head_size)
        self.head = DraftHead(target, 0, "target")
        initialise(self)

    def fuse(self, features: Tensor) -> Tensor:
        """The feature itself."""
        return features

    def forward(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See `RowNet`."""
        u = self.fc(torch.cat([embedded.to(feature.dtype), feature], -1))
        out: Tensor = self.block(u, cos, sin, 0, attend)
        return out

    def readout(self, y: Tensor) -> Tensor:
        """The imitated feature."""
        return y

    def feedback(self, y: Tensor) -> Tensor:
        """The imitated feature."""
        return y

    def fused_plan(self) -> RowPlan:
        """See `RowNet`."""
        from outpace.drafters.device.plan import RowPlan, plan_block
        from outpace.target.fast.plan import Projection

        bias = None if self.fc.bias is None else self.fc.bias.detach()
        return RowPlan(
            tap_norms=(),
            fuse_norm=None,
            fuse=None,
            norm_embedding=None,
            norm_state=None,
            embedding_first=True,
            join=Projection(self.fc.weight.detach(), bias),
            residual="joined",
            blocks=(plan_block(self.block, None),),
            norm=None,
            feeds_normed=False,
            head=Projection(self.head.weight.detach()),
            offsets=self.head.offsets,
            eps=self.shape.eps,
        )


class FirstLayer(nn.Module):
    """EAGLE-3's first block: attention reads embedding and hidden state side by side; the residual is the latter."""

    def __init__(self, shape: Shape, *, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.hidden_norm = RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape, 2 * shape.hidden)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """embedded, hidden [B, R, H] -> [B, R, H]."""
        q, k, v, residual = self.before(embedded, hidden, cos, sin)
        return self.rest(residual, attend(0, q, k, v))

    def before(
        self, embedded: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Up to attention: q, k, v and the residual."""
        normed = self.hidden_norm(hidden)
        both = torch.cat([self.input_layernorm(embedded).to(normed.dtype), normed], -1)
        return *self.self_attn(both, cos, sin), normed if self.norm_before_residual else hidden

    def rest(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Behind attention."""
        return finish(residual, attended, self.self_attn, self.post_attention_layernorm, self.mlp)


class FusedNet(RowNet):
    """EAGLE-3: several of the target's states fused, one or more blocks, a norm and a head over a draft vocabulary.

    Args:
        target: of these sizes. taps: states to fuse, lowest first.
        layers: blocks; those behind the first are plain. intermediate: width of their MLPs (0: as the target's).
        head: frozen rows of the target's head, or rows of its own that start from them.
        vocabulary: tokens of the draft vocabulary (0: the target's). ids: which, or None.
        norm_before_residual: the residual is the normed hidden state.
        norm_before_fc: one norm over the fused states. fc_norm: one per state (3.1); excludes the former.
        norm_output: the state fed back has been normed (3.1).
    """

    def __init__(
        self,
        target: Target,
        *,
        taps: Sequence[str],
        layers: int,
        intermediate: int,
        head: HeadKind,
        vocabulary: int,
        ids: Tensor | None,
        norm_before_residual: bool,
        norm_before_fc: bool,
        fc_norm: bool,
        norm_output: bool,
    ) -> None:
        super().__init__()
        shape = self.shape = Shape.of(target, intermediate=intermediate)
        self.layers = layers
        self.taps = tuple(taps)
        self.norm_output = norm_output
        width = target.hidden_size
        self.input_norm = RMSNorm(width * len(taps), shape.eps) if norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(width, shape.eps) for _ in taps) if fc_norm else None
        self.fc = Linear(width * len(taps), shape.hidden, bias=False)
        self.midlayer = FirstLayer(shape, norm_before_residual=norm_before_residual)
        self.more = nn.ModuleList(Block(shape) for _ in range(layers - 1))
        self.norm = RMSNorm(shape.hidden, shape.eps)
        self.rotary = Rotary(target, shape.head_size)
        self.head = DraftHead(target, vocabulary, head, ids)
        initialise(self)
        copy_norm(target, self.norm)
        with torch.no_grad():  # begin with the highest state, at the size of what is fed back
            self.fc.weight[:, -width:] += torch.eye(width) * self.norm.weight.mean()

    def fuse(self, features: Tensor) -> Tensor:
        """[B, R, taps * H] -> [B, R, H]."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(x) for norm, x in zip(self.fc_norm, parts, strict=True)], -1)
        out: Tensor = self.fc(features)
        return out

    def forward(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See `RowNet`."""
        y: Tensor = self.midlayer(embedded, feature, cos, sin, attend)
        for layer, block in enumerate(self.more, start=1):
            y = block(y, cos, sin, layer, attend)
        return y

    def readout(self, y: Tensor) -> Tensor:
        """Normed, as the target's head expects it."""
        out: Tensor = self.norm(y)
        return out

    def feedback(self, y: Tensor) -> Tensor:
        """Before the norm, or behind it (3.1)."""
        return self.norm(y) if self.norm_output else y

    def fused_plan(self) -> RowPlan:
        """See `RowNet`."""
        from outpace.drafters.device.plan import RowPlan, plan_block
        from outpace.target.fast.plan import Projection

        first = self.midlayer
        behind: list[Any] = list(self.more)
        tap_norms: list[Any] = list(self.fc_norm or ())
        return RowPlan(
            tap_norms=tuple(norm.weight.detach() for norm in tap_norms),
            fuse_norm=None if self.input_norm is None else self.input_norm.weight.detach(),
            fuse=Projection(self.fc.weight.detach()),
            norm_embedding=first.input_layernorm.weight.detach(),
            norm_state=first.hidden_norm.weight.detach(),
            embedding_first=True,
            join=None,
            residual="normed_state" if first.norm_before_residual else "state",
            blocks=(plan_block(first, None), *(plan_block(b, b.input_layernorm.weight.detach()) for b in behind)),
            norm=self.norm.weight.detach(),
            feeds_normed=self.norm_output,
            head=Projection(self.head.weight.detach()),
            offsets=self.head.offsets,
            eps=self.shape.eps,
        )
