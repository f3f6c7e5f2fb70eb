"""Attention sinks: one learnt logit per query head that joins the denominator of its softmax.

A query with the scores s gives key j the weight exp(s_j) / (Σ_i exp(s_i) + exp(sink)), so its
weights add up to less than 1 (gpt-oss, arXiv 2508.10925, section 2; "attention is off by one"). A
sink is a further key whose value is 0. It changes no equation of the gradients of queries, keys and
values if the log-sum-exp of a query has the sink in it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def softmax_with_sinks(
    scores: Float[Array, "*n S"], sinks: Float[Array, "*m"]
) -> Float[Array, "*n S"]:
    """The softmax over the last axis; `sinks` broadcasts against the scores and is 1 wide there."""
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def join_sinks(
    out: Float[Array, "B L N H"], lse: Float[Array, "B N L"], sinks: Float[Array, " N"]
) -> tuple[Array, Array]:
    """Adds sinks to the output and log-sum-exp of a kernel that knows none; both are in base 2."""
    joined = jnp.logaddexp2(lse, sinks[:, None])
    share = jnp.moveaxis(jnp.exp2(lse - joined), 1, 2)[..., None]
    return (out * share).astype(out.dtype), joined
