"""Losses as pure functions on vectors, one value per pair or example, no reduction hidden.

Letters: s = sum of a completion's log-probabilities under the policy, ref the same under the reference, L its target
tokens; c = s_chosen - ref_chosen, r = s_rejected - ref_rejected. All in nats, float32 or float64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dpo(c: Float[Array, " P"], r: Float[Array, " P"], beta: float | Array) -> Float[Array, " P"]:
    """-log σ(β(c - r)), direct preference optimisation (arXiv 2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * (c - r))


def dpo_norm(
    c: Float[Array, " P"],
    r: Float[Array, " P"],
    chosen_tokens: Float[Array, " P"],
    rejected_tokens: Float[Array, " P"],
    beta: float | Array,
) -> Float[Array, " P"]:
    """-log σ(β(c/L_c - r/L_r)), length-normalised DPO (Tülu 3, arXiv 2411.15124, section 5.1.2); β is 5 to 10."""
    return -jax.nn.log_sigmoid(beta * (c / jnp.maximum(chosen_tokens, 1) - r / jnp.maximum(rejected_tokens, 1)))


def kto_baseline(mismatched: Float[Array, ""]) -> Float[Array, ""]:
    """z0 = max(0, mean of s' - ref' over mismatched rows), without gradient (arXiv 2402.01306, section 4.1)."""
    return jax.lax.stop_gradient(jnp.maximum(mismatched, 0.0))


def kto(
    x: Float[Array, " E"],
    desirable: Float[Array, " E"],
    z0: float | Array,
    beta: float | Array,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
) -> Float[Array, " E"]:
    """w_D(1 - σ(β(x - z0))) where desirable, w_U(1 - σ(β(z0 - x))) elsewhere (arXiv 2402.01306, eq. 8).

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


def sft(s: Float[Array, " E"]) -> Float[Array, " E"]:
    """-s: the summed negative log-likelihood; divided by the step's target tokens it is the token mean."""
    return -s
