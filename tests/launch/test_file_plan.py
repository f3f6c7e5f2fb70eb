"""launch.train --dry_run: its figures are those of the run, and it makes nothing."""

import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from deltapref_jax.artifacts.runner import run
from deltapref_jax.artifacts.workspace import Workspace
from deltapref_jax.config import ConfigError, Model, Objective, Pairs, PairTraining, Training
from deltapref_jax.devices import Devices, attached_devices
from deltapref_jax.models.flops import forward_flops
from deltapref_jax.models.weights import describe_model
from deltapref_jax.records import TokenSequence
from deltapref_jax.stages.pairs_file import plan, steps_of
from deltapref_jax.validation import validate_pair_training
from launch.cost import checkpoint_bytes
from launch.file_plan import FileCost, show_file_plan

LENGTHS = [(3 + i % 5, 4 + 3 * i % 17, 2 + i % 7) for i in range(12)]  # prompt, chosen, rejected


@pytest.fixture
def training_of(tiny_folder, tmp_path):
    def make(kind="dpo", student=tiny_folder, **fields):
        rows = [
            {"prompt_ids": [5 + i] * n, "chosen_ids": [8] * a, "rejected_ids": [9] * b, "from": "x"}
            for i, (n, a, b) in enumerate(LENGTHS)
        ]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shape = {"pairs_per_step": 4, "rows": 8, "row_length": 64, "checkpoint_every": 2}
        return validate_pair_training(
            PairTraining(
                workspace=str(tmp_path / "workspace"),
                data=Pairs(str(tmp_path / "pairs.jsonl")),
                student=Model(str(student)),
                objective=Objective(name=kind, kind=kind, learning_rate=1e-3),
                training=Training(**shape | {"epochs": 2.0, "budget": "epochs"} | fields),
            )
        )

    return make


def planned(p, devices=None):
    """What a dry run prints, in one line."""
    devices, out = devices or Devices(1, 1), io.StringIO()
    policy = plan(p, None, devices, weights=False)
    show_file_plan(Console(file=out, width=200), p, policy, Workspace(p.workspace), devices)
    return re.sub(r"\s+", " ", out.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_the_figures_are_those_of_the_run(training_of, kind, tiny, tmp_path):
    p, devices = training_of(kind), attached_devices()
    shown = planned(p, devices)
    assert not (tmp_path / "workspace").exists()
    policy, workspace = plan(p, None, devices), Workspace(p.workspace)
    sequences = policy.sequences["file"]
    run([sequences], workspace, show=False)
    rows = workspace.rows(TokenSequence, sequences)
    cost = FileCost(policy, workspace, rows, steps_of(p, policy, rows, devices, describe_model))
    trained, scored = cost(policy), [cost(table) for table in policy.logprobs.values()]
    run([policy], workspace, show=False)
    stats = workspace.manifest(policy).stats
    assert (trained.work.items, trained.tokens) == (stats["steps"], stats["tokens"])
    filled = stats["filled"] / stats["positions"]
    assert f"about {filled:.0%} of the positions filled" in shown
    assert f"{stats['steps']:.0f} steps" in shown
    for table, estimate in zip(policy.logprobs.values(), scored, strict=True):
        found = workspace.manifest(table).stats
        assert (estimate.work.items, estimate.tokens) == (found["rows"], found["tokens"])
        assert estimate.flops == sum(
            forward_flops(tiny.spec, np.arange(row.length), row.targets.sum()) for row in rows
        )
    kept = list((workspace.path(policy) / "checkpoints").glob("step_*"))
    assert len(kept) == p.training.keep_checkpoints
    size = sum(file.stat().st_size for file in pathlib.Path(kept[0]).rglob("*") if file.is_file())
    assert checkpoint_bytes(tiny.spec, p.training) == pytest.approx(size, rel=0.5)
    assert planned(p, devices).endswith("; nothing is to be made. ")


def test_work_is_counted_by_hand(training_of, tiny):
    shown = planned(training_of(rows=2))
    lengths = [(n + a, n + b) for n, a, b in LENGTHS]
    matched = sum(map(sum, lengths))
    assert "tokens 1 of 1 12 pairs" in shown
    assert f"score 1 of 1 24 sequences ≈ {matched} " in shown
    assert f"train 1 of 1 6 steps ≈ {2 * matched} " in shown  # two epochs, 4 pairs a step
    assert "are trained on 2 times; those of training, and its FLOPs, by 6 of 6 steps" in shown
    mean = round(2 * matched / 48)
    assert f"A step of dpo: 8 sequences of about {mean} tokens in " in shown
    size = 12 * tiny.spec.parameters / 1024
    assert f"Checkpoints: one in 2 steps, of {size:.0f} KiB; the newest 1 and the policy" in shown


def test_what_a_dry_run_assumes_of_the_devices_reaches_the_steps(training_of):
    """On four devices a micro-batch of 8 rows is at least half filled with padding."""
    shown = planned(training_of(), Devices(4, 4, platform="tpu"))
    assert shown.startswith("Mesh: training fsdp=4.")
    assert "Data: " in shown and "1 columns ignored: from 12 rows read 12 trained on" in shown
    assert "its rows are spread over 4 devices (data x fsdp)" in shown


def test_a_config_json_with_a_tokenizer_is_enough(training_of, tiny_folder, tmp_path):
    alone = shutil.copytree(
        tiny_folder, tmp_path / "alone", ignore=shutil.ignore_patterns("*.safetensors")
    )
    p = training_of(student=alone)
    assert "6 steps" in planned(p)
    with pytest.raises(FileNotFoundError):
        plan(p)
    for file in alone.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer, which gives the file its tokens; "):
        planned(p)


def test_what_a_run_refuses_is_refused(training_of):
    with pytest.raises(ConfigError, match=r"12 are longer than config\.training\.row_length \(4"):
        planned(training_of(row_length=4))
