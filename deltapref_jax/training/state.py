"""What a training step changes, and the optimizer that changes it."""

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
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, BFloat16, Float, UInt

from deltapref_jax.models.sharding import path_name, shardings


class TrainState(NamedTuple):
    """What is trained and its moments, sharded alike; the frozen base of adapters is no part of it."""

    params: nnx.State  # float32
    moments: Any  # optax state


def round_randomly(x: Float[Array, "*n"], bits: UInt[Array, "*n"]) -> BFloat16[Array, "*n"]:
    """float32 to one of its two bfloat16 neighbours, with the probabilities that make the mean `x`.

    Args:
      x: finite.
      bits: uint32, uniform on 0 to 2¹⁶ - 1.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    return jax.lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)


def _rounded(mu: Any, nu: Any, seed: Any, count: Array) -> tuple[Any, Any]:
    """Both moments in bfloat16; bits from (seed, step, path) alone, 16 each of one draw, whatever the mesh."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    bits = jax.tree_util.tree_map_with_path(
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
    """Adam's direction m̂ / (√v̂ + eps) (arXiv 1412.6980), with bias corrections that are right in float32.

    `optax.scale_by_adam` computes 1 - b2ᵗ as written, which has five right digits less than float32 in the first steps
    (b2 = 0.999): enough to miss a reference run by ten times the noise. -expm1(t log b2) has them all.

    In bfloat16 the moments are rounded at random: to the nearest, v would never move where a step changes it by less
    than 2⁻⁹ of itself, which 1 - b2 = 0.001 always does once v is near g². Its update takes `seed`, uint32.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, moments), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        grads: Any, state: optax.ScaleByAdamState, params: Any = None, *, seed: Any = 0, **_: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        count = state.count + 1
        mu, nu = (jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (state.mu, state.nu))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, nu, grads)
        c1, c2 = (-jnp.expm1(count * math.log(b)) for b in (b1, b2))
        direction = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        kept = (mu, nu) if moments == "float32" else _rounded(mu, nu, seed, count)
        return direction, optax.ScaleByAdamState(count, *kept)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) on gradients clipped by their global norm; the learning rate comes with each step."""

    clip: float = 1.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    moments: str = "float32"  # or "bfloat16"

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The optax chain up to the learning rate. Decay is on matrices, not on norm weights.

        With bfloat16 moments its update takes a uint32 `seed`.
        """

        def decayed(params: nnx.State) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: not path_name(path).endswith("norm"), params
            )

        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            scale_by_adam(self.b1, self.b2, self.eps, self.moments),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


def init_state(params: nnx.State, optimizer: Optimizer, mesh: Mesh) -> TrainState:
    """A state at step 0 on `mesh`; `params`, those that are trained, are copied, not consumed."""
    transform = optimizer.transform()
    place = shardings(params, mesh)
    params = jax.tree.map(lambda x, s: _place(np.asarray(x), s), params, place)
    moments = jax.jit(
        transform.init, out_shardings=shardings(jax.eval_shape(transform.init, params), mesh)
    )(params)
    return TrainState(params, moments)


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Each device gets a copy of its own part, float32: the whole never lies on one of them."""
    return jax.make_array_from_callback(
        x.shape, sharding, lambda part: np.array(x[part], np.float32)
    )


def learning_rate(
    step: int, steps: int, peak: float, warmup: float, schedule: str, floor: float = 0.0
) -> float:
    """Rate of step `step` (0 first): linear warm-up over ceil(warmup · steps) steps from 0, then the schedule.

    Args:
      step: 0 to steps - 1.
      steps: of the whole run.
      peak: rate after warm-up.
      warmup: share of the steps.
      schedule: "linear" (to `floor` after the last step), "cosine" or "constant".
      floor: share of the peak that the decay ends at.
    """
    ramp = -int(-warmup * steps // 1)
    if step < ramp:
        return peak * step / ramp
    if schedule == "constant":
        return peak
    return float(_decay(max(steps - ramp, 1), peak, schedule, floor)[step - ramp])


@functools.lru_cache(maxsize=8)
def _decay(steps: int, peak: float, schedule: str, floor: float) -> np.ndarray:
    """Rates of all steps after warm-up: one by one the host would wait for the device at every step."""
    decay = {
        "linear": optax.linear_schedule(peak, floor * peak, steps),
        "cosine": optax.cosine_decay_schedule(peak, steps, floor),
    }[schedule]
    return np.asarray(decay(jnp.arange(steps + 1)), np.float32)
