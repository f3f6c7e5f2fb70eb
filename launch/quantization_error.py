"""Measures what quantising a model changes: log-probabilities of texts, and ratings as a judge.

    python -m launch.quantization_error --model=PATH --text=README.md
    python -m launch.quantization_error --model=PATH --text=README.md --problems=20

The text is cut into rows of --length tokens. Every variant is compared with the model in float32,
token by token: the model in bfloat16, which shows how much rounding alone changes, and each
--quantization, computed in --dtype. With --problems the model also rates worked
solutions of synthetic problems, clean and corrupted, and pairs of the two are ordered by their
sample delta as a study would (a model that is a poor judge has deltas near 0, which anything
reorders).
"""

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from rich import box
from rich.table import Table

from deltapref_jax.config import DIMENSIONS, DTYPES, QUANTIZATIONS, ConfigError, MeshShape, Scoring
from deltapref_jax.judging.rubric import conversation
from deltapref_jax.judging.scorer import rate_traces
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.attention.dense import capped
from deltapref_jax.models.parameters import weight_bytes
from deltapref_jax.models.weights import LoadedModel, load
from deltapref_jax.progress import plain_console, say
from deltapref_jax.synthetic.corrupt import DEGREES, corrupt
from deltapref_jax.synthetic.families import FAMILIES
from deltapref_jax.synthetic.world import from_meta, prompts, solution
from launch.flags import define_count, define_output, run_main

