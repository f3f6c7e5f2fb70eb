"""One arm from a file of pairs.

Every format trains, a second run makes nothing, a killed run ends the same, and a reference table
is used if it fits and refused if it does not.
"""

import dataclasses
import fnmatch
import json
import operator
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from configs.train import get_config
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, Lora, Model, Objective, Pairs, PairTraining, Training
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.models.weights import inspect_model
from deltapref_jax.records import TokenSequence
from deltapref_jax.scoring.logprobs import score_sequences
from deltapref_jax.stages.pairs_file import check, plan
from deltapref_jax.synthetic import world
from deltapref_jax.validation import validate_pair_training
from launch.trained import show
from tests.marks import mostly

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LOG_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
QUESTIONS = [q.question for q in world.prompts(("chain", "shop"), 16, 1, 3)]
PAIRS = [
    {"prompt": q, "chosen": f" Answer: {i}.", "rejected": f" Answer: {i + 3}!"}
    for i, q in enumerate(QUESTIONS)
]


def answer(content):
    return [{"role": "assistant", "content": content}]


def asked(content):
    return [{"role": "user", "content": content}]


def rows_of(name, text):
    """The same questions in one of the formats."""
    if name == "text":
        return [row | {"source": "here"} for row in PAIRS]
    if name == "messages":
        return [
            {"prompt": asked(r["prompt"])} | {k: answer(r[k]) for k in ("chosen", "rejected")}
            for r in PAIRS
        ]
    if name == "conversations":
        return [
            {k: asked(r["prompt"]) + answer(r[k]) for k in ("chosen", "rejected")} for r in PAIRS
        ]
    if name == "unpaired":
        return [
            {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
            for r in PAIRS
            for k in ("chosen", "rejected")
        ]
    ids = [
        {"prompt_ids": text.encode_plain(r["prompt"])}
        | {f"{k}_ids": text.completion_ids(r[k], True) for k in ("chosen", "rejected")}
        for r in PAIRS
    ]
    if name == "ids":
        return ids
    return [
        {"prompt_ids": r["prompt_ids"], "completion_ids": r[f"{k}_ids"], "label": k == "chosen"}
        for r in ids
        for k in ("chosen", "rejected")
    ]


@pytest.fixture
def pair_training(tiny_folder, text, tmp_path):
    """A run of a format; what is given overrides fields of the training."""

    def make(format="text", kind="dpo", ending="jsonl", rows=None, **training):
        path = tmp_path / f"{format}.{ending}"
        rows = rows or rows_of(format, text)
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shape = {
            "pairs_per_step": 4,
            "steps": 3,
            "rows": 8,
            "row_length": 128,
            "warmup": 0.0,
            "checkpoint_every": 1,
        }
        return validate_pair_training(
            PairTraining(
                workspace=str(tmp_path / "workspace"),
                data=Pairs(str(path)),
                student=Model(str(tiny_folder)),
                objective=Objective(name=kind, kind=kind, learning_rate=1e-3),
                training=Training(**shape | training),
            )
        )

    return make


def tokens(p):
    """Makes the sequences of the file; the workspace and the policy's node."""
    workspace, policy = Workspace(p.workspace), plan(p)
    run([policy.sequences["file"]], workspace, show=False)
    return workspace, policy


def made(p):
    """Runs it as launch.train does; the workspace and the policy's node."""
    workspace, policy = tokens(p)
    check(p, policy, workspace)
    run([policy], workspace, show=False)
    return workspace, policy


def metrics(workspace, policy):
    lines = (workspace.path(policy) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(workspace, policy):
    return (workspace.path(policy) / "policy" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("format", "kind", "ending", "loss"),
    mostly(
        pytest.mark.slow,
        [
            ("text", "dpo", "jsonl", np.log(2)),
            ("messages", "dpo_norm", "parquet", np.log(2)),
            ("conversations", "kto", "jsonl", 0.5),
            ("unpaired", "kto", "parquet", 0.5),
            ("ids", "dpo", "parquet", np.log(2)),
            ("unpaired ids", "kto", "jsonl", 0.5),
        ],
        *(1, 2, 5),
    ),
)
def test_every_format_trains_from_the_references_own_loss(
    pair_training, format, kind, ending, loss
):
    workspace, policy = made(pair_training(format, kind, ending))
    rows = metrics(workspace, policy)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[0]["loss"] == pytest.approx(loss, abs=1e-4)
    assert rows[2]["loss"] < rows[0]["loss"]
    trained = str(workspace.path(policy) / "policy")
    assert weights_hash(trained) != policy.student_weights
    stats = workspace.manifest(policy).stats
    assert (stats["groups"], stats["dropped_long"]) == (32 if kind == "kto" else 16, 0)


def test_sft_takes_the_desirable_ones(pair_training):
    one, two = made(pair_training("text", "sft")), made(pair_training("unpaired", "sft"))
    assert one[1].logprobs == {}
    assert metrics(*one) == metrics(*two)
    for (workspace, policy), undesirable in ((one, 16), (two, 16)):
        stats = workspace.manifest(policy.sequences["file"]).stats
        assert (stats["groups"], stats["undesirable"]) == (16, undesirable)


def test_the_table_holds_the_references_log_probabilities_and_its_weights(
    pair_training, tiny, tiny_folder, one_device
):
    workspace, policy = made(pair_training("text", "kto"))
    (file,) = workspace.path(policy.logprobs["file"]).glob("*.parquet")
    assert pq.read_schema(file).metadata[b"weights"].decode() == weights_hash(str(tiny_folder))
    everything = workspace.rows(TokenSequence, policy.sequences["file"])
    rows, table = [s for s in everything if s.matched], pq.read_table(file).to_pylist()
    assert [t["sequence_id"] for t in table] == [s.sequence_id for s in everything]
    assert [t["tokens"] for t in table] == [s.targets.sum() for s in everything]
    assert (
        len(table) == 2 * len(rows) == 64
    )  # each once behind its own prompt and once behind another
    want = score_sequences(
        tiny.spec,
        tiny.state,
        rows,
        8,
        128,
        one_device,
        "float32",
    ).sums
    assert [t["trace_id"] for t in table[:32]] == [r.trace_id for r in rows]
    np.testing.assert_allclose([t["logprob"] for t in table[:32]], want, rtol=1e-5)
    own = {r.prompt_id for r in rows}
    assert {t["prompt_id"] for t in table[32:]} == own
    assert all(t["prompt_id"] != r.prompt_id for t, r in zip(table[32:], rows, strict=True))


def test_a_second_run_and_another_seed_do_not_score_again(pair_training, monkeypatch):
    first = pair_training("text", "kto")
    workspace, policy = made(first)
    before = weights(workspace, policy)
    monkeypatch.setattr(
        "deltapref_jax.stages.score.score_sequences", lambda *_: pytest.fail("scored again")
    )
    assert weights(*made(first)) == before
    other = made(dataclasses.replace(first, seed=1))
    assert workspace.key(other[1].logprobs["file"]) == workspace.key(policy.logprobs["file"])
    assert weights(*other) != before


def test_a_given_table_is_used_and_one_of_other_weights_or_tokens_is_refused(
    pair_training, tiny, tmp_path, text, monkeypatch
):
    workspace, policy = made(pair_training())
    table = workspace.path(policy.logprobs["file"])
    given = dataclasses.replace(pair_training(), table=str(table), seed=0)
    with monkeypatch.context() as m:
        m.setattr(
            "deltapref_jax.stages.score.score_sequences", lambda *_: pytest.fail("scored again")
        )
        again = made(given)
    assert again[1].logprobs["file"].known != ""
    assert workspace.manifest(again[1].logprobs["file"]).stats["from_table"] == 32
    assert workspace.manifest(policy.logprobs["file"]).stats["from_table"] == 0
    assert weights(*again) == weights(workspace, policy)

    other = tmp_path / "other"
    export(jax.tree.map(lambda x: x * 1.01, tiny.state), tiny.spec, text, other)
    with pytest.raises(ConfigError) as error:
        plan(dataclasses.replace(given, student=Model(str(other))))
    file = next(iter(table.glob("*.parquet")))
    assert str(error.value) == (
        f"The table {file} was made by the weights {weights_hash(given.student.place)} and the "
        f"reference has the weights {weights_hash(str(other))}; name the model that made it in "
        "config.reference.path, or leave config.table empty to have it computed."
    )

    with pytest.raises(
        ConfigError,
        match=r"^The table \S+ has no log-probability for 32 of 32 sequences, such as that "
        r"of Line 1 of messages\.jsonl, chosen; it was made of other tokens .*: leave "
        r"config\.table empty to have them computed\.$",
    ):
        made(dataclasses.replace(pair_training("messages"), table=str(table)))
    with pytest.raises(
        ConfigError,
        match=r"^There is no Parquet file at nowhere; check config\.table, or leave it ",
    ):
        plan(dataclasses.replace(given, table="nowhere"))


def test_another_reference_is_scored_and_not_guarded(pair_training, tiny, tmp_path, text):
    other = tmp_path / "other"
    export(jax.tree.map(lambda x: x * 1.05, tiny.state), tiny.spec, text, other)
    workspace, policy = made(dataclasses.replace(pair_training(), reference=Model(str(other))))
    assert policy.logprobs["file"].weights == weights_hash(str(other))
    assert metrics(workspace, policy)[0]["rewards/chosen"] != pytest.approx(0, abs=1e-4)


def test_adapters_of_a_bfloat16_base_start_at_the_bases_own_reference(
    pair_training, tiny, tmp_path, text
):
    base = tmp_path / "base"
    export(tiny.state, tiny.spec, text, base, "bfloat16")
    one = dataclasses.replace(
        pair_training("text", "kto", lora=Lora(4), weight_decay=0.1),
        student=Model(str(base), "bfloat16"),
    )
    workspace, policy = made(one)
    reference = policy.logprobs["file"]
    assert (reference.weights, reference.dtype) == (weights_hash(str(base)), "bfloat16")
    rows = metrics(workspace, policy)
    assert rows[0]["rewards/chosen"] == pytest.approx(
        0, abs=1e-4
    )  # 0.1 per nat: the same program to the last digits
    assert rows[2]["loss"] < rows[0]["loss"]
    config = json.loads((workspace.path(policy) / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == (str(base), 4)


def test_a_base_model_without_a_chat_template_trains_on_text_and_refuses_messages(
    pair_training, tiny_folder, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").unlink()
    workspace, policy = made(
        dataclasses.replace(pair_training("text", "sft"), student=Model(str(base)))
    )
    assert len(metrics(workspace, policy)) == 3
    with pytest.raises(
        ConfigError,
        match=rf"^The tokenizer of {base} has no chat template; add chat_template\.jinja "
        "to its folder, or give text instead of messages\\.$",
    ):
        made(dataclasses.replace(pair_training("messages"), student=Model(str(base))))


LONG = [PAIRS[0] | {"chosen": " so" * 200}, *PAIRS[1:]]


@pytest.mark.parametrize(
    ("kind", "rule", "groups", "counts"),
    [
        ("dpo", "drop", 15, {"too_long": 1, "truncated": 0}),
        ("dpo", "truncate", 16, {"too_long": 0, "truncated": 1}),
        ("kto", "drop", 31, {"too_long": 1, "truncated": 0}),
        ("kto", "truncate", 32, {"too_long": 0, "truncated": 1}),
    ],
)
def test_too_long_is_dropped_or_cut_and_said(pair_training, kind, rule, groups, counts, capsys):
    workspace, policy = made(
        pair_training(kind=kind, rows=[r | {"note": 1, "id": 2} for r in LONG], over_length=rule)
    )
    stats = workspace.manifest(policy.sequences["file"]).stats
    assert {k: stats[k] for k in counts} == counts
    assert workspace.manifest(policy).stats["groups"] == groups
    show(Console(width=200), workspace, policy)
    out = capsys.readouterr().out
    assert "text.jsonl (paired)" in out
    assert "2 columns ignored: id, note" in out
    assert f"  {groups} trained on" in out
    assert ("1 longer than row_length, dropped" in out) == (rule == "drop")
    assert ("1 sequences cut to row_length" in out) == (rule == "truncate")
    assert str(workspace.path(policy) / "policy") in out


def test_mismatched_rows_follow_the_length_rule(pair_training):
    """Each sequence fits its row; a long answer behind the long question does not."""
    rows = [
        {"prompt": "why " * 60, "chosen": " so.", "rejected": " no."},
        *({"prompt": q, "chosen": " so" * 40, "rejected": " no."} for q in QUESTIONS[:3]),
    ]
    for rule, dropped in (("drop", "dropped_mismatched"), ("truncate", "truncated_mismatched")):
        workspace, policy = made(
            pair_training("text", "kto", rows=rows, over_length=rule, row_length=200)
        )
        stats, found = (
            workspace.manifest(node).stats for node in (policy, policy.sequences["file"])
        )
        assert (found[dropped], stats["groups"]) == (1, 8)
        assert stats["dropped_mismatched"] == (rule == "drop")
    with pytest.raises(
        ConfigError,
        match=r"^Line [234] of \S+, chosen has a completion that is \d+ tokens long behind the "
        r"prompt of Line 1 of \S+, chosen \(KTO's baseline\), and config\.training\."
        r"row_length is 200; raise it, or set config\.training\.over_length to ",
    ):
        made(pair_training("text", "kto", rows=rows, over_length="error", row_length=200))


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_file_may_bring_the_prompts_of_its_mismatched_rows(pair_training, ending):
    """Null: the row has no mismatched row; a prompt that is too long follows the length rule."""
    others = [[6, 7], None, [5] * 30, [5]]
    rows = [
        {
            "prompt_ids": [5, 6 + i],
            "completion_ids": [8, 9, 4],
            "label": i < 2,
            "mismatched_prompt_ids": other,
        }
        for i, other in enumerate(others)
    ]
    for rule in ("drop", "truncate"):  # nothing of the third completion would stay
        p = pair_training("ids", "kto", ending, rows, over_length=rule, row_length=16)
        workspace, policy = tokens(p)
        found = workspace.rows(TokenSequence, policy.sequences["file"])
        assert [row.prompt_ids.tolist() for row in found if row.matched] == [
            row["prompt_ids"] for row in rows
        ]
        mismatched = {row.trace_id: row for row in found if not row.matched}
        assert [row.prompt_ids.tolist() for row in mismatched.values()] == [[6, 7], [5]]
        assert list(mismatched) == [found[0].trace_id, found[3].trace_id]
        assert all(row.completion_ids.tolist() == [8, 9, 4] for row in mismatched.values())
        assert workspace.manifest(policy.sequences["file"]).stats["dropped_mismatched"] == 2
        check(p, policy, workspace)
    p = pair_training("ids", "kto", ending, rows, over_length="error", row_length=16)
    with pytest.raises(
        ConfigError,
        match=r"^(Line 3|Row 2) of \S+ has a completion that is 33 tokens long behind its "
        r"mismatched_prompt_ids \(KTO's baseline\), and config\.training\.row_length is 16; raise ",
    ):
        tokens(p)


def test_what_a_step_of_one_side_lacks_is_left_blank(pair_training, capsys):
    """A run of KTO may end, or begin, with a step that has no undesirable example."""
    workspace, policy = made(pair_training("text", "kto", steps=2))
    file = workspace.path(policy) / "metrics.jsonl"
    first, second = metrics(workspace, policy)
    short = {name: value for name, value in second.items() if not name.endswith("rejected")}
    for rows in ((first, short), (short, first)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        show(Console(width=200), workspace, policy)
        (line,) = [
            line for line in capsys.readouterr().out.splitlines() if "logps/rejected" in line
        ]
        assert re.findall(r"-\d+\.\d{4}", line) == [f"{first['logps/rejected']:.4f}"]


@pytest.mark.parametrize("format", ["text", "messages", "ids"])
@pytest.mark.parametrize(("kind", "groups"), [("dpo", 15), ("kto", 31), ("sft", 15)])
def test_an_empty_answer_is_dropped_and_counted(pair_training, text, format, kind, groups):
    rows = rows_of(format, text)
    name, nothing = {
        "text": ("chosen", ""),
        "messages": ("chosen", answer("")),
        "ids": ("chosen_ids", []),
    }[format]
    one = pair_training(format, kind, rows=[rows[0] | {name: nothing}, *rows[1:]])
    workspace, policy = tokens(one)
    stats = workspace.manifest(policy.sequences["file"]).stats
    assert (stats["empty"], stats["groups"]) == (1, groups)
    rows_left = workspace.rows(TokenSequence, policy.sequences["file"])
    assert all(len(row.completion_ids) > 1 for row in rows_left)
    with pytest.raises(
        ConfigError,
        match=r"^All 16 pairs or examples of \S+ have an empty answer; give it some that "
        r"have none\.$",
    ):
        tokens(pair_training(format, "dpo", rows=[r | {name: nothing} for r in rows]))


def test_pairs_of_two_equal_answers_are_counted_cut_ones_too(pair_training, text):
    rows = [{"prompt": "a", "chosen": " so" * 200 + "!", "rejected": " so" * 200 + "?"}, *PAIRS]
    for rule, same in (("drop", 0), ("truncate", 1)):
        workspace, policy = tokens(pair_training(rows=rows, over_length=rule))
        assert workspace.manifest(policy.sequences["file"]).stats["same"] == same


def test_what_file_and_config_show_is_refused_before_the_reference_is_scored(
    command, pair_training
):
    """Seed 0 draws a step of both answers of one prompt."""
    one = pair_training("text", "kto")
    done = command(
        "launch.train",
        *flags_of(one),
        "--config.objective.kind=kto",
        "--config.training.pairs_per_step=1",
        "--config.training.steps=99",
    )
    said = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"Step \d+ of KTO \(\d of 99 steps\) would hold 2 examples of one prompt; ", said
    )
    assert done.returncode == 2
    stages = {place.name for place in pathlib.Path(one.workspace).iterdir()}
    assert stages == {"tokens", "index.json", "by_name", "claims"}


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"max_positions": 20},
            r"^A sequence of \d+ tokens is longer than the 20 positions that the model \S+ was "
            r"made for; lower config\.training\.row_length, so that over_length applies\.$",
        ),
        (
            {"vocab": 9},
            r"^The data have the token id \d+ and the model \S+ has the ids 0 to 8; use the "
            r"tokenizer of ",
        ),
    ],
)
def test_sequences_that_the_reference_was_not_made_for_are_refused(
    pair_training, spec, sentence, monkeypatch
):
    one = pair_training()
    workspace, policy = tokens(one)
    check(one, policy, workspace)
    monkeypatch.setattr(
        "deltapref_jax.stages.pairs_file.inspect_model",
        lambda path: (dataclasses.replace(inspect_model(path)[0], **spec), None),
    )
    with pytest.raises(ConfigError, match=sentence):
        check(one, policy, workspace)


def test_a_reference_with_another_tokenizer_is_refused(pair_training, tiny, tmp_path):
    other = tmp_path / "other"
    export(tiny.state, tiny.spec, tiny.text, other)
    file = other / "tokenizer.json"
    held = json.loads(file.read_text())
    words = held["model"]["vocab"]
    a, b = [word for word in words if len(word) == 1][:2]
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(held))
    with pytest.raises(
        ConfigError,
        match=r"^The reference \S+ has another tokenizer than the student \S+, so that ",
    ):
        plan(dataclasses.replace(pair_training(), reference=Model(str(other))))


