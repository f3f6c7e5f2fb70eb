import dataclasses
import json

import jax
import pytest
from deltapref_jax.workspace import Node, Workspace, run
from flax import nnx

from deltapref_jax.config import Generator, MeshShape, Model, Sampling
from deltapref_jax.models.decoder import Decoder
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import export
from deltapref_jax.records import PROMPT, TRACE, table
from deltapref_jax.stages.sample import describe, messages, sample
from deltapref_jax.stages.verify import verify
from deltapref_jax.synthetic.tokenizer import build
from deltapref_jax.synthetic.world import prompts
from deltapref_jax.text.template import ChatTokenizer

SAMPLING = Sampling(max_prompt=300, max_tokens=12, slots=8, chunk=4, shard=3)
QUESTIONS = prompts(("chain", "sorting"), 8, 1, 0)


def write_prompts(job):
    job.write(table(PROMPT, QUESTIONS[: job.config["count"]]))


STAGES = {"prompts": write_prompts, "sample": sample, "verify": verify}
ASKED = Node("prompts", "prompts", {"count": 8})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model")
    build((question["messages"] for question in QUESTIONS), 300, path)
    text = ChatTokenizer.load(str(path))
    spec = ModelSpec(len(text.tokenizer), 16, 2, 2, 1, 8, 24, max_positions=400)
    state = nnx.state(Decoder(spec, rngs=nnx.Rngs(0)))
    export(jax.tree.map(lambda x: 10 * x, state), spec, text, path)
    return str(path)


def node(folder, sampling=SAMPLING, seed=0, **options):
    generator = Generator(**{"name": "g", "model": Model(folder), "samples": 2} | options)
    config, local = describe(generator, sampling, seed, MeshShape())
    return Node("sample", "sample g", config, {"prompts": ASKED}, local)


def made(root, wanted):
    workspace = Workspace(root)
    run({"it": wanted}, STAGES, workspace, show=False)
    return workspace.table(wanted).to_pylist()


def test_traces(folder, tmp_path):
    wanted = node(folder)
    rows = made(tmp_path, wanted)
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (question["prompt_id"], s) for question in QUESTIONS for s in (0, 1)
    ]
    assert len({row["trace_id"] for row in rows}) == 16
    text = ChatTokenizer.load(folder)
    for row in rows:
        assert (row["generator"], row["tokens"]) == ("g", len(row["token_ids"]))
        assert row["finish"] == ("eos" if row["token_ids"][-1] in text.end_ids else "length")
        assert row["text"] == text.decode(row["token_ids"])
    stats = Workspace(tmp_path).manifest(wanted)["stats"]
    assert stats["tokens"] == sum(row["tokens"] for row in rows)
    assert stats["truncated"] == sum(row["finish"] == "length" for row in rows)
    assert 0 < stats["utilisation"] <= 1


def test_shard_and_slots_do_not_matter(folder, tmp_path):
    other = dataclasses.replace(SAMPLING, shard=8, slots=16, chunk=5)
    for a, b in zip(made(tmp_path, node(folder)), made(tmp_path, node(folder, other)), strict=True):
        assert a.pop("logprob") == pytest.approx(b.pop("logprob"), rel=1e-4, abs=1e-4)
        assert a == b


def test_a_killed_run_ends_with_the_same_bytes(folder, tmp_path):
    wanted = node(folder)
    made(tmp_path, wanted)
    directory = Workspace(tmp_path).path(wanted)
    before = {path.name: path.read_bytes() for path in directory.glob("*.parquet")}
    assert len(before) == 3
    for lost in ("manifest.json", "shard-00001-of-00003.json"):
        (directory / lost).unlink()
    made(tmp_path, wanted)
    assert {path.name: path.read_bytes() for path in directory.glob("*.parquet")} == before


def test_seed_name_and_temperature_make_other_traces(folder, tmp_path):
    ids = [
        {row["trace_id"] for row in made(tmp_path, n)}
        for n in (
            node(folder),
            node(folder, seed=1),
            node(folder, name="h"),
            node(folder, temperature=0.5),
        )
    ]
    assert len(set.union(*ids)) == 4 * 16


def test_the_path_of_the_weights_is_not_hashed(folder, tmp_path):
    (tmp_path / "copy").symlink_to(folder)
    assert node(str(tmp_path / "copy")).key == node(folder).key


def test_system_and_prefix():
    prompt = {
        "messages": json.dumps(
            [{"role": "system", "content": "old"}, {"role": "user", "content": "2 + 2?"}]
        )
    }
    assert messages(prompt, {"system": "", "prefix": ""}) == json.loads(prompt["messages"])
    assert messages(prompt, {"system": "Be brief.", "prefix": "1 + 1 = 2. "}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1 = 2. 2 + 2?"},
    ]


def test_a_long_prompt_is_named_before_anything_is_sampled(folder, tmp_path):
    wanted = node(folder, dataclasses.replace(SAMPLING, max_prompt=10))
    with pytest.raises(
        ValueError, match=r"Prompt [0-9a-f]{16} has \d+ tokens; .*max_prompt allows 1 to 10"
    ):
        made(tmp_path, wanted)
    assert not list(Workspace(tmp_path).path(wanted).glob("*.parquet"))


def test_verdicts(tmp_path):
    right, unchecked = QUESTIONS[0], {**QUESTIONS[1], "checker": ""}
    texts = [
        (right, f"Answer: {right['answer']}", "eos"),
        (right, "Answer: no", "eos"),
        (right, "hm", "stop"),
        (right, f"Answer: {right['answer']}", "length"),
        (unchecked, "Answer: 1", "length"),
    ]
    rows = [
        {
            "trace_id": str(i),
            "prompt_id": p["prompt_id"],
            "generator": "g",
            "sample": i,
            "text": text,
            "weights": "w",
            "token_ids": [1],
            "finish": finish,
            "logprob": -1.0,
            "tokens": 1,
        }
        for i, (p, text, finish) in enumerate(texts)
    ]
    stages = {
        "verify": verify,
        "prompts": lambda job: job.write(table(PROMPT, [right, unchecked])),
        "sample": lambda job: job.write(table(TRACE, rows)),
    }
    wanted = Node(
        "verify",
        "verify g",
        {},
        {"sample": Node("sample", "g", {}), "prompts": Node("prompts", "p", {})},
    )
    workspace = Workspace(tmp_path)
    run({"it": wanted}, stages, workspace, show=False)
    assert [
        (row["trace_id"], row["correct"], row["note"])
        for row in workspace.table(wanted).to_pylist()
    ] == [
        ("0", True, ""),
        ("1", False, ""),
        ("2", False, "no answer"),
        ("3", False, "unfinished"),
        ("4", None, ""),
    ]
    assert workspace.manifest(wanted)["stats"] == {
        "correct": 1,
        "checked": 4,
        "unfinished": 1,
        "rows": 5,
    }
