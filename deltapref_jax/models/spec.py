"""What a decoder computes: its sizes, the kinds of its layers and its constants.

A spec says everything that compiled programs depend on. `models.config_json` reads it from a
config.json, `models.parameters` lists the arrays that it calls for, and `models.decoder` computes.
"""

import dataclasses
from typing import NamedTuple


class Rope(NamedTuple):
    """Rotary embeddings of some layers; hashable.

    Dimension pair i of the first `width` dimensions of a head turns by
    position * theta^(-2i / width) * factors[i].
    """

    theta: float = 10_000.0  # base of the frequencies
    width: int = 0  # dimensions of a head that are rotated, even; 0 means all
    factors: tuple[float, ...] = ()  # of every frequency; empty means 1
    long_factors: tuple[float, ...] = ()  # used instead in sequences longer than `original`
    original: int = 0  # longest sequence of pretraining, in tokens; used with `long_factors`
    scale: float = 1.0  # multiplies cosines and sines, and so the scores by its square


class Layer(NamedTuple):
    """What may differ between the layers of a decoder besides their weights; hashable."""

    window: int = 0  # a token sees itself and the window - 1 tokens before it; 0 means all
    rope: int | None = 0  # index in `ModelSpec.ropes`; None means no position embedding


class Experts(NamedTuple):
    """A mixture of experts in place of the MLP; hashable."""

    total: int  # E, experts of a layer
    active: int  # experts that a token is sent to
    mlp: int  # X, width of one expert
    normalized: bool  # whether the weights of a token's experts are divided by their sum
    swiglu_alpha: float = 0.0  # of `experts.clamped_swiglu`; 0 means activation(gate) * up
    swiglu_limit: float = 0.0  # gates are at most this, and ups between minus this and this


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Sizes and constants of a decoder.

    It is hashable, so that models of one shape share their compiled functions.
    """

    vocab: int  # V
    width: int  # D
    layers: int
    heads: int  # N, query heads
    kv_heads: int  # K, key and value heads; divides `heads`
    head_width: int  # H, even; heads * head_width may differ from width
    mlp: int  # F
    _: dataclasses.KW_ONLY
    norm_eps: float = 1e-5
    tied: bool = True  # whether the embedding is the output projection too
    max_positions: int = 2048  # the longest sequence, in tokens
    family: str = "llama"  # a name of `families.FAMILIES`: names of tensors
    ropes: tuple[Rope, ...] = (Rope(),)
    pattern: tuple[Layer, ...] = (Layer(),)  # kinds of the first layers, repeated for the others
    norm: str = "rms"  # "rms", "rms_plus_one" or "layer_plus_one": see `decoder.normalize`
    norms: str = "before"  # "before" attention and MLP, "after" them, or "both"
    qk_norm: str = ""  # RMSNorm of queries and keys: of each "head", over all "heads", or none
    biases: tuple[str, ...] = ()  # matrices whose product has a bias, such as "q"
    sinks: bool = False  # whether attention's heads have sinks: see `attention.sinks`
    activation: str = "silu"  # of the MLP: "silu", "gelu_tanh" or "relu_squared"
    gated: bool = True  # whether the activation multiplies a second product
    experts: Experts | None = None
    query_scale: float | None = None  # multiplies the scores; None means head_width^-0.5
    attention_cap: float = 0.0  # scores s become cap * tanh(s / cap); 0 means they don't
    logit_cap: float = 0.0  # likewise the logits
    embedding_scale: float = 1.0  # multiplies the embeddings
    quantization: str = ""  # of the matrices of layers, a name of `quantization.FORMATS`, or none

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads is {self.heads}; it must be a multiple of kv_heads, {self.kv_heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width is {self.head_width}; rotary embeddings need an even number."
            )

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        from deltapref_jax.models.parameters import count

        return count(self)

    def within(self, length: int) -> "ModelSpec":
        """The same decoder with LongRoPE's factors for sequences of up to `length` tokens alone."""
        ropes = tuple(
            rope._replace(
                factors=rope.long_factors if length > rope.original else rope.factors,
                long_factors=(),
                original=0,
            )
            if rope.long_factors
            else rope
            for rope in self.ropes
        )
        return dataclasses.replace(self, ropes=ropes)

    def quantised(self, quantization: str) -> "ModelSpec":
        """The same decoder with the matrices of its layers in a format of `quantization`."""
        return dataclasses.replace(self, quantization=quantization)

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.layers))

    @property
    def windows(self) -> tuple[int, ...]:
        """The different windows of the layers."""
        return tuple(dict.fromkeys(kind.window for kind in self.kinds))


class Adapters(NamedTuple):
    """Shape of a decoder's low-rank adapters (`models.lora`); hashable."""

    rank: int = 0  # 0 means no adapters
    targets: tuple[str, ...] = ()  # names of the adapted matrices in `decoder.Block`, such as "q"


NO_ADAPTERS = Adapters()
"""A decoder without adapters."""