def test_adapters_wider_than_the_narrowest_matrix_are_refused(pair_training, tiny):
    width = tiny.spec.kv_heads * tiny.spec.head_width
    assert width < tiny.spec.width
    plan(pair_training(lora=Lora(width)))
    plan(pair_training(lora=Lora(width + 1, targets=("q_proj", "up_proj"))))
    with pytest.raises(ConfigError) as error:
        plan(pair_training(lora=Lora(width + 1)))
    assert str(error.value) == (
        f"config.training.lora.rank is {width + 1} and k_proj of the student is {width} wide; "
        "make rank that at most, or train all weights with rank 0."
    )


def test_examples_are_no_pairs(pair_training):
    with pytest.raises(
        ConfigError,
        match=r"^\S+unpaired\.jsonl holds labelled examples and no pairs, which the "
        r"objective 'dpo' needs; set config\.objective\.kind to 'kto' or 'sft', or ",
    ):
        made(pair_training("unpaired"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"data": Pairs()},
            "config.data.path is empty; give a .jsonl or .parquet file, a hub data set or its "
            "folder.",
        ),
        ({"data": Pairs("x", workers=-1)}, "config.data.workers is -1; it must be at least 0."),
        (
            {"data": Pairs("x", truncation_mode="middle")},
            "config.data.truncation_mode is 'middle'; choose one of 'keep_start', 'keep_end'.",
        ),
        (
            {"training": Training(over_length="cut")},
            "config.training.over_length is 'cut'; choose one of 'error', 'drop', 'truncate'.",
        ),
        (
            {"training": Training(budget="epochs", steps=7)},
            "config.training.steps is 7 and nothing reads it, for "
            "config.training.budget is 'epochs'; leave it at 30.",
        ),
        (
            {"training": Training(epochs=3.0)},
            "config.training.epochs is 3.0 and nothing reads it, for "
            "config.training.budget is 'steps'; leave it at 1.0.",
        ),
        (
            {"training": Training(finishes=("eos",))},
            "config.training.finishes is ('eos',) and nothing reads it, for a file "
            "does not say how its answers ended; leave it at ('eos', 'stop').",
        ),
        (
            {"data": Pairs("x", truncation_mode="keep_end")},
            "config.data.truncation_mode is 'keep_end' and nothing reads "
            "it, for config.training.over_length is 'drop'; leave it at 'keep_start'.",
        ),
        (
            {"reference": Model(dtype="bfloat16")},
            "config.reference.dtype is 'bfloat16' and nothing reads it, for "
            "config.reference.path is empty; leave it at 'float32'.",
        ),
        (
            {"objective": Objective(kind="dppo")},
            "config.objective.kind is 'dppo'; choose one of 'dpo', 'dpo_norm', 'hinge', 'ipo', "
            "'robust', 'cdpo', 'apo_zero', 'apo_down', 'simpo', 'kto', 'apo_zero_unpaired', 'sft'.",
        ),
        (
            {"objective": Objective(beta=0.0)},
            "beta in config.objective is 0.0; it must be at least 1e-09.",
        ),
        ({"training": Training(rows=-1)}, "config.training.rows is -1; it must be at least 0."),
        (
            {"student": Model()},
            "config.student.path is empty; give a Hugging Face folder, a hub name or a GGUF file.",
        ),
        ({"name": ""}, "config.name is empty; name the experiment."),
    ],
)
def test_a_bad_value_is_one_sentence(change, sentence):
    with pytest.raises(ConfigError) as error:
        validate_pair_training(
            dataclasses.replace(PairTraining(data=Pairs("x"), student=Model("y")), **change)
        )
    assert str(error.value) == sentence


