"""The benchmark reports what its docstring says, on a model that takes seconds."""

import io
import json
import math
import os
import re
import subprocess
import sys
import types

import pytest
from absl import flags
from rich.console import Console

from launch import bench_train

DEFAULTS = {
    name: holder.default
    for name, holder in vars(bench_train).items()
    if isinstance(holder, flags.FlagHolder)
}
# Entry points define flags of one name, and a process of the tests may import several of them.
for flag in flags.FLAGS.flags_by_module_dict()["launch.bench_train"]:
    delattr(flags.FLAGS, flag.name)


@pytest.fixture
def contender(monkeypatch, tmp_path):
    """Lets scripts stand for the contenders."""
    given = DEFAULTS | {"_ROUNDS": 1, "_PAIRS": 2, "_STEPS": 2}
    for name, value in given.items():
        monkeypatch.setattr(bench_train, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(bench_train, "_CONTENDERS", tmp_path)
    (tmp_path / "model").mkdir()

    def write(**scripts):
        for name, script in scripts.items():
            (tmp_path / f"{name}.py").write_text(script)
        chosen = {name: (sys.executable, f"{name}.py", {}) for name in scripts}
        monkeypatch.setattr(bench_train, "contenders", lambda *_: chosen)
        return tmp_path / "model"

    return write


def test_a_peer_that_is_killed_or_fails_is_a_row(contender):
    result = {"step_seconds": [2.0, 1.0], "reference_seconds": 0.0, "loss": [0.7, 0.6]}
    model = contender(
        ours=f"print({json.dumps(result)!r})",
        killed="import os; os.kill(os.getpid(), 9)",
        broken="raise MemoryError('no room for [/] 8 GiB')",
        silent="pass",
    )
    out = io.StringIO()
    console = Console(file=out, width=120)
    rows = bench_train.measure("dpo", "uniform", model, console)
    bench_train.show(console, rows)
    ours, killed, broken, silent = rows
    assert ours["tokens_per_second"] == 2 * 2 * 256
    assert ours["failed"] == []
    assert killed["failed"] == ["killed (SIGKILL), as Linux does where memory runs out"]
    assert broken["failed"] == ["ended with exit code 1: MemoryError: no room for [/] 8 GiB"]
    assert silent["failed"] == ["ended with exit code 0"]
    assert min(row["peak_bytes"] for row in rows) > 2**20
    table = out.getvalue()
    assert re.search(r"killed\s.* failed .* \d\.\d\d ", table)
    assert "dpo, uniform, killed: 1 of 1 rounds failed; killed (SIGKILL), as " in table


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
