"""The benchmark reports what its docstring says, on a model that takes seconds."""

import json
import math
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_ours_alone(tmp_path):
    out = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "launch.bench_train",
        "--layers=1",
        "--width=64",
        "--mlp=64",
        "--vocab=128",
        "--pairs=2",
        "--steps=3",
        "--rounds=1",
        "--shapes=uniform",
        f"--output={out}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    assert "dpo, uniform" in done.stdout
    assert "kto, uniform" in done.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["contender"]) for row in rows] == [("dpo", "ours"), ("kto", "ours")]
    for row in rows:
        (run,) = row["runs"]
        assert len(run["step_seconds"]) == len(run["loss"]) == 3
        assert run["loss"][0] == pytest.approx(
            math.log(2) if row["kind"] == "dpo" else 0.5, abs=1e-4
        )
        # Positions of a pair: its prompt of 64 without the last token, and that token before
        # either completion of 192.
        positions = 63 + 2 * 193
        assert row["real_share"] == 1  # two pairs a row of 898
        tokens = 2 * 2 * 256
        slowest = tokens / (max(run["step_seconds"][1:]) + run["reference_seconds"])
        assert row["lowest"] == pytest.approx(slowest)
        assert row["lowest"] <= row["tokens_per_second"] <= row["training_only"]
        assert row["peak_bytes"] > 2**27
        assert 0 < row["of_ceiling"] < 1
        # 7 matrices of 64 x 64 (q, o, k, v, gate, up, down), the vocabulary at targets, attention
        attended = 2 * 256**2 - 63**2
        forward = 2 * (2 * positions * 7 * 64 * 64 + 2 * 64 * 128 * 2 * 192 + 2 * 64 * attended)
        steps = {"dpo": 3, "kto": 4}[row["kind"]] * forward
        assert run["step_flops"] == pytest.approx([steps] * 3)
        assert run["reference_flops"] == pytest.approx({"dpo": 1, "kto": 2}[row["kind"]] * forward)