def flags_of(pair_training):
    fields = {
        "data.path": pair_training.data.path,
        "student.path": pair_training.student.path,
        "workspace": pair_training.workspace,
        "training.row_length": 128,
        "training.pairs_per_step": 4,
        "training.rows": 8,
        "training.budget": "steps",
        "training.steps": 12,
        "training.checkpoint_every": 1,
        "objective.learning_rate": 1e-3,
    }
    return [f"--config.{k}={v}" for k, v in fields.items()]


def program(pair_training):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.train", *flags_of(pair_training)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_a_killed_program_continues_to_the_same_weights(pair_training, tmp_path):
    one = pair_training()
    whole = program(dataclasses.replace(one, workspace=str(tmp_path / "whole")))
    killed = program(one)
    policies = pathlib.Path(one.workspace) / "train"
    while killed.poll() is None and not list(policies.glob("*/checkpoints.*/step_[2-9]*")):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not list(policies.glob("*/manifest.json"))
    killed.communicate()
    again = program(one)
    out, error = again.communicate()
    assert again.returncode == 0
    said = [line for line in error.splitlines() if line.strip()]
    logged = [line[20:] for line in said if re.match(LOG_TIME, line)]
    assert len(logged) == len(said)
    steps = [line for line in logged if re.match(r"train: step \d+ of 12, loss \d", line)]
    assert steps[-1].startswith("train: step 12 of 12")
    assert re.fullmatch(
        r"train: starts\ntrain: \d+% of a step's positions are empty: [^\n]*\n"
        r"train: continues after step \d+ of 12\n"
        r"train: 12 steps, [\d.]+ s, [\d,]+ tokens/s\n"
        r"3 artifacts: 1 made here, 2 stood or made elsewhere",
        "\n".join(line for line in logged if line not in steps),
    ), logged
    assert "  16 trained on" in out
    assert re.search(
        r"^[\d,]+ tokens/s after the first step, .* s; [\d.]+% of the positions were padding$",
        out,
        re.M,
    )
    assert re.search(
        r"^Checkpoints: training stood still for [\d.]+ s, and [\d.]+ s were written ", out, re.M
    )
    texts = [
        re.sub(r"\n.* tokens/s .*\nCheckpoints: .*\n", "\n", text.replace(root, ""))
        for text, root in ((whole.communicate()[0], str(tmp_path / "whole")), (out, one.workspace))
    ]
    assert texts[0] == texts[1]
    (a,), (b,) = (
        [*root.glob("train/*/policy/model.safetensors")]
        for root in (tmp_path / "whole", pathlib.Path(one.workspace))
    )
    assert a.read_bytes() == b.read_bytes()
    lines = [(f.parent.parent / "metrics.jsonl").read_text() for f in (a, b)]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(1, 13))


