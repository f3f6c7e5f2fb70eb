import dataclasses
import io
import json
import pathlib
import re
import shutil

import numpy as np
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
    MeshShape,
    Model,
    Objective,
    Prompts,
    Run,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.models.flops import forward_flops, training_flops
from deltapref_jax.models.memory import sampling_memory, scoring_memory, training_memory
from deltapref_jax.models.parameters import matrices as matrices_of
from deltapref_jax.stages.study import plan
from deltapref_jax.text.template import ChatTokenizer
from deltapref_jax.validation import validate
from launch.cost import Cost, check_prompts
from launch.dry_run import plan_rows, show_plan
from launch.rates import read_rates

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


def test_work_is_counted_by_hand(experiment, tmp_path):
    report = plan(experiment)
    cost = Cost(report, Workspace(tmp_path / "workspace"))
    found = {node.name: cost(node) for node in in_order([report])}
    assert {name: (e.work.items, e.work.unit, round(e.tokens)) for name, e in found.items()} == {
        "suite/s": (5, "prompts", 0),
        "prompts": (16, "prompts", 0),
        "report": (1, "pages", 0),
        "sample/a": (32, "traces", 32 * 50),
        "sample/b": (16, "traces", 16 * 50),
        "verify/a": (32, "verdicts", 0),
        "verify/b": (16, "verdicts", 0),
        "judge/m/a": (32 * 5, "ratings", 32 * 64),
        "judge/m/b": (16 * 5, "ratings", 16 * 64),
        "tokens/a": (64, "sequences", 0),
        "tokens/b": (32, "sequences", 0),
        "score/a": (64, "sequences", 64 * 50),
        "score/b": (32, "sequences", 32 * 50),
        "audit/m": (16 * 21 * 5, "ratings", 16 * 21 * 64),
        "audit/m/traces": (16 * 6 * 5, "ratings", 16 * 6 * 64),
        "retest/m": (16 * 2 * 3 * 5, "ratings", 16 * 2 * 3 * 64),
        "evaluate/student/s": (15, "answers", 15 * 50),
        "capability/a/s": (15, "answers", 15 * 50),
        "capability/b/s": (15, "answers", 15 * 50),
        "pair/dpo": (16, "pairs", 0),
        "pair/kto": (16, "pairs", 0),
        "pair/sft": (16, "pairs", 0),
        "train/dpo/0": (3, "steps", 24 * 40),
        "train/kto/0": (3, "steps", 48 * 40),
        "train/sft/0": (3, "steps", 12 * 40),
        "evaluate/dpo/0/s": (15, "answers", 15 * 50),
        "evaluate/kto/0/s": (15, "answers", 15 * 50),
        "evaluate/sft/0/s": (15, "answers", 15 * 50),
    }
    assert not any(e.measured or e.seconds is not None for e in found.values())


def test_flops_memory_and_disk_are_by_formula(experiment, tiny, tmp_path):
    report = plan(experiment)
    cost, spec = Cost(report, Workspace(tmp_path / "workspace")), tiny.spec
    sample, policy = cost(report.traces["a"]), cost(report.policies["dpo"][Run(0, 0)])
    assert sample.flops == 32 * forward_flops(spec, np.arange(50), 20)
    assert policy.flops == 24 * training_flops(spec, np.arange(40), 20)
    assert sample.memory == sampling_memory(spec, 64, 50, "float32", MeshShape())
    forward, both = (f(spec, np.arange(40), 20) for f in (forward_flops, training_flops))
    # KTO's baseline, the same completions behind other prompts, is read forward alone.
    kto = report.policies["kto"][Run(0, 0)]
    assert cost(kto).flops == pytest.approx(24 * both + 24 * forward)
    quarter = dataclasses.replace(kto.objective, baseline_fraction=0.25)
    fewer = dataclasses.replace(kto, objective=quarter)
    assert cost(fewer).flops == pytest.approx(24 * both + 6 * forward)
    assert cost.work(fewer).sequences == 24 + 6
    on_tpu = Cost(report, Workspace(tmp_path / "workspace"), "tpu")(report.traces["a"])
    assert on_tpu.memory == sampling_memory(spec, 64, 128, "float32", MeshShape())  # whole tiles
    assert (on_tpu.tokens, on_tpu.flops) == (sample.tokens, sample.flops)
    # A small model recomputes nothing.
    training = dataclasses.replace(experiment.training, remat="none")
    assert policy.memory == training_memory(spec, training, "float32", MeshShape())
    # the policy in float32, and one checkpoint with two moments
    assert 0 <= policy.disk - spec.parameters * (4 + 12) < 20_000
    judged = cost(report.ratings["m"]["b"])
    assert judged.flops == 16 * forward_flops(spec, np.arange(64), 5)
    assert judged.memory == scoring_memory(spec, 16, 64, "float32", MeshShape())
    assert cost(report.prompts).flops == cost(report.prompts).memory == 0


