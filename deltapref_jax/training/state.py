"""The training state, and the optimizer and learning-rate schedule that update it."""

import dataclasses
import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, BFloat16, Float, UInt

from deltapref_jax.mesh import place
from deltapref_jax.models.sharding import path_name, shardings


class TrainState(NamedTuple):
    """Trained parameters and their optimizer state, sharded alike.

    The frozen base weights of adapters are not part of it.
    """

    params: nnx.State  # float32
    moments: Any  # optax state


def round_randomly(x: Float[Array, "*n"], bits: UInt[Array, "*n"]) -> BFloat16[Array, "*n"]:
    """Rounds float32 stochastically to bfloat16, so that the expected value is `x`.

    Args:
      x: finite numbers.
      bits: uint32, uniform on 0 to 2¹⁶ - 1.
    """
    # bfloat16 is the upper half of float32. The sum carries into it with probability lower / 2¹⁶.
    total = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    return jax.lax.bitcast_convert_type((total >> 16).astype(jnp.uint16), jnp.bfloat16)


def _round_moments(mu: Any, nu: Any, seed: Any, count: Array) -> tuple[Any, Any]:
    """Rounds both moments to bfloat16.

    The random bits depend only on seed, step and parameter path, so they are the same on every
    mesh. One draw of 32 bits serves both moments, with 16 bits each.
    """
    # The step is folded into the key, so that a resumed run rounds as the uninterrupted one does.
    key = jax.random.fold_in(jax.random.key(seed), count)
    bits = jax.tree_util.tree_map_with_path(
        # A path's CRC is the same in every process and Python version, unlike `hash`.
        lambda path, x: jax.random.bits(
            jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), x.shape
        ),
        mu,
    )
    return (
        jax.tree.map(lambda m, b: round_randomly(m, b & 0xFFFF), mu, bits),
        jax.tree.map(lambda v, b: round_randomly(v, b >> 16), nu, bits),
    )


def scale_by_adam(
    b1: float, b2: float, eps: float, moments: str = "float32"
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction m̂ / (√v̂ + eps) (arXiv 1412.6980), with accurate bias corrections.

    `optax.scale_by_adam` computes 1 - b2ᵗ as written. With b2 = 0.999, cancellation costs it five
    of float32's digits in the first steps, enough to miss a reference run by ten times the noise.
    -expm1(t log b2) keeps them all.

    bfloat16 moments are rounded stochastically. Rounded to the nearest, v would never change by
    less than 2⁻⁹ of itself, and with 1 - b2 = 0.001 every change is smaller once v is near g².

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the denominator.
      moments: dtype of the moments, "float32" or "bfloat16".

    Returns:
      A transformation whose update takes the keyword `seed`, a uint32, for the rounding.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, moments), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, seed: Any = 0, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        # The count starts at 1, because the correction 1 - b⁰ would divide by 0.
        count = state.count + 1
        # Moments are updated in float32, whatever they are stored in.
        mu, nu = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (state.mu, state.nu))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, grads)
        # The bias corrections 1 - bᵗ, as -expm1(t log b); the logarithm is taken in double
        # precision.
        c1, c2 = (-jnp.expm1(count * math.log(b)) for b in (b1, b2))
        direction = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        # The direction was computed from unrounded moments: rounding affects later steps only.
        stored = (mu, nu) if moments == "float32" else _round_moments(mu, nu, seed, count)
        return direction, optax.ScaleByAdamState(count, *stored)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm.

    The learning rate is an argument of each step.
    """

    clip: float = 1.0  # largest global norm
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moments: str = "float32"  # dtype of the moments, or "bfloat16"
    offload_moments: bool = False  # whether they lie in the host's memory between updates

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """Returns the optax chain without the learning rate; norm weights are not decayed.

        With bfloat16 moments, its update takes the keyword `seed`, a uint32.
        """

        def decayed(params: nnx.State) -> Any:
            # Decay would pull a norm's scale, which starts at 1, to 0; biases and the sinks of
            # attention have none either.
            return jax.tree_util.tree_map_with_path(
                lambda path, _: not path_name(path).endswith(("norm", "_bias", "sinks")), params
            )

        return optax.chain(
            # The clip comes first and the decay last: decay is decoupled from the gradient's
            # moments (arXiv 1711.05101, algorithm 2).
            optax.clip_by_global_norm(self.clip),
            scale_by_adam(self.b1, self.b2, self.eps, self.moments),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


def init_state(params: nnx.State, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """Returns the state before the first step, sharded over `mesh`.

    Args:
      params: parameters to train; they are copied, not donated.
      optimizer: the optimizer.
      mesh: the mesh.
    """
    transform = optimizer.transform()
    # Master weights are float32: in bfloat16 an update below 2⁻⁹ of a weight would be lost.
    params = place(params, shardings(params, mesh), np.float32)
    # Moments are created by the compiled function in their shards, never whole on one device.
    moments = jax.jit(
        transform.init, out_shardings=shardings(jax.eval_shape(transform.init, params), mesh)
    )(params)
    if optimizer.offload_moments:
        moments = jax.device_put(moments, in_memory("pinned_host", moments))
    return TrainState(params, moments)


def in_memory(kind: str, tree: Any) -> Any:
    """Shardings of arrays in another memory of the same devices.

    Args:
      kind: "device", or "pinned_host": of the host of each device.
      tree: arrays.
    """
    return jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree)


def on_host(moments: Any) -> bool:
    """Whether moments lie in the host's memory, as offloaded ones do between updates."""
    return all(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(moments))


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, schedule: str, floor: float = 0.0
) -> float:
    """Returns the learning rate of a step.

    It rises linearly from 0 during ceil(warmup · steps) steps, and then follows the schedule.

    Args:
      step: number of the step, 0 to steps - 1.
      steps: number of steps of the whole run.
      peak: rate after warm-up.
      warmup: share of the steps, 0 to 1.
      schedule: "linear", "cosine" or "constant".
      floor: share of the peak that the decay would reach at step `steps`.
    """
    warmup_steps = -int(-warmup * steps // 1)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    # At least one step, because optax's schedules need a positive number of steps.
    return float(_decay(max(steps - warmup_steps, 1), peak, schedule, floor)[step - warmup_steps])


@functools.lru_cache(maxsize=8)
def _decay(steps: int, peak: float, schedule: str, floor: float) -> np.ndarray:
    """Returns the rates of all steps after warm-up.

    They are computed at once, because optax schedules run on the device, and the host would wait
    for it at every step.
    """
    decay = {
        "linear": optax.linear_schedule(peak, floor * peak, steps),
        "cosine": optax.cosine_decay_schedule(peak, steps, floor),
    }[schedule]
    # One value more than there are steps: the last is the floor, which no step reaches.
    return np.asarray(decay(jnp.arange(steps + 1)), np.float32)
