"""launch.preflight: what it prints and refuses, and what its numbers rest on."""

import dataclasses
import importlib
import importlib.util
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest
from rich.console import Console

from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import (
    ConfigError,
    Experiment,
    Generator,
    Judge,
    MeshShape,
    Model,
    Objective,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.models.parameters import matrices
from deltapref_jax.models.program import Program
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.models.weights import describe_model
from deltapref_jax.stages import programs
from deltapref_jax.stages.programs import StageProgram, study_programs
from deltapref_jax.stages.study import plan
from launch import compiler, proposals
from launch.chips import parse_topology
from launch.compile_programs import Request, Result, programs_of
from launch.cost import Cost
from launch.dry_run import plan_rows
from launch.formula import estimate
from launch.preflight_tables import Printer
from launch.proposals import Proposal
from launch.roofline import Speed, bounds
from launch.workload import Load, step_line, step_of, steps_of, study_load

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PUBLISHED = ROOT / "tests" / "models" / "published"


def run(*arguments, folder=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "launch.preflight", *arguments],
        cwd=folder,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with the models of configs/llama_1b.py, of which there is config.json alone."""
    pytest.importorskip("reasoning_gym")  # whose questions the config asks
    for name in ("Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct"):
        place = tmp_path / "meta-llama" / name
        place.mkdir(parents=True)
        config = PUBLISHED / "meta-llama" / name / "config.json"
        (place / "config.json").write_text(config.read_text())
    return tmp_path


CONFIG = f"--config={ROOT}/configs/llama_1b.py"


@pytest.mark.slow
def test_what_does_not_fit_by_formula_gets_no_speed_and_a_proposal(folder):
    """Of TPUs too, without a compiler for them."""
    training = ("--config.training.rows=64", "--config.training.remat=none")
    flags = ("--topology=v5e:2x4", "--nocompile", "--stages=train", "--json=found.json")
    done = run(CONFIG, *flags, *training, folder=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    gradient = next(p for p in found["programs"] if p["name"] == "gradient")
    assert (gradient["status"], gradient["level"]) == ("refused", "")
    assert gradient["needed"] + gradient["beside"] > 15.75 * 2**30
    assert not found["predicted"]
    (proposal,) = found["proposals"]
    assert all(r["status"] == "by formula" for r in proposal["proposal"]["results"])
    assert "(by formula, not compiled: at most " in done.stdout


def test_the_chip_hours_name_the_stages_that_they_lack():
    console = Console(file=io.StringIO(), width=130)
    show = Printer(console, parse_topology("v5e:2x4"), True, "O0")
    speed = Speed("score", "reference", 1.0, 1000.0, 0.5, "memory")
    loads = [Load("score", "reference", 10, 4500), Load("train", "dpo", 10, 4096)]
    assert show.stages([speed], loads) == {"score reference": pytest.approx(0.1)}
    assert "In all 0.1 chip-hours without train dpo, if every se" in console.file.getvalue()
    # Of a file's epochs nothing is known.
    assert show.stages([speed], []) == {}
    assert console.file.getvalue().count("In all") == 1
    # How many of a file's sequences are scored is not known.
    trained = Speed("train", "dpo", 1.0, 1000.0, 0.5, "compute")
    assert set(show.stages([trained, speed], [loads[1]])) == {"train dpo"}
    assert "chip-hours without score reference, if" in console.file.getvalue()


def test_a_prompt_is_prefilled_once_and_a_proposal_counts_its_own_stage():
    console = Console(file=io.StringIO(), width=130)
    show = Printer(console, parse_topology("v5e:1x1"), True, "O0")
    predicted = tuple(
        Speed(stage, "strong", 1.0, 1.0, 0.5, "memory") for stage in ("prefill", "decode")
    )
    mine = Load("sample", "strong", 40, 100, 20, prompts=10)
    others = [Load("sample", "weak", 40, 100, 20, prompts=10), Load("score", "reference", 10, 120)]
    refused = Result("", "sample", "strong", "decode", {"data": 1})
    proposal = Proposal(("--x",), (refused,), predicted)
    hours = show.proposal(refused, proposal, [*others, mine])
    assert hours == pytest.approx({"prefill strong": 1000 / 3600, "decode strong": 800 / 3600})
    assert " chip-hours, if every" in console.file.getvalue()


@pytest.mark.slow
def test_gpus_are_described_by_formula(folder):
    done = run(CONFIG, "--topology=h100:1x8", "--json=found.json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "8 gpu devices on 1 host, 75.00 GiB each; by formula, not compiled." in done.stdout
    found = json.loads((folder / "found.json").read_text())
    programs = {p["label"]: p for p in found["programs"]}
    gradient = programs["train dpo: gradient"]
    assert gradient["status"] == "by formula"
    # Weights in float32; beside them two moments, and the sum of gradients, which nothing is added
    # to in place where nothing is recomputed.
    assert gradient["arguments"] == pytest.approx(1.236e9 * 4 / 8, rel=0.01)
    assert gradient["beside"] == pytest.approx(3 * gradient["arguments"], rel=0.01)
    gathered = {(c[0], c[1]): c[3] for c in gradient["collectives"]}
    assert gathered["all-gather", "fsdp"] == pytest.approx(2 * 1.2358e9 * 2 * 7 / 8, rel=1e-3)
    assert {s["stage"] for s in found["predicted"]} == {
        *("train", "score", "judge", "prefill", "decode")
    }
    assert set(found["predicted_chip_hours"]) >= {"train dpo", "decode strong", "judge model"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--topology=v5e:5x5"], "--topology is 'v5e:5x5'; v5e has the topologies 1x1, 2x2, "),
        (
            ["--topology=h100:1x8", "--config.training.mesh.fsdp=5"],
            "config.training.mesh is fsdp=5 and there are 8 devices; the sizes must multiply to "
            "that; nearest that fits: ",
        ),
        (["--topology=h100:1x8", "--level=O9"], "--level is 'O9'; choose one of 'O0', 'default'."),
        (["--topology=h100:1x8", "--json=nowhere/x.json"], "--json=nowhere/x.json: its folder "),
        (["--topology=cpu:1x8", "--smallest"], "--smallest compares what fits with a device's "),
        (["--topology=h100:1x8", "--stages=pair"], "--stages is 'pair'; choose one of 'train', "),
        (["--topology=h100:1x8", "--config.student.path=nowhere"], "There is no model at nowhere"),
        ([], "--topology is missing; give it a value (--help)."),
    ],
)
def test_bad_input_is_one_sentence(folder, command, arguments, sentence):
    done = command("launch.preflight", CONFIG, *arguments, folder=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in done.stderr


def test_without_libtpu_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run pip install 'deltapref-jax\[tpu\]'\.$"):
        compiler.check_compiler("")


def test_a_cache_that_cannot_be_made_is_said_before_anything_is_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--cache is '.*', which cannot be made \(Not a dir"):
        compiler.check_compiler(str(tmp_path / "file" / "folder"))


def request_of(tmp_path):
    return Request(Experiment(), {}, parse_topology("v5e:2x4"), "O0", True, str(tmp_path))


def child(monkeypatch, tmp_path, source):
    """Lets a script stand for the child process."""
    script = tmp_path / "child.py"
    known = json.dumps(dataclasses.asdict(Result("", "train", "dpo", "x", {"data": 1})))
    beginning = f"import json, pickle, sys, time\nknown = json.loads({known!r})\n"
    script.write_text(beginning + textwrap.dedent(source))
    popen = subprocess.Popen
    monkeypatch.setattr(
        compiler.subprocess,
        "Popen",
        lambda command, **options: popen([sys.executable, str(script), command[-1]], **options),
    )


@pytest.mark.slow
def test_a_program_that_takes_too_long_or_crashes_is_left_and_the_others_go_on(
    monkeypatch, tmp_path
):
    child(
        monkeypatch,
        tmp_path,
        """
        _, labels = pickle.load(open(sys.argv[1], "rb"))
        labels = labels or ["quick", "slow", "crash", "last"]
        print("@list", json.dumps(labels), flush=True)
        for label in labels:
            print("@start", json.dumps(known | {"label": label}), flush=True)
            if label == "slow":
                time.sleep(60)
            if label == "crash":
                sys.exit("the compiler gave up")
            print("@done", json.dumps(known | {"label": label, "status": "fits"}), flush=True)
        """,
    )
    # Long enough for a new process on a busy machine.
    found = list(compiler.compile_each(request_of(tmp_path), 8.0))
    assert [(r.label, r.status) for r in found] == [
        ("quick", "fits"),
        ("slow", "timed out"),
        ("crash", "crashed"),
        ("last", "fits"),
    ]
    assert found[2].error == "the compiler gave up"


def test_what_changes_no_number_is_proposed_first(monkeypatch, tmp_path):
    """Moments on the host before moments in bfloat16, and both together last."""
    request, tried = request_of(tmp_path), []
    request.config.training.remat, request.config.training.rows = "block", 8
    request.config.objectives = (Objective("dpo"),)
    request.config.training.mesh = MeshShape(1, 8, 1, 1)
    mesh = dataclasses.asdict(request.config.training.mesh)
    refused = Result("", "train", "dpo", "gradient", mesh, executed=1e15, tokens=32_768)

    def compiled(request, seconds):
        assert request.stages == ("train",)
        t = request.config.training
        tried.append((t.offload_moments, t.moments))
        fits = tried[-1] == (True, "bfloat16")
        yield dataclasses.replace(refused, status="fits" if fits else "refused")

    monkeypatch.setattr(proposals, "compile_each", compiled)
    found = proposals.propose(request, request.config, refused, lambda config, _: config, 1.0)
    assert tried == [(True, "float32"), (False, "bfloat16"), (True, "bfloat16")]
    assert found.flags == (
        "--config.training.offload_moments=True",
        "--config.training.moments=bfloat16",
    )
    (speed,), micros = found.predicted, steps_of(request.config)["dpo"].micro_batches
    assert speed.bound == "compute"
    assert speed.seconds == pytest.approx(micros * 1e15 / 8 / 197e12)  # the peak of a v5e


@pytest.mark.parametrize(
    ("stage", "of", "flags"),
    [
        (
            "sample",
            "strong, cool, student",
            (
                "--config.generators[1].mesh.tensor=8 --config.generators[2].mesh.tensor=8 "
                "--config.sampling.mesh.tensor=8",
            ),
        ),
        ("judge", "model", ("--config.judges[1].mesh.fsdp=8",)),
        ("score", "reference", ("--config.scoring.mesh.fsdp=8",)),
    ],
)
def test_a_mesh_is_proposed_to_all_models_of_the_programs(monkeypatch, tmp_path, stage, of, flags):
    request, tried = request_of(tmp_path), []
    shape = dict.fromkeys(("data", "fsdp", "tensor", "context"), 1) | {"data": 2, "tensor": 4}
    if stage != "sample":
        shape |= {"data": 8, "tensor": 1}
    e = request.config
    e.scoring.rows = 8
    e.generators = tuple(
        Generator(name=name, mesh=MeshShape(**shape)) for name in ("weak", "strong", "cool")
    )
    e.judges = (Judge(name="exact"), Judge(name="model", kind="model"))

    def compiled(request, seconds):
        tried.append(request)
        yield dataclasses.replace(refused, status="fits")

    def fit(config, _):
        """That of sampling also belongs to the generator that has none of its own."""
        config.generators[0].mesh = config.sampling.mesh
        return config

    monkeypatch.setattr(proposals, "compile_each", compiled)
    refused = Result("", stage, of, "decode", shape, status="refused", tokens=1, executed=1e15)
    found = proposals.propose(request, e, refused, fit, 1.0)
    assert found.flags == flags
    (request,) = tried
    assert (request.stages, request.first) == ((stage,), ((stage, "decode"),))
    if stage == "sample":
        assert {g.mesh.tensor for g in request.config.generators} == {8}
        assert set(request.of) == {"weak", "strong", "cool", "student"}


def test_programs_that_cannot_be_made_are_a_sentence(monkeypatch, tmp_path):
    child(monkeypatch, tmp_path, """print('@error "slots are odd."')""")
    with pytest.raises(ConfigError, match=r"^The programs of the config cannot be made: slots are"):
        list(compiler.compile_each(request_of(tmp_path), 2.0))


def test_the_workload_is_that_of_a_dry_run(tmp_path):
    e = importlib.import_module("configs.quickstart").get_config()
    e.workspace = str(tmp_path)
    report, workspace = plan(e), Workspace(str(tmp_path))
    rows = plan_rows(report, workspace, Cost(report, workspace))
    counted = {}
    for row in rows:
        if row.estimate and row.estimate.work.longest:
            stage = {"audit": "judge", "retest": "judge", "evaluate": "sample"}.get(
                row.node.stage, row.node.stage
            )
            counted[stage] = counted.get(stage, 0) + row.estimate.work.sequences
    loads = {}
    for load in study_load(e):
        loads[load.stage] = loads.get(load.stage, 0) + load.sequences
    assert loads == counted
    # 420 questions once, and 540 of suites twice, of which every prompt is prefilled once.
    (strong,) = (x for x in study_load(e) if (x.stage, x.of) == ("sample", "strong"))
    assert (strong.sequences, strong.prompts) == (420 + 2 * 540, 420 + 540)


def test_programs_have_room_for_the_prompts_of_the_suite_with_fewest_samples():
    """All models answer all suites: 64 slots wait for prompts of one sample, in groups of eight."""
    tiny, mesh = ModelSpec(1000, 48, 2, 4, 2, 16, 96), MeshShape(8, 1, 1, 1)
    e = Experiment(
        student=Model("tiny"),
        generators=(
            Generator(name="plain", model=Model("tiny"), samples=8),
            Generator(name="filtered", model=Model("tiny"), samples=8, top_p=0.9),
        ),
        suites=(Suite(name="one", samples=1), Suite(name="four", samples=4)),
        sampling=Sampling(max_prompt=8, max_tokens=8, slots=64, mesh=mesh),
        training=Training(rows=8, mesh=mesh),
        scoring=Scoring(rows=8, mesh=mesh),
    )
    topology = parse_topology("cpu:1x8")
    request = Request(e, {"tiny": tiny}, topology, "O0", False, "", stages=("sample",))
    found = {p.label: p.program.beside for p in programs_of(request)}
    assert set(found) >= {"sample plain, student: insert", "sample filtered: insert"}
    _, waiting = found["sample plain, student: insert"]
    assert len(waiting) == 7
    # A request for the programs of one of them has no others.
    alone = programs_of(dataclasses.replace(request, of=("student",)))
    assert {p.of for p in alone} == {"plain, student"}


def test_no_program_is_left_out_because_another_has_its_name(monkeypatch, tmp_path):
    """Generators "a" and "b" that share programs, beside one of another model named "a, b"."""
    each = types.SimpleNamespace(label="sample a, b: prefill", stage="sample")
    monkeypatch.setattr(programs, "study_programs", lambda *_: [each, each])
    described = dataclasses.replace(request_of(tmp_path), compiled=False)
    with pytest.raises(ValueError, match=r"^two are called 'sample a, b: prefill'; rename a gen"):
        programs_of(described)


def test_a_step_is_cut_as_rows_hold_it():
    training = Experiment().training
    training.rows, training.row_length, training.pairs_per_step = 32, 4096, 32
    objective = Objective(name="dpo")
    mesh = dataclasses.asdict(MeshShape(1, 16, 1, 1))
    step = step_of(training, objective, 500, mesh)
    # 64 sequences of 500 tokens fill 8 of the 16 rows that half a micro-batch has at least.
    assert (step.micro_batches, step.sequences) == (0.5, 64)
    assert step.filled == pytest.approx(64 * 500 / (16 * 4096))
    training.rows = 16
    assert step_of(training, objective, 4096, mesh).micro_batches == 4
    assert step_of(training, objective, 4096, mesh).filled == 1
    # One sequence of 3,000 tokens is a row, whose rest stays empty and is warned of; sequences of
    # different lengths, with that mean, fill the gaps.
    training.rows = 32
    step = step_of(training, objective, 3000, mesh)
    assert (step.micro_batches, step.filled) == (2, pytest.approx(3000 / 4096))
    line = step_line("dpo", step, mesh)
    assert "fill 73% of the positions of 2 micro-batches. Then 27% of a step's positions" in line
    step = step_of(training, objective, 3000, mesh, measured=True)
    assert (step.micro_batches, step.filled) == (1.5, pytest.approx(3000 / 4096 * 2 / 1.5))


def test_bounds_are_those_of_the_chip():
    topology = parse_topology("v5e:4x4")
    result = Result(
        *("x", "train", "dpo", "gradient"),
        {"data": 1, "fsdp": 16, "tensor": 1, "context": 1},
        status="fits",
        executed=16 * 197e12,
        memory_traffic=819e9 / 2,
        collectives=[("all-gather", "fsdp", 16, 2 * 100e9, 1.0)],
    )
    found = bounds(result, topology)
    assert (found.compute, found.memory, found.interconnect) == (1.0, 0.5, 2.0)
    assert (found.seconds, found.binding) == (2.0, "interconnect")
    # Over two slices a sum over data crosses the network, shared by the 16 of each slice.
    two = parse_topology("v5e:4x4", 2)
    crossing = dataclasses.replace(
        result,
        mesh={"data": 2, "fsdp": 16, "tensor": 1, "context": 1},
        collectives=[("all-reduce", "data", 2, 3.1e9 * 3, 1.0)],
    )
    assert bounds(crossing, two).interconnect == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("topology", "slices", "mesh", "axis", "seconds"),
    [
        # What lies within a slice or host is received over its links, for any number of them.
        ("v5e:2x4", 8, (8, 8, 1), "fsdp", 60 / 100),
        ("v5e:2x2", 4, (4, 4, 1), "fsdp", 60 / 100),
        ("h100:8x8", 1, (8, 1, 8), "tensor", 60 / 450),
        # fsdp over hosts with one GPU each: everything crosses the network.
        ("h100:16x1", 1, (1, 16, 1), "fsdp", 60 / 50),
        # Four hosts of two: of seven parts a GPU receives three from other hosts.
        ("h100:4x2", 1, (1, 8, 1), "fsdp", 60 * 3 / 7 / 50),
        # Two hosts of eight: one of fifteen, which takes less than NVLink takes for the others.
        ("h100:2x8", 1, (1, 16, 1), "fsdp", 60 * 14 / 15 / 450),
    ],
)
def test_links_and_network_each_take_the_time_of_what_they_carry(
    topology, slices, mesh, axis, seconds
):
    topology = parse_topology(topology, slices)
    sizes = dataclasses.asdict(MeshShape(*mesh, 1))
    collectives = [("all-gather", axis, sizes[axis], 60e9, 1.0)]
    result = Result("x", "train", "dpo", "gradient", sizes, collectives=collectives)
    assert bounds(result, topology).interconnect == pytest.approx(seconds)


def test_what_pads_rows_is_executed(one_device):
    e = importlib.import_module("configs.llama_1b").get_config()
    e.sampling.max_prompt, e.sampling.max_tokens = 1001, 1999
    e.training.rows, e.training.row_length, e.training.remat = 2, 4096, "none"
    e.scoring.rows, e.scoring.row_length = 2, 4608
    name = str(PUBLISHED / "meta-llama" / "Llama-3.2-1B-Instruct")
    spec = describe_model(name)[0]
    found = {p.label: p for p in study_programs(e, lambda _: spec, lambda *_: one_device)}
    products = spec.layers * sum(math.prod(p.sides(spec)) for p in matrices(spec).values())

    def padding(label):
        """Tokens of padding by which more is executed than the model needs."""
        return (found[label].executed - found[label].flops) / (2 * products)

    # A row holds one sequence of 3,000 tokens; its padding is read by weights, not by attention.
    assert padding("score reference: logprobs") == pytest.approx(2 * 1608, rel=1e-3)
    assert padding("train dpo: gradient") == pytest.approx(3 * 2 * 1096, rel=1e-3)
    # Eight prompts of 1,001 tokens are prefilled as 1,008, and a judge's rows are full.
    assert padding("sample weak: prefill") == pytest.approx(8 * 7, rel=1e-3)
    assert found["sample weak: prefill"].tokens == 8 * 1001
    assert padding("judge model: labels") == 0


def received_by_formula(mesh, name, spec, trained=0):
    each = StageProgram(
        *("train", "dpo", name, Program(None, ()), None, spec, "bfloat16", 0.0), trained=trained
    )
    result = Result("x", "train", "dpo", name, dataclasses.asdict(mesh))
    estimate(result, each)
    return {(kind, axis): received for kind, axis, _, received, _ in result.collectives}


def test_collectives_by_formula_are_those_of_what_is_moved():
    spec = describe_model(str(PUBLISHED / "meta-llama" / "Llama-3.1-8B-Instruct"))[0]
    mesh = MeshShape(1, 16, 1, 1)
    # As compiled for v5e:4x4 (docs/preflight.md): weights twice, gradients in float32.
    found = received_by_formula(mesh, "gradient", spec, spec.parameters)
    assert found["all-gather", "fsdp"] == pytest.approx(28.16e9, rel=1e-3)
    assert found["reduce-scatter", "fsdp"] == pytest.approx(28.15e9, rel=1e-3)
    # Of adapters nothing but their own gradients.
    adapted = received_by_formula(mesh, "gradient", spec, 10**6)
    assert adapted["all-gather", "fsdp"] == found["all-gather", "fsdp"]
    assert adapted["reduce-scatter", "fsdp"] == 4 * 10**6 * 15 / 16
    # int8 matrices of layers with their scales; the head is not quantised.
    whole = received_by_formula(mesh, "labels", spec)["all-gather", "fsdp"]
    eighth = received_by_formula(mesh, "labels", spec.quantised("int8"))["all-gather", "fsdp"]
    assert (whole, eighth) == pytest.approx((14.08e9, 7.53e9), rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_programs_of_1b_are_compiled_for_a_tpu(folder):
    """Training, scoring, judging and decoding of 1B on eight chips: two minutes on two cores."""

    def compiled(stages, *flags):
        where = ("--topology=v5e:2x4", f"--stages={stages}", "--json=found.json")
        done = run(CONFIG, *where, f"--cache={folder}/cache", *flags, folder=folder)
        assert done.returncode == 0, done.stderr
        return json.loads((folder / "found.json").read_text())

    found = compiled("train,score,judge,sample")
    programs = {p["label"]: p for p in found["programs"]}
    assert {p["status"] for p in programs.values()} == {"fits"}
    gradient = programs["train dpo: gradient"]
    assert gradient["peak"] + gradient["beside"] <= 15.75 * 2**30
    assert any(c[1] == "fsdp" for c in gradient["collectives"])
    # A step of decoding reads weights and cache at most once, and copies neither.
    chunk = importlib.import_module("configs.llama_1b").get_config().sampling.chunk
    for model in ("weak", "strong"):  # with heads of 64 and of 128
        decode = programs[f"sample {model}: decode"]
        assert 0.5 < decode["memory_traffic"] / chunk / decode["arguments"] <= 1.05
        assert decode["temporaries"] < 0.1 * decode["arguments"]
    # The second time everything is in the cache, also of a program that is another model's too.
    there = set(os.listdir(folder / "cache"))
    assert compiled("train")["programs"] == [p for p in found["programs"] if p["stage"] == "train"]
    assert set(os.listdir(folder / "cache")) == there