def test_help_and_a_missing_file(command, pair_training):
    helped = command("launch.train", "--help")
    assert helped.stdout.startswith("Trains one arm from any file of preference pairs")
    for field in (
        "data.path",
        "student.path",
        "objective.kind",
        "training.over_length",
        "table",
        "seed",
    ):
        assert f"--config.{field}" in helped.stdout
    assert "--profile_steps: First and last training step" in " ".join(helped.stdout.split())
    defaults = re.findall(r"--config\.(\S+) +(?:.*\n {8,})*.*\(([\w.-]*)\)$", helped.stdout, re.M)
    assert len(defaults) > 20
    for field, default in defaults:
        assert (field, default) == (field, str(operator.attrgetter(field)(get_config())))
    pairs = dataclasses.replace(pair_training(), data=Pairs("none.parquet"))
    lost = command("launch.train", *flags_of(pairs))
    assert lost.stderr == "There is no data file or folder none.parquet; check config.data.path.\n"
    assert lost.returncode == 2


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--config.objective.nll=1",
            "--config.objective.nll=1: Objective has no field 'nll'; it has name, kind, beta, *",
        ),
        (
            "--config.traning.rows=4",
            "--config.traning.rows=4: PairTraining has no field 'traning' (did you "
            "mean 'training'?); it has name, workspace, *",
        ),
        (
            "--config=configs/quickstart.py",
            "--config gives Experiment where PairTraining is needed; its get_config() must *",
        ),
        (
            "--config.training.lora.rnk=4",
            "--config.training.lora.rnk=4: Lora has no field 'rnk' (did you mean "
            "'rank'?); it has rank, alpha, *",
        ),
        (
            "steps=3",
            "'steps=3' is no flag; flags begin with -- and have = before their value (--help "
            "lists them).",
        ),
        (
            "--config.workspace=",
            "config.workspace is empty; name a folder or bucket for the artifacts.",
        ),
        (
            "--config.training.mesh.data=3",
            "config.training.mesh is data=3 and there are 2 devices; the sizes must multiply to "
            "that; nearest that fits: data=2 or fsdp=2.",
        ),
    ],
)
def test_a_slip_on_the_command_line_is_one_sentence(command, flag, sentence, tiny_folder):
    done = command(
        "launch.train",
        flag,
        *(
            ()
            if flag.startswith("--config=")
            else ("--config.data.path=none.jsonl", f"--config.student.path={tiny_folder}")
        ),
        environment=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert done.returncode == 2
    assert fnmatch.fnmatchcase(done.stderr.strip(), sentence.replace("[", "[[]"))


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("sft", "reference", Model(path="another")), ("simpo", "table", "table.parquet")],
)
def test_a_reference_that_nothing_reads_is_refused(kind, field, value, pair_training):
    objective = Objective(name=kind, kind=kind)
    with pytest.raises(
        ConfigError,
        match=rf"config.{field}.* is .* and objective '{kind}' has no reference; leave it",
    ):
        validate_pair_training(
            dataclasses.replace(pair_training(), objective=objective, **{field: value})
        )


@pytest.mark.parametrize("code", [0, 2])
def test_a_program_ends_with_its_own_code_whatever_aborts_behind_it(code):
    """`Late` stands for C++ that aborts while the interpreter is taken down."""
    end = "preemption.exit_all(2, 'Fix this.')" if code else "preemption.exit_process()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"""
import atexit, os
from deltapref_jax import preemption
class Late:
    def __init__(self): self.end = os._exit
    def __del__(self): self.end(134)
late = Late()
atexit.register(print, "parted")
{end}
""",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        code,
        "parted\n",
        "Fix this.\n" if code else "",
    )
