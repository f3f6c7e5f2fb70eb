import copy
import dataclasses
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pytest

from deltapref_jax.artifacts.node import in_order
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
    Suite,
    greedy_twin,
)
from deltapref_jax.devices import Devices
from deltapref_jax.stages.report import results_of_policies
from deltapref_jax.stages.study import check_models, plan, usable_traces
from deltapref_jax.validation import validate


@pytest.fixture
def experiment(tiny_folder, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "What is 1+1?"}\n')
    return validate(
        Experiment(
            name="tiny",
            question="Does it count?",
            workspace="nowhere",
            prompts=(
                Prompts(tasks=("chain",), count=10),
                Prompts(kind="jsonl", path=str(tmp_path / "asked.jsonl")),
            ),
            generators=(
                Generator(name="weak", samples=2),
                Generator(name="mid", temperature=0.7),
                Generator(name="strong", temperature=0.5),
            ),
            judges=(Judge(name="m", kind="model", model=Model(path=str(tiny_folder))),),
            student=Model(path=str(tiny_folder)),
            objectives=(
                Objective(name="dpo"),
                Objective(name="kto", kind="kto"),
                Objective(name="sft", kind="sft"),
            ),
            arms=(
                Arm(name="zero", chosen="weak", rejected="weak"),
                Arm(name="mid", chosen="mid", rejected="weak"),
                Arm(name="strong", chosen="strong", rejected="weak", seeds=(0, 1)),
                Arm(name="strong-kto", chosen="strong", rejected="weak", objective="kto"),
                Arm(
                    name="strong-top",
                    chosen="strong",
                    rejected="weak",
                    keep="top",
                    fraction=0.5,
                    group="selection",
                ),
                Arm(name="sft", chosen="strong", rejected="weak", objective="sft", group="control"),
            ),
            suites=(
                Suite(name="s", prompts=Prompts(tasks=("shop",), count=5)),
                Suite(name="t", domain="out", prompts=Prompts(tasks=("euclid",), count=5)),
            ),
        )
    )


def keys(e, devices=None):
    """The key of every artifact by label, were the contents of every artifact its key."""
    found = {}
    for node in in_order([plan(e, devices=devices)]):
        found[node] = node.key({name: found[source] for name, source in node.inputs().items()})
    assert len({node.name for node in found}) == len(found)
    return {node.name: key for node, key in found.items()}


def changed(e, **fields):
    """Labels whose key differs once `e` has other fields: `a__b` is `e.a.b`, `a__0` is `e.a[0]`."""
    other = copy.deepcopy(e)
    for name, value in fields.items():
        *way, last = name.split("__")
        at = other
        for step in way:
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        setattr(at, last, value)
    before, after = keys(e), keys(other)
    return {label for label in before if after.get(label) != before[label]}


def labels_of(*arms, seeds=(0,), pair=True):
    found = {f"train/{a}/{s}" for a in arms for s in seeds} | {"report"}
    found |= {f"evaluate/{a}/{s}/{suite}" for a in arms for s in seeds for suite in "st"}
    return found | ({f"pair/{a}" for a in arms} if pair else set())


def test_labels_name_everything_that_is_wanted_and_nothing_else(experiment):
    generators = ("weak", "mid", "strong")
    runs = [
        ("zero", 0),
        ("mid", 0),
        ("strong", 0),
        ("strong", 1),
        ("strong-kto", 0),
        ("strong-top", 0),
        ("sft", 0),
    ]
    wanted = {"prompts", "suite/s", "suite/t", "audit/m", "report"}
    wanted |= {"audit/m/traces", "retest/m"}
    for kind in ("sample", "verify", "judge/m", "tokens", "score"):
        wanted |= {f"{kind}/{g}" for g in generators}
    wanted |= {f"capability/{g}/{suite}" for g in generators for suite in "st"}
    wanted |= {f"evaluate/student/{suite}" for suite in "st"}
    wanted |= {f"pair/{a.name}" for a in experiment.arms}
    wanted |= {f"train/{a}/{s}" for a, s in runs}
    wanted |= {f"evaluate/{a}/{s}/{suite}" for a, s in runs for suite in "st"}
    report = plan(experiment)
    assert {node.name for node in in_order([report])} == wanted
    assert {node.name for node in report.inputs().values()} == wanted - {"report"}
    assert len(report.inputs()) == len(wanted) - 1


