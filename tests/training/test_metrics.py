"""FLOPs, speeds, trackers and the profiler; the host never waits for the current step."""

import struct
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from deltapref_jax.models.flops import forward_flops, peak_flops
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.progress import progress
from deltapref_jax.training import loop, monitor
from deltapref_jax.training.checkpoint import read_metrics
from deltapref_jax.training.monitor import MonitorConfig, note, step_flops

SPEC = ModelSpec(49152, 576, 30, 9, 3, 64, 1536)


def test_flops_are_two_per_weight_and_token_and_the_causal_half_of_attention():
    positions = np.array([*range(10), *range(6)])
    norms = SPEC.width * (2 * SPEC.layers + 1)
    weights = SPEC.parameters - norms - SPEC.vocab * SPEC.width
    assert forward_flops(SPEC, positions, 0) == 2 * weights * 16 + 30 * 2 * 576 * (10**2 + 6**2)
    assert (
        forward_flops(SPEC, positions, 7) - forward_flops(SPEC, positions, 0) == 2 * 7 * 576 * 49152
    )


def test_a_steps_flops_are_those_of_its_sequences_whatever_the_packing(program):
    want = {}
    for kind in ("dpo", "kto"):
        for rows in (32, 4):
            data = program.data(kind, rows)(0)
            want.setdefault(kind, step_flops(SPEC, data))
            assert step_flops(SPEC, data) == pytest.approx(want[kind], rel=1e-12)
    # KTO also reads each sequence behind another prompt of the same length, without gradient.
    assert want["kto"] == pytest.approx(want["dpo"] * 4 / 3, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_the_note_of_the_bar():
    values = {
        "loss": 0.5,
        "rewards/margins": 0.25,
        "rewards/accuracies": 0.75,
        "tokens_per_second": 12345.6,
        "padding": 0.041,
        "mfu": 0.4567,
        "grad_norm": 1.0,
    }
    assert (
        note(values)
        == "loss 0.5000  margin +0.250  accuracy 75%  12,346 tokens/s  padding 4%  MFU 45.7%"
    )
    assert note({"loss": 2.0, "padding": 0.0}) == "loss 2.0000  padding 0%"


def test_a_narrow_terminal_cuts_nothing(capsys):
    words = note(
        {
            "loss": 0.5,
            "rewards/margins": 0.25,
            "rewards/accuracies": 1.0,
            "tokens_per_second": 123456.7,
            "padding": 0.041,
            "mfu": 0.4567,
        }
    )
    bar = progress()
    bar.add_task("train", total=1200, completed=340, unit="steps", note=words)
    console = Console(width=80)
    for each in bar.get_renderables():
        console.print(each)
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    for part in ("train ", "340/1200", "-:--:--", *words.split("  ")):
        assert part in out


@pytest.fixture
def calls(monkeypatch):
    """Records the calls of a fake tracker."""
    calls = []

    class Fake:
        def __init__(self, folder, label, resumed):
            calls.append(("open", folder.name, label, resumed))

        def write(self, step, values):
            calls.append((step, values))

        def flush(self):
            calls.append("flush")

        def close(self):
            calls.append("close")

    monkeypatch.setitem(monitor.TRACKERS, "wandb", Fake)
    return calls


def test_trackers_see_the_rows_the_padding_and_the_speed(
    program, tmp_path, calls, monkeypatch, one_device
):
    monkeypatch.setattr(monitor, "peak_flops", lambda kind: 1e12)
    clock = iter(range(100))
    monkeypatch.setattr(
        monitor, "time", types.SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    data = [program.data("dpo", 32)(i) for i in range(3)]
    program.tiny(
        tmp_path / "run",
        steps=3,
        mesh=one_device,
        monitor=MonitorConfig(("wandb",)),
        label="arm",
        source=data.__getitem__,
    )
    rows = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert calls[0] == ("open", "run", "arm", 0)
    assert calls[-2:] == ["flush", "close"]  # flushed before the last checkpoint
    written = [entry for entry in calls[1:] if isinstance(entry, tuple)]
    assert [step for step, _ in written] == [1, 2, 3]
    for row, (_, values), batch in zip(rows, written, data, strict=True):
        assert {k: v for k, v in row.items() if k != "step"}.items() <= values.items()
        assert values["padding"] == pytest.approx(1 - batch.tokens / (32 * 64))
    assert "tokens_per_second" not in written[0][1]
    seconds = [values["tokens_per_second"] for _, values in written[1:]]
    assert written[1][1]["mfu"] / seconds[0] == pytest.approx(
        step_flops(program.SPEC, data[1]) / data[1].tokens / 1e12
    )
    assert [row["num_tokens"] for row in rows] == list(np.cumsum([batch.tokens for batch in data]))


def test_metrics_are_fetched_a_step_late_once_a_step(program, tmp_path, monkeypatch):
    order, train_step, get = [], loop.train_step, jax.device_get

    def fetch(tree):
        if isinstance(tree, dict) and "loss" in tree:
            order.append("fetch")
        return get(tree)

    monkeypatch.setattr(loop, "train_step", lambda *a: (order.append("step"), train_step(*a))[1])
    monkeypatch.setattr(jax, "device_get", fetch)
    program.tiny(tmp_path, steps=5, every=3)
    #                1       2                3, saved                  4       5, saved
    assert order == [
        "step",
        "step",
        "fetch",
        "step",
        "fetch",
        "fetch",
        "step",
        "step",
        "fetch",
        "fetch",
    ]


def test_tensorboard_has_every_scalar(program, tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    from tensorboardX import event_file_writer
    from tensorboardX.proto.event_pb2 import Event

    # both runs begin within one second, by which the writer names its files
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(time=lambda: 1.7e9))

    program.tiny(tmp_path, steps=2, monitor=MonitorConfig(("tensorboard",)))
    program.tiny(tmp_path, steps=3, monitor=MonitorConfig(("tensorboard",)))
    events = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event, data = Event.FromString(data[12 : 12 + size]), data[12 + size + 4 :]
            for value in event.summary.value:
                events[value.tag, event.step] = value.simple_value
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                assert events[f"train/{name}", row["step"]] == pytest.approx(value, rel=1e-6), name
    assert ("train/padding", 1) in events


def test_wandb_continues_a_run_under_its_id(program, tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: (calls.append(k), run)[1])
    )
    for steps in (1, 2):
        program.tiny(tmp_path, steps=steps, monitor=MonitorConfig(("wandb",)), label="arm")
    first, second = (call for call in calls if isinstance(call, dict))
    assert first == second
    assert (first["name"], first["resume"], first["dir"]) == ("arm", "allow", str(tmp_path))
    assert [call[0] for call in calls if isinstance(call, tuple)] == [1, 2]
    assert calls[-1] == "end"
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert calls[1][1]["train/loss"] == rows[0]["loss"]


def test_the_profiler_traces_its_window_and_stops(program, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    source = program.data("dpo", 32)
    program.tiny(
        tmp_path,
        steps=4,
        monitor=MonitorConfig(profile=(2, 3)),
        source=lambda step: (calls.append(step), source(step))[1],
    )
    assert calls == [0, str(tmp_path / "profile"), 1, 2, "stop", 3]
