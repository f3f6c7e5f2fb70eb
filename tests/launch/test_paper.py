"""The paper's study is planned by the config.json files of its models alone."""

import json
import pathlib
import shutil

import pytest
from rich.console import Console

from configs import paper
from deltapref_jax.artifacts.node import in_order
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, Model, Run
from deltapref_jax.devices import Devices
from deltapref_jax.models.config_json import spec_from_hf
from deltapref_jax.models.flops import training_flops
from deltapref_jax.models.memory import training_memory
from deltapref_jax.models.weights import describe_model, inspect_model
from deltapref_jax.stages.meshes import mesh_lines
from deltapref_jax.stages.study import plan
from deltapref_jax.validation import validate
from launch.cost import Cost, check_prompts, described_alone
from launch.dry_run import show_plan

PUBLISHED = pathlib.Path(__file__).parent.parent / "models" / "published"
STUDENT = "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
POD = Devices(64, 4, 1, "tpu")  # v5p 4x4x4: 16 hosts of 4 chips
DATA = {
    "open-r1/OpenR1-Math-220k": ("train", {"problem": "1+1?", "answer": "2"}),
    "HuggingFaceH4/MATH-500": ("test", {"problem": "1+2?", "answer": "3"}),
    "openai/gsm8k": ("test", {"question": "1+3?", "answer": "#### 4"}),
    "TIGER-Lab/TheoremQA": ("test", {"Question": "1+4?", "Answer": "5"}),
}


def push_paper(hub, scratch):
    """Pushes the config.json of every published model, and a row of every data set."""
    for file in PUBLISHED.rglob("config.json"):
        hub.push(file.parent.relative_to(PUBLISHED).as_posix(), file.parent)
    for name, (split, row) in DATA.items():
        folder = scratch / name
        folder.mkdir(parents=True)
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
        subset = "main" if name == "openai/gsm8k" else "default"
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: {split}\n"
            f"    path: {split}.jsonl\n---\n"
        )
        hub.push(name, folder, kind="dataset")


@pytest.fixture
def experiment(hub, tmp_path):
    push_paper(hub, tmp_path / "data")
    e = paper.get_config()
    e.workspace = str(tmp_path / "workspace")
    return validate(e)


def test_the_study_is_planned_on_a_pod_without_weights(experiment, hub, tmp_path, capsys):
    report = plan(experiment, devices=POD, weights=False)
    assert set(described_alone(report)) == {
        STUDENT,
        "openai/gpt-oss-120b",
        *(f"simplescaling/s1.1-{rung}" for rung in paper.RUNGS),
    }
    assert not [r for r in hub.requests if r[1].endswith((".safetensors", "tokenizer.json"))]
    lines = mesh_lines(report.experiment, POD)
    assert lines[0] == (
        "Meshes: training fsdp=64; scoring fsdp=64; on each host sampling data=4; generator s1-14B "
        "tensor=4; generator s1-32B tensor=4."
    )
    workspace = Workspace(experiment.workspace)
    show_plan(Console(width=100), report, workspace)
    check_prompts(report, workspace)
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in lines if line.strip()}
    assert "16 of 16" in table["train"]
    # 16,500 prompts: two traces of the weakest generator and one of each of the others.
    assert "82,500 traces" in table["sample"]
    cost = Cost(report, workspace)
    policy = report.policies["dpo-32B"][Run(0, 0)]
    spec = spec_from_hf(json.loads((PUBLISHED / STUDENT / "config.json").read_text()))
    assert cost(policy).memory == training_memory(
        spec, report.experiment.training, "bfloat16", report.experiment.training.mesh
    )
    sequences = 2 * 64 * -(-16_500 // 64)
    assert cost(policy).flops == sequences * training_flops(spec, range(8192), 7168)
    # Models without weights are told apart, and so are their nodes.
    weights = {name: node.weights for name, node in report.traces.items()}
    assert len(set(weights.values())) == len(weights)
    assert len(set(in_order([report]))) == len(in_order([report]))


def test_a_study_that_is_made_needs_the_weights(experiment):
    with pytest.raises(FileNotFoundError) as error:
        plan(experiment, devices=POD)
    assert "\n" not in str(error.value)
    assert f"The hub's model {STUDENT} at " in str(error.value)
    assert str(error.value).endswith(" has no safetensors; choose a repository that is complete.")


def test_a_folder_with_a_config_alone_is_planned_and_not_loaded(tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(PUBLISHED / STUDENT, folder)
    spec, text = describe_model(str(folder))
    assert (spec.layers, spec.width, text) == (32, 4096, None)
    with pytest.raises(FileNotFoundError, match=r"has no safetensors; give a complete"):
        inspect_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match=r"^The model .* cannot be used: model_type is 'mamba'"):
        describe_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^The model in .* cannot be read .*; fetch it again\.$"):
        describe_model(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        describe_model(str(folder))
    assert str(error.value) == (
        f"The folder {folder} has no config.json; give a model, or a config.json."
    )


def test_what_a_config_shows_to_be_impossible_is_refused_without_weights(experiment):
    experiment.sampling.max_tokens = 200_000
    with pytest.raises(ConfigError, match=r"has 131072 positions|has 32768 positions"):
        plan(experiment, devices=POD, weights=False)
    experiment.sampling.max_tokens = 7168
    experiment.training.lora.rank = 4096
    with pytest.raises(ConfigError, match=r"rank is 4096 and k_proj of the student is 1024 wide"):
        plan(experiment, devices=POD, weights=False)
    experiment.training.lora.rank = 0
    experiment.judges[0].model = Model("openai/gpt-oss-21b")
    with pytest.raises(FileNotFoundError, match=r"^The hub has no model 'openai/gpt-oss-21b' "):
        plan(experiment, devices=POD, weights=False)
