"""The compiled step: gradients of micro-batches are summed, then applied once.

Everything that differs between arms of one objective and shape (learning rate, beta, weights, KTO's
z0, the step's size) is an argument, so all of them share one compilation. Every loss is a sum over
the micro-batch divided by the *step's* pairs, examples or tokens: micro-batches, packing and
devices do not change it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltapref_jax.config import OBJECTIVE_KINDS
from deltapref_jax.models.lora import partition
from deltapref_jax.models.sharding import BATCH, shardings
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec
from deltapref_jax.models.weights import abstract
from deltapref_jax.scoring.logprobs import logprob_fn, sequence_logprobs_and_totals
from deltapref_jax.scoring.packing import PackedBatch
from deltapref_jax.training.objectives import LOSSES, Hyper, Terms
from deltapref_jax.training.state import Optimizer, TrainState

Array = jax.Array
Sums = dict[str, Array]


class Examples(NamedTuple):
    """What the loss needs besides log-probabilities: one entry per pair or example, padded.

    `first` is the index in [S] of a pair's chosen sequence, or of the example's; `second` that of
    the rejected one (0 where there is none). `weight` is 1, and 0 for padding.
    """

    first: Any  # int32 [P], index into [S]
    second: Any  # int32 [P]
    first_ref: Any  # float32 [P], reference log-probability, nats
    second_ref: Any
    desirable: Any  # float32 [P], KTO's label
    weight: Any


def _pair_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    """The pair's loss plus `nll_weight` times the negative log-likelihood of the chosen.

    The likelihood is a mean over the target tokens of the step's chosen (arXiv 2404.19733).
    """
    # Without a reference the columns of references are not subtracted, whatever they hold.
    given = OBJECTIVE_KINDS[kind].reference
    c, r = (
        (s[e.first] - e.first_ref, s[e.second] - e.second_ref)
        if given
        else (s[e.first], s[e.second])
    )
    losses = LOSSES[kind](Terms(c, r, n[e.first], n[e.second], e.desirable), h)
    if not given:  # SimPO's reward is a mean over tokens (arXiv 2405.14734, eq. 4)
        c, r = c / jnp.maximum(n[e.first], 1), r / jnp.maximum(n[e.second], 1)
    # DPO's implicit reward, β times the log-ratio (arXiv 2305.18290, section 4), or SimPO's.
    values = {
        "loss": losses,
        "rewards/chosen": h.beta * c,
        "rewards/rejected": h.beta * r,
        "rewards/margins": h.beta * (c - r),
        "rewards/accuracies": c > r,
        "logps/chosen": s[e.first],
        "logps/rejected": s[e.second],
    }
    # Dividing by the step's total, and not by the micro-batch's, makes micro-batches add up.
    # Padding points at sequence 0, whose values are finite, so a weight of 0 removes it.
    sums = {name: jnp.sum(value * e.weight) / h.total for name, value in values.items()}
    sums["nll_loss"] = -jnp.sum(s[e.first] * e.weight) / h.chosen_tokens
    sums["loss"] += h.nll_weight * sums["nll_loss"]
    return sums["loss"], sums


def _example_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    x = s[e.first] - e.first_ref
    losses = LOSSES[kind](Terms(x, x, n[e.first], n[e.first], e.desirable), h)
    sums = {"loss": jnp.sum(losses * e.weight) / h.total}
    # The sides have no total of their own before the step ends, so sums and counts are returned and
    # `loop.summarise` divides them.
    for side, member in (
        ("chosen", e.desirable * e.weight),
        ("rejected", (1 - e.desirable) * e.weight),
    ):
        sums |= {
            f"count/{side}": jnp.sum(member),
            f"rewards/{side}": jnp.sum(h.beta * x * member),
            f"logps/{side}": jnp.sum(s[e.first] * member),
        }
    return sums["loss"], sums


def _token_loss(kind: str, s: Array, n: Array, e: Examples, h: Hyper) -> tuple[Array, Sums]:
    # Without a reference and with one sequence, `first` and `second` are the same.
    losses = LOSSES[kind](Terms(s[e.first], s[e.first], n[e.first], n[e.first], e.desirable), h)
    loss = jnp.sum(losses * e.weight) / h.total
    return loss, {
        "loss": loss,
        "logps/chosen": jnp.sum(s[e.first] * e.weight),
        "count/chosen": jnp.sum(e.weight),
    }


_UNITS: dict[str, Callable[[str, Array, Array, Examples, Hyper], tuple[Array, Sums]]] = {
    "pair": _pair_loss,
    "example": _example_loss,
    "token": _token_loss,
}


def _without_blocks(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Divides trained parameters into those outside of layers and those of layers."""
    rest = {name: params[name] for name in params if name != "blocks"}
    return nnx.State(rest), params["blocks"]


