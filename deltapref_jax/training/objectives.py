"""Losses as pure functions on vectors: one value per pair or example, without reduction.

Letters: s is the sum of a completion's log-probabilities under the policy, ref the same under the
reference, L the number of its target tokens; c = s_chosen - ref_chosen, r = s_rejected -
ref_rejected, d = c - r. All are in nats, float32 or float64.

Losses and gradients are finite and right at |c|, |r| of thousands: 1 - σ(x) is computed as σ(-x),
and log σ by `jax.nn.log_sigmoid`, never as the log of σ. `LOSSES` maps the kinds of
`config.OBJECTIVE_KINDS` to the functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = float | Array


def _per_token(x: Float[Array, " P"], tokens: Float[Array, " P"]) -> Float[Array, " P"]:
    """Returns x / L, and 0 for an empty completion, whose x is 0."""
    return x / jnp.maximum(tokens, 1)


def dpo(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """DPO: -log σ(βd) (arXiv 2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * (c - r))


def dpo_norm(
    c: Float[Array, " P"],
    r: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
) -> Float[Array, " P"]:
    """Length-normalised DPO: -log σ(β(c/L_c - r/L_r)) (Tülu 3, arXiv 2411.15124, section 5.1.2).

    Useful β are 5 to 10, because c/L_c and r/L_r are means over tokens.
    """
    return -jax.nn.log_sigmoid(
        beta * (_per_token(c, chosen_tokens) - _per_token(r, rejected_tokens))
    )


def hinge(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """SLiC's hinge on DPO's margin: max(0, 1 - βd) (arXiv 2305.10425, 2309.06657).

    The gradient at the corner, βd = 1, is 0.
    """
    return jax.nn.relu(1 - beta * (c - r))


def ipo(
    c: Float[Array, " P"],
    r: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
) -> Float[Array, " P"]:
    """IPO on means over tokens: (c/L_c - r/L_r - 1/(2β))² (arXiv 2310.12036)."""
    return (_per_token(c, chosen_tokens) - _per_token(r, rejected_tokens) - 1 / (2 * beta)) ** 2


def robust(
    c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar, epsilon: Scalar
) -> Float[Array, " P"]:
    """Robust DPO: [-(1 - ε) log σ(βd) + ε log σ(-βd)] / (1 - 2ε) (arXiv 2403.00409).

    Its mean is that of DPO on clean labels if a share ε < 1/2 of the labels is flipped. It has no
    lower bound.
    """
    x = beta * (c - r)
    return (-(1 - epsilon) * jax.nn.log_sigmoid(x) + epsilon * jax.nn.log_sigmoid(-x)) / (
        1 - 2 * epsilon
    )


def cdpo(
    c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar, epsilon: Scalar
) -> Float[Array, " P"]:
    """Conservative DPO: -(1 - ε) log σ(βd) - ε log σ(-βd), cross-entropy with smoothed labels.

    Source: Mitchell, "A note on DPO with noisy preferences and relationship to IPO" (2023).
    """
    x = beta * (c - r)
    return -(1 - epsilon) * jax.nn.log_sigmoid(x) - epsilon * jax.nn.log_sigmoid(-x)


def apo_zero(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """APO-zero: 1 - σ(βc) + σ(βr), which raises chosen and lowers rejected (arXiv 2408.06266)."""
    # 1 - σ(βc) is σ(-βc).
    return jax.nn.sigmoid(-beta * c) + jax.nn.sigmoid(beta * r)


def apo_down(c: Float[Array, " P"], r: Float[Array, " P"], beta: Scalar) -> Float[Array, " P"]:
    """APO-down: σ(βc) + 1 - σ(βd), which lowers both, rejected more (arXiv 2408.06266)."""
    return jax.nn.sigmoid(beta * c) + jax.nn.sigmoid(-beta * (c - r))


def simpo(
    chosen: Float[Array, " P"],
    rejected: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: Scalar,
    gamma: Scalar,
) -> Float[Array, " P"]:
    """SimPO: -log σ(β(s_c/L_c - s_r/L_r) - γ), without reference (arXiv 2405.14734, eq. 6).

    `chosen` and `rejected` are s, not log-ratios.
    """
    margin = _per_token(chosen, chosen_tokens) - _per_token(rejected, rejected_tokens)
    return -jax.nn.log_sigmoid(beta * margin - gamma)


def kto_baseline(mismatched: Float[Array, ""]) -> Float[Array, ""]:
    """KTO's z0: max(0, mean of s' - ref'), without gradient (arXiv 2402.01306, section 4.1).

    `mismatched` is the mean of s' - ref' over a whole step's mismatched rows, each a prompt with
    another prompt's completion. It is clamped after averaging, because clamped micro-batches would
    not add up to the step.
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
    """KTO: w_D(1 - σ(β(x - z0))) if desirable, else w_U(1 - σ(β(z0 - x))); arXiv 2402.01306, eq. 8.

    An example's term depends only on its own label and z0. The mean is over all examples, whatever
    their labels, and the weights are not renormalised. So a step with only one label needs no rule
    of its own.

    Args:
      x: s - ref of every example, in nats.
      desirable: 1 for desirable examples, 0 for undesirable ones.
      z0: `kto_baseline` over the whole step, in nats.
      beta: strength of the pull to the reference.
      desirable_weight: w_D.
      undesirable_weight: w_U.
    """
    # With 1 - σ(y) = σ(-y), both cases are one sigmoid whose sign is that of the label.
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
    """Unpaired APO-zero: w_D(1 - σ(βx)) if desirable, else w_U σ(βx) (arXiv 2408.06266).

    These are the two terms of APO-zero, and KTO with z0 = 0.
    """
    return kto(x, desirable, 0.0, beta, desirable_weight, undesirable_weight)


def sft(s: Float[Array, " E"]) -> Float[Array, " E"]:
    """SFT: -s, the summed negative log-likelihood of a completion.

    The step divides it by the number of its target tokens, which gives the mean over tokens.
    """
    return -s


class Hyper(NamedTuple):
    """Scalars of one step, which are arguments of the compiled step and not constants in it."""

    beta: Any
    label_smoothing: Any  # ε
    gamma: Any
    nll_weight: Any
    desirable_weight: Any
    undesirable_weight: Any
    z0: Any
    total: Any  # pairs, examples or target tokens of the whole step, by which its sum is divided
    chosen_tokens: Any  # target tokens of the chosen completions (or examples) of the whole step


class Terms(NamedTuple):
    """Inputs of a loss, with one entry per pair or example.

    `first` is a pair's chosen completion, or the example's only one.
    """

    first: Any  # s - ref in nats, or s if the objective has no reference
    second: Any  # the same of the rejected completion
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
