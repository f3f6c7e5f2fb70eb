"""One decoder for all families: scanned layers, a packed forward pass and a cached one.

What differs between families is data, in `spec.ModelSpec`; the arrays are those of
`parameters.PARAMETERS`. All layers are one scan, whatever their kinds: a layer's window and rotary
embeddings are indices that the scan slices beside its weights.

Steps are pure functions: `graphdef, state = nnx.split(model)` outside, and
`nnx.merge(graphdef, state)` inside `jax.jit`. `jax.named_scope` names the parts of a step
(embedding, attention_norm, attention, mlp_norm, mlp, final_norm, unembedding) in profiles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from deltapref_jax.mesh import platform_of
from deltapref_jax.models.attention.dispatch import LANES, cached_attention, packed_attention
from deltapref_jax.models.experts import mixture
from deltapref_jax.models.parameters import Parameter, block_parameters, parameters
from deltapref_jax.models.products import GATHERED, Layout, add_bias, in_values_of, products
from deltapref_jax.models.quantization import Quantised, quantised_linear
from deltapref_jax.models.rotary import apply_rotary, rotary_angles, segment_lengths
from deltapref_jax.models.sharding import spec_for
from deltapref_jax.models.spec import NO_ADAPTERS, Adapters, Layer, ModelSpec

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

_ALL_BUT_GATHERED = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
"""Keeps everything except the weights of all devices."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v"],
    meta_fields=["positions_last", "together"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, one array [B, K, S, H] each.

    The index along S is the token's position in its sequence.

    Attributes:
      k: keys, [B, K, H, S] where `positions_last`.
      v: values.
      positions_last: static; chosen by `empty_cache`.
      together: static, chosen by `empty_cache`: heads that lie beside each other along H, so that K
        is fewer and H is wider by this factor.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    positions_last: bool = False
    together: int = 1

    @property
    def length(self) -> int:
        """S."""
        return int(self.v[0].shape[2])

    @property
    def key_axis(self) -> int:
        """The axis of the positions in `k`; in `v` it is 2."""
        return 3 if self.positions_last else 2

    def map(self, change: Callable[[Array, int], Array]) -> "Cache":
        """Returns the cache of what `change` makes of every array and its axis of positions."""
        return dataclasses.replace(
            self,
            k=tuple(change(k, self.key_axis) for k in self.k),
            v=tuple(change(v, 2) for v in self.v),
        )


def empty_cache(
    spec: ModelSpec,
    slots: int,
    length: int,
    dtype: jnp.dtype = jnp.float32,
    mesh: Mesh | None = None,
) -> Cache:
    """Returns a cache of zeros for `slots` rows of at most `length` positions.

    Args:
      spec: sizes of the decoder.
      slots: B.
      length: S.
      dtype: of keys and values.
      mesh: its platform chooses the layout of the keys; None means the default platform's. A CPU's
        product of a query with keys is up to 20 times as fast where positions are neighbours in
        memory. A TPU's kernel reads both arrays with H last, and whole lanes of it.
    """
    positions_last = platform_of(mesh) == "cpu"
    devices = mesh.shape["tensor"] if mesh is not None else 1
    together = heads_together(spec, devices) if platform_of(mesh) == "tpu" else 1
    shape = (slots, spec.kv_heads // together, length, spec.head_width * together)
    k_shape = (*shape[:2], *shape[:1:-1]) if positions_last else shape
    return Cache(
        tuple(jnp.zeros(k_shape, dtype) for _ in range(spec.layers)),
        tuple(jnp.zeros(shape, dtype) for _ in range(spec.layers)),
        positions_last,
        together,
    )


def heads_together(spec: ModelSpec, devices: int) -> int:
    """Returns how many key heads a cache keeps beside each other, to fill a TPU's lanes.

    One, where heads fill them, or where heads are too few or do not divide over `tensor` so.

    Args:
      spec: sizes of the decoder.
      devices: along `tensor`.
    """
    count = max(1, LANES // spec.head_width)
    whole = count * spec.head_width == LANES and spec.kv_heads % count == 0
    divides = spec.kv_heads % devices or spec.kv_heads // count % devices == 0
    return count if whole and divides else 1


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


def layer_norm(
    x: Float[Array, "*n D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*n D"]:
    """LayerNorm (arXiv 1607.06450) in float32; returns the dtype of `x`."""
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + eps)
    return (h * weight + bias).astype(x.dtype)


def normalize(
    x: Float[Array, "*n D"], weight: Array, bias: Array | None, spec: ModelSpec
) -> Float[Array, "*n D"]:
    """The norm of a spec: RMSNorm by the weight, or by 1 + weight (Gemma), or LayerNorm (Nemotron).

    The weight is added to 1 in float32, so that a weight near 0 keeps its digits.
    """
    if spec.norm == "rms":
        return rms_norm(x, weight, spec.norm_eps)
    weight = 1 + weight.astype(jnp.float32)
    if bias is None:
        return rms_norm(x, weight, spec.norm_eps)
    return layer_norm(x, weight, bias, spec.norm_eps)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}
"""The activations of `ModelSpec.activation`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(
    gate: Float[Array, "*n F"], up: Float[Array, "*n F"], activation: str
) -> Float[Array, "*n F"]:
    """A gated MLP's product, activation(gate) * up (arXiv 2002.05202).

    The backward pass computes the activation again instead of storing it.
    """
    return ACTIVATIONS[activation](gate) * up


def _gated_backward(activation: str, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    gate, up = saved
    if activation == "silu":
        s = jax.nn.sigmoid(gate)
        # The derivative of silu is σ(x) * (1 + x * (1 - σ(x))).
        return g * up * (s * (1 + gate * (1 - s))), g * (gate * s)
    y, back = jax.vjp(ACTIVATIONS[activation], gate)
    return back(g * up)[0], g * y


gated.defvjp(
    lambda gate, up, activation: (gated(gate, up, activation), (gate, up)), _gated_backward
)


@jax.custom_vjp
def linear(
    x: Float[Array, "*n D"], weights: tuple[Float[Array, "D *out"], ...]
) -> tuple[Array, ...]:
    """Matrix products x * weight, [*n, *out], in the dtype of `x`.

    The gradient of `x` is summed over the weights in float32. A weight's gradient is summed in
    float32 and has the weight's dtype. A weight that is not differentiated (a base under adapters)
    has no gradient, and `x` is not kept for it.

    The backward pass is written out because of XLA on CPU: in a weight's gradient it copies the
    left factor with the tokens as its last axis, and fuses that copy with the elementwise
    computation of the factor, which then runs again number by number. Here the left factor is the
    narrower of x and g.
    """
    return tuple(jnp.tensordot(x, weight.astype(x.dtype), 1) for weight in weights)


def _linear_forward(x: Any, weights: Any) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    outputs = linear(x.value, tuple(w.value for w in weights))
    trained = tuple(() if w.perturbed else None for w in weights)
    return outputs, (
        x.value if any(w.perturbed for w in weights) else None,
        tuple(w.value for w in weights),
        trained,
    )


def _linear_backward(
    saved: tuple[Any, ...], g: tuple[Array, ...]
) -> tuple[Array, tuple[Array | None, ...]]:
    x, weights, trained = saved
    dx = [_input_gradient(y, w, len(weights) > 1) for y, w in zip(g, weights, strict=True)]
    return functools.reduce(jnp.add, dx).astype(g[0].dtype), tuple(
        None if t is None else _weight_gradient(x, y, w)
        for y, w, t in zip(g, weights, trained, strict=True)
    )


def _input_gradient(g: Array, weight: Array, summed: bool) -> Array:
    """Returns g * weightᵀ, in float32 where it is one of several that are added up."""
    # The leading axes of g are tokens; the rest of g is *out.
    axes = tuple(range(g.ndim - weight.ndim + 1, g.ndim)), tuple(range(1, weight.ndim))
    return jax.lax.dot_general(
        g,
        weight.astype(g.dtype),
        (axes, ((), ())),
        preferred_element_type=jnp.float32 if summed else None,
    )


def _weight_gradient(x: Array, g: Array, weight: Array) -> Array:
    tokens = tuple(range(x.ndim - 1))
    # XLA on CPU has no product in bfloat16 for the other order of factors.
    x_first = x.shape[-1] <= math.prod(weight.shape[1:]) or x.dtype.itemsize < 4
    a, b = (x, g) if x_first else (g, x)
    dw = jax.lax.dot_general(a, b, ((tokens,) * 2, ((), ())), preferred_element_type=jnp.float32)
    if not x_first:
        # Without the barrier XLA would fold the transpose into a slower product.
        dw = jnp.moveaxis(jax.lax.optimization_barrier(dw), -1, 0)
    return dw.astype(weight.dtype)


linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


def _initial(parameter: Parameter, spec: ModelSpec, rngs: nnx.Rngs) -> nnx.Param:
    """Draws a parameter of one layer, or of the model, in float32; quantised ones are zeros."""
    shape = parameter.shape(spec)
    if parameter.scale in parameters(spec):
        return nnx.Param(jnp.zeros(shape, parameter.stored_dtype(spec, jnp.float32)))
    if parameter.init in ("normal", "residual"):
        # GPT-2's scaling keeps the variance of the residual stream independent of depth.
        std = 0.02 / (2 * spec.layers) ** 0.5 if parameter.init == "residual" else 0.02
        return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
    ones = parameter.init == "norm" and spec.norm == "rms"
    return nnx.Param(jnp.ones(shape) if ones else jnp.zeros(shape))


class Block(nnx.Module):
    """Attention and MLP with norms and residual connections.

    Parameters are float32, but for matrices that the spec has quantised, which have scales beside
    them (`quantization`); the computation has its input's dtype. An adapted matrix W [in, out] has
    two more beside it, A [in, r] and B [r, out], that act on activations: y = xW + scale * (xA)B
    (LoRA, arXiv 2106.09685, eq. 3), so that nothing of W's shape is ever computed.
    """

    sinks: nnx.Param  # [N], where the family has them

    def __init__(self, spec: ModelSpec, adapters: Adapters = NO_ADAPTERS, *, rngs: nnx.Rngs):
        self.spec = spec
        declared = block_parameters(spec)
        for name, parameter in declared.items():
            setattr(self, name, _initial(parameter, spec, rngs))
        if adapters.rank:
            # alpha / rank is an array, so that alpha is not a constant of a compiled program.
            self.scale = nnx.Param(jnp.ones(()))
        for name in adapters.targets:
            shape, inputs = declared[name].shape(spec), declared[name].inputs
            setattr(self, f"{name}_a", nnx.LoRAParam(jnp.zeros((*shape[:inputs], adapters.rank))))
            setattr(self, f"{name}_b", nnx.LoRAParam(jnp.zeros((adapters.rank, *shape[inputs:]))))

    def _multiply(
        self, x: Float[Array, "B T I"], names: Sequence[str], inputs: int, layout: Layout | None
    ) -> list[Array]:
        """Multiplies `x` by each of the matrices; a list of [B, T, *out]."""
        found: dict[str, Array] = {}
        weights: dict[str, Array] = {}
        for name in names:
            # An einsum over o's two input axes would transpose the matrix at every call.
            matrix = self._matrix(name)
            w = matrix.values if isinstance(matrix, Quantised) else matrix
            w = w.reshape(-1, *w.shape[inputs:])
            if isinstance(matrix, Quantised):
                found[name] = quantised_linear(x, matrix._replace(values=w))
            else:
                weights[name] = w
        if weights and layout is None:
            found |= zip(weights, linear(x, tuple(weights.values())), strict=True)
        elif weights and layout is not None:
            specs = []
            for name in weights:
                shape = (self.spec.layers, *getattr(self, name).shape)
                axes = spec_for(f"blocks.{name}", shape, layout.mesh)[1:]
                specs.append(PartitionSpec(axes[0], *axes[inputs:]))
            outputs = products(x, tuple(weights.values()), tuple(specs), layout)
            found |= zip(weights, outputs, strict=True)
        return [found[name] for name in names]

    def _project(
        self, x: Float[Array, "B T I"], *names: str, layout: Layout | None = None
    ) -> list[Array]:
        """Multiplies `x` by matrices, with their biases and adapters if any; [B, T, *out] each.

        On a mesh, what all of them read is gathered once, and their gradients of `x` are one sum.
        """
        inputs = block_parameters(self.spec)[names[0]].inputs
        adapted = [name for name in names if hasattr(self, f"{name}_a")]
        matrices = [*names, *(f"{name}_a" for name in adapted)]
        found = dict(zip(matrices, self._multiply(x, matrices, inputs, layout), strict=True))
        for name in names:
            if hasattr(self, f"{name}_bias"):
                found[name] = add_bias(found[name], getattr(self, f"{name}_bias")[...])
        # The outputs of A are narrow and on every device of `tensor`.
        narrow = layout and layout._replace(split=False)
        for name in adapted:
            low_rank = checkpoint_name(found[f"{name}_a"], "projection")
            # The scale is float32, so the product is cast back to the computation's dtype.
            scaled = (low_rank * self.scale[...]).astype(x.dtype)
            found[name] = found[name] + self._multiply(scaled, [f"{name}_b"], 1, narrow)[0]
        return [found[name] for name in names]

    def _normalized(self, x: Array, name: str) -> Array:
        """Normalises `x` where the family has a norm of that name; otherwise returns it."""
        if not hasattr(self, name):
            return x
        bias = getattr(self, f"{name}_bias")[...] if hasattr(self, f"{name}_bias") else None
        with jax.named_scope(name):
            return normalize(x, getattr(self, name)[...], bias, self.spec)

    def _queries_and_keys(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Normalises queries and keys, of each head or of all heads at once, where a family does.

        Kernels multiply scores by H^-0.5; the queries are multiplied by what remains.
        """
        if self.spec.qk_norm == "head":
            q, k = self._normalized(q, "q_norm"), self._normalized(k, "k_norm")
        elif self.spec.qk_norm == "heads":
            with jax.named_scope("qk_norm"):
                q, k = (
                    rms_norm(
                        x.reshape(*x.shape[:2], -1),
                        getattr(self, name)[...].reshape(-1),
                        self.spec.norm_eps,
                    ).reshape(x.shape)
                    for x, name in ((q, "q_heads_norm"), (k, "k_heads_norm"))
                )
        if self.spec.query_scale is not None:
            q = q * jnp.asarray(self.spec.query_scale * self.spec.head_width**0.5, q.dtype)
        return q, k

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: tuple[Array, Array],
        attend: Callable[..., Array],
        mesh: Mesh | None = None,
        layout: Layout | None = None,
    ) -> Float[Array, "B T D"]:
        """Adds the outputs of attention and of the MLP to the residual stream.

        Args:
          x: the residual stream.
          angles: `rotary.rotary_angles` of the tokens.
          attend: maps rotated queries [B, T, N, H], rotated keys and values [B, T, K, H], and
            `sinks` [N] or None, to the attention's output [B, T, N, H].
          mesh: the mesh over which the rows lie; None means one device.
          layout: of `x` over the mesh where the products state their collectives; None leaves them
            to XLA's partitioner.
        """
        h = self._normalized(x, "attention_norm")
        with jax.named_scope("attention"):
            q, k, v = self._project(h, *"qkv", layout=layout)
            q, k = self._queries_and_keys(q, k)
            # Named after the rotation, so that the backward pass does not rotate again.
            q, k, v = (
                checkpoint_name(y, "projection")
                for y in (apply_rotary(q, angles), apply_rotary(k, angles), v)
            )
            sinks = in_values_of(self.sinks[...], x.dtype) if self.spec.sinks else None
            attended = attend(q, k, v, sinks=sinks).reshape(*x.shape[:-1], -1)
            (out,) = self._project(attended, "o", layout=layout)
            out = checkpoint_name(out, "projection")
        x = x + self._normalized(out, "attention_out_norm")
        h = self._normalized(x, "mlp_norm")
        with jax.named_scope("mlp"):
            h = self._mlp(h, mesh, layout)
        return x + self._normalized(h, "mlp_out_norm")

    def _matrix(self, name: str) -> Array | Quantised:
        """Returns a matrix, with its scales where it is quantised."""
        values, scale = getattr(self, name)[...], getattr(self, f"{name}_scale", None)
        return values if scale is None else Quantised(values, scale[...])

    def _mlp(
        self, h: Float[Array, "B T D"], mesh: Mesh | None, layout: Layout | None
    ) -> Float[Array, "B T D"]:
        spec = self.spec
        if spec.experts:
            weights = {
                name.removeprefix("expert_"): self._matrix(name)
                for name, p in block_parameters(spec).items()
                if "E" in p.dims and p.init != "scale"
            }
            return mixture(h, weights, spec.experts, ACTIVATIONS[spec.activation], mesh)
        inner = ("gate", "up") if spec.gated else ("up",)
        h, *up = (checkpoint_name(y, "projection") for y in self._project(h, *inner, layout=layout))
        h = gated(h, *up, spec.activation) if spec.gated else ACTIVATIONS[spec.activation](h)
        return self._project(h, "down", layout=layout)[0]


@jax.custom_vjp
def _accumulate(layer: nnx.State, totals: nnx.State, number: Array) -> tuple[nnx.State, nnx.State]:
    """Returns the parameters of a layer, and `totals`; both unchanged.

    A reverse scan returns the gradients of all layers in new arrays. The cotangent of `totals`
    instead comes back through the layers, and receives each layer's gradient in place: where it
    begins as a sum of gradients, it ends as the new sum, and no second tree of gradients exists.

    Args:
      layer: parameters of one layer.
      totals: those of its parameters that are trained, of all layers; the values are not read.
      number: the layer's.
    """
    return layer, totals


def _accumulate_backward(
    number: Array, g: tuple[nnx.State, nnx.State]
) -> tuple[None, nnx.State, None]:
    layer, totals = (dict(nnx.to_flat_state(state)) for state in g)
    for path, total in totals.items():
        old = jax.lax.dynamic_index_in_dim(total[...], number, 0, keepdims=False)
        new = jax.lax.dynamic_update_index_in_dim(total[...], old + layer[path][...], number, 0)
        totals[path] = total.replace(new)
    return None, nnx.from_flat_state(totals), None


_accumulate.defvjp(
    lambda layer, totals, number: (_accumulate(layer, totals, number), number),
    _accumulate_backward,
)


class Decoder(nnx.Module):
    """Maps token ids to final hidden states.

    The projection to the vocabulary is left to the caller (`unembedding`), so that no logits tensor
    [B, L, V] need exist.
    """

    final_norm: nnx.Param  # [D]
    final_norm_bias: nnx.Param  # [D], where norms have biases
    head: nnx.Param  # [V, D], where the embedding is not tied

    def __init__(
        self,
        spec: ModelSpec,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        adapters: Adapters = NO_ADAPTERS,
    ):
        self.spec, self.dtype = spec, dtype
        declared = parameters(spec)
        self.embed = _initial(declared["embed"], spec, rngs)

        # Layers are stacked, so that a scan over them compiles one layer for any depth.
        @nnx.split_rngs(splits=spec.layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(spec, adapters, rngs=rngs)

        self.blocks = stack(rngs)  # every parameter has a leading axis of length `layers`
        for name, parameter in declared.items():
            if not parameter.stacked and name != "embed":
                setattr(self, name, _initial(parameter, spec, rngs))

    def output_rows(self) -> Float[Array, "V D"]:
        """Returns the rows of the output projection as they are stored."""
        return (self.embed if self.spec.tied else self.head)[...]

    def unembedding(self) -> Float[Array, "V D"]:
        """Returns the rows of the output projection in the computation's dtype."""
        with jax.named_scope("unembedding"):
            return self.output_rows().astype(self.dtype)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up the embeddings of tokens, in the computation's dtype."""
        with jax.named_scope("embedding"):
            # The rows are cast and not the table, so that its gradient is summed in float32.
            x = jnp.asarray(self.embed[...])[tokens].astype(self.dtype)
            scale = self.spec.embedding_scale
            return x if scale == 1 else x * jnp.asarray(scale, self.dtype)

    def _final_norm(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("final_norm"):
            bias = self.final_norm_bias[...] if hasattr(self, "final_norm_bias") else None
            return normalize(x, self.final_norm[...], bias, self.spec)

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
        return self.hidden_and_totals(
            tokens, positions, segments, branches, remat, mesh, nnx.State({})
        )[0]

    def hidden_and_totals(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        branches: Int[Array, "B L"] | None,
        remat: str,
        mesh: Mesh | None,
        totals: nnx.State,
    ) -> tuple[Float[Array, "B L D"], nnx.State]:
        """Returns what `hidden` does, and `totals`, unchanged.

        `totals` are stacked parameters of `blocks`, or none. Their gradients are those of the
        cotangent of `totals` (see `_accumulate`), and not of the model's parameters.
        """
        # Masks and angles depend on the packing alone, so all layers of a kind share them.
        spec = self.spec
        layout = Layout.of(mesh, tokens.shape[1])
        attend = packed_attention(
            segments,
            branches,
            mesh,
            positions=positions,
            windows=spec.windows,
            cap=spec.attention_cap,
            sinks=spec.sinks,
        )
        kinds = tuple(dict.fromkeys(spec.kinds))
        angles = [self._angles(kind, positions, segments) for kind in kinds]
        # The structure is that of every layer; the scan slices the leading axis of the parameters.
        graphdef, stacked = nnx.split(self.blocks)

        def layer(
            carry: tuple[Array, nnx.State], inputs: tuple[Array, nnx.State, Array | None]
        ) -> tuple[tuple[Array, nnx.State], None]:
            (x, totals), (number, state, kind) = carry, inputs
            if totals:
                state, totals = _accumulate(state, totals, number)
            block = nnx.merge(graphdef, state)
            if kind is None:
                return (block(x, angles[0], attend, mesh, layout), totals), None
            of_kind = jax.tree.map(lambda *kinds: jnp.stack(kinds)[kind], *angles)
            window = jnp.asarray([spec.windows.index(k.window) for k in kinds])[kind]
            x = block(x, of_kind, functools.partial(attend, kind=window), mesh, layout)
            return (x, totals), None

        x = self._embed(tokens)
        if layout is not None:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(layout.mesh, layout.residual))
        # Rematerialisation is per layer, so that one layer's activations exist at a time.
        if remat != "none":
            layer = jax.checkpoint(layer, policy=POLICIES[remat])
        elif layout is not None:
            layer = jax.checkpoint(layer, policy=_ALL_BUT_GATHERED)
        # Layers of one kind are no data, so that their program is a plain one.
        of_layer = (
            None if len(kinds) == 1 else jnp.asarray([kinds.index(kind) for kind in spec.kinds])
        )
        inputs = (jnp.arange(spec.layers), stacked, of_layer)
        (x, totals), _ = jax.lax.scan(layer, (x, totals), inputs)
        return self._final_norm(x), totals

    def _angles(
        self, kind: Layer, positions: Array, segments: Array | None = None
    ) -> tuple[Array, Array]:
        """Rotation angles of the layers of a kind; segments are read by LongRoPE alone."""
        rope = None if kind.rope is None else self.spec.ropes[kind.rope]
        lengths = None
        if rope and rope.long_factors and segments is not None:
            lengths = segment_lengths(positions, segments)
        return rotary_angles(positions, rope, self.spec.head_width, lengths)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Cache,
        mesh: Mesh | None = None,
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
          mesh: the mesh over which the rows lie; None means one device.
        """
        spec = self.spec
        attend = cached_attention(
            positions,
            cache.length,
            mesh,
            spec.windows,
            spec.attention_cap,
            cache.positions_last,
            cache.together,
        )
        angles = {kind: self._angles(kind, positions) for kind in dict.fromkeys(spec.kinds)}
        keys, values = list(cache.k), list(cache.v)

        def attend_layer(i: int, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
            """Writes keys and values into the cache of layer i and attends to it."""
            window = spec.kinds[i].window
            out, keys[i], values[i] = attend(q, k, v, keys[i], values[i], window, sinks)
            return out

        x = self._embed(tokens)
        for i, (block, kind) in enumerate(zip(self._layers(), spec.kinds, strict=True)):
            x = block(x, angles[kind], functools.partial(attend_layer, i), mesh)
        return self._final_norm(x), dataclasses.replace(cache, k=tuple(keys), v=tuple(values))

    def prefill(self, tokens: Int[Array, "B T"], mesh: Mesh | None = None) -> Cache:
        """Returns a cache of T positions that holds prompts, which are padded on the right.

        Attention runs on the kernel of packed rows, in tiles, so that no scores [T, T] exist.
        Padding has keys and values too; decoding overwrites them before it reads them.

        Args:
          tokens: token ids.
          mesh: the mesh over which the rows lie; None means one device.
        """
        spec = self.spec
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        angles = {kind: self._angles(kind, positions) for kind in dict.fromkeys(spec.kinds)}
        attend = packed_attention(
            jnp.ones_like(tokens), mesh=mesh, windows=spec.windows, cap=spec.attention_cap
        )
        cache = empty_cache(spec, tokens.shape[0], tokens.shape[1], self.dtype, mesh)
        keys, values = list(cache.k), list(cache.v)

        def attend_layer(i: int, q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
            """Keeps the keys and values of layer i and attends to them."""
            wide = *k.shape[:2], k.shape[2] // cache.together, -1
            keys[i] = jnp.moveaxis(k.reshape(wide), 1, cache.key_axis)
            values[i] = jnp.moveaxis(v.reshape(wide), 1, 2)
            return attend(q, k, v, spec.windows.index(spec.kinds[i].window), sinks)

        x = self._embed(tokens)
        for i, (block, kind) in enumerate(zip(self._layers(), spec.kinds, strict=True)):
            x = block(x, angles[kind], functools.partial(attend_layer, i), mesh)
        return dataclasses.replace(cache, k=tuple(keys), v=tuple(values))

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