_MODEL = flags.DEFINE_string("model", None, "A folder, a hub name or a .gguf file.")
_TEXT = flags.DEFINE_string("text", None, "A file of text.")
_QUANTIZATION = flags.DEFINE_multi_enum(
    "quantization", list(QUANTIZATIONS[1:]), list(QUANTIZATIONS[1:]), "Formats to measure."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Computation of quantised models.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens of a row.", 2, 2**15)
_PROBLEMS = flags.DEFINE_integer(
    "problems", 0, "Synthetic problems whose solutions are rated; 0: none.", 0, 10_000
)
_ROW_LENGTH = define_count("row_length", 2048, "Tokens of a row of ratings.", 2**15)
_OUTPUT = define_output()


@functools.partial(jax.jit, static_argnums=(0, 1))
def compare_tokens(
    first: nnx.GraphDef, second: nnx.GraphDef, states: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares two models on one row of tokens.

    Args:
      first: structure of the model that is compared with.
      second: structure of the other.
      states: their parameters.
      tokens: [L].

    Returns:
      difference: of the log-probabilities of every next token, second minus first, nats [L - 1].
      divergence: KL(first, second) over the vocabulary, nats [L - 1].
      agree: whether both find the same token most likely [L - 1].
    """
    models = [nnx.merge(g, s) for g, s in zip((first, second), states, strict=True)]
    row, positions = tokens[None], jnp.arange(len(tokens))[None]
    hidden = [m.hidden(row, positions, jnp.ones_like(row))[0, :-1] for m in models]

    def position(x: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        *hidden, label = x
        a, b = (
            jax.nn.log_softmax(
                capped(
                    jnp.dot(m.unembedding(), h, preferred_element_type=jnp.float32),
                    m.spec.logit_cap,
                )
            )
            for h, m in zip(hidden, models, strict=True)
        )
        divergence = jnp.sum(jnp.exp(a) * (a - b))
        return b[label] - a[label], divergence, jnp.argmax(a) == jnp.argmax(b)

    # Logits of a few positions exist at once.
    return jax.lax.map(position, (*hidden, tokens[1:]), batch_size=32)


def token_errors(
    base: LoadedModel, other: LoadedModel, rows: Sequence[np.ndarray]
) -> dict[str, float]:
    """Differences of log-probabilities over all next tokens of all rows."""
    states = base.state, other.state
    found = [
        jax.device_get(compare_tokens(base.graphdef, other.graphdef, states, row)) for row in rows
    ]
    difference, divergence, agree = (np.concatenate(x) for x in zip(*found, strict=True))
    size = np.abs(difference)
    return {
        "next tokens": len(size),
        "mean |Δ log p|, nats": float(size.mean()),
        "99th percentile": float(np.percentile(size, 99)),
        "largest": float(size.max()),
        "mean Δ log p": float(difference.mean()),
        "mean KL": float(divergence.mean()),
        "share of equal most likely tokens": float(agree.mean()),
    }


def ratings_of(model: LoadedModel, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns ratings of solutions: clean [problems, 1, d] and corrupted [problems, c, d]."""
    chats, texts = [], []
    for prompt in prompts(tuple(FAMILIES), max(_PROBLEMS.value, len(FAMILIES)), 2, 0):
        problem, rng = from_meta(prompt.meta), random.Random(prompt.prompt_id)
        solutions = [solution(problem)] + [
            corrupt(problem, dimension, degree, rng)
            for dimension in DIMENSIONS
            for degree in range(1, DEGREES + 1)
        ]
        chats += [conversation(prompt.chat())] * len(solutions)
        texts += solutions
    size = 1 + len(DIMENSIONS) * DEGREES
    chats, texts = chats[: size * _PROBLEMS.value], texts[: size * _PROBLEMS.value]
    mesh = make_mesh(MeshShape(), jax.local_devices()[:1])
    shape = Scoring(rows=1, row_length=_ROW_LENGTH.value)
    ratings, _ = rate_traces(model, chats, texts, DIMENSIONS, shape, mesh, dtype)
    table = ratings.expectation.reshape(_PROBLEMS.value, size, len(DIMENSIONS))
    return table[:, :1], table[:, 1:]


def rating_errors(
    base: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> dict[str, float]:
    """Shift of ratings, and how pairs (clean, corrupted) are ordered and selected."""
    shift = np.abs(np.concatenate([b - a for a, b in zip(base, other, strict=True)], axis=1))
    deltas = [(clean - corrupted).sum(axis=-1).ravel() for clean, corrupted in (base, other)]
    half = len(deltas[0]) // 2
    top = [set(np.argsort(-d, kind="stable")[:half].tolist()) for d in deltas]
    return {
        "ratings": shift.size,
        "mean |Δ rating|, points": float(shift.mean()),
        "largest |Δ rating|": float(shift.max()),
        "standard deviation of sample deltas": float(deltas[0].std()),
        "share of pairs ordered alike": float(np.mean(np.sign(deltas[0]) == np.sign(deltas[1]))),
        "share of the top half kept": len(top[0] & top[1]) / half,
    }


def read_rows(path: str, model: LoadedModel) -> list[np.ndarray]:
    """Returns the tokens of a file in rows of --length; what fills no row is left out.

    Raises:
      ConfigError: there is no file, or its text is shorter than a row.
    """
    if not Path(path).is_file():
        raise ConfigError(f"--text is {path!r} and there is no such file; name a file of text.")
    # Tokens that begin every text, such as <bos>; many models read nothing well without them.
    first = list(model.text.tokenizer("")["input_ids"])
    tokens = model.text.encode_plain(_text(path))
    length = _LENGTH.value - len(first)
    if len(tokens) < length:
        raise ConfigError(
            f"--text is {path!r}, which has {len(tokens)} tokens, and --length is {_LENGTH.value}; "
            "name a longer text or shorter rows."
        )
    starts = range(0, len(tokens) - length + 1, length)
    return [np.asarray(first + tokens[start : start + length], np.int32) for start in starts]


def _text(path: str) -> str:
    """The text of a file.

    Raises:
      ConfigError: it is no UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--text names {path}, which is no text in UTF-8 ({e.reason}).") from e


def main(_: list[str]) -> None:
    """Compares all variants with float32, prints a table and writes the JSON."""
    path = str(_MODEL.value)
    base = load(path)
    rows = read_rows(str(_TEXT.value), base)
    variants = [("bfloat16", "bfloat16", ""), *((q, _DTYPE.value, q) for q in _QUANTIZATION.value)]
    rated = ratings_of(base, "float32") if _PROBLEMS.value else None
    found: dict[str, dict[str, Any]] = {}
    for name, dtype, quantization in variants:
        model = load(path, dtype, dtype, quantization)
        row = {"computed in": dtype, "weights, MiB": weight_bytes(model.spec, dtype) / 2**20}
        row |= token_errors(base, model, rows)
        if rated:
            row |= rating_errors(rated, ratings_of(model, dtype))
        found[name] = row
    console = plain_console()
    say(console, f"{path} against itself in float32:")
    table = Table("", *found, box=box.SIMPLE)
    for measure in found["bfloat16"]:
        values = (row[measure] for row in found.values())
        table.add_row(measure, *(v if isinstance(v, str) else f"{v:,.4g}" for v in values))
    console.print(table)
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps({"model": path} | found, indent=1) + "\n")


if __name__ == "__main__":
    flags.mark_flags_as_required(["model", "text"])
    run_main(main)
