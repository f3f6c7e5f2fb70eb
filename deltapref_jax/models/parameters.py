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
from typing import NamedTuple

from deltapref_jax.models.families import FAMILIES
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
    init: str = "normal"  # "normal", "residual" (a smaller normal), "norm" or "zeros"
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
    def batch(self) -> int:
        """Leading dimensions that are neither summed over nor outputs: 1 for experts."""
        return 1 if self.dims[0] == "E" and self.inputs else 0

    def sides(self, spec: ModelSpec) -> tuple[int, int]:
        """Inputs and outputs of a matrix, with heads and their widths as one axis."""
        shape = self.shape(spec)[self.batch :]
        return math.prod(shape[: self.inputs]), math.prod(shape[self.inputs :])


def _matrix(
    name: str,
    letters: str,
    axes: tuple[str | None, ...],
    names: tuple[str, str],
    has: _Has = lambda spec: True,
    inputs: int = 1,
    residual: bool = False,
) -> tuple[Parameter, Parameter]:
    """A matrix of a layer's product, and the bias of its outputs, which few families have."""
    short, (tensor, gguf) = name.removeprefix("blocks."), names
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
            " ".join(letters.split()[inputs:]),
            axes[inputs:],
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
        init="zeros",
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


PARAMETERS: tuple[Parameter, ...] = (
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
    Parameter(
        "blocks.router",
        "D E",
        ("fsdp", None),
        f"{_L}mlp.gate.weight",
        f"{_B}ffn_gate_inp.weight",
        inputs=1,
        has=_sparse,
    ),
    # Experts lie over `tensor`, so each of its devices computes whole experts.
    *(
        Parameter(
            f"blocks.expert_{name}",
            "E D X",
            ("tensor", "fsdp", None),
            f"{_L}mlp.experts.{{expert}}.{name}_proj.weight",
            f"{_B}ffn_{name}_exps.weight",
            inputs=1,
            has=_sparse,
        )
        for name in ("gate", "up")
    ),
    Parameter(
        "blocks.expert_down",
        "E X D",
        ("tensor", None, "fsdp"),
        f"{_L}mlp.experts.{{expert}}.down_proj.weight",
        f"{_B}ffn_down_exps.weight",
        inputs=1,
        init="residual",
        has=_sparse,
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
"""All parameters that a decoder may have, in the order of the computation."""


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
    """Returns the number of parameters."""
    return sum(
        math.prod(p.shape(spec)) * (spec.layers if p.stacked else 1)
        for p in parameters(spec).values()
    )