def test_each_thing_is_made_once(experiment):
    found = keys(experiment)
    assert found["pair/strong"] == found["pair/strong-kto"] == found["pair/sft"]
    assert len({found[f"pair/{a}"] for a in ("zero", "mid", "strong", "strong-top")}) == 4
    assert (
        len({found[f"train/{a}"] for a in ("strong/0", "strong/1", "strong-kto/0", "sft/0")}) == 4
    )
    twin = dataclasses.replace(experiment.arms[2], name="twin")
    same = dataclasses.replace(experiment, arms=(*experiment.arms, twin))
    assert keys(same)["train/twin/1"] == found["train/strong/1"]


def test_changing_one_arm_changes_that_arm_only(experiment):
    assert changed(experiment, arms__4__fraction=0.25) == labels_of("strong-top")
    assert changed(experiment, arms__5__objective="dpo") == labels_of("sft", pair=False)
    assert changed(experiment, arms__1__name="middle") == labels_of("mid")


@pytest.mark.parametrize(
    "fields",
    [
        {"arms__1__steps": 7},
        {"arms__1__epochs": 2.0},
        {"arms__1__pairs_per_step": 4},
        {"arms__1__learning_rate": 1e-5},
    ],
)
def test_a_budget_of_its_own_trains_one_arm_again(experiment, fields):
    assert changed(experiment, **fields) == labels_of("mid", pair=False)


def test_a_budget_that_is_that_of_all_arms_changes_the_page_alone(experiment):
    t, o = experiment.training, experiment.objectives[0]
    same = {
        "arms__1__steps": t.steps,
        "arms__1__pairs_per_step": t.pairs_per_step,
        "arms__1__learning_rate": o.learning_rate,
    }
    assert changed(experiment, **same) == {"report"}


@pytest.mark.parametrize(
    ("fields", "label", "same"),
    [
        (
            {"objectives__1__beta": 0.3},
            "train/strong-kto/0",
            {"train/strong/0", "pair/strong-kto", "score/strong"},
        ),
        ({"training__steps": 7}, "train/zero/0", {"pair/zero", "score/weak", "evaluate/student/s"}),
        (
            {"generators__2__temperature": 0.6},
            "sample/strong",
            {"sample/weak", "prompts", "evaluate/student/s"},
        ),
        (
            {"generators__2__prefix": "Think."},
            "capability/strong/s",
            {"capability/mid/s", "evaluate/student/s"},
        ),
        (
            {"judges__0__dimensions": ("factuality",)},
            "judge/m/weak",
            {"score/weak", "sample/weak", "suite/s"},
        ),
        (
            {"suites__1__samples": 4},
            "evaluate/student/t",
            {"prompts", "train/sft/0", "pair/mid", "evaluate/student/s", "capability/mid/s"},
        ),
        ({"suites__1__prompts__seed": 4}, "prompts", {"suite/s"}),
        ({"sampling__max_tokens": 50}, "sample/weak", {"prompts", "suite/s"}),
        ({"scoring__rows": 3}, "score/weak", {"sample/weak", "evaluate/student/s"}),
        ({"seed": 5}, "sample/weak", {"prompts", "suite/s"}),
    ],
)
def test_what_a_change_reaches(experiment, fields, label, same):
    found = changed(experiment, **fields)
    assert {label, "report"} <= found
    assert not found & same


@pytest.mark.parametrize("field", ["question", "about", "generators__1__about"])
def test_a_new_sentence_on_the_page_changes_the_report_only(experiment, field):
    assert changed(experiment, **{field: "Another sentence."}) == {"report"}


def test_workspace_and_places_change_no_key(experiment, tiny_folder, tmp_path):
    moved = shutil.copytree(tiny_folder, tmp_path / "elsewhere")
    (tmp_path / "there").mkdir()
    file = str(shutil.copy(experiment.prompts[1].path, tmp_path / "there" / "asked.jsonl"))
    assert changed(experiment, workspace="other", trackers=("wandb",)) == set()
    assert changed(experiment, generators__2__about="edited") == {"report"}  # words for the page
    assert changed(experiment, student__path=str(moved), prompts__1__path=file) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {"training__mesh__data": 2},
        {"scoring__mesh__tensor": 2},
        {"judges__0__mesh__fsdp": 8},
        {"sampling__mesh__tensor": 4},
        {"generators__2__mesh__tensor": 8},
    ],
)
def test_no_mesh_changes_a_key(experiment, fields):
    assert changed(experiment, **fields) == set()


