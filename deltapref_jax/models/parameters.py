"""Every parameter of a decoder, declared once: shape, mesh axes, names in files.

`PARAMETERS` is the only place that knows which arrays a decoder has. Building and initialising a
model (`decoder`), sharding, reading and writing weights, adapters, FLOPs and the number of
parameters are all derived from it. A family (`models.families`) renames tensors, and a spec says
which of the parameters a model has.

Letters of shapes: V vocabulary, D width, N query heads, K key and value heads, H head width, F MLP
width, E experts, X width of an expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from deltapref_jax.models.families import FAMILIES
from deltapref_jax.models.quantization import FORMATS
from deltapref_jax.models.spec import ModelSpec

_Has = Callable[[ModelSpec], bool]


class Parameter(NamedTuple):
    """One parameter; where its name begins with "blocks.", one of every layer, stacked."""

    name: str  # path in `decoder.Decoder`
    letters: str  # the shape, such as "D N H"; without the layers' axis
    axes: tuple[str | None, ...]  # mesh axis of each dimension
    tensor: str  # name in safetensors; {layer} and {expert} stand for numbers
    gguf: str  # name in GGUF; experts are one tensor there
    inputs: int = 0  # leading dimensions that a product sums over; 0: no matrix of a product
    # "normal", "residual" (a smaller normal), "norm", "norm_bias", "zeros" or "scale"
    init: str = "normal"
    has: _Has = lambda spec: True  # whether a model of that spec has the parameter

    @property
    def stacked(self) -> bool:
        """Whether every layer has one."""
        return self.name.startswith("blocks.")

    @property
    def short(self) -> str:
        """The name in `decoder.Block`."""
        return self.name.removeprefix("blocks.")

    @property
    def dims(self) -> tuple[str, ...]:
        """The letters of the shape, one by one."""
        return tuple(self.letters.split())

    def shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """The shape in one layer."""
        experts = spec.experts
        sizes = {
            "V": spec.vocab,
            "D": spec.width,
            "N": spec.heads,
            "K": spec.kv_heads,
            "H": spec.head_width,
            "F": spec.mlp,
            "E": experts.total if experts else 0,
            "X": experts.mlp if experts else 0,
        }
        return tuple(sizes[letter] for letter in self.dims)

    @property
    def of_experts(self) -> bool:
        """Whether every expert has one."""
        return self.dims[0] == "E" and len(self.dims) > 1

    @property
    def batch(self) -> int:
        """Leading dimensions that are neither summed over nor outputs: 1 for experts."""
        return 1 if self.of_experts and self.inputs else 0

    def sides(self, spec: ModelSpec) -> tuple[int, int]:
        """Inputs and outputs of a matrix, with heads and their widths as one axis."""
        shape = self.shape(spec)[self.batch :]
        return math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])

    @property
    def scale(self) -> str:
        """The name of the parameter that holds the scales of the matrix where it is quantised."""
        return f"{self.name}_scale"

    def stored_dtype(self, spec: ModelSpec, dtype: Any) -> np.dtype:
        """The dtype in which a model that is not trained holds the parameter.

        It is `dtype`, that of the computation, but for quantised matrices and for what the
        computation reads in float32: scales, and the weights and biases of norms.
        """
        if self.scale in parameters(spec):
            return FORMATS[spec.quantization].dtype
        exact = self.init in ("norm", "norm_bias", "scale")
        return np.dtype(np.float32) if exact else np.dtype(dtype)


def _matrix(
    name: str,
    letters: str,
    axes: tuple[str | None, ...],
    names: tuple[str, str],
    has: _Has = lambda spec: True,
    inputs: int = 1,
    residual: bool = False,
    experts: bool = False,
) -> tuple[Parameter, Parameter]:
    """A matrix of a layer's product, and the bias of its outputs, which few families have.

    Where it has `experts`, the first axis of both is theirs.
    """
    short, (tensor, gguf) = name.removeprefix("blocks."), names
    of_bias = [i for i in range(len(axes)) if i >= inputs + experts or (experts and not i)]
    prefix = "model.layers.{layer}."
    return (
        Parameter(
            name,
            letters,
            axes,
            f"{prefix}{tensor}.weight",
            f"blk.{{layer}}.{gguf}.weight",
            inputs,
            "residual" if residual else "normal",
            has,
        ),
        Parameter(
            f"{name}_bias",
            " ".join(letters.split()[i] for i in of_bias),
            tuple(axes[i] for i in of_bias),
            f"{prefix}{tensor}.bias",
            f"blk.{{layer}}.{gguf}.bias",
            0,
            "zeros",
            lambda spec: has(spec) and short in spec.biases,
        ),
    )


def _norm(
    name: str,
    names: tuple[str, str],
    has: _Has,
    letters: str = "D",
    bias: bool = True,
) -> tuple[Parameter, ...]:
    """A norm's weight, and the bias that a LayerNorm has beside it."""
    tensor, gguf = names
    weight = Parameter(
        name, letters, (), f"{tensor}.weight", f"{gguf}.weight", init="norm", has=has
    )
    shift = Parameter(
        f"{name}_bias",
        letters,
        (),
        f"{tensor}.bias",
        f"{gguf}.bias",
        init="norm_bias",
        has=lambda spec: has(spec) and spec.norm == "layer_plus_one",
    )
    return (weight, shift) if bias else (weight,)


