"""Rotary embeddings from the options of a config.json.

`transformers` 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling; its config classes
turn both into one form, which is read here. Every scaling multiplies the plain frequencies by one
factor per dimension pair, so all of them become a `spec.Rope`.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from deltapref_jax.models.families.family import positive
from deltapref_jax.models.spec import Rope

_READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
    "longrope": (
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    ),
}
"""Kinds of rotary embeddings, and the options that each of them reads."""
_ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(
    options: Mapping[str, Any],
    name: str,
    head_width: int,
    max_positions: int,
    partial: bool,
    outer: Mapping[str, Any],
) -> Rope:
    """Returns the rotary embeddings that a config's options describe.

    Args:
      options: rope_parameters as `transformers` 5 completes them.
      name: what messages call them, such as "rope_parameters".
      head_width: H.
      max_positions: max_position_embeddings of the config.
      partial: whether the family rotates a part of each head.
      outer: the options that YaRN's truncate is read from. `transformers` takes it from the whole
        rope_parameters, so it is ignored where these are nested by kind of layer.

    Raises:
      ValueError: a kind or an option is not supported, or a value is no number.
    """
    kind = options.get("rope_type", options.get("type", "default"))
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(
            f"rope_type is {kind!r} in config.json; supported: {', '.join(map(repr, _READ))}."
        )
    for option, value in options.items():
        if option in _ALWAYS or option in _READ[kind] or value is None:
            continue
        # A factor of 1 changes nothing, and a length alone is not read where nothing is scaled.
        if option == "original_max_position_embeddings" or (value == 1 and value is not True):
            continue
        raise ValueError(
            f"{name}.{option} is {reprlib.repr(value)} in config.json, and rotary embeddings of "
            f"the kind {kind!r} with it are not supported."
        )
    theta = positive("rope_theta", options.get("rope_theta"))
    rotated = options.get("partial_rotary_factor", None if partial else 1.0)
    part = positive("partial_rotary_factor", rotated)
    width = int(head_width * part)
    if width != head_width and (not partial or part > 1 or width % 2 or not width):
        raise ValueError(
            f"partial_rotary_factor is {part} in config.json; only rotary embeddings of whole "
            "heads are supported for this family, or of an even part where it has one."
        )
    rope = Rope(theta, 0 if width == head_width else width)
    if kind == "default":
        return rope
    wanted = (key for key in _READ[kind] if key in ("low_freq_factor", "high_freq_factor"))
    values = {
        key: positive(key, options.get(key))
        for key in (*wanted, *(("factor",) if kind in ("linear", "llama3") else ()))
    }
    original = options.get("original_max_position_embeddings")
    original = max_positions if original is None else original
    original = positive("original_max_position_embeddings", original)
    frequencies = theta ** (-np.arange(0, width, 2) / width)  # radians per position, [H/2]
    if kind == "linear":
        return rope._replace(factors=(1 / values["factor"],) * len(frequencies))
    if kind == "llama3":
        return rope._replace(factors=_llama3(frequencies, original, **values))
    if kind == "yarn":
        if theta <= 1:
            raise ValueError(f"rope_theta is {theta:g} in config.json; YaRN needs one above 1.")
        return _yarn(rope, options, frequencies, original, max_positions, outer)
    return _longrope(rope, options, len(frequencies), original, max_positions)


def _llama3(
    frequencies: np.ndarray,
    original: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
) -> tuple[float, ...]:
    """Llama 3.1's scaling (arXiv 2407.21783): long waves by 1 / factor, short ones unchanged."""
    if low_freq_factor >= high_freq_factor:
        raise ValueError(
            f"low_freq_factor is {low_freq_factor:g} in config.json and high_freq_factor "
            f"{high_freq_factor:g}; the first must be below the second."
        )
    wavelength = 2 * np.pi / frequencies
    # The share of the unscaled frequency between the two ends.
    share = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - share) / factor + share
    scaled = np.where(wavelength > original / low_freq_factor, 1 / factor, between)
    return tuple(map(float, np.where(wavelength < original / high_freq_factor, 1.0, scaled)))


def _yarn(
    rope: Rope,
    options: Mapping[str, Any],
    frequencies: np.ndarray,
    original: float,
    max_positions: int,
    outer: Mapping[str, Any],
) -> Rope:
    """YaRN (arXiv 2309.00071, section 3.2 and 3.4)."""
    width = 2 * len(frequencies)
    factor = options.get("factor")
    factor = max_positions / original if factor is None else positive("factor", factor)

    def mscale(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = options.get("attention_factor")
    if scale is None:
        weights = [options.get(key) for key in ("mscale", "mscale_all_dim")]
        scale = mscale()
        if all(weights):
            scale = mscale(positive("mscale", weights[0]))
            scale /= mscale(positive("mscale_all_dim", weights[1]))

    def dimension(rotations: float) -> float:
        """The dimension pair that turns so often within the original context."""
        turns = math.log(original / (rotations * 2 * math.pi))
        return width * turns / (2 * math.log(rope.theta))

    low = dimension(positive("beta_fast", options.get("beta_fast") or 32))
    high = dimension(positive("beta_slow", options.get("beta_slow") or 1))
    if outer.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return rope._replace(
        factors=tuple(map(float, ramp / factor + (1 - ramp))),
        scale=positive("attention_factor", scale),
    )


def _longrope(
    rope: Rope, options: Mapping[str, Any], pairs: int, original: float, max_positions: int
) -> Rope:
    """LongRoPE (arXiv 2402.13753): one list of factors for short sequences, one for long ones."""
    factor = options.get("factor")
    factor = max_positions / original if factor is None else positive("factor", factor)
    scale = options.get("attention_factor")
    if scale is None:
        if factor > 1 >= original:
            raise ValueError(
                f"original_max_position_embeddings is {original:g} in config.json; LongRoPE "
                "without an attention_factor needs one above 1."
            )
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    lists = []
    for key in ("short_factor", "long_factor"):
        values = options.get(key)
        if not isinstance(values, list) or len(values) != pairs:
            raise ValueError(
                f"{key} is {reprlib.repr(values)} in config.json; it must be a list of {pairs} "
                "numbers, one per pair of rotated dimensions."
            )
        lists.append(tuple(1 / positive(key, value) for value in values))
    rope = rope._replace(factors=lists[0], scale=positive("attention_factor", scale))
    # Equal lists do not depend on the length of a sequence.
    if lists[0] == lists[1]:
        return rope
    return rope._replace(long_factors=lists[1], original=int(original))
