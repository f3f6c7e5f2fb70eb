"""One decoder for the Llama family: scanned layers, a packed forward pass and a cached one.

Steps are pure functions: `graphdef, state = nnx.split(model)` outside, and
`nnx.merge(graphdef, state)` inside `jax.jit`. `jax.named_scope` names the parts of a step
(embedding, attention_norm, attention, mlp_norm, mlp, final_norm, unembedding) in profiles.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from deltapref_jax.models.attention.dense import cached_attention
from deltapref_jax.models.attention.dispatch import packed_attention
from deltapref_jax.models.rotary import apply_rotary, rotary_angles
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, ModelSpec

POLICIES = {
    "projections": jax.checkpoint_policies.save_only_these_names("projection", "attention"),
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What rematerialisation keeps of a block besides its input.

"projections" keeps the outputs of all matrix products (norms, silu and masks are recomputed);
"attention" keeps attention's output and its log-sum-exp (the products are recomputed, attention is
not); "block" keeps nothing. The value "none" of a config keeps everything and needs no policy.
"""


class Cache(NamedTuple):
    """Keys [B, K, H, S] and values [B, K, S, H], one array per layer.

    The index along S is the token's position in its sequence.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]


def empty_cache(spec: ModelSpec, slots: int, length: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """Returns a cache of zeros for `slots` rows of at most `length` positions."""
    k_shape = (slots, spec.kv_heads, spec.head_width, length)
    v_shape = (slots, spec.kv_heads, length, spec.head_width)
    return Cache(
        tuple(jnp.zeros(k_shape, dtype) for _ in range(spec.layers)),
        tuple(jnp.zeros(v_shape, dtype) for _ in range(spec.layers)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*n D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*n D"]:
    """RMSNorm, x / rms(x) * weight (arXiv 1910.07467), in float32; returns the dtype of `x`.

    Its backward pass keeps x alone. With y = x / rms(x) and e = g * weight:
    dx = (e - y * mean(e * y)) / rms(x) and dweight = Σ g * y.
    """
    return (_normalize(x, eps)[0] * weight).astype(x.dtype)


def _normalize(x: Array, eps: float) -> tuple[Array, Array]:
    """Returns x / rms(x) and 1 / rms(x), in float32."""
    h = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return h * scale, scale


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, weight = saved
    y, scale = _normalize(x, eps)
    g = g.astype(jnp.float32)
    e = g * weight
    dx = scale * (e - y * jnp.mean(e * y, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * y, axis=tuple(range(x.ndim - 1))).astype(weight.dtype)


rms_norm.defvjp(lambda x, weight, eps: (rms_norm(x, weight, eps), (x, weight)), _rms_norm_backward)


@jax.custom_vjp
def swiglu(gate: Float[Array, "*n F"], up: Float[Array, "*n F"]) -> Float[Array, "*n F"]:
    """SwiGLU's product, silu(gate) * up (arXiv 2002.05202).

    The backward pass computes the sigmoid again instead of storing it.
    """
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    s = jax.nn.sigmoid(gate)
    # The derivative of silu is σ(x) * (1 + x * (1 - σ(x))).
    return g * up * (s * (1 + gate * (1 - s))), g * (gate * s)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


@jax.custom_vjp
def linear(x: Float[Array, "*n D"], weight: Float[Array, "D *out"]) -> Array:
    """Matrix product x * weight, [*n, *out], in the dtype of `x`.

    The weight's gradient is summed in float32 and has the weight's dtype. A weight that is not
    differentiated (a base under adapters) has no gradient, and `x` is not kept for it.

    The backward pass is written out because of XLA on CPU: in a weight's gradient it copies the
    left factor with the tokens as its last axis, and fuses that copy with the elementwise
    computation of the factor, which then runs again number by number. Here the left factor is the
    narrower of x and g.
    """
    return jnp.tensordot(x, weight.astype(x.dtype), 1)


def _linear_forward(x: Any, weight: Any) -> tuple[Array, tuple[Array | None, Array]]:
    return linear(x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _linear_backward(saved: tuple[Array | None, Array], g: Array) -> tuple[Array, Array | None]:
    x, weight = saved
    # The axes of x but its last, and the leading axes of g, are tokens; the rest of g is *out.
    batch_axes = g.ndim - weight.ndim + 1
    tokens, outs = tuple(range(batch_axes)), tuple(range(1, weight.ndim))
    dx = jax.lax.dot_general(
        g, weight.astype(g.dtype), ((tuple(range(batch_axes, g.ndim)), outs), ((), ()))
    )
    if x is None:
        return dx, None
    # XLA on CPU has no product in bfloat16 for the other order of factors.
    x_first = x.shape[-1] <= math.prod(weight.shape[1:]) or x.dtype.itemsize < 4
    a, b = (x, g) if x_first else (g, x)
    dw = jax.lax.dot_general(a, b, ((tokens,) * 2, ((), ())), preferred_element_type=jnp.float32)
    if not x_first:
        # Without the barrier XLA would fold the transpose into a slower product.
        dw = jnp.moveaxis(jax.lax.optimization_barrier(dw), -1, 0)
    return dx, dw.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


class Block(nnx.Module):
    """Pre-norm attention and gated MLP with residual connections.

    Parameters are float32; the computation has its input's dtype. An adapted matrix W [in, out] has
    two more beside it, A [in, r] and B [r, out], that act on activations: y = xW + scale * (xA)B
    (LoRA, arXiv 2106.09685, eq. 3), so that nothing of W's shape is ever computed.
    """

    def __init__(self, spec: ModelSpec, adapters: Adapters = NO_ADAPTERS, *, rngs: nnx.Rngs):
        self.spec = spec
        D, N, K, H, F = spec.width, spec.heads, spec.kv_heads, spec.head_width, spec.mlp

        def normal(shape: tuple[int, ...], std: float) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))

        # GPT-2's scaling keeps the variance of the residual stream independent of depth.
        residual_std = 0.02 / (2 * spec.layers) ** 0.5
        self.attention_norm = nnx.Param(jnp.ones(D))
        self.q = normal((D, N, H), 0.02)
        self.k = normal((D, K, H), 0.02)
        self.v = normal((D, K, H), 0.02)
        self.o = normal((N, H, D), residual_std)
        self.mlp_norm = nnx.Param(jnp.ones(D))
        self.gate = normal((D, F), 0.02)
        self.up = normal((D, F), 0.02)
        self.down = normal((F, D), residual_std)
        if adapters.rank:
            # alpha / rank is an array, so that alpha is not a constant of a compiled program.
            self.scale = nnx.Param(jnp.ones(()))
        for name in adapters.targets:
            shape, inputs = getattr(self, name).shape, 2 if name == "o" else 1
            setattr(self, f"{name}_a", nnx.LoRAParam(jnp.zeros((*shape[:inputs], adapters.rank))))
            setattr(self, f"{name}_b", nnx.LoRAParam(jnp.zeros((adapters.rank, *shape[inputs:]))))

    def _project(self, x: Float[Array, "B T I"], name: str) -> Array:
        """Multiplies `x` by a matrix of the block and by its adapters if any; [B, T, *out]."""

        def times(x: Array, matrix: nnx.Param, inputs: int) -> Array:
            # An einsum over o's two input axes would transpose the matrix at every call.
            w = matrix[...]
            return linear(x, w.reshape(-1, *w.shape[inputs:]))

        inputs = 2 if name == "o" else 1
        y = times(x, getattr(self, name), inputs)
        if not hasattr(self, f"{name}_a"):
            return y
        low_rank = checkpoint_name(times(x, getattr(self, f"{name}_a"), inputs), "projection")
        # The scale is float32, so the product is cast back to the computation's dtype.
        scaled = (low_rank * self.scale[...]).astype(x.dtype)
        return y + times(scaled, getattr(self, f"{name}_b"), 1)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        attend: Callable[[Array, Array, Array], Array],
    ) -> Float[Array, "B T D"]:
        """Adds the outputs of attention and of the MLP to the residual stream.

        Args:
          x: the residual stream.
          angles: `rotary.rotary_angles` of the tokens.
          attend: maps rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] to the
            attention's output [B, T, N, H].
        """
        with jax.named_scope("attention_norm"):
            h = rms_norm(x, self.attention_norm[...], self.spec.norm_eps)
        with jax.named_scope("attention"):
            q, k, v = (self._project(h, name) for name in "qkv")
            # Named after the rotation, so that the backward pass does not rotate again.
            q, k, v = (
                checkpoint_name(y, "projection")
                for y in (apply_rotary(q, angles), apply_rotary(k, angles), v)
            )
            attended = attend(q, k, v).reshape(*x.shape[:-1], -1)
            x = x + checkpoint_name(self._project(attended, "o"), "projection")
        with jax.named_scope("mlp_norm"):
            h = rms_norm(x, self.mlp_norm[...], self.spec.norm_eps)
        with jax.named_scope("mlp"):
            gate, up = (
                checkpoint_name(self._project(h, name), "projection") for name in ("gate", "up")
            )
            return x + self._project(swiglu(gate, up), "down")


class Decoder(nnx.Module):
    """Maps token ids to final hidden states.

    The projection to the vocabulary is left to the caller (`unembedding`), so that no logits tensor
    [B, L, V] need exist.
    """

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

        # Layers are stacked, so that a scan over them compiles one layer for any depth.
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
        """Returns the rows of the output projection in the computation's dtype."""
        with jax.named_scope("unembedding"):
            return (self.embed if self.spec.tied else self.head)[...].astype(self.dtype)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the embeddings of tokens, in the computation's dtype."""
        with jax.named_scope("embedding"):
            # The rows are cast and not the table, so that its gradient is summed in float32.
            return jnp.asarray(self.embed[...])[tokens].astype(self.dtype)

    def _final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("final_norm"):
            return rms_norm(x, self.final_norm[...], self.spec.norm_eps)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        branches: Int[Array, "B L"] | None = None,
        remat: str = "none",
        mesh: Mesh | None = None,
    ) -> Float[Array, "B L D"]:
        """Returns the hidden states of packed rows after the final norm (layout: `masks`).

        Args:
          tokens: token ids.
          positions: position of each token in its own sequence; a branch continues from its trunk.
          segments: 1 upward, one number per sequence; 0 is padding.
          branches: 0 for the trunk, 1 upward for branches; None where there are none.
          remat: what the backward pass recomputes of each block: "none", or a name of `POLICIES`.
          mesh: the mesh over which the rows lie (see `dispatch.packed_attention`); None means one
            device.
        """
        # Mask and angles depend on the layout alone, so all layers share them.
        attend = packed_attention(segments, branches, mesh)
        angles = rotary_angles(positions, self.spec.head_width, self.spec.rope_theta)
        # The structure is that of every layer; the scan slices the leading axis of the parameters.
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x: Array, state: nnx.State) -> tuple[Array, None]:
            return nnx.merge(graphdef, state)(x, angles, attend), None

        x = self._embed(tokens)
        # Rematerialisation is per layer, so that one layer's activations exist at a time.
        if remat != "none":
            layer = jax.checkpoint(layer, policy=POLICIES[remat])
        x, _ = jax.lax.scan(layer, x, stacked)
        return self._final_norm(x)

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Writes `tokens` into the cache at `positions`; returns their hidden states and the cache.

        The hidden states are those after the final norm. A token sees every cache index up to its
        own position, so what a cache holds beyond a row's end is overwritten before it is read:
        prompts are padded on the right, and rows are reused without clearing.

        The layers are unrolled and not scanned: a scan inside the loop over steps would copy every
        layer's weights and cache out of their stacks at every step. Where this runs often, call it
        on an `unstacked` model.

        Args:
          tokens: token ids; T is 1 for decoding and the padded prompt length for prefilling.
          positions: position of each token in its own sequence.
          cache: a cache of B rows; donate it.
        """
        rows = jnp.arange(tokens.shape[0])[:, None]
        # A token sees the cache up to its own position, which this call writes first.
        mask = jnp.arange(cache.v[0].shape[2]) <= positions[:, :, None]
        angles = rotary_angles(positions, self.spec.head_width, self.spec.rope_theta)
        keys, values = list(cache.k), list(cache.v)

        def attend_layer(i: int, q: Array, k: Array, v: Array) -> Array:
            """Writes keys and values into the cache of layer i and attends to all of it."""
            # Two index arrays with slices between them: NumPy's rule puts their axes first, [B, T,
            # K, H], which is the shape of `k` and `v`.
            keys[i] = keys[i].at[rows, :, :, positions].set(k.astype(keys[i].dtype))
            values[i] = values[i].at[rows, :, positions].set(v.astype(values[i].dtype))
            return cached_attention(q, keys[i].astype(q.dtype), values[i].astype(q.dtype), mask)

        x = self._embed(tokens)
        for i, block in enumerate(self._layers()):
            x = block(x, angles, functools.partial(attend_layer, i))
        return self._final_norm(x), Cache(tuple(keys), tuple(values))

    def _layers(self) -> Sequence[Block]:
        """Returns the blocks one by one, whether they are stacked or not."""
        if isinstance(self.blocks, nnx.List):
            return self.blocks
        graphdef, stacked = nnx.split(self.blocks)
        return [
            nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked))
            for i in range(self.spec.layers)
        ]


def unstacked(graphdef: nnx.GraphDef, state: nnx.State) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the same decoder with each layer's parameters in arrays of their own.

    It serves `Decoder.decode`, and has no `Decoder.hidden`.
    """
    model = nnx.merge(graphdef, state)
    model.blocks = nnx.List(model._layers())
    return nnx.split(model)
