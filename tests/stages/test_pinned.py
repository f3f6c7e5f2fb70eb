import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
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
    Pairs,
    PairTraining,
    Prompts,
    Training,
)
from deltapref_jax.hub import repository
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import weights_hash
from deltapref_jax.stages import pairs_file, study
from deltapref_jax.stages.pinned import pinned
from deltapref_jax.validation import validate
from launch.cost import check_prompts
from launch.dry_run import show_plan

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODEL, DATA = "someone/tiny", "someone/pairs"
PAIRS = [
    {"prompt": f"What is {i}+1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
    for i in range(8)
]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "pairs"
    root.mkdir()
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return root


def experiment(tmp_path, **models):
    """A study whose student, reference, generator and judge are `models`."""
    return validate(
        Experiment(
            name="tiny",
            workspace=str(tmp_path / "workspace"),
            prompts=(Prompts(kind="hub", path=DATA), Prompts(tasks=("chain",), count=4)),
            generators=(Generator(name="a"), Generator(name="b", model=models["generator"])),
            judges=(Judge(name="m", kind="model", model=models["judge"]),),
            student=models["student"],
            reference=models["reference"],
            objectives=(Objective(name="dpo"),),
            arms=(Arm(name="ab", chosen="b", rejected="a"),),
        )
    )


def keys(report):
    """The key of every artifact by label, were the contents of every artifact its key."""
    found = {}
    for node in in_order([report]):
        found[node] = node.key({name: found[source] for name, source in node.inputs().items()})
    return {node.name: key for node, key in found.items()}


def weights_asked(hub):
    """Requests for more than the beginning of a file of weights."""
    return [r for r in hub.requests if r[1].endswith(".safetensors") and not r[2]]


def test_a_dry_run_of_models_on_the_hub_fetches_no_weights(hub, folder, data, tmp_path):
    first, rows = hub.push(MODEL, folder), hub.push(DATA, data, kind="dataset")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    second = hub.push(MODEL, folder, branch="later")
    named = Model(MODEL)
    models = {
        "student": named,
        "reference": Model(MODEL, revision="later"),
        "generator": Model(MODEL, revision=second),
        "judge": Model(MODEL, revision=first),
    }
    e = experiment(tmp_path, **{k: dataclasses.replace(m) for k, m in models.items()})
    report = study.plan(e)
    show_plan(Console(), report, Workspace(e.workspace))
    check_prompts(report, Workspace(e.workspace))
    assert not weights_asked(hub)
    known = report.experiment
    assert known.student.revision == known.judges[0].model.revision == first
    assert known.reference.revision == known.generators[1].model.revision == second
    assert known.prompts[0].revision == rows and known.prompts[1].revision == ""
    # The generator without a model of its own is the student, at the student's revision.
    a, b = report.traces["a"], report.traces["b"]
    assert (a.generator.model.revision, b.generator.model.revision) == (first, second)
    assert a.weights != b.weights == report.logprobs["a"].weights
    assert report.prompts.contents[0] == f"{DATA}@{rows}"
    assert a.describe()["generator"]["model"]["revision"] == first
    assert report.prompts.describe()["sources"][0]["revision"] == rows


def test_artifacts_are_shared_by_a_hub_name_and_a_folder_of_equal_files(
    hub, folder, data, tmp_path
):
    hub.push(MODEL, folder)
    hub.push(DATA, data, kind="dataset")

    def planned(path):
        names = ("student", "reference", "generator", "judge")
        return keys(study.plan(experiment(tmp_path, **{name: Model(path) for name in names})))

    named = planned(MODEL)
    assert named == planned(str(folder))
    (data / "train.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    hub.push(DATA, data, kind="dataset")
    repository.cache_clear()  # as in a new program
    assert planned(MODEL)["prompts"] != named["prompts"]


def test_pair_training_fetches_weights_when_they_are_needed(hub, folder, data, tmp_path, tiny):
    hub.push(DATA, data, kind="dataset")
    first = hub.push(MODEL, folder)
    p = PairTraining(
        workspace=str(tmp_path / "workspace"),
        data=Pairs(DATA),
        student=Model(MODEL),
        training=Training(pairs_per_step=2, steps=1, rows=8, row_length=128),
    )
    policy = pairs_file.plan(p)
    workspace = Workspace(p.workspace)
    run(list(policy.sequences.values()), workspace, "test")
    pairs_file.check(p, policy, workspace)
    assert not weights_asked(hub)
    run(list(policy.logprobs.values()), workspace, "test")
    assert weights_asked(hub)
    manifest = workspace.manifest(policy.logprobs["file"])
    model = {"path": MODEL, "revision": first, "dtype": "float32", "quantization": ""}
    assert manifest.config["model"] == model
    assert manifest.config["weights"] == weights_hash(str(folder))
    other = jax.tree.map(lambda x: x * 1.5, tiny.state)
    export(other, tiny.spec, tiny.text, folder)
    hub.push(MODEL, folder)
    repository.cache_clear()  # as in a new program
    again = pairs_file.plan(p)
    assert again.student_weights != policy.student_weights
    assert not workspace.complete(again.logprobs["file"])


def test_a_folder_has_no_revision(hub, folder, data):
    for path in (str(folder), "gs://bucket/model"):
        with pytest.raises(ConfigError) as raised:
            pinned(PairTraining(data=Pairs(str(data)), student=Model(path, revision="v1")))
        assert str(raised.value) == (
            f"revision of the model {path} is 'v1', and it is in no repository of the hub; leave "
            "the field empty."
        )
    assert not hub.requests


@pytest.mark.slow
def test_an_entry_point_refuses_a_model_on_the_hub_before_its_weights(hub, folder, data, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mamba"}
    (folder / "config.json").write_text(json.dumps(config))
    hub.push(MODEL, folder)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }

    def train(*flags):
        return subprocess.run(
            [sys.executable, "-m", "launch.train", f"--config.data.path={data}/train.jsonl"]
            + [f"--config.student.path={MODEL}", f"--config.workspace={tmp_path}/work", *flags],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    refused = train()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert re.match(
        r"The model someone/tiny@[0-9a-f]{40} cannot be used: model_type is 'mamba' in "
        r"config\.json; supported: ",
        refused.stderr,
    )
    assert refused.stderr.count("\n") == 1
    assert hub.asked("config.json") and not hub.asked("model.safetensors")
    typed = train("--config.student.revision=v9")
    assert (typed.returncode, typed.stderr) == (
        2,
        "The hub's model 'someone/tiny' has no revision 'v9'; give a branch, a tag or a whole "
        "commit, or leave revision empty.\n",
    )
