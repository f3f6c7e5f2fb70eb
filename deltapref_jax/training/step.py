"""The compiled step: gradients of micro-batches are summed, then applied once.

Everything that differs between arms of one objective and shape (learning rate, beta, weights, KTO's z0, the step's
size) is an argument, so all of them share one compilation. Every loss is a sum over the micro-batch divided by the
*step's* pairs, examples or tokens: micro-batches, packing and devices do not change it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.logprobs import scorer, sequence_logprobs
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.training import objectives
from deltapref_jax.training.state import Optimizer, TrainState

Array = jax.Array
Sums = dict[str, Array]


class Examples(NamedTuple):
    """What the loss needs besides the log-probabilities; one entry per pair (DPO) or example (KTO, SFT), padded.

    `first` is the chosen sequence's segment index of a pair, or the example's; `second` the rejected one's (0 where
    there is none). `weight` is 1, and 0 for padding.
    """

    first: Any  # int32 [P], index into [S]
    second: Any  # int32 [P]
    first_ref: Any  # float32 [P], reference log-probability, nats
    second_ref: Any
    desirable: Any  # float32 [P], KTO's label
    weight: Any


class Hyper(NamedTuple):
    """Scalars of one step."""

    beta: Any
    desirable_weight: Any
    undesirable_weight: Any
    z0: Any
    total: Any  # pairs, examples (KTO) or target tokens (SFT) of the whole step


def _pair_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    c, r = s[e.first] - e.first_ref, s[e.second] - e.second_ref
    losses = (objectives.dpo(c, r, h.beta) if kind == "dpo"
              else objectives.dpo_norm(c, r, n[e.first], n[e.second], h.beta))
    values = {
        "loss": losses,
        "rewards/chosen": h.beta * c,
        "rewards/rejected": h.beta * r,
        "rewards/margins": h.beta * (c - r),
        "rewards/accuracies": c > r,
        "logps/chosen": s[e.first],
        "logps/rejected": s[e.second],
        "deviation": (jnp.abs(c) + jnp.abs(r)) / 2,
    }
    sums = {name: jnp.sum(value * e.weight) / h.total for name, value in values.items()}
    return sums["loss"], sums


def _kto_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    x = s[e.first] - e.first_ref
    losses = objectives.kto(x, e.desirable, h.z0, h.beta, h.desirable_weight, h.undesirable_weight)
    sums = {"loss": jnp.sum(losses * e.weight) / h.total,
            "deviation": jnp.sum(jnp.abs(x) * e.weight) / h.total}
    for side, member in (("chosen", e.desirable * e.weight), ("rejected", (1 - e.desirable) * e.weight)):
        sums |= {f"count/{side}": jnp.sum(member), f"rewards/{side}": jnp.sum(h.beta * x * member),
                 f"logps/{side}": jnp.sum(s[e.first] * member)}
    return sums["loss"], sums


def _sft_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    loss = jnp.sum(objectives.sft(s[e.first]) * e.weight) / h.total
    return loss, {"loss": loss, "logps/chosen": jnp.sum(s[e.first] * e.weight), "count/chosen": jnp.sum(e.weight)}


LOSSES: dict[str, Callable[[str, Array, Array, Examples, Hyper], tuple[Array, Sums]]] = {
    "dpo": _pair_loss, "dpo_norm": _pair_loss, "kto": _kto_loss, "sft": _sft_loss}


class Programs(NamedTuple):
    """The compiled functions of one objective and shape."""

    gradient: Callable[..., Any]  # (params, batch, examples, hyper) -> (grads, sums)
    add: Callable[..., Any]  # (grads, more grads) -> grads
    apply: Callable[..., Any]  # (state, grads, learning rate) -> (state, gradient norm before clipping)
    logprobs: Callable[..., Any]  # (params, batch) -> ([S] sums, [S] counts)
    place: Any  # shardings of the whole TrainState


@functools.cache
def programs(spec: ModelSpec, dtype: str, kind: str, optimizer: Optimizer, segments: int, mesh: Mesh,
             remat: bool = False) -> Programs:
    """Compiles once per model shape, objective, optimizer, row shape and mesh, for the life of the process."""
    transform = optimizer.transform()
    graphdef, params_shape = abstract(spec, jnp.dtype(dtype))
    params_place = shardings(params_shape, mesh)
    place = TrainState(params_place, shardings(jax.eval_shape(transform.init, params_shape), mesh))
    rows, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())

    def gradient(params: nnx.State, batch: PackedBatch, examples: Examples, hyper: Hyper) -> tuple[nnx.State, Sums]:
        def loss(params: nnx.State) -> tuple[Array, Sums]:
            s, n = sequence_logprobs(nnx.merge(graphdef, params), batch, segments, remat)
            return LOSSES[kind](kind, s, n, examples, hyper)

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, sums

    def apply(state: TrainState, grads: nnx.State, rate: Array) -> tuple[TrainState, Array]:
        updates, moments = transform.update(grads, state.moments, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, moments), optax.tree.norm(grads)

    return Programs(
        gradient=jax.jit(gradient, in_shardings=(params_place, rows, everywhere, everywhere),
                         out_shardings=(params_place, everywhere)),
        add=jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0, out_shardings=params_place),
        apply=jax.jit(apply, donate_argnums=0, in_shardings=(place, params_place, everywhere),
                      out_shardings=(place, everywhere)),
        logprobs=scorer(spec, dtype, segments, mesh),
        place=place,
    )