class Programs(NamedTuple):
    """The compiled functions of one objective and shape.

    Parameters are in two parts (`lora.partition`): trained and frozen. Gradients and moments are of
    the first alone; the second is empty in full fine-tuning, and the base of adapters otherwise.
    """

    # Whether `gradient` adds to the grads so far, which are donated. Without rematerialisation it
    # does not: what it gets is empty.
    in_place: bool
    zeros: Callable[..., Any]  # () -> grads before the first micro-batch
    # (trained, frozen, batch, examples, hyper, grads so far) -> (grads, sums, log-probabilities
    # [S])
    gradient: Callable[..., Any]
    add: Callable[..., Any]  # (grads, more grads) -> grads
    # (state, grads, learning rate, seed) -> (state, gradient norm before clipping)
    apply: Callable[..., Any]
    logprobs: Callable[..., Any]  # (both in one, batch) -> ([S] sums, [S] counts)


@functools.cache
def programs(
    spec: ModelSpec,
    dtype: str,
    kind: str,
    optimizer: Optimizer,
    segments: int,
    mesh: Mesh,
    remat: str = "none",
    adapters: Adapters = NO_ADAPTERS,
) -> Programs:
    """Compiles once per model shape, objective, optimizer, row shape and mesh, in one process."""
    # Only shapes are traced here; no array is allocated.
    transform = optimizer.transform()
    graphdef, shapes = abstract(spec, jnp.dtype(dtype), adapters)
    params_shape, frozen_shape = partition(shapes, adapters)
    in_place = remat != "none"
    total_shape = params_shape if in_place else nnx.State({})
    params_place, frozen_place = shardings(params_shape, mesh), shardings(frozen_shape, mesh)
    # Moments have the paths of their parameters, and are sharded alike by the same rules.
    state_shardings = TrainState(
        params_place, shardings(jax.eval_shape(transform.init, params_shape), mesh)
    )
    # Rows are spread over the mesh; examples, scalars and sums are small and are on every device.
    rows, everywhere = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())

    def gradient(
        params: nnx.State,
        frozen: nnx.State,
        batch: PackedBatch,
        examples: Examples,
        hyper: Hyper,
        total: nnx.State,
    ) -> tuple[nnx.State, Sums, Array]:
        # Layers add their gradients to the sum so far themselves (`decoder._accumulate`), so that
        # no second tree of them exists. Where nothing is recomputed, that would copy the weights.
        rest, blocks = _without_blocks(params) if in_place else (params, nnx.State({}))

        def loss(rest: nnx.State, blocks: nnx.State) -> tuple[Any, tuple[Sums, Array]]:
            # What is not in `rest` is a constant of the closure, and so is the frozen part.
            model = nnx.merge(graphdef, nnx.merge_state(params, rest), frozen)
            s, n, blocks = sequence_logprobs_and_totals(model, batch, segments, remat, mesh, blocks)
            value, sums = _UNITS[OBJECTIVE_KINDS[kind].unit](kind, s, n, examples, hyper)
            return (value, blocks), (sums, s)

        (value, _), pull, (sums, s) = jax.vjp(loss, rest, blocks, has_aux=True)
        if not in_place:
            return pull((jnp.ones_like(value), blocks))[0], sums, s
        rest_sum, blocks_sum = _without_blocks(total)
        grads, blocks_sum = pull((jnp.ones_like(value), blocks_sum))
        grads = jax.tree.map(jnp.add, rest_sum, grads)
        return nnx.merge_state(grads, nnx.State({"blocks": blocks_sum})), sums, s

    def apply(
        state: TrainState, grads: nnx.State, rate: Array, seed: Array
    ) -> tuple[TrainState, Array]:
        updates, moments = transform.update(grads, state.moments, state.params, seed=seed)
        # `p - rate * u` and not optax's scaling by a schedule, because the rate is an argument.
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        # The norm is that of the raw gradients: the clipped norm would be at most `clip` and show
        # nothing.
        return TrainState(params, moments), optax.tree.norm(grads)

    return Programs(
        in_place=in_place,
        zeros=jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total_shape),
            out_shardings=shardings(total_shape, mesh),
        ),
        gradient=jax.jit(
            # Parameters are not donated here: all micro-batches of a step read the same ones.
            gradient,
            donate_argnums=5,
            in_shardings=(
                params_place,
                frozen_place,
                rows,
                everywhere,
                everywhere,
                shardings(total_shape, mesh),
            ),
            out_shardings=(params_place, everywhere, everywhere),
        ),
        # The first sum is donated and its buffers are reused for the result.
        add=jax.jit(
            lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0, out_shardings=params_place
        ),
        apply=jax.jit(
            # The old state is donated, so that old and new parameters and moments never exist side
            # by side.
            apply,
            donate_argnums=0,
            in_shardings=(state_shardings, params_place, everywhere, everywhere),
            out_shardings=(state_shardings, everywhere),
        ),
        logprobs=logprob_fn(spec, dtype, segments, mesh, adapters),
    )