def test_no_devices_change_a_key(experiment):
    assert keys(experiment, Devices(8, 4)) == keys(experiment, Devices(1, 1)) == keys(experiment)


def test_every_stage_gets_the_mesh_of_its_model(experiment):
    experiment.training.mesh.fsdp = 2
    experiment.scoring.mesh.fsdp = 4
    experiment.sampling.mesh.tensor = 2
    experiment.generators[1].mesh.fsdp = 4
    stated = {
        node.name: node.mesh for node in in_order([plan(experiment)]) if hasattr(node, "mesh")
    }
    fitted = plan(experiment, devices=Devices(16, 4))
    sizes = {node.name: node.mesh for node in in_order([fitted]) if hasattr(node, "mesh")}
    assert stated.keys() == sizes.keys()
    for name, wanted, found in (
        ("train/zero/0", MeshShape(fsdp=2), MeshShape(8, 2, 1, 1)),
        ("score/mid", MeshShape(fsdp=4), MeshShape(4, 4, 1, 1)),
        ("judge/m/mid", MeshShape(fsdp=4), MeshShape(4, 4, 1, 1)),
        ("audit/m", MeshShape(fsdp=4), MeshShape(4, 4, 1, 1)),
        ("sample/weak", MeshShape(tensor=2), MeshShape(2, 1, 2, 1)),
        ("sample/mid", MeshShape(fsdp=4), MeshShape(1, 4, 1, 1)),
        ("capability/mid/s", MeshShape(fsdp=4), MeshShape(1, 4, 1, 1)),
        ("evaluate/student/s", MeshShape(tensor=2), MeshShape(2, 1, 2, 1)),
        ("evaluate/sft/0/t", MeshShape(tensor=2), MeshShape(2, 1, 2, 1)),
    ):
        assert (stated[name], sizes[name]) == (wanted, found), name


def test_edited_prompts_and_weights_are_noticed(experiment, tiny_folder, tmp_path):
    before = keys(experiment)
    with open(experiment.prompts[1].path, "a") as file:
        file.write('{"prompt": "What is 2+2?"}\n')
    assert keys(experiment)["prompts"] != before["prompts"]
    other = shutil.copytree(tiny_folder, tmp_path / "edited")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(
        config.replace("0.00001", "0.00002").replace("1e-05", "2e-05")
    )
    assert config != (other / "config.json").read_text()
    wanted = {"evaluate/student/s", "score/weak", "sample/mid", "train/zero/0"}
    assert wanted <= changed(experiment, student__path=str(other))


def test_prompt_folders_are_hashed_by_content(experiment, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n')
    hub = dataclasses.replace(experiment, prompts=(Prompts(kind="hub", path=str(folder)),))
    before = keys(hub)["prompts"]
    (folder / "train.jsonl").write_text('{"prompt": "b"}\n')
    assert keys(hub)["prompts"] != before


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            Prompts(kind="parquet", path="/nowhere.parquet"),
            r"^There is no prompt file /nowhere\.parquet; check prompts\.path\.$",
        ),
        (
            Prompts(kind="tfds", path="/nowhere"),
            r"^There is no TFDS builder directory /nowhere; check prompts\.path\.$",
        ),
    ],
)
def test_missing_prompts_are_found_before_anything_runs(experiment, source, sentence):
    with pytest.raises(ConfigError, match=sentence):
        plan(dataclasses.replace(experiment, prompts=(source,)))


def test_missing_model_is_found_before_anything_runs(experiment):
    generators = (dataclasses.replace(experiment.generators[0], model=Model(path="/nowhere")),)
    with pytest.raises(
        FileNotFoundError, match=r"^There is no model at /nowhere; give a Hugging Face folder"
    ):
        plan(dataclasses.replace(experiment, generators=generators, arms=experiment.arms[:1]))


def test_the_models_of_a_study_need_chat_templates(experiment, tiny_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "chat_template.jinja").unlink()
    model = Model(path=str(base))
    check_models(experiment)
    for field, value in (
        ("student", model),
        ("reference", model),
        ("generators", (dataclasses.replace(experiment.generators[0], model=model),)),
        ("judges", (dataclasses.replace(experiment.judges[0], model=model),)),
    ):
        with pytest.raises(
            ConfigError, match=rf"^The tokenizer of {base} has no chat template; add "
        ):
            check_models(dataclasses.replace(experiment, **{field: value}))


