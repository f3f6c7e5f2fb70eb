import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Generator, MeshShape, Model, Sampling
from deltapref_jax.mesh import make_mesh
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import load
from deltapref_jax.records import Prompt, TokenSequence, Trace, Verdict
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.stages.sample import TraceTable, asked
from deltapref_jax.stages.verify import VerdictTable
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import prompts
from deltapref_jax.text.template import ChatTokenizer

SAMPLING = Sampling(max_prompt=300, max_tokens=12, slots=8, chunk=4, shard=3)
QUESTIONS = prompts(("chain", "sorting"), 8, 1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    build((question.messages for question in QUESTIONS), 300, path)
    text = ChatTokenizer.load(str(path))
    spec = ModelSpec(len(text.tokenizer), 16, 2, 2, 1, 8, 24, max_positions=400)
    state = nnx.state(Decoder(spec, rngs=nnx.Rngs(0)))
    export(jax.tree.map(lambda x: 10 * x, state), spec, text, path)
    return str(path)


@pytest.fixture
def node(bench, folder):
    """The function of path and options to a table of traces."""

    def of(path=folder, sampling=SAMPLING, seed=0, **options):
        model = Model(path=path)
        return TraceTable(
            label=("sample", "g"),
            prompts=bench.given(Prompt, QUESTIONS),
            generator=Generator(**{"name": "g", "model": model, "samples": 2} | options),
            weights=weights_hash(path),
            sampling=sampling,
            seed=seed,
            mesh=MeshShape(),
        )

    return of


def made(root, wanted):
    workspace = Workspace(root)
    run([wanted], workspace, show=False)
    return workspace.rows(Trace, wanted)


def test_traces(node, folder, tmp_path):
    wanted = node()
    rows = made(tmp_path, wanted)
    assert [(row.prompt_id, row.sample) for row in rows] == [
        (question.prompt_id, s) for question in QUESTIONS for s in (0, 1)
    ]
    assert len({row.trace_id for row in rows}) == 16
    text = ChatTokenizer.load(folder)
    for row in rows:
        assert (row.generator, row.tokens) == ("g", len(row.token_ids))
        assert row.finish == ("eos" if row.token_ids[-1] in text.end_ids else "length")
        assert row.text == text.decode(row.token_ids)
    stats = Workspace(tmp_path).manifest(wanted).stats
    assert stats["tokens"] == sum(row.tokens for row in rows)
    assert stats["truncated"] == sum(row.finish == "length" for row in rows)
    assert 0 < stats["utilisation"] <= 1


def test_shard_and_slots_do_not_matter(node, tmp_path):
    other = node(sampling=dataclasses.replace(SAMPLING, shard=8, slots=16, chunk=5))
    for a, b in zip(made(tmp_path, node()), made(tmp_path, other), strict=True):
        assert a.logprob == pytest.approx(b.logprob, rel=1e-4, abs=1e-4)
        a, b = (t._replace(logprob=0.0, token_ids=t.token_ids.tolist()) for t in (a, b))
        assert a == b


def test_a_killed_run_ends_with_the_same_bytes(node, tmp_path):
    wanted = node()
    made(tmp_path, wanted)
    directory = Workspace(tmp_path).path(wanted)
    before = {path.name: path.read_bytes() for path in directory.glob("*.parquet")}
    assert len(before) == 3
    for lost in ("manifest.json", "shard-00001-of-00003.json"):
        (directory / lost).unlink()
    made(tmp_path, wanted)
    assert {path.name: path.read_bytes() for path in directory.glob("*.parquet")} == before


def test_seed_name_and_temperature_make_other_traces(node, tmp_path):
    wanted = (node(), node(seed=1), node(name="h"), node(temperature=0.5))
    ids = [{row.trace_id for row in made(tmp_path, n)} for n in wanted]
    assert len(set.union(*ids)) == 4 * 16


def test_the_path_of_the_weights_is_not_hashed(node, folder, tmp_path):
    (tmp_path / "copy").symlink_to(folder)
    moved, hashed = node(str(tmp_path / "copy")), {"prompts": "x"}
    assert moved.key(hashed) == node().key(hashed)
    assert moved.key(hashed) != node(seed=1).key(hashed)


def test_system_and_prefix():
    messages = json.dumps(
        [{"role": "system", "content": "old"}, {"role": "user", "content": "2 + 2?"}]
    )
    prompt = Prompt("id", "task", messages, "", "", "{}")
    assert asked(prompt, "", "") == json.loads(messages)
    assert asked(prompt, "Be brief.", "1 + 1 = 2. ") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 = 2. 2 + 2?"},
    ]