def test_quantised_models_need_less_memory_and_have_rates_of_their_own(experiment, tiny, tmp_path):
    experiment.generators[1].model.quantization = "int8"
    experiment.judges[0].model.quantization = "fp8"
    report = plan(experiment)
    cost, spec = Cost(report, Workspace(tmp_path / "workspace")), tiny.spec
    of = {name: cost(table).memory for name, table in report.traces.items()}
    assert of["a"] == sampling_memory(spec, 64, 50, "float32", MeshShape())
    matrices = sum(a * b for p in matrices_of(spec).values() for a, b in [p.sides(spec)])
    outputs = sum(p.sides(spec)[1] for p in matrices_of(spec).values())
    assert of["a"] - of["b"] == spec.layers * (3 * matrices - 4 * outputs)
    judged = cost(report.ratings["m"]["b"])
    plain = scoring_memory(spec, 16, 64, "float32", MeshShape())
    assert plain - judged.memory == of["a"] - of["b"]
    assert cost._kind(report.traces["a"]) != cost._kind(report.traces["b"])
    assert cost(report.logprobs["b"]).memory == scoring_memory(spec, 16, 64, "float32", MeshShape())


def test_epochs_are_whole_steps(experiment, tmp_path):
    experiment.training = Training(pairs_per_step=5, budget="epochs", epochs=2, row_length=40)
    report = plan(experiment)
    cost = Cost(report, Workspace(tmp_path / "workspace"))
    assert cost.work(report.policies["dpo"][Run(0, 0)]).items == 7  # 16 pairs twice, in steps of 5


def shown(report, workspace, width=80, every=False):
    console = Console(width=width, record=True, file=io.StringIO())
    show_plan(console, report, workspace, every)
    return console.export_text()


def by_stage(text):
    """Stage to its cells."""
    rows = re.findall(r"^(\w+|in all) +(\d+ of \d+) (.*)$", text, re.MULTILINE)
    return {stage: (missing, re.split(r"  +", rest.strip())) for stage, missing, rest in rows}


def test_a_fresh_plan_has_a_row_per_stage_and_says_what_is_not_known(experiment):
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    text = shown(report, workspace)
    rows = by_stage(text)
    assert list(rows) == [
        *("prompts", "sample", "verify", "judge", "audit", "retest", "tokens"),
        *("score", "pair", "train", "evaluate", "report", "in all"),
    ]
    # arms that differ in the objective have one table of pairs, and b is the student
    assert rows["pair"][0] == "1 of 1" and rows["train"][0] == "3 of 3"
    assert rows["evaluate"][0] == "4 of 4" and rows["in all"][0] == "24 of 24"
    assert rows["sample"][1][:2] == ["48 traces", "≤ 2.4k"]
    assert rows["train"][1][:2] == ["9 steps", "≤ 3.4k"]
    assert all(cells[-1] == "?" for _, cells in rows.values())
    assert "Time: rate unknown, since the workspace has no finished artifact." in text
    assert "Complete:" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_continued_plan_is_at_the_rates_of_what_is_finished(experiment):
    experiment.sampling.max_prompt = 80
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    run([report.prompts, report.traces["a"]], workspace, show=False)
    a, b = report.traces["a"], report.traces["b"]
    manifest = workspace.manifest(a)
    estimate = Cost(report, workspace)(b)
    assert estimate.measured
    assert estimate.seconds == pytest.approx(manifest.seconds / 2)  # half as many traces
    read = manifest.stats["tokens"] + manifest.stats["prompt_tokens"]
    assert estimate.tokens == pytest.approx(read / 2)
    assert estimate.disk == pytest.approx(sum(n for n, _ in manifest.files.values()) / 2 + 12_000)
    text = shown(report, workspace, width=120)
    rows = by_stage(text)
    assert rows["sample"][0] == "1 of 2" and rows["sample"][1][1].startswith("≈")
    assert rows["sample"][1][-1].endswith("s") and rows["judge"][1][-1] == "?"
    assert rows["in all"][1][-1].endswith("s + ?")
    assert "prompts" not in rows and "Complete: prompts (2)." in text
    assert re.search(r"rate unknown \(\?\) of verify, judge, audit, .*report, of which", text)


