import pathlib
import re
import subprocess
import sys

import pytest
from rich.console import Console

from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    Arm,
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Model,
    Objective,
    Prompts,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.stages.study import plan
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.validation import validate
from launch.cost import Cost, check_prompts, plan_table

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def experiment(tiny_folder, tmp_path):
    (tmp_path / "asked.jsonl").write_text(
        "".join(f'{{"prompt": "What is {i}+1?"}}\n' for i in range(6))
    )
    return validate(
        Experiment(
            name="tiny",
            question="Does it count?",
            workspace=str(tmp_path / "workspace"),
            prompts=(
                Prompts(tasks=("chain",), count=10),
                Prompts(kind="jsonl", path=str(tmp_path / "asked.jsonl")),
            ),
            generators=(Generator(name="a", samples=2), Generator(name="b")),
            judges=(Judge(name="m", kind="model"),),
            student=Model(path=str(tiny_folder)),
            objectives=(
                Objective(name="dpo"),
                Objective(name="kto", kind="kto"),
                Objective(name="sft", kind="sft"),
            ),
            arms=tuple(
                Arm(name=o, chosen="b", rejected="a", objective=o) for o in ("dpo", "kto", "sft")
            ),
            suites=(Suite(name="s", prompts=Prompts(tasks=("shop",), count=5), samples=3),),
            sampling=Sampling(max_prompt=30, max_tokens=20),
            scoring=Scoring(row_length=64),
            training=Training(pairs_per_step=4, steps=3, row_length=40),
        )
    )


def test_costs_are_counted_by_hand(experiment, tmp_path):
    report = plan(experiment)
    cost = Cost(report, Workspace(tmp_path / "workspace"))
    assert {node.name: cost(node) for node in in_order([report])} == {
        "suite/s": (0, 0),
        "prompts": (0, 0),
        "report": (0, 0),
        "sample/a": (32, 32 * 50),
        "sample/b": (16, 16 * 50),
        "verify/a": (0, 0),
        "verify/b": (0, 0),
        "judge/m/a": (32, 32 * 64),
        "judge/m/b": (16, 16 * 64),
        "tokens/a": (0, 0),
        "tokens/b": (0, 0),
        "score/a": (64, 64 * 50),
        "score/b": (32, 32 * 50),
        "audit/m": (16 * 21, 16 * 21 * 64),
        "evaluate/student/s": (15, 15 * 50),
        "capability/a/s": (15, 15 * 50),
        "capability/b/s": (15, 15 * 50),
        "pair/dpo": (0, 0),
        "pair/kto": (0, 0),
        "pair/sft": (0, 0),
        "train/dpo/0": (24, 24 * 40),
        "train/kto/0": (48, 48 * 40),
        "train/sft/0": (12, 12 * 40),
        "evaluate/dpo/0/s": (15, 15 * 50),
        "evaluate/kto/0/s": (15, 15 * 50),
        "evaluate/sft/0/s": (15, 15 * 50),
    }