_L, _B = "model.layers.{layer}.", "blk.{layer}."


def _dense(spec: ModelSpec) -> bool:
    return spec.experts is None


def _sparse(spec: ModelSpec) -> bool:
    return spec.experts is not None


def _before(spec: ModelSpec) -> bool:
    return spec.norms in ("before", "both")


def _after(spec: ModelSpec) -> bool:
    return spec.norms in ("after", "both")


def _has_qk_norm(kind: str, spec: ModelSpec) -> bool:
    return spec.qk_norm == kind


_STORED: tuple[Parameter, ...] = (
    Parameter("embed", "V D", ("tensor", "fsdp"), "model.embed_tokens.weight", "token_embd.weight"),
    # Over `tensor`, q, k, v, gate and up are split by their outputs, and o and down by their
    # inputs, so that one sum over devices ends each half of a block (Megatron-LM, arXiv
    # 1909.08053).
    *_norm("blocks.attention_norm", (f"{_L}input_layernorm", f"{_B}attn_norm"), _before),
    *(
        p
        for name, letters in (("q", "D N H"), ("k", "D K H"), ("v", "D K H"))
        for p in _matrix(
            f"blocks.{name}",
            letters,
            ("fsdp", "tensor", None),
            (f"self_attn.{name}_proj", f"attn_{name}"),
        )
    ),
    # Of each head alone, or of all heads at once: a file has the same name for both.
    *(
        p
        for side, heads in (("q", "N H"), ("k", "K H"))
        for kind, name, letters in (("head", "norm", "H"), ("heads", "heads_norm", heads))
        for p in _norm(
            f"blocks.{side}_{name}",
            (f"{_L}self_attn.{side}_norm", f"{_B}attn_{side}_norm"),
            functools.partial(_has_qk_norm, kind),
            letters,
            bias=False,
        )
    ),
    Parameter(
        "blocks.sinks",
        "N",
        ("tensor",),
        f"{_L}self_attn.sinks",
        f"{_B}attn_sinks.weight",
        has=lambda spec: spec.sinks,
    ),
    *_matrix(
        "blocks.o",
        "N H D",
        ("tensor", None, "fsdp"),
        ("self_attn.o_proj", "attn_output"),
        inputs=2,
        residual=True,
    ),
    *_norm(
        "blocks.attention_out_norm",
        (f"{_L}post_attention_layernorm", f"{_B}post_attention_norm"),
        _after,
    ),
    *_norm("blocks.mlp_norm", (f"{_L}post_attention_layernorm", f"{_B}ffn_norm"), _before),
    *_matrix(
        "blocks.gate",
        "D F",
        ("fsdp", "tensor"),
        ("mlp.gate_proj", "ffn_gate"),
        lambda spec: _dense(spec) and spec.gated,
    ),
    *_matrix("blocks.up", "D F", ("fsdp", "tensor"), ("mlp.up_proj", "ffn_up"), _dense),
    *_matrix(
        "blocks.down",
        "F D",
        ("tensor", "fsdp"),
        ("mlp.down_proj", "ffn_down"),
        _dense,
        residual=True,
    ),
    *_matrix("blocks.router", "D E", ("fsdp", None), ("mlp.gate", "ffn_gate_inp"), _sparse),
    # Experts lie over `tensor`, so each of its devices computes whole experts.
    *(
        p
        for name, letters, axes in (
            ("gate", "E D X", ("tensor", "fsdp", None)),
            ("up", "E D X", ("tensor", "fsdp", None)),
            ("down", "E X D", ("tensor", None, "fsdp")),
        )
        for p in _matrix(
            f"blocks.expert_{name}",
            letters,
            axes,
            (f"mlp.experts.{{expert}}.{name}_proj", f"ffn_{name}_exps"),
            _sparse,
            residual=name == "down",
            experts=True,
        )
    ),
    *_norm(
        "blocks.mlp_out_norm",
        (f"{_L}post_feedforward_layernorm", f"{_B}post_ffw_norm"),
        _after,
    ),
    *_norm("final_norm", ("model.norm", "output_norm"), lambda spec: True),
    Parameter(
        "head",
        "V D",
        ("tensor", "fsdp"),
        "lm_head.weight",
        "output.weight",
        has=lambda spec: not spec.tied,
    ),
)
"""The parameters that files hold, in the order of the computation."""