def test_a_long_prompt_is_named_before_anything_is_sampled(node, tmp_path):
    wanted = node(sampling=dataclasses.replace(SAMPLING, max_prompt=10))
    with pytest.raises(
        ValueError, match=r"Prompt [0-9a-f]{16} has \d+ tokens; .*max_prompt allows 1 to 10"
    ):
        made(tmp_path, wanted)
    # the prompts were made, so that the place of the traces is known
    assert not list(Workspace(tmp_path).path(wanted).glob("*.parquet"))


def test_verdicts(bench):
    right, unchecked = QUESTIONS[0], QUESTIONS[1]._replace(checker="")
    texts = [
        (right, f"Answer: {right.answer}", "eos"),
        (right, "Answer: no", "eos"),
        (right, "hm", "stop"),
        (right, f"Answer: {right.answer}", "length"),
        (unchecked, "Answer: 1", "length"),
    ]
    traces = [
        Trace(str(i), p.prompt_id, "g", "w", i, text, [1], finish, -1.0, 1)
        for i, (p, text, finish) in enumerate(texts)
    ]
    wanted = VerdictTable(
        label=("verify", "g"),
        prompts=bench.given(Prompt, [right, unchecked]),
        traces=bench.given(Trace, traces),
    )
    rows = bench.rows(Verdict, wanted)
    assert [(row.trace_id, row.correct, row.note) for row in rows] == [
        ("0", True, ""),
        ("1", False, ""),
        ("2", False, "no answer"),
        ("3", False, "unfinished"),
        ("4", None, ""),
    ]
    assert bench.stats(wanted) == {"correct": 1, "checked": 4, "unfinished": 1, "rows": 5}


@pytest.mark.slow  # to be compiled as for users: without LLVM's optimisations sums differ by 5e-4
def test_a_quantised_generator_is_another_one_and_says_so(node, folder, tmp_path):
    """Its draws are its own, and the log-probabilities are those of its quantised weights."""
    plain, made_of = node(), node(model=Model(folder, quantization="int8"))
    assert plain.identity != made_of.identity
    assert plain.config() != made_of.config()
    rows = made(tmp_path, made_of)
    assert not {row.trace_id for row in rows} & {row.trace_id for row in made(tmp_path, plain)}
    workspace = Workspace(tmp_path)
    assert workspace.table(made_of).schema.metadata == {b"quantization": b"int8"}
    assert not workspace.table(plain).schema.metadata
    assert workspace.manifest(made_of).config["generator"]["model"]["quantization"] == "int8"
    # The scorer has the engine's log-probabilities with the same weights alone.
    text = ChatTokenizer.load(folder)
    prompts_of = {q.prompt_id: text.prompt_ids(q.chat()) for q in QUESTIONS}
    sequences = [
        TokenSequence(np.asarray(prompts_of[row.prompt_id], np.int32), row.token_ids)
        for row in rows
    ]
    sums = {
        q: score_sequences(
            model.spec, model.state, sequences, 8, 320, make_mesh(MeshShape()), "float32"
        ).sums
        for q in ("", "int8")
        for model in [load(folder, quantization=q)]
    }
    sampled = [row.logprob for row in rows]
    assert sampled == pytest.approx(sums["int8"], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(sampled, sums[""], strict=True)) > 1e-3
