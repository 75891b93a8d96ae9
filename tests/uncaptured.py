"""The loop on the device without a device: passes and rounds run where they would be replayed. Not a test.

What would be captured is called again each time, into the tensors its first call gave, as a graph would. Triton's
interpreter runs the kernels of rounds on a CPU; passes are plain torch, since their kernels have tests of their own.
"""

from dataclasses import fields, is_dataclass
from time import perf_counter
from weakref import WeakKeyDictionary

import torch

from outpace.target import Target
from outpace.target.fast.forward import Outputs
from outpace.target.fast.graphs import Capture, FastPass
from outpace.target.fast.plan import joined_names, make_plan
from tiny import make_model


class Repeated:
    """A piece of work in place of its graph: warmed up, run once without effect on `result`'s place, then called."""

    def __init__(self, work, warm):
        (warm or work)()
        self.work = work
        self._result = None

    @property
    def result(self):
        if self._result is None:
            self._result = self.work()
        return self._result

    def __call__(self):
        made = self.work()
        if self._result is None:
            self._result = made
        elif made is not None:
            for one, other in zip(tensors(self._result), tensors(made), strict=True):
                one.copy_(other)
        return self._result


def tensors(value):
    """All tensors of a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key in sorted(value) for t in tensors(value[key])]
    if is_dataclass(value):
        return [t for field in fields(value) for t in tensors(getattr(value, field.name))]
    return []


def seen_entries(lengths, rows, span, bits, capacity):
    """[B, R, capacity] bool: which cache entries each row sees; bits: of `span` entries behind the length, or None."""
    batch = lengths.shape[0]
    at = (torch.arange(capacity) - lengths[:, None])[:, None].expand(-1, rows, -1)
    if bits is None:
        return at <= torch.arange(rows)[:, None]
    word = bits.view(batch, rows, -1).gather(2, (at >> 5).clamp(0, bits.shape[1] - 1))
    own = ((word >> (at & 31).int()) & 1).bool() & (at >= 0) & (at < span)
    return (at < 0) | own


def plain_attention(query, keys, values, *, lengths, slots, bits, scaling, span=None, **_):
    """`tree_attention` in torch, for rounds that need not test it."""
    batch, heads, size = lengths.shape[0], query.shape[1], query.shape[2]
    rows = query.shape[0] // batch
    sees = seen_entries(lengths, rows, span or rows, bits, keys.shape[2])[:, None]
    keys, values = (t[slots].repeat_interleave(heads // t.shape[1], 1) for t in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(
        query.view(batch, rows, heads, size).transpose(1, 2), keys, values, attn_mask=sees, scale=scaling
    )
    return out.transpose(1, 2).reshape(batch * rows, heads, size).contiguous()


class PlainForward:
    """`Forward` of a Llama-type model, in torch."""

    def __init__(self, plan, embed, names):
        self.plan = plan
        self.embed = embed
        self.names = names

    def __call__(self, inputs, cache, *, splits, layer_ids, taps=(), adapter=None, **_):
        del splits
        plan, found = self.plan, {}
        batch, rows = inputs.batch, inputs.rows
        heads, key_heads, size = plan.heads, plan.key_heads, plan.head_size
        cos, sin = (t[inputs.positions].view(batch, rows, 1, -1) for t in plan.rotary["full_attention"])
        entry = inputs.lengths[:, None] + torch.arange(rows)
        hidden = self.embed(inputs.tokens)
        if inputs.embeds is not None:
            hidden = torch.cat([hidden, inputs.embeds], 1)

        def product(x, weight, joined):
            out, at = x @ weight.T, 0
            for name, width in joined:
                if adapter is not None:
                    adapter.add(name, x, out[..., at : at + width], inputs.main)
                at += width
            return out

        def norm(x, gamma):
            return torch.nn.functional.rms_norm(x, gamma.shape, gamma, plan.eps)

        for layer in layer_ids:
            one, names = plan.layers[layer], self.names[layer]
            found[f"in:{layer}"] = hidden
            joined = product(norm(hidden, one.norm_attention), one.qkv.weight, names["qkv"])
            joined = joined.view(batch, rows, -1, size)
            first, second = joined[:, :, : heads + key_heads].chunk(2, -1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
            for tensor, new in zip(
                cache[layer], (turned[:, :, heads:], joined[:, :, heads + key_heads :]), strict=True
            ):
                tensor[inputs.slots[:, None], :, entry] = new
            query = turned[:, :, :heads].reshape(batch * rows, heads, size)
            out = plain_attention(
                query, *cache[layer], lengths=inputs.lengths, slots=inputs.slots, bits=inputs.bits, scaling=plan.scaling
            )
            hidden = hidden + product(out.view(batch, rows, -1), one.out.weight, names["out"])
            gate, up = product(norm(hidden, one.norm_mlp), one.gate_up.weight, names["gate_up"]).chunk(2, -1)
            hidden = hidden + product(torch.nn.functional.silu(gate) * up, one.down.weight, names["down"])
        found["pre_norm"] = hidden
        found["post_norm"] = norm(hidden, plan.norm)
        logits = found["post_norm"][:, : inputs.main].contiguous() @ plan.head.weight.T
        return Outputs(logits, None, {name: found[name].clone() for name in taps})


class Uncaptured(FastPass):
    """`FastPass` on a CPU, for rounds: prompts are read through the modules."""

    def __init__(self, target):
        self.plan = make_plan(target)
        self.names = joined_names(target)
        self.capture = Capture()
        self.positions_limit = next(iter(self.plan.rotary.values()))[0].shape[0]
        self._forward = PlainForward(self.plan, target.model.get_input_embeddings(), self.names)
        self._inputs = {}
        self._graphs = WeakKeyDictionary()

    def capture_work(self, work, what, warm=None):
        del what
        self.capture.graphs += 1
        return Repeated(work, warm)

    def fits(self, block, cache):
        del block, cache
        return False


class Mark:
    """A `torch.cuda.Event` that takes the host's time."""

    def __init__(self, **_):
        self.at = 0.0

    def record(self):
        self.at = perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def uncaptured_target(monkeypatch, **changes):
    """A tiny target whose rounds take the loop of `engine.device`."""
    from outpace.drafters.device import fused, reading

    monkeypatch.setattr(torch.cuda, "Event", Mark)
    for module in (fused, reading):
        monkeypatch.setattr(module, "tree_attention", plain_attention)
    target = Target(make_model(**{"num_hidden_layers": 2, **changes}))
    target._fast.made = Uncaptured(target)
    return target.through("fast")
