"""Losses as pure functions on vectors, one value per pair or example, no reduction hidden.

Letters: s = sum of a completion's log-probabilities under the policy, ref the same under the reference, L its target
tokens; c = s_chosen - ref_chosen, r = s_rejected - ref_rejected, d = c - r. All in nats, float32 or float64, and finite
with the right gradients at |c|, |r| of thousands: 1 - σ(x) is computed as σ(-x) and log σ never as log of σ.
`LOSSES` maps the kinds of `config.OBJECTIVE_KINDS` to them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = float | Array


def _per_token(x: Float[Array, " P"], tokens: Float[Array, " P"]) -> Float[Array, " P"]:
    """x / L; an empty completion has x = 0, and 0 is its mean."""
    return x / jnp.maximum(tokens, 1)


def dpo(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """-log σ(βd), direct preference optimisation (arXiv 2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * (c - r))


def dpo_norm(
    c: Float[Array, " P"],
    r: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
) -> Float[Array, " P"]:
    """-log σ(β(c/L_c - r/L_r)), length-normalised DPO (Tülu 3, arXiv 2411.15124, section 5.1.2); β is 5 to 10."""
    return -jax.nn.log_sigmoid(
        beta * (_per_token(c, chosen_tokens) - _per_token(r, rejected_tokens))
    )


def hinge(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """max(0, 1 - βd), the hinge of SLiC on DPO's margin (arXiv 2305.10425, 2309.06657); flat at the corner."""
    return jax.nn.relu(1 - beta * (c - r))


def ipo(
    c: Float[Array, " P"],
    r: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
) -> Float[Array, " P"]:
    """(c/L_c - r/L_r - 1/(2β))², identity preference optimisation (arXiv 2310.12036) on means over tokens."""
    return (_per_token(c, chosen_tokens) - _per_token(r, rejected_tokens) - 1 / (2 * beta)) ** 2


def robust(
    c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar, epsilon: Scalar
) -> Float[Array, " P"]:
    """[-(1 - ε) log σ(βd) + ε log σ(-βd)] / (1 - 2ε), unbiased if a share ε < 1/2 of labels is flipped.

    It has no lower bound (arXiv 2403.00409).
    """
    x = beta * (c - r)
    return (-(1 - epsilon) * jax.nn.log_sigmoid(x) + epsilon * jax.nn.log_sigmoid(-x)) / (
        1 - 2 * epsilon
    )


def cdpo(
    c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar, epsilon: Scalar
) -> Float[Array, " P"]:
    """-(1 - ε) log σ(βd) - ε log σ(-βd), conservative DPO: cross entropy with smoothed labels.

    Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023).
    """
    x = beta * (c - r)
    return -(1 - epsilon) * jax.nn.log_sigmoid(x) - epsilon * jax.nn.log_sigmoid(-x)


def apo_zero(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """1 - σ(βc) + σ(βr), anchored: chosen up, rejected down (arXiv 2408.06266)."""
    return jax.nn.sigmoid(-beta * c) + jax.nn.sigmoid(beta * r)


def apo_down(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """σ(βc) + 1 - σ(βd), anchored: both down, rejected further (arXiv 2408.06266)."""
    return jax.nn.sigmoid(beta * c) + jax.nn.sigmoid(-beta * (c - r))


def simpo(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
    gamma: Scalar,
) -> Float[Array, " P"]:
    """-log σ(β(s_c/L_c - s_r/L_r) - γ), no reference (arXiv 2405.14734, eq. 6); `chosen`, `rejected` are s."""
    margin = _per_token(chosen, chosen_tokens) - _per_token(rejected, rejected_tokens)
    return -jax.nn.log_sigmoid(beta * margin - gamma)


def kto_baseline(mismatched: Float[Array, ""]) -> Float[Array, ""]:
    """z0 = max(0, mean of s' - ref' over mismatched rows), without gradient (arXiv 2402.01306, section 4.1).

    The mean comes first and the clamp after it: clamped parts of a step would not add up to the step.
    """
    return jax.lax.stop_gradient(jnp.maximum(mismatched, 0.0))


def kto(
    x: Float[Array, " E"],
    desirable: Float[Array, " E"],
    z0: Scalar,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> Float[Array, " E"]:
    """w_D(1 - σ(β(x - z0))) where desirable, w_U(1 - σ(β(z0 - x))) elsewhere (arXiv 2402.01306, eq. 8).

    An example's term depends on its own label and on z0, and the mean is over all examples whatever their labels, the
    weights not renormalised. So a step with one label only needs no rule of its own: it is that part of the sum.

    Args:
      x: s - ref of every example.
      desirable: 1 or 0.
      z0: `kto_baseline` over the whole step.
      beta: strength of the pull to the reference.
      desirable_weight: w_D.
      undesirable_weight: w_U.
    """
    sign = 2 * desirable - 1
    weight = jnp.where(desirable > 0, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-sign * beta * (x - z0))


def apo_zero_unpaired(
    x: Float[Array, " E"],
    desirable: Float[Array, " E"],
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> Float[Array, " E"]:
    """w_D(1 - σ(βx)) where desirable, w_U σ(βx) elsewhere: APO-zero's two terms (arXiv 2408.06266), KTO with z0 = 0."""
    return kto(x, desirable, 0.0, beta, desirable_weight, undesirable_weight)


def sft(s: Float[Array, " E"]) -> Float[Array, " E"]:
    """-s: the summed negative log-likelihood; divided by the step's target tokens it is the token mean."""
    return -s


class Hyper(NamedTuple):
    """Scalars of one step, arguments of the compiled program."""

    beta: Any
    label_smoothing: Any  # ε
    gamma: Any
    nll_weight: Any
    desirable_weight: Any
    undesirable_weight: Any
    z0: Any
    total: Any  # pairs, examples or target tokens of the whole step: what the summed loss is divided by
    chosen_tokens: Any  # target tokens of the first row of all groups of the whole step


class Terms(NamedTuple):
    """What a loss reads, one entry per pair or example; `first` is the chosen row, or the example's only one."""

    first: Any  # s - ref; s alone where the objective has no reference
    second: Any
    first_tokens: Any  # L
    second_tokens: Any
    desirable: Any  # 1 or 0


LOSSES: dict[str, Callable[[Terms, Hyper], Array]] = {
    "dpo": lambda t, h: dpo(t.first, t.second, h.beta),
    "dpo_norm": lambda t, h: dpo_norm(t.first, t.second, t.first_tokens, t.second_tokens, h.beta),
    "hinge": lambda t, h: hinge(t.first, t.second, h.beta),
    "ipo": lambda t, h: ipo(t.first, t.second, t.first_tokens, t.second_tokens, h.beta),
    "robust": lambda t, h: robust(t.first, t.second, h.beta, h.label_smoothing),
    "cdpo": lambda t, h: cdpo(t.first, t.second, h.beta, h.label_smoothing),
    "apo_zero": lambda t, h: apo_zero(t.first, t.second, h.beta),
    "apo_down": lambda t, h: apo_down(t.first, t.second, h.beta),
    "simpo": lambda t, h: simpo(
        t.first, t.second, t.first_tokens, t.second_tokens, h.beta, h.gamma
    ),
    "kto": lambda t, h: kto(
        t.first, t.desirable, h.z0, h.beta, h.desirable_weight, h.undesirable_weight
    ),
    "apo_zero_unpaired": lambda t, h: apo_zero_unpaired(
        t.first, t.desirable, h.beta, h.desirable_weight, h.undesirable_weight
    ),
    "sft": lambda t, h: sft(t.first),
}
