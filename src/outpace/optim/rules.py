"""The textbook update rules on float32 tensors. They know nothing of how anything is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.nn.functional import threshold

from outpace.optim.compand import exact_sqrt

LARGEST_STATE: Final = 2.0**39  # an element whose moment or root of a variance would be above is held
LIFT: Final = 2.0**48  # variances are averaged in this unit, so that nothing underflows where a root is taken
TINY_SQUARE: Final = 2.0**-126 - 2.0**-149  # the square of a gradient up to this counts as zero


class Updated(NamedTuple):
    """Float32 results of one rule, each of the shape of the weights; what the rule does not have is None.

    first: the first moment; second, root: the lifted variance and its square root
    watched: what grows without bound if the gradient does; the element is held where it passes `bound` or is NaN
    """

    theta: Tensor
    first: Tensor | None
    second: Tensor | None
    root: Tensor | None
    watched: Tensor
    bound: float = LARGEST_STATE


class Numbers(NamedTuple):
    """The numbers of one step, computed in Python's double precision and used as float32.

    decay: what the weight is multiplied by; step: the step length; beta1, rest1, beta2, rest2: the moving averages;
    root: 1 / sqrt(bias correction of the second moment); eps; coupled: decay added to the gradient instead.
    """

    decay: float = 1.0
    step: float = 0.0
    beta1: float = 0.0
    rest1: float = 0.0
    beta2: float = 0.0
    rest2: float = 0.0
    root: float = 1.0
    eps: float = 0.0
    coupled: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One update rule: its name, the state names of its moments, its numbers and its arithmetic."""

    name: str
    first: str | None
    second: str | None
    nesterov: bool = False
    numbers: Callable[[Mapping[str, Any], int], Numbers]
    update: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Numbers], Updated]


def adamw_numbers(group: Mapping[str, Any], step: int) -> Numbers:
    """The numbers of AdamW's step number `step`, from 1."""
    beta1, beta2 = group["betas"]
    return Numbers(
        decay=1.0 - group["lr"] * group["weight_decay"],
        step=group["lr"] / (1.0 - beta1**step),
        beta1=beta1,
        rest1=1.0 - beta1,
        beta2=beta2,
        rest2=1.0 - beta2,
        root=1.0 / (1.0 - beta2**step) ** 0.5,
        eps=group["eps"],
    )


def adamw(g: Tensor, theta: Tensor, m: Tensor | None, v: Tensor | None, n: Numbers) -> Updated:
    """Loshchilov and Hutter 2019, Algorithm 2, on a lifted variance: v is 2^48 times the average of squares.

    Each division is by a reciprocal that was rounded first, which costs one rounding and halves the kernel's work.
    """
    if m is None or v is None:
        raise AssertionError("AdamW has two moments")
    square = threshold(g * g, TINY_SQUARE, 0.0)
    m = m * n.beta1 + g * n.rest1
    v = v * n.beta2 + square * (n.rest2 * LIFT)
    root = exact_sqrt(v)
    update = m * (root * (n.root / LIFT**0.5) + n.eps).reciprocal()
    return Updated(theta * n.decay - update * n.step, m, v, root, root, LARGEST_STATE * LIFT**0.5)


def lion_numbers(group: Mapping[str, Any], step: int) -> Numbers:
    """The numbers of a Lion step; they do not depend on its number."""
    beta1, beta2 = group["betas"]
    return Numbers(
        decay=1.0 - group["lr"] * group["weight_decay"],
        step=group["lr"],
        beta1=beta1,
        rest1=1.0 - beta1,
        beta2=beta2,
        rest2=1.0 - beta2,
    )


def lion(g: Tensor, theta: Tensor, m: Tensor | None, v: Tensor | None, n: Numbers) -> Updated:
    """Chen et al. 2023, Algorithm 2. The sign of zero is zero."""
    if m is None:
        raise AssertionError("Lion has a moment")
    direction = (m * n.beta1 + g * n.rest1).sign()
    m = m * n.beta2 + g * n.rest2
    return Updated(theta * n.decay - direction * n.step, m, None, None, m.abs())


def sgd_numbers(group: Mapping[str, Any], step: int) -> Numbers:
    """The numbers of SGD's step number `step`, from 1; as in torch, the first step is not dampened."""
    decoupled = group["decoupled_weight_decay"]
    return Numbers(
        decay=1.0 - group["lr"] * group["weight_decay"] if decoupled else 1.0,
        step=group["lr"],
        beta1=group["momentum"],
        rest1=1.0 if step == 1 else 1.0 - group["dampening"],
        coupled=0.0 if decoupled else group["weight_decay"],
    )


def sgd(g: Tensor, theta: Tensor, m: Tensor | None, v: Tensor | None, n: Numbers) -> Updated:
    """Gradient descent with heavy-ball momentum, or none."""
    watched = g.abs()
    g = g + theta * n.coupled
    if m is not None:
        g = m = m * n.beta1 + g * n.rest1
        watched = m.abs()
    return Updated(theta * n.decay - g * n.step, m, None, None, watched)


def sgd_nesterov(g: Tensor, theta: Tensor, m: Tensor | None, v: Tensor | None, n: Numbers) -> Updated:
    """Gradient descent with Nesterov momentum, as torch.optim.SGD states it."""
    if m is None:
        raise AssertionError("Nesterov momentum needs momentum")
    g = g + theta * n.coupled
    m = m * n.beta1 + g * n.rest1
    return Updated(theta * n.decay - (g + m * n.beta1) * n.step, m, None, None, m.abs())


ADAMW: Final = Rule(name="adamw", first="exp_avg", second="exp_avg_sq", numbers=adamw_numbers, update=adamw)
LION: Final = Rule(name="lion", first="exp_avg", second=None, numbers=lion_numbers, update=lion)
SGD_PLAIN: Final = Rule(name="sgd", first=None, second=None, numbers=sgd_numbers, update=sgd)
SGD_HEAVY: Final = Rule(name="sgd", first="momentum_buffer", second=None, numbers=sgd_numbers, update=sgd)
SGD_NESTEROV: Final = Rule(
    name="sgd", first="momentum_buffer", second=None, nesterov=True, numbers=sgd_numbers, update=sgd_nesterov
)
