"""launch.recipe as a user runs it: the pairs are an arm's, and its card says what tables say."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs import quickstart
from deltapref_jax.analysis.proposal import GeneratorPair, Proposal, select_by
from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import Arm, ConfigError, Prompts, Suite
from deltapref_jax.records import Pair, Rating, Result, Trace
from deltapref_jax.stages.recipe import at_most, card_of, without_student
from deltapref_jax.stages.study import plan
from deltapref_jax.validation import validate
from launch.budget import Budget, fixed_flops, flops_of_prompt
from launch.cost import Cost

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import os
from deltapref_jax.config import *


def get_config(arm: str = ""):
    def model(name):
        return Model(os.path.join(NURSERY, name))

    def suite(task, domain):
        return Suite(task, domain, Prompts(tasks=(task,), count=60, difficulty=1, seed=9))

    e = Experiment(
        name="small",
        question="?",
        prompts=(
            Prompts(tasks=("chain",), count=40, difficulty=1),
            Prompts(tasks=("shop",), count=20, difficulty=1),
        ),
        generators=tuple(Generator(n, model(f"oak-{{n}}")) for n in ("weak", "strong")),
        judges=(Judge("truth"),),
        suites=(suite("chain", "in"), suite("shop", "out")),
        sampling=Sampling(max_prompt=96, max_tokens=96, slots=64, chunk=16),
        workspace={workspace!r},
    )
    if arm:
        e.student = model("student")
        e.objectives = (Objective("dpo"),)
        e.arms = (eval(arm),)
        e.prompts[0].count, e.prompts[1].count = 20, 10
    return e
"""


def launched(entry, *arguments):
    """Stdout of an entry point that must exit with 0."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", f"launch.{entry}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a recipe of 30 of 60 prompts, and what a dry run and the run printed."""
    root = tmp_path_factory.mktemp("recipe")
    (root / "small.py").write_text(CONFIG.format(workspace=str(root / "workspace")))
    arguments = f"--config={root}/small.py", f"--out={root}/pairs.parquet", "--traces=60"
    dry = launched("recipe", *arguments, "--dry_run")
    assert not (root / "pairs.parquet").exists()
    return root, dry, launched("recipe", *arguments)


@pytest.fixture(scope="module")
def card(made):
    return (made[0] / "pairs.md").read_text()