def test_all_arms_share_their_prompts_and_read_ratings_only_where_these_shape_the_pairs(experiment):
    arms = experiment.arms
    assert usable_traces(experiment, arms[0]) == {"mid": 1, "strong": 1, "weak": 2}
    assert usable_traces(dataclasses.replace(experiment, arms=arms[:2]), arms[0]) == {
        "mid": 1,
        "weak": 2,
    }
    assert usable_traces(dataclasses.replace(experiment, arms=arms[1:]), arms[1]) == {
        "mid": 1,
        "strong": 1,
        "weak": 1,
    }
    shared = dataclasses.replace(experiment, arms=arms[1:], shared_by=("weak", "strong"))
    assert usable_traces(shared, arms[2]) == {"strong": 1, "weak": 1}  # whatever other arms use
    assert usable_traces(shared, arms[1]) == {"mid": 1, "strong": 1, "weak": 1}
    pairs = plan(experiment).pairs
    assert set(pairs["mid"][0].inputs()) == {
        "prompts",
        "traces/weak",
        "traces/mid",
        "traces/strong",
        "verdicts/weak",
        "verdicts/mid",
    }
    assert set(pairs["strong-top"][0].inputs()) == {
        "prompts",
        "traces/weak",
        "traces/mid",
        "traces/strong",
        "verdicts/weak",
        "verdicts/strong",
        "ratings/weak",
        "ratings/strong",
    }


def test_of_two_arms_with_exchanged_sides_the_rung_says_how_traces_meet(experiment):
    """Whatever else they differ in, and wherever they stand; a control goes by the others."""
    strong = Arm("a", "strong", "weak", chosen_sample="best", by="factuality", objective="sft")
    weak = Arm("b", "weak", "strong", rejected_sample="best", by="factuality")
    for arms, exchanged in (
        ((strong, weak), {"b"}),
        ((weak, strong), {"a"}),
        ((dataclasses.replace(weak, group="control"), strong), {"b"}),
        ((weak, dataclasses.replace(strong, group="selection")), {"a"}),
        ((dataclasses.replace(weak, rejected_sample="first"), strong), set()),
        ((Arm("a", "weak", "weak"), strong), set()),
    ):
        e = dataclasses.replace(copy.deepcopy(experiment), arms=arms)
        pairs = plan(e).pairs
        assert {name for name, tables in pairs.items() if tables[0].rules.exchanged} == exchanged
    # A right side of one arm is a wrong side of the other, and strata are shared by those who
    # have them.
    arms = (strong, dataclasses.replace(weak, stratum="right_wrong"))
    e = dataclasses.replace(e, arms=arms, shared_strata=("both_right", "right_wrong"))
    assert not plan(e).pairs["b"][0].rules.exchanged


def test_a_random_arm_ranks_by_nothing(experiment):
    arm = dataclasses.replace(experiment.arms[4], keep="random", by="step_coherence")
    pairs = plan(dataclasses.replace(experiment, arms=(arm,))).pairs["strong-top"][0]
    assert (pairs.rank_by, pairs.dimensions) == ("sum", ())


def test_a_selection_by_the_reference_margin_reads_log_probabilities_and_no_ratings(experiment):
    arm = dataclasses.replace(
        experiment.arms[4], keep="bottom", by="reference_margin", objective="sft"
    )
    report = plan(dataclasses.replace(experiment, arms=(arm,)))
    pairs = report.pairs["strong-top"][0]
    assert set(pairs.inputs()) == {
        "prompts",
        *(f"traces/{g}" for g in ("weak", "strong")),
        *(
            f"{kind}/{g}"
            for g in ("weak", "strong")
            for kind in ("verdicts", "sequences", "logprobs")
        ),
    }
    policy = report.policies["strong-top"][Run(0, 0)]
    assert pairs.reference_weights == policy.reference_weights
    assert policy.logprobs == {} and set(report.logprobs) == {"weak", "strong"}


def test_samples_chosen_by_rating_read_ratings_and_get_the_draw(experiment):
    arm = dataclasses.replace(
        experiment.arms[0], rejected_sample="worst", by="factuality", draws=(0, 1)
    )
    first, second = plan(dataclasses.replace(experiment, arms=(arm,))).pairs["zero"].values()
    assert {"ratings/weak"} <= set(first.inputs()) and first.rank_by == "factuality"
    assert (first.rules.coin, second.rules.coin) == ((0, 0), (0, 1))
    assert first.rules.samples == ("first", "worst")