def _scale(matrix: Parameter) -> Parameter:
    """The scales of a quantised matrix's output channels, which lie where the channels do."""
    outputs = slice(matrix.batch + matrix.inputs, None)
    return Parameter(
        matrix.scale,
        " ".join(matrix.dims[: matrix.batch] + matrix.dims[outputs]),
        matrix.axes[: matrix.batch] + matrix.axes[outputs],
        "",
        "",
        init="scale",
        has=lambda spec: bool(spec.quantization) and matrix.has(spec),
    )


PARAMETERS: tuple[Parameter, ...] = (
    *_STORED,
    # The router is small, and decides which experts compute a token.
    *(_scale(p) for p in _STORED if p.inputs and p.short != "router"),
)
"""All parameters that a decoder may have: those of files, and the scales of quantised matrices."""


@functools.lru_cache(maxsize=256)
def parameters(spec: ModelSpec) -> dict[str, Parameter]:
    """Returns the parameters of a model by name, with its family's names of tensors."""
    names = FAMILIES[spec.family].tensors
    found = {}
    for p in PARAMETERS:
        if p.has(spec):
            tensor, gguf = names.get(p.name, (p.tensor, p.gguf))
            found[p.name] = p._replace(tensor=tensor, gguf=gguf)
    return found


def block_parameters(spec: ModelSpec) -> dict[str, Parameter]:
    """Returns the parameters of one layer by their name in `decoder.Block`."""
    return {p.short: p for p in parameters(spec).values() if p.stacked}


def matrices(spec: ModelSpec) -> dict[str, Parameter]:
    """Returns the matrices that every token of a layer is multiplied by, by their short name."""
    return {name: p for name, p in block_parameters(spec).items() if p.inputs}


def count(spec: ModelSpec) -> int:
    """Returns the number of parameters, without the scales of quantised matrices."""
    return sum(
        math.prod(p.shape(spec)) * (spec.layers if p.stacked else 1)
        for p in parameters(spec).values()
        if p.init != "scale"
    )


def weight_bytes(spec: ModelSpec, dtype: str) -> int:
    """Returns the bytes of a model that is not trained, by the dtype of its computation."""
    return sum(
        math.prod(p.shape(spec))
        * (spec.layers if p.stacked else 1)
        * p.stored_dtype(spec, dtype).itemsize
        for p in parameters(spec).values()
    )
