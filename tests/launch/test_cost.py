import pathlib
import re
import subprocess
import sys

import pytest
from deltapref_jax.workspace import Workspace, run
from evals.evaluate import describe
from rich.console import Console

from deltapref_jax.config import (
    Arm,
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
from deltapref_jax.stages import prompts
from deltapref_jax.stages.study import plan
from deltapref_jax.validation import validate
from launch.cost import Cost, plan_table

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
    nodes = plan(experiment, describe)
    cost = Cost(experiment, nodes, Workspace(tmp_path / "workspace"))
    assert {label: cost(label) for label in nodes} == {
        "suite/s": (0, 0),
        "prompts": (0, 0),
        "report": (0, 0),
        "sample/a": (32, 32 * 50),
        "sample/b": (16, 16 * 50),
        "verify/a": (0, 0),
        "verify/b": (0, 0),
        "judge/m/a": (32, 32 * 64),
        "judge/m/b": (16, 16 * 64),
        "score/a": (64, 64 * 50),
        "score/b": (32, 32 * 50),
        "audit/m": (16 * 21, 16 * 21 * 64),
        "evaluate/student": (15, 15 * 50),
        "capability/a": (15, 15 * 50),
        "capability/b": (15, 15 * 50),
        "pair/dpo": (0, 0),
        "pair/kto": (0, 0),
        "pair/sft": (0, 0),
        "train/dpo/0": (24, 24 * 40),
        "train/kto/0": (48, 48 * 40),
        "train/sft/0": (12, 12 * 40),
        "evaluate/dpo/0": (15, 15 * 50),
        "evaluate/kto/0": (15, 15 * 50),
        "evaluate/sft/0": (15, 15 * 50),
    }


def test_table_names_each_artifact_once_and_counts_what_stands(experiment):
    nodes = plan(experiment, describe)
    workspace = Workspace(experiment.workspace)
    run({"prompts": nodes["prompts"]}, {"prompts": prompts.prompts}, workspace, show=False)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(experiment, nodes, workspace))
    text = console.export_text()
    console.file.close()
    keys = {node.key for node in nodes.values()}
    assert sorted(re.findall(r"\b[0-9a-f]{16}\b", text)) == sorted(keys)
    assert f"{len(keys)} artifacts" in text
    assert "2 there" in text  # the prompts, and the suite that they must not overlap
    assert re.search(rf"prompts +│ {nodes['prompts'].key} │ yes", text)


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
            "--config.sampling.max_tokens=70",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    experiment.seed, experiment.generators[1].temperature, experiment.sampling.max_tokens = (
        7,
        0.7,
        70,
    )
    nodes = plan(experiment, describe)
    assert re.search(rf"{nodes['sample/b'].key} │ no +│ +16 │ +1,600 ", done.stdout)
    assert {node.key for node in nodes.values()} == set(
        re.findall(r"\b[0-9a-f]{16}\b", done.stdout)
    )
    assert not (tmp_path / "workspace").exists()