@pytest.fixture(scope="module")
def study(made, card):
    """The study of the arm that the card prints: its report and the recipe's workspace."""
    arm = re.search(r"^    (Arm\(.*\))$", card, re.M)[1]
    spec = importlib.util.spec_from_file_location("small", made[0] / "small.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    e = validate(module.get_config(arm))
    return plan(e), Workspace(e.workspace), arm


def cells(card, *first):
    """The other cells of the row of a table that begins with these."""
    row = next(line for line in card.splitlines() if line.startswith(f"| {' | '.join(first)} |"))
    return [cell.strip() for cell in row.strip("| ").split("|")][len(first) :]


@pytest.mark.slow
def test_a_dry_run_and_a_run_say_what_is_proposed(made):
    _, dry, ran = made
    assert "not known before they are measured" in dry
    assert "60 traces" in dry
    assert "strong over weak: the widest of 1 gaps in accuracy in domain" in ran
    for said in (dry, ran):
        assert "--traces 60 traces has room for 30 of the config's 60 prompts" in said
        assert "No study: these are the paper's defaults and not measured here" in said


@pytest.mark.slow
def test_the_pairs_are_those_of_launch_export_and_a_study_reuses_everything(made, study):
    root, (report, workspace, arm) = made[0], study
    nodes = [report.pairs["recipe"][0], *report.ratings["truth"].values()]
    nodes += [node for tables in report.capability.values() for node in tables.values()]
    assert [node.name for node in in_order(nodes) if not workspace.complete(node)] == []
    exported = root / "exported.parquet"
    launched("export", f"--config={root}/small.py:{arm}", "--arm=recipe", f"--out={exported}")
    assert pq.read_table(root / "pairs.parquet").equals(pq.read_table(exported))
    (again,) = {path.parent for path in (root / "workspace" / "recipe").glob("*/card.md")}
    assert (again / "card.md").read_bytes() == (root / "pairs.md").read_bytes()


@pytest.mark.slow
def test_the_cards_numbers_are_those_of_the_tables(card, study):
    report, workspace, _ = study
    node = report.pairs["recipe"][0]
    pairs, stats = workspace.rows(Pair, node), workspace.manifest(node).stats
    assert card.startswith(f"# {len(pairs)} preference pairs: small\n")
    assert cells(card, "pair/recipe", "pairs kept") == [str(len(pairs))]
    assert cells(card, "pair/recipe", "pairs in the pool") == [f"{stats['pool']:.0f}"]
    assert cells(card, "prompts", "rows read") == ["30"]
    assert len(pairs) == round(0.3 * stats["pool"])
    # sample delta by dimension
    rated = {
        (row.trace_id, row.dimension): row.rating
        for table in report.ratings["truth"].values()
        for row in workspace.rows(Rating, table)
    }
    for dimension in report.experiment.judges[0].dimensions:
        gaps = [rated[p.chosen_id, dimension] - rated[p.rejected_id, dimension] for p in pairs]
        expected = [np.mean(gaps), np.std(gaps), *np.percentile(gaps, (0, 25, 50, 75, 100))]
        found = cells(card, "truth", dimension.replace("_", " "))
        assert [float(value) for value in found[:-1]] == pytest.approx(expected, abs=0.0051)
        assert found[-1] == f"{100 * np.mean(np.array(gaps) > 0):.0f}%"
    # generator delta and correctness
    for suite, domain in (("chain", "in domain"), ("shop", "out of domain")):
        low, high = (
            100 * np.mean([r.correct for r in workspace.rows(Result, report.capability[g][suite])])
            for g in ("weak", "strong")
        )
        found = [float(text.split()[0]) for text in cells(card, f"{suite}, {domain}")[:3]]
        assert found == pytest.approx([low, high, high - low], abs=0.051)
    both = 100 * np.mean([p.chosen_correct is True and p.rejected_correct is False for p in pairs])
    assert cells(card, "right / wrong") == [f"{both:.1f}%"]
    traces = sum(len(workspace.rows(Trace, table)) for table in report.traces.values())
    assert cells(card, "truth", "exact")[0] == str(traces) == "60"


@pytest.mark.slow
def test_the_card_names_licences_seed_and_every_artifact(card, study):
    report, workspace, _ = study
    assert cells(card, "generator strong")[-1] == "not stated"
    assert "The seed of traces and draws is 0." in card
    for node in in_order([report.pairs["recipe"][0], *report.ratings["truth"].values()]):
        assert f"`{node.stage}/{workspace.key(node)}`" in card


def test_the_questions_of_a_study_stay_out_of_the_prompts():
    e = quickstart.get_config()
    e.objectives[0].rates, e.objectives[0].tuned_by = (1e-4, 2e-4), "dpo-strong"
    tuning = Prompts(tasks=("chain",), count=10, seed=5)
    e.suites += (Suite("tuning", "in", tuning, readout="tuning"),)
    of_study, of_recipe = (plan(validate(c)) for c in (e, without_student(e)))
    assert list(of_recipe.prompts.suites) == list(of_study.prompts.suites)
    assert "tuning" in of_recipe.prompts.suites
    measured = {name: list(tables) for name, tables in of_study.capability.items()}
    assert {name: list(tables) for name, tables in of_recipe.capability.items()} == measured


def test_a_budget_keeps_the_proportions_of_the_sources():
    sources = (Prompts(tasks=("chain",), count=40), Prompts(kind="jsonl", path="q.jsonl"))
    assert [p.count for p in at_most(sources, [40, 20], 31)] == [21, 10]
    assert [p.count for p in at_most(sources, [40, 20], 2)] == [1, 1]
    with pytest.raises(ConfigError, match=r"room for 1 prompts, of which 0 .*prompts\[1\]"):
        at_most(sources, [40, 20], 1)
    tasks = (dataclasses.replace(sources[0], tasks=("chain", "shop", "trip")),)
    with pytest.raises(ConfigError, match="which needs at least 3; raise the budget"):
        at_most(tasks, [40], 2)


def test_a_budget_in_flops_counts_all_that_the_card_is_made_of():
    e = validate(without_student(quickstart.get_config()))
    report = plan(dataclasses.replace(e, arms=(Arm("any", "strong", "weak"),)))
    cost = Cost(report, Workspace(e.workspace))
    of_prompt, fixed = flops_of_prompt(report, cost), fixed_flops(report, cost)
    proposal = Proposal(GeneratorPair("strong", "good", ""), select_by(None, e.judges), (), "")
    card = card_of(plan(validate(dataclasses.replace(e, arms=(proposal.arm,)))), proposal)
    of_card = Cost(card, Workspace(e.workspace))
    nodes = [n for n in in_order([card]) if n.stage not in ("prompts", "tokens", "recipe")]
    questions = cost.work(report.prompts).items
    needed = questions * (of_prompt["strong"] + of_prompt["good"]) + fixed
    assert needed == pytest.approx(sum(map(of_card.most_flops, nodes)))
    stages = {n.stage for n in nodes}
    assert {"evaluate", "sample", "judge", "audit", "retest"} <= stages


def test_a_budget_that_is_too_small_or_too_large_is_refused():
    budget = Budget(100.0, "--flops", "FLOPs", 10.0, {"a": 1.0, "b": 5.0, "c": 4.0})
    assert budget.dearest == ("b", "c")
    assert (budget.prompts("b", "c"), budget.prompts("a", "c")) == (10, 18)
    budget.check(10, 10)
    with pytest.raises(ConfigError, match="11 prompts, .*, need 109 FLOPs .* beside 10 for"):
        budget.check(11, 20)
    with pytest.raises(ConfigError, match="all 9 prompts of the config need 91 FLOPs at most"):
        budget.check(1, 9)