def test_strata_that_share_their_prompts_are_known_to_their_arms_alone(experiment):
    e = copy.deepcopy(experiment)
    e.arms[2].stratum, e.shared_strata = "both_wrong", ("both_wrong", "wrong_right")
    e.generators[0].samples = e.generators[2].samples = 2
    pairs = plan(validate(e)).pairs
    assert pairs["strong"][0].rules.shared_strata == ("both_wrong", "wrong_right")
    assert pairs["mid"][0].rules.shared_strata == ()


def test_a_mean_of_judges_is_a_judge_that_arms_can_name(experiment, tiny_folder):
    before = keys(experiment)
    more = (
        Judge(name="mean", kind="mean", of=("m", "n")),
        Judge(name="n", kind="model", model=Model(path=str(tiny_folder), dtype="bfloat16")),
    )
    experiment.judges += more
    experiment.arms[4].judge = "mean"
    report = plan(validate(experiment))
    assert list(report.ratings) == ["m", "mean", "n"] and set(report.audits) == {"m", "n"}
    pairs = report.pairs["strong-top"][0]
    assert {g: n.name for g, n in pairs.ratings.items()} == {
        g: f"judge/mean/{g}" for g in ("weak", "strong")
    }
    assert set(pairs.ratings["weak"].ratings["n"]) == {"weak", "mid", "strong"}
    after = keys(experiment)
    same = {label for label in before if before[label] == after[label]}
    assert {f"judge/m/{g}" for g in ("weak", "mid", "strong")} <= same
    assert before.keys() - same == labels_of("strong-top")


def test_a_balanced_ladder_knows_all_of_its_rungs(experiment):
    e = copy.deepcopy(experiment)
    e.balance, e.arms[1].draws = "correctness", (0, 3)
    report = plan(validate(e))
    rungs = {r.chosen for r in report.pairs["mid"][0].rungs}
    assert rungs == {"weak", "mid", "strong"} and len(report.pairs["mid"][0].rungs) == 3
    assert {draw: node.draw for draw, node in report.pairs["mid"].items()} == {0: 0, 3: 3}
    assert set(report.pairs["mid"][0].verdicts) == {"weak", "mid", "strong"}
    assert report.pairs["strong"][0].key({}) == report.pairs["strong-kto"][0].key({})
    assert (report.pairs["sft"][0].balance, report.pairs["sft"][0].rungs) == ("", ())
    # Selections and controls keep their pairs; a rung's depend on all rungs.
    assert changed(experiment, balance="chosen_length") == labels_of(
        "zero", "mid", "strong-kto"
    ) | labels_of("strong", seeds=(0, 1))


def test_a_second_read_out_is_asked_of_the_student_and_the_arms(experiment):
    before = keys(experiment)
    twins = tuple(greedy_twin(suite) for suite in experiment.suites)
    more = dataclasses.replace(experiment, suites=(*experiment.suites, *twins))
    report, after = plan(validate(more)), keys(more)
    assert {label for label in before if before[label] != after[label]} == {"report"}
    added = {label for label in after if label not in before}
    assert {"evaluate/student/s-greedy", "evaluate/sft/0/t-greedy"} <= added
    assert not [label for label in added if label.startswith("capability")]
    assert {name: node.domain for name, node in report.student.items()} == {
        "s": "in",
        "t": "out",
        "s-greedy": "",
        "t-greedy": "",
    }


def test_another_author_or_another_judge_changes_the_arms_that_use_them_only(experiment):
    assert changed(experiment, arms__3__chosen="mid") == labels_of("strong-kto")
    shaped = (
        labels_of("strong-top")
        | {f"judge/m/{g}" for g in ("weak", "mid", "strong")}
        | {"audit/m", "audit/m/traces", "retest/m"}
    )
    assert changed(experiment, judges__0__dimensions=("factuality", "step_coherence")) == shaped


def test_a_generator_with_the_students_tokenizer_keeps_the_ids_it_sampled(
    experiment, tiny_folder, tmp_path
):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template + "\n")
    experiment.generators[1].model.path = str(other)
    sequences = plan(experiment).sequences
    assert {name: node.sampled for name, node in sequences.items()} == {
        "weak": True,
        "mid": False,
        "strong": True,
    }
    assert len({node.tokenizer for node in sequences.values()}) == 1