def test_artifacts_of_other_devices_and_models_give_no_rate(experiment):
    experiment.sampling.max_prompt = 80
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    run([report.prompts, report.traces["a"]], workspace, show=False)
    spec = Cost(report, workspace).rates
    (kind,) = (kind for kind in spec.taken if kind[0] == "sample")
    assert kind[2:] == ("float32", 0) and spec.machine.endswith(" x cpu")
    assert not [k for k in read_rates(workspace, lambda *_: None).taken if k[0] == "sample"]
    experiment.generators[1].model.dtype = "bfloat16"
    report = plan(experiment)
    assert Cost(report, workspace)(report.traces["b"]).seconds is None
    file = workspace.path(report.traces["a"]) / "manifest.json"
    made = json.loads(file.read_text())
    made["versions"]["device"], made["ended"] = "TPU v5e", "2000-01-01T00:00:00+00:00"
    file.write_text(json.dumps(made))
    assert not [k for k in Cost(report, workspace).rates.taken if k[0] == "sample"]


def test_a_finished_study_is_one_sentence(experiment):
    experiment.arms = experiment.judges = experiment.suites = ()
    experiment.sampling.max_prompt = 80
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    run([report], workspace, show=False)
    # A line that is too long is cut within the path, wherever that is.
    text = "".join(shown(report, workspace).split())
    sentence = (
        f"tiny: Does it count? All 6 artifacts are in {workspace.root}; nothing is to be made."
    )
    assert text == "".join(sentence.split())


def test_every_row_has_name_and_key(experiment):
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    run([report.prompts], workspace, show=False)
    text = shown(report, workspace, every=True)
    nodes = in_order([report])
    keys = {node.name: workspace.key(node) for node in nodes if workspace.key(node)}
    # the questions are there, so that what is made of them alone has a key
    assert {name.split("/")[0] for name in keys} == {
        *("suite", "prompts", "sample", "audit", "evaluate", "capability")
    }
    rows = dict(
        re.findall(r"^([\w]+(?:/[\w/]+)?|prompts|report) +([0-9a-f]{16}|\?|as \S+) ", text, re.M)
    )
    assert rows.keys() == {node.name for node in nodes}
    assert {name: key for name, key in rows.items() if len(key) == 16 and " " not in key} == keys
    assert rows["pair/kto"] == "as pair/dpo" and rows["pair/dpo"] == "?"
    assert re.search(rf"^prompts +{keys['prompts']}  there", text, re.MULTILINE)


def test_a_full_disk_is_said(experiment, monkeypatch):
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    text = " ".join(shown(report, workspace).split())
    assert re.search(
        rf"About [\d.]+ MiB will be written to {workspace.root}, where .* free\.", text
    )
    free = shutil.disk_usage("/")._replace(free=500)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    text = " ".join(shown(report, workspace).split())
    assert "where only 500 B are free: free some, or choose another place with" in text


def test_equal_nodes_are_counted_once(experiment):
    report, workspace = plan(experiment), Workspace(experiment.workspace)
    rows = plan_rows(report, workspace, Cost(report, workspace))
    same = {row.node.name: row.same_as.name for row in rows if row.same_as}
    assert same == {
        "pair/kto": "pair/dpo",
        "pair/sft": "pair/dpo",
    } | dict.fromkeys(("capability/a/s", "capability/b/s"), "evaluate/student/s")


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


def test_dry_run_prints_the_plan_and_makes_nothing(command, experiment, tmp_path):
    (tmp_path / "study.py").write_text(
        "from deltapref_jax.config import *\n\n\ndef get_config(count):\n"
        f"    return {experiment!r}.__class__(**vars({experiment!r}) | {{'seed': int(count)}})\n"
    )
    done = command(
        "launch.ablate",
        f"--config={tmp_path}/study.py:7",
        "--dry_run",
        "--config.generators[1].temperature=0.7",
        "--config.sampling.max_prompt=80",
        "--config.sampling.max_tokens=20",
    )
    assert (done.returncode, done.stderr) == (0, "")
    experiment.seed, experiment.generators[1].temperature = 7, 0.7
    experiment.sampling.max_prompt, experiment.sampling.max_tokens = 80, 20
    report = plan(experiment)
    rows = by_stage(done.stdout)
    assert rows["sample"][1][:2] == ["48 traces", "≤ 4.8k"]
    assert rows["in all"][0] == "25 of 25"  # b is sampled in another manner than the student
    assert len(in_order([report])) == 28
    assert not (tmp_path / "workspace").exists()
