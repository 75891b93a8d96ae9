"""Passes of models outside the family table, through their own `forward`.

Gives logits, the `post_norm` tap, scouts given as tokens or embeddings, and adapters; not what needs a look inside.
Because nobody has read that `forward`, a probe at load compares it with itself: a tree block against plain passes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from outpace.errors import UnsupportedError
from outpace.laws import Tree
from outpace.target.block import Block, Readout
from outpace.target.families import cache_keyword
from outpace.target.masks import additive_mask, block_visibility
from outpace.target.taps import check_taps

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.cache import BlockCache
    from outpace.target.model import Target

_MASKED_ATTENTION = ("eager", "sdpa")


class GenericRunner:
    """Runs blocks through `model.forward` with explicit positions, masks and our cache.

    Raises:
        UnsupportedError: if the model's attention cannot take a mask per row.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        implementation = getattr(target.config, "_attn_implementation", "eager")
        if implementation not in _MASKED_ATTENTION:
            raise UnsupportedError(
                f"{target.name} uses {implementation} attention, which takes no mask per row; load it with "
                "attn_implementation='sdpa' (or 'eager')"
            )

    def run(self, block: Block, cache: BlockCache, *, taps: Collection[str], logits: bool) -> Readout:
        """See `Target.run`."""
        target = self.target
        wanted = check_taps(taps, target.layers_total)
        if wanted - {"post_norm"}:
            raise UnsupportedError(
                f"{target.config.model_type} is outside the family table, so only the tap 'post_norm' can be read; "
                f"asked for {', '.join(sorted(wanted))}; see outpace.target.families to add a row"
            )
        scouts = block.scouts
        if scouts is not None and scouts.enter > 0:
            raise UnsupportedError(
                f"{target.config.model_type} runs through its own forward: scouts can only enter at layer 0"
            )
        rows = block.rows + (scouts.count if scouts else 0)
        lengths = cache.lengths[block.first : block.first + block.tokens.shape[0]]
        sees, positions = block_visibility(block)
        inputs: dict[str, Any] = {"input_ids": block.tokens}
        if scouts is not None:
            if scouts.tokens is not None:
                inputs = {"input_ids": torch.cat([block.tokens, scouts.tokens], 1)}
            else:
                main = target.embed(block.tokens)
                inputs = {"inputs_embeds": torch.cat([main, scouts.embeds.to(main.dtype)], 1)}  # type: ignore[union-attr]
        lowest = torch.finfo(target.dtype).min  # own forwards may add to the mask, which -inf does not survive
        width = cache.attended(max(lengths) + rows)
        masks = {
            kind: additive_mask(
                sees, positions, lengths, width, target.dtype, target.window if kind == "sliding_attention" else None
            ).clamp_min(lowest)
            for kind in set(target.layer_types)
        }
        cache.open(block.first, block.tokens.shape[0], rows)
        captured: list[Tensor] = []
        head = target.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        try:
            with target._gate.open(scouts.adapter if scouts is not None else None, block.rows):
                out = target.model(
                    **inputs,
                    attention_mask=next(iter(masks.values())) if len(masks) == 1 else masks,
                    position_ids=positions,
                    **{cache_keyword(target.model): cache},
                    use_cache=True,
                    return_dict=True,
                ).logits
        finally:
            handle.remove()
        found = {"post_norm": captured[0]} if "post_norm" in wanted else {}
        main_logits = out[:, : block.rows] if logits else None
        return Readout(main_logits, out[:, block.rows :] if scouts is not None and scouts.logits else None, found)

    def probe(self) -> None:
        """Compare a branching block behind a cache with plain passes over each of its paths.

        Raises:
            UnsupportedError: if they differ, or the model's forward fails on them, so that wrong text is impossible.
        """
        target = self.target
        model = target.model
        size = target.vocabulary
        prompt = [token % size for token in (5, 17, 3)]
        root, tree = 7 % size, Tree([token % size for token in (11, 13, 2)], [-1, -1, 0])
        kind = target.config.model_type
        with torch.inference_mode():
            try:
                cache = target.new_cache()
                target.prefill(prompt, cache)
                block = Block.of([root], [tree], [len(prompt)], target.device)
                found = target.run(block, cache).logits
                paths = [[root], [root, tree.tokens[0]], [root, tree.tokens[1]], [root, tree.tokens[0], tree.tokens[2]]]
                plain = [
                    model(torch.tensor([[*prompt, *path]], device=target.device), use_cache=False).logits[0, -1]
                    for path in paths
                ]
            except UnsupportedError:
                raise
            except Exception as error:
                raise UnsupportedError(
                    f"{kind} is outside the family table and its own forward does not run a block of rows with a "
                    f"cache, a 4-D mask and position ids ({type(error).__name__}: {error}); see outpace.target.families"
                ) from error
        assert found is not None
        want = torch.stack(plain).float()
        gap = float((found[0].float() - want).abs().max())
        scale = float(want.abs().max())
        allowed = scale * {torch.float64: 1e-9, torch.float32: 1e-3}.get(target.dtype, 6e-2)
        if not gap <= allowed:
            raise UnsupportedError(
                f"{kind} is outside the family table, and its own forward does not give the same logits for a tree "
                f"of rows as for plain passes (they differ by {gap:.3g}, logits reach {scale:.3g}); it may ignore "
                "position ids or masks. Decode it with transformers.generate, or add a row to outpace.target.families"
            )