def test_a_generator_that_no_arm_uses_is_rated_and_measured_and_no_input_of_an_arm(experiment):
    idle = Generator(name="idle", temperature=0.9)
    more = dataclasses.replace(experiment, generators=(*experiment.generators, idle))
    before, after = keys(experiment), keys(more)
    assert {label for label in before if after[label] != before[label]} == {
        "report",
        "audit/m/traces",  # a judge is measured on traces of all generators
    }
    assert set(after) - set(before) == {
        "sample/idle",
        "verify/idle",
        "judge/m/idle",
        "capability/idle/s",
        "capability/idle/t",
    }


def test_sft_alone_is_not_scored(experiment):
    only = dataclasses.replace(experiment, arms=experiment.arms[-1:])
    assert not [label for label in keys(only) if label.startswith("score/")]


def test_an_objective_without_reference_asks_for_no_table(experiment):
    simpo = Objective(name="simpo", kind="simpo", beta=2.0)
    arms = (experiment.arms[1], dataclasses.replace(experiment.arms[2], objective="simpo"))
    report = plan(
        dataclasses.replace(experiment, objectives=(*experiment.objectives, simpo), arms=arms)
    )
    assert set(report.logprobs) == {"weak", "mid"}  # what DPO reads
    assert set(report.policies["strong"][Run(0, 0)].logprobs) == set()
    assert set(report.policies["mid"][Run(0, 0)].logprobs) == {"weak", "mid"}
    assert set(report.policies["strong"][Run(0, 0)].sequences) == {"weak", "strong"}


def test_reference_of_its_own_scores_and_is_named_to_training(experiment, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "reference")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(
        config.replace("1e-05", "2e-05").replace("0.00001", "0.00002")
    )
    report = plan(dataclasses.replace(experiment, reference=Model(path=str(other))))
    policy = report.policies["mid"][Run(0, 0)]
    assert report.logprobs["mid"].weights == policy.reference_weights != policy.student_weights


def test_every_draw_has_its_pairs_and_every_seed_trains_on_them(experiment):
    arm = next(a for a in experiment.arms if a.name == "strong-top")
    arms = (dataclasses.replace(arm, draws=(0, 2), seeds=(0, 5)),)
    report = plan(dataclasses.replace(experiment, arms=arms))
    pairs = report.pairs["strong-top"]
    assert {d: (node.draw, node.name) for d, node in pairs.items()} == {
        0: (0, "pair/strong-top"),
        2: (2, "pair/strong-top/draw2"),
    }
    policies = report.policies["strong-top"]
    assert list(policies) == [Run(0, 0), Run(0, 5), Run(2, 0), Run(2, 5)]
    assert policies[Run(2, 5)].pairs is pairs[2] and policies[Run(2, 5)].seed == 5
    assert policies[Run(2, 5)].name == "train/strong-top/draw2-5"
    assert policies[Run(0, 5)].name == "train/strong-top/5"
    assert set(report.results["strong-top"]) == set(policies)


def test_draws_that_give_equal_pairs_are_one_policy_of_every_seed(experiment):
    arm = next(a for a in experiment.arms if a.name == "strong-top")
    arms = (dataclasses.replace(arm, draws=(0, 2, 3), seeds=(0, 5)),)
    runs = plan(dataclasses.replace(experiment, arms=arms)).results["strong-top"]
    # Keys as they are where draw 2 drew the pairs of draw 0: those of equal contents are equal.
    pairs = {0: "these", 2: "these", 3: "others"}
    keys = {
        table: f"{pairs[run.draw]} {run.seed} {suite}"
        for run, tables in runs.items()
        for suite, table in tables.items()
    }
    rows = pa.table({"text": [""], "answer": [""], "correct": [True]})
    job = SimpleNamespace(
        workspace=SimpleNamespace(key=keys.__getitem__),
        tables=lambda tables: dict.fromkeys(tables, rows),
    )
    found = results_of_policies(job, runs)
    assert list(found) == [Run(0, 0), Run(0, 5), Run(3, 0), Run(3, 5)]
    assert {t.column_names[0] for t in found.values()} == {"correct"}
    assert results_of_policies(job, {Run(0, 0): {}}) == {}


def test_judges_of_free_form_prompts_are_audited_on_edited_traces_alone(experiment):
    report = plan(dataclasses.replace(experiment, prompts=experiment.prompts[1:]))
    assert report.audits == {} and list(report.trace_audits) == list(report.retests) == ["m"]
    edited, retest = report.trace_audits["m"], report.retests["m"]
    assert edited.traces == report.traces and edited.finishes == experiment.training.finishes
    # Of the generators whose pairs ratings shape.
    assert retest.generators == (("strong", "weak"),) and set(retest.traces) == {"strong", "weak"}
