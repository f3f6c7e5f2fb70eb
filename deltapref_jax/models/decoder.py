"""One decoder for the Llama family: stacked, scanned layers; a packed forward pass and a cached one.

Steps are pure functions: `graphdef, state = nnx.split(model)` outside, `nnx.merge(graphdef, state)` inside `jax.jit`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention import attend_cache, rotate, rotation
from deltapref_jax.models.kernels import packed_attention
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec

POLICIES = {
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What is kept of a block besides its input: every product (norms, silu and masks are recomputed); attention's output
and its log-sum-exp alone (products are recomputed, attention is not); nothing. "none" keeps everything."""


class Cache(NamedTuple):
    """Keys [B, K, H, S] and values [B, K, S, H], one array per layer; the index on S is the position."""

    k: tuple[Array, ...]
    v: tuple[Array, ...]


def empty_cache(spec: ModelSpec, slots: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """A cache for `slots` rows of at most `length` positions."""
    k, v = (
        (slots, spec.kv_heads, spec.head_width, length),
        (slots, spec.kv_heads, length, spec.head_width),
    )
    return Cache(
        tuple(jnp.zeros(k, dtype) for _ in range(spec.layers)),
        tuple(jnp.zeros(v, dtype) for _ in range(spec.layers)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*n D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*n D"]:
    """x / rms(x) · weight (arXiv 1910.07467), in float32, returned in the dtype of `x`.

    Backward, with y = x / rms(x) and e = g · weight: dx = (e - y · mean(e · y)) / rms(x), dweight = Σ g · y.
    """
    return (_normed(x, eps)[0] * weight).astype(x.dtype)


def _normed(x: Array, eps: float) -> tuple[Array, Array]:
    h = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return h * scale, scale


def _norm_backward(eps: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = saved
    y, scale = _normed(x, eps)
    g = g.astype(jnp.float32)
    e = g * weight
    dx = scale * (e - y * jnp.mean(e * y, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * y, axis=tuple(range(x.ndim - 1))).astype(weight.dtype)


rms_norm.defvjp(lambda x, weight, eps: (rms_norm(x, weight, eps), (x, weight)), _norm_backward)


@jax.custom_vjp
def gated(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """silu(gate) · up (arXiv 2002.05202), with the sigmoid computed again in the backward pass, not stored."""
    return jax.nn.silu(gate) * up


def _gated_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    return g * up * (s * (1 + gate * (1 - s))), g * (gate * s)


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


@jax.custom_vjp
def linear(x: Float[Array, "*n D"], weight: Float[Array, "D *out"]) -> Array:
    """x · weight, [*n, *out], in the dtype of `x`; the weight's gradient is summed in float32 and has its dtype.

    Written out because XLA on CPU copies the left factor of a weight's gradient with its tokens last, and computes
    what stands before it again on the way, number by number: here it is the narrower of x and g. Of a weight that is
    not differentiated (the base of adapters) there is no gradient, and `x` is not kept for it.
    """
    return jnp.tensordot(x, weight.astype(x.dtype), 1)


def _linear_forward(x: Any, weight: Any) -> tuple[Array, tuple[Array | None, Array]]:
    return linear(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _linear_backward(saved: tuple[Array | None, Array], g: Array) -> tuple[Array, Array | None]:
    x, weight = saved
    last = g.ndim - weight.ndim + 1  # x's axes but its last, which are g's first: tokens
    tokens, outs = tuple(range(last)), tuple(range(1, weight.ndim))
    dx = jax.lax.dot_general(
        g, weight.astype(g.dtype), ((tuple(range(last, g.ndim)), outs), ((), ()))
    )
    if x is None:
        return dx, None
    # XLA on CPU has no product of the other form in bfloat16
    straight = x.shape[-1] <= math.prod(weight.shape[1:]) or x.dtype.itemsize < 4
    a, b = (x, g) if straight else (g, x)
    dw = jax.lax.dot_general(a, b, ((tokens,) * 2, ((), ())), preferred_element_type=jnp.float32)
    if not straight:  # the barrier: XLA would fold the transpose into a slower product
        dw = jnp.moveaxis(jax.lax.optimization_barrier(dw), -1, 0)
    return dx, dw.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


class Block(nnx.Module):
    """Attention and gated MLP. Parameters are float32; the computation has its input's dtype.

    An adapted matrix W [in, out] has two more beside it, A [in, r] and B [r, out], that act on activations:
    y = xW + scale · (xA)B (LoRA, arXiv 2106.09685, eq. 3), so that nothing of W's shape is ever computed.
    """

    def __init__(self, spec: ModelSpec, adapters: Adapters = NO_ADAPTERS, *, rngs: nnx.Rngs):
        self.spec = spec
        D, N, K, H, F = spec.width, spec.heads, spec.kv_heads, spec.head_width, spec.mlp

        def normal(shape: tuple[int, ...], std: float) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))

        inner = (
            0.02 / (2 * spec.layers) ** 0.5
        )  # keeps the residual stream's variance independent of depth (GPT-2)
        self.attention_norm = nnx.Param(jnp.ones(D))
        self.q = normal((D, N, H), 0.02)
        self.k = normal((D, K, H), 0.02)
        self.v = normal((D, K, H), 0.02)
        self.o = normal((N, H, D), inner)
        self.mlp_norm = nnx.Param(jnp.ones(D))
        self.gate = normal((D, F), 0.02)
        self.up = normal((D, F), 0.02)
        self.down = normal((F, D), inner)
        if adapters.rank:
            self.scale = nnx.Param(
                jnp.ones(())
            )  # alpha / rank: an array, so that alpha is no constant of a program
        for name in adapters.targets:
            shape, inputs = getattr(self, name).shape, 2 if name == "o" else 1
            setattr(self, f"{name}_a", nnx.LoRAParam(jnp.zeros((*shape[:inputs], adapters.rank))))
            setattr(self, f"{name}_b", nnx.LoRAParam(jnp.zeros((adapters.rank, *shape[inputs:]))))

    def _product(self, x: Float[Array, "B T I"], name: str) -> Array:
        """[B, T, *out]: `x` times a matrix, adapters included."""

        def times(x: Array, matrix: nnx.Param, inputs: int) -> Array:
            w = matrix[...]  # an einsum over o's n and h would transpose it at every call
            return linear(x, w.reshape(-1, *w.shape[inputs:]))

        inputs = 2 if name == "o" else 1
        y = times(x, getattr(self, name), inputs)
        if not hasattr(self, f"{name}_a"):
            return y
        low = checkpoint_name(times(x, getattr(self, f"{name}_a"), inputs), "projection")
        return y + times((low * self.scale[...]).astype(x.dtype), getattr(self, f"{name}_b"), 1)

    def project(
        self, x: Float[Array, "B T D"], rotations: tuple[Array, Array]
    ) -> tuple[Array, Array, Array]:
        """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
        h = rms_norm(x, self.attention_norm[...], self.spec.norm_eps)
        q, k, v = (self._product(h, name) for name in "qkv")
        q, k, v = (
            checkpoint_name(y, "projection")
            for y in (rotate(q, rotations), rotate(k, rotations), v)
        )
        return q, k, v

    def finish(
        self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """Adds the attention's output and the MLP's to the residual stream."""
        x = x + checkpoint_name(
            self._product(attended.reshape(*x.shape[:-1], -1), "o"), "projection"
        )
        h = rms_norm(x, self.mlp_norm[...], self.spec.norm_eps)
        gate, up = (
            checkpoint_name(self._product(h, name), "projection") for name in ("gate", "up")
        )
        return x + self._product(gated(gate, up), "down")


class Decoder(nnx.Module):
    """Token ids to final hidden states; the projection to the vocabulary is the caller's (`unembedding`)."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        adapters: Adapters = NO_ADAPTERS,
    ):
        self.spec, self.dtype = spec, dtype
        self.embed = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (spec.vocab, spec.width), jnp.float32)
        )

        @nnx.split_rngs(splits=spec.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(spec, adapters, rngs=rngs)

        self.blocks = stack(rngs)  # every parameter has a leading axis of length `layers`
        self.final_norm = nnx.Param(jnp.ones(spec.width))
        if not spec.tied:
            self.head = nnx.Param(
                0.02 * jax.random.normal(rngs.params(), (spec.vocab, spec.width), jnp.float32)
            )

    def unembedding(self) -> Float[Array, "V D"]:
        """Rows of the output projection in the computation's dtype."""
        return (self.embed if self.spec.tied else self.head)[...].astype(self.dtype)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        branches: Int[Array, "B L"] | None = None,
        remat: str = "none",
        mesh: Mesh | None = None,
    ) -> Float[Array, "B L D"]:
        """Hidden states after the final norm of packed rows (see `attention` for the layout).

        Args:
          tokens: ids.
          positions: of each token in its own sequence; a branch continues from its trunk.
          segments: 1 upward, one number per sequence; 0 is padding.
          branches: 0 for the trunk, 1 upward for branches; None where there are none.
          remat: what the backward pass recomputes of each block: "none", or a name of `POLICIES`.
          mesh: over which the rows lie (see `kernels.packed_attention`); None: one device.
        """
        attention = packed_attention(segments, branches, mesh)
        rotations = rotation(positions, self.spec.head_width, self.spec.rope_theta)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x: Array, state: nnx.State) -> tuple[Array, None]:
            block = nnx.merge(graphdef, state)
            q, k, v = block.project(x, rotations)
            return block.finish(x, attention(q, k, v)), None

        # rows are cast, not the table: its gradient adds up in float32
        x = jnp.asarray(self.embed[...])[tokens].astype(self.dtype)
        if remat != "none":
            layer = jax.checkpoint(layer, policy=POLICIES[remat])
        x, _ = jax.lax.scan(layer, x, stacked)
        return rms_norm(x, self.final_norm[...], self.spec.norm_eps)

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Writes `tokens` into the cache at `positions` and returns their hidden states after the final norm.

        A token sees every cache index up to its own position, so what stands beyond a row's end is never read before
        it is overwritten: prompts are padded on the right and rows are reused without clearing. The layers are laid
        out one after another, not scanned: a scan inside the loop over steps would copy every layer's weights and
        cache out of their stacks at every step. Call it on an `unstacked` model where it runs often.

        Args:
          tokens: ids; T is 1 when decoding and the padded prompt length when prefilling.
          positions: of each token in its own sequence.
          cache: of B rows; donate it.
        """
        rows = jnp.arange(tokens.shape[0])[:, None]
        mask = jnp.arange(cache.v[0].shape[2]) <= positions[:, :, None]
        rotations = rotation(positions, self.spec.head_width, self.spec.rope_theta)
        keys, values = list(cache.k), list(cache.v)
        x = jnp.asarray(self.embed[...])[tokens].astype(self.dtype)
        for i, block in enumerate(self._layers()):
            q, k, v = block.project(x, rotations)
            keys[i] = keys[i].at[rows, :, :, positions].set(k.astype(keys[i].dtype))
            values[i] = values[i].at[rows, :, positions].set(v.astype(values[i].dtype))
            x = block.finish(
                x, attend_cache(q, keys[i].astype(q.dtype), values[i].astype(q.dtype), mask)
            )
        return rms_norm(x, self.final_norm[...], self.spec.norm_eps), Cache(
            tuple(keys), tuple(values)
        )

    def _layers(self) -> Sequence[Block]:
        if isinstance(self.blocks, nnx.List):
            return self.blocks
        graphdef, stacked = nnx.split(self.blocks)
        return [
            nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))
            for i in range(self.spec.layers)
        ]


def unstacked(graphdef: nnx.GraphDef, state: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """The same decoder with every layer's parameters in arrays of their own, for `decode`; it has no `hidden`."""
    model = nnx.merge(graphdef, state)
    model.blocks = nnx.List(model._layers())
    return nnx.split(model)