def printed(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


def test_table_names_each_artifact_once_and_counts_what_stands(experiment):
    report = plan(experiment)
    workspace = Workspace(experiment.workspace)
    run([report.prompts], workspace, show=False)
    text = printed(plan_table(report, workspace))
    nodes = in_order([report])
    # the questions of both tables are there, so that what is made of them alone has a key
    keys = {node: workspace.key(node) for node in nodes if workspace.key(node)}
    assert {node.stage for node in keys} == {"prompts", "sample", "audit", "evaluate"}
    assert sorted(re.findall(r"\b[0-9a-f]{16}\b", text)) == sorted(keys.values())
    rows = re.findall(r"^│ ([\w/]+) +│.*│ +(yes|no|\?) +│", text, re.MULTILINE)
    there = ("suite/s", "prompts")
    assert dict(rows) == {
        n.name: "yes" if n.name in there else "no" if n in keys else "?" for n in nodes
    }
    assert len(rows) == len(nodes)
    assert re.search(rf"prompts +│ {workspace.key(report.prompts)} │ yes", text)
    assert f"{len(nodes)} artifacts" in text
    # a and b are sampled and measured on the suite, as is the student; the judge is audited
    unknown = len(nodes) - len(keys)
    assert sums(text) == [
        ("2 there", "yes", "0", "0"),
        (f"{len(keys) - 2} missing", "no", "429", "26,154"),
        (f"{unknown} behind missing ones", "?", "273", "13,482"),
    ]


def sums(text):
    """The last rows of the table: what, there, traces, tokens."""
    row = r"^│ (\d+ (?:there|missing|behind missing ones)) +│ +│ (\S+) +│ +(\S+) │ +(\S+) │"
    return re.findall(row, text, re.MULTILINE)


def test_what_may_be_there_is_known_once_its_inputs_are_made(experiment):
    experiment.arms = experiment.judges = experiment.suites = ()
    experiment.sampling.max_prompt = 80
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    run([report.prompts, *report.traces.values()], workspace, show=False)
    # both tables of verdicts have a key now, and the report behind them has none
    assert sums(printed(plan_table(report, workspace))) == [
        ("3 there", "yes", "0", "0"),
        ("2 missing", "no", "0", "0"),
        ("1 behind missing ones", "?", "0", "0"),
    ]
    run([report], workspace, show=False)
    assert [row[0] for row in sums(printed(plan_table(report, workspace)))] == [
        "6 there",
        "0 missing",
        "0 behind missing ones",
    ]


def test_prompts_that_are_too_long_are_named(experiment, tiny_folder):
    experiment.generators[1].prefix = "Think about it slowly, and then answer: "
    text = ChatTokenizer.load(str(tiny_folder))
    questions = [p for source in experiment.prompts for p in read_prompts(source)[0]]
    lengths = [
        len(text.prompt_ids([{"role": "user", "content": experiment.generators[1].prefix + q}]))
        for q in (p.question for p in questions)
    ]
    workspace = Workspace(experiment.workspace)
    experiment.suites = ()
    experiment.sampling.max_prompt = max(lengths)
    check_prompts(plan(experiment), workspace)
    experiment.sampling.max_prompt = max(lengths) - 1
    report = plan(experiment)
    sentence = (
        f"The longest prompt of sample/b has {max(lengths)} tokens and config.sampling.max_prompt "
        f"is {max(lengths) - 1}; raise it."
    )
    with pytest.raises(ConfigError) as error:
        check_prompts(report, workspace)
    assert str(error.value) == sentence
    run([report.prompts], workspace, show=False)  # the same once their table is there
    with pytest.raises(ConfigError) as error:
        check_prompts(report, workspace)
    assert str(error.value) == sentence


def test_dry_run_prints_the_plan_and_makes_nothing(experiment, tiny_folder, tmp_path):
    (tmp_path / "study.py").write_text(
        "from deltapref_jax.config import *\n\n\ndef get_config(count):\n"
        f"    return {experiment!r}.__class__(**vars({experiment!r}) | {{'seed': int(count)}})\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.ablate",
            f"--config={tmp_path}/study.py:7",
            "--dry_run",
            "--config.generators[1].temperature=0.7",
            "--config.sampling.max_prompt=80",
            "--config.sampling.max_tokens=20",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    experiment.seed, experiment.generators[1].temperature = 7, 0.7
    experiment.sampling.max_prompt, experiment.sampling.max_tokens = 80, 20
    report = plan(experiment)
    workspace = Workspace(experiment.workspace)
    known = [node for node in in_order([report]) if workspace.key(node)]
    assert re.search(r"│ sample/b +│ +│ \? +│ +16 │ +1,600 ", done.stdout)
    # nothing is made, so that only the key of what has no inputs is known
    assert [node.name for node in known] == ["suite/s"]
    assert re.findall(r"\b[0-9a-f]{16}\b", done.stdout) == [workspace.key(report.suites["s"])]
    assert f"{len(in_order([report]))} artifacts" in done.stdout
    assert not (tmp_path / "workspace").exists()
