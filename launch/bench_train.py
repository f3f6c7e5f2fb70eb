"""Compares a training step's speed and memory with TRL and Tunix, on the same weights and pairs.

    python -m launch.bench_train --trl=TRL_ENV/bin/python --tunix=TUNIX_ENV/bin/python

The first command compares all; this one measures this project alone, in a minute:

    python -m launch.bench_train --layers=2 --width=64 --vocab=512 --steps=2 --rounds=1

Each contender runs in a process of its own, which reads a model folder with random weights and a
file of pairs. It does one step that is not counted, as it compiles, and then `steps - 1` that are.
Each round runs all contenders in turn. A prompt has a quarter of its pair's mean length. Sequences
have 256 tokens with the shape `uniform`, and lognormal lengths with `lognormal`: median 160, sigma
0.8, at most 1024; `--scale` multiplies them. torch (OpenMP) and XLA get as many threads as the
process may use, and all contenders use huge pages (GLIBC_TUNABLES).

`tokens/s` counts the real tokens of both sequences of the pairs, over the seconds of a step and of
the reference pass of its pairs. TRL by default and Tunix run that pass inside the step. KTO's
mismatched rows cost time and count no tokens. `peak` is the process's largest resident memory, or
on an accelerator the most of its memory that was taken. `of ceiling` is the time that the FLOPs
which a step and its reference pass need would take at the rate of a large matrix product, over the
measured time: 100% is as fast as this machine can be. `loss` of the second step shows that all
compute the same. A contender that fails, such as for want of memory, is a row with the peak that it
reached, and a sentence under the table.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deltapref_jax.config import DTYPES, REMATS, ConfigError, check_choice
from deltapref_jax.progress import plain_console, say
from launch.flags import define_count, define_output, run_main

_TRL = flags.DEFINE_string(
    "trl", "", "Python of an environment with trl and torch; if empty, TRL is not measured."
)
_TUNIX = flags.DEFINE_string(
    "tunix", "", "Python of an environment with google-tunix; if empty, Tunix is not measured."
)
_KINDS = flags.DEFINE_list("kinds", ["dpo", "kto"], "Objectives (Tunix has no KTO).")
_SHAPES = flags.DEFINE_list(
    "shapes", ["uniform", "lognormal"], "Distributions of sequence lengths."
)
_ONLY = flags.DEFINE_list(
    "only", [], "Contenders to run: ours, trl-precomputed, trl, tunix; if empty, all available."
)
_KNOWN = {
    "kinds": ("dpo", "kto"),
    "shapes": ("uniform", "lognormal"),
    "only": ("ours", "trl-precomputed", "trl", "tunix"),
}
_STEPS = flags.DEFINE_integer(
    "steps",
    3,
    "Steps of one process; the first is not counted.",
    lower_bound=2,
    upper_bound=2**20,
)
_ROUNDS = define_count("rounds", 2, "Processes per contender.")
_PAIRS = define_count("pairs", 8, "Pairs of one step.")
_SCALE = define_count("scale", 1, "Multiplies all lengths.", 1024)
_ROWS = define_count("rows", 2, "Rows of our micro-batch.")
_REMAT = flags.DEFINE_enum(
    "remat", "projections", list(REMATS), "Our remat policy, from models.decoder.POLICIES."
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    list(DTYPES),
    "Our dtype; TRL trains in mixed bfloat16 on a GPU, and the peers in float32 elsewhere.",
)
_CHECKPOINTING = flags.DEFINE_bool(
    "trl_gradient_checkpointing", False, "TRL's default is true; false is faster."
)
_ACCUMULATE = define_count("tunix_accumulate", 1, "Micro-batches of Tunix's step.")
_TUNIX_REMAT = flags.DEFINE_enum(
    "tunix_remat", "NONE", ["NONE", "BLOCK", "DECODER"], "Tunix's RematConfig."
)
_LAYERS = define_count("layers", 30, "Layers of the model; the defaults are SmolLM2-135M's.", 1000)
_WIDTH = define_count(
    "width",
    576,
    "Width of the model, a multiple of 64, or below 128 an even number; heads are 64 wide, and a "
    "third of them are kv heads if possible.",
    2**16,
)
_MLP = define_count("mlp", 1536, "MLP width of the model.")
_VOCAB = define_count("vocab", 49152, "Vocabulary size of the model.")
_HUGE = flags.DEFINE_bool(
    "huge_pages", True, "GLIBC_TUNABLES=glibc.malloc.hugetlb=1, for all contenders."
)
_OUTPUT = define_output()

_CONTENDERS = Path(__file__).parent / "contenders"
_ROPE_THETA = 100_000


def make_model(folder: Path) -> None:
    """Writes a Llama folder with random weights.

    Its tokenizer reads ids as words: `w7` is 7, `</s>` is 0.
    """
    import transformers
    from flax import nnx
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    from deltapref_jax.models.decoder import Decoder
    from deltapref_jax.models.export import export
    from deltapref_jax.models.spec import ModelSpec, Rope
    from deltapref_jax.text.template import ChatTokenizer

    names = {0: "</s>", 1: "<pad>"}
    tokenizer = Tokenizer(
        WordLevel({names.get(i, f"w{i}"): i for i in range(_VOCAB.value)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    heads = max(1, _WIDTH.value // 64)
    spec = ModelSpec(
        _VOCAB.value,
        _WIDTH.value,
        _LAYERS.value,
        heads,
        heads // 3 if heads % 3 == 0 else heads,
        _WIDTH.value // heads,
        _MLP.value,
        ropes=(Rope(_ROPE_THETA),),
        max_positions=8192 * _SCALE.value,
    )
    export(
        nnx.state(Decoder(spec, rngs=nnx.Rngs(0))), spec, ChatTokenizer(fast, "the bench"), folder
    )


def pairs_of(shape: str, count: int) -> list[dict[str, list[int]]]:
    """Makes pairs of random ids; the last id of a completion is its end token."""
    r = np.random.default_rng(0)
    lengths = np.full((count, 2), 256)
    if shape == "lognormal":
        lengths = np.clip(r.lognormal(np.log(160), 0.8, (count, 2)).astype(int), 8, 1024)
    pairs = []
    for n in lengths * _SCALE.value:
        prompt = min(int(n.mean()) // 4, int(n.min()) // 2)
        pairs.append(
            {"prompt": r.integers(2, _VOCAB.value, prompt).tolist()}
            | {
                side: [*r.integers(2, _VOCAB.value, m - prompt - 1).tolist(), 0]
                for side, m in zip(("chosen", "rejected"), n, strict=True)
            }
        )
    return pairs


def contenders(kind: str, shape: str, folder: Path) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Returns name → (Python executable, script, its configuration)."""
    # A uniform row holds two pairs that share their prompts, except for the last prompt token,
    # which precedes each completion: hence the 2.
    length = 896 * _SCALE.value + 2 if shape == "uniform" else 1024 * _SCALE.value
    base = {
        "folder": str(folder),
        "kind": kind,
        "pairs": _PAIRS.value,
        "beta": 0.1,
        "learning_rate": 1e-6,
        "dtype": _DTYPE.value,
    }
    ours = base | {
        "rows": _ROWS.value,
        "row_length": length,
        "remat": _REMAT.value,
    }
    trl = base | {
        "threads": len(os.sched_getaffinity(0)),
        "gradient_checkpointing": _CHECKPOINTING.value,
    }
    available = {"ours": (sys.executable, "ours.py", ours)}
    if _TRL.value:
        available |= {
            "trl-precomputed": (_TRL.value, "with_trl.py", trl | {"precompute": True}),
            "trl": (_TRL.value, "with_trl.py", trl | {"precompute": False}),
        }
    if _TUNIX.value and kind == "dpo":
        available["tunix"] = (
            _TUNIX.value,
            "with_tunix.py",
            base
            | {
                "remat": _TUNIX_REMAT.value,
                "accumulate": _ACCUMULATE.value,
                "rope_theta": _ROPE_THETA,
            },
        )
    names = _ONLY.value or list(available)
    return {name: available[name] for name in names if name in available}


def run(python: str, script: str, c: dict[str, Any]) -> dict[str, Any]:
    """Runs one contender's process.

    Returns:
      Its JSON, or `failed`, which says how it ended; and its peak in bytes: of the accelerator's
      memory where the contender used one, else resident.
    """
    threads = str(len(os.sched_getaffinity(0)))
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
    }
    if _HUGE.value:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [python, str(_CONTENDERS / script), json.dumps(c)],
            stdout=out,
            stderr=err,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        # Where memory runs out, Linux ends the contender and not its neighbours.
        with contextlib.suppress(OSError):
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines()
        found: dict[str, Any]
        if process.returncode or not lines:
            found = {"failed": _ended(process.returncode, err.read())}
        else:
            found = json.loads(lines[-1])
    return {"peak_bytes": usage.ru_maxrss * 1024} | found


def _ended(code: int, stderr: str) -> str:
    """Says how a process without a result ended."""
    if code == -signal.SIGKILL:
        return "killed (SIGKILL), as Linux does where memory runs out"
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = stderr.strip().splitlines()[-1:]
    return ": ".join([how, *last])[:500]


def measure(kind: str, shape: str, model: Path, console: Console) -> list[dict[str, Any]]:
    """Measures all contenders on one objective and shape, in alternation."""
    pairs = pairs_of(shape, _PAIRS.value * _STEPS.value)
    (model.parent / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    tokens = [
        sum(
            2 * len(p["prompt"]) + len(p["chosen"]) + len(p["rejected"])
            for p in pairs[at : at + _PAIRS.value]
        )
        for at in range(0, len(pairs), _PAIRS.value)
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    selected = contenders(kind, shape, model.parent)
    for turn in range(_ROUNDS.value):
        for name, contender in selected.items():
            result = run(*contender)
            runs.setdefault(name, []).append(result)
            said = result.get("failed") or (
                f"{', '.join(f'{s:.1f}' for s in result['step_seconds'])} s a step, reference "
                f"{result['reference_seconds']:.1f} s"
            )
            peak = f"peak {result['peak_bytes'] / 2**30:.2f} GiB"
            say(console, escape(f"{kind} {shape} round {turn + 1} {name}: {said}, {peak}"))
    return [_row(kind, shape, name, own, tokens) for name, own in runs.items()]


def _row(
    kind: str, shape: str, name: str, runs: list[dict[str, Any]], tokens: list[int]
) -> dict[str, Any]:
    """Returns a contender's row of the table, from its runs and the tokens of each step.

    A row without a run that finished has no speeds; `failed` says how each of the others ended.
    """
    found: dict[str, Any] = {"kind": kind, "shape": shape, "contender": name, "runs": runs}
    found["peak_bytes"] = max(one["peak_bytes"] for one in runs)
    found["failed"] = [one["failed"] for one in runs if "failed" in one]
    runs = [one for one in runs if "failed" not in one]
    if not runs:
        return found
    speeds, training = [], []
    for one in runs:
        for count, seconds in list(zip(tokens, one["step_seconds"], strict=True))[1:]:
            training.append(count / seconds)
            speeds.append(
                count / (seconds + one["reference_seconds"] * count / statistics.mean(tokens))
            )
    losses = [one["loss"][1] for one in runs if len(one["loss"]) > 1]
    ceilings = [
        (flops + one["reference_flops"])
        / (seconds + one["reference_seconds"])
        / one["product_flops"]
        for one in runs
        if "product_flops" in one
        for flops, seconds in list(zip(one["step_flops"], one["step_seconds"], strict=True))[1:]
    ]
    return found | {
        "tokens_per_second": statistics.median(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "training_only": statistics.median(training),
        "loss": losses[0] if losses else None,
        "of_ceiling": statistics.median(ceilings) if ceilings else None,
        "real_share": runs[0].get("real_share"),
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints the table; ratios are ours over the contender's.

    A speed ratio above 1 and a peak ratio below 1 are in our favour.
    """
    table = Table(
        title=f"{_PAIRS.value} pairs a step, {_LAYERS.value} layers of {_WIDTH.value}, "
        f"{_VOCAB.value} words"
    )
    table.add_column("", min_width=16)
    for name in (
        "tokens/s",
        "step\nalone",
        "speed,\nours/it",
        "peak\nGiB",
        "peak,\nours/it",
        "of\nceiling",
        "loss",
    ):
        table.add_column(name, justify="right")
    ours = {(r["kind"], r["shape"]): r for r in rows if r["contender"] == "ours"}
    for r in rows:
        base = ours.get((r["kind"], r["shape"]))
        if base is r:
            table.add_section()
            table.add_row(Text(f"{r['kind']}, {r['shape']}", style="bold"))
        elif base and "loss" in base and "loss" in r:
            r |= {
                "speed_ratio": base["tokens_per_second"] / r["tokens_per_second"],
                "peak_ratio": base["peak_bytes"] / r["peak_bytes"],
            }
        if "loss" not in r:
            table.add_row(r["contender"], "failed", "", "", f"{r['peak_bytes'] / 2**30:.2f}")
            continue
        speed, peak = (
            f"{r[name]:.2f}" if name in r else "" for name in ("speed_ratio", "peak_ratio")
        )
        table.add_row(
            r["contender"],
            _short(r["tokens_per_second"]),
            _short(r["training_only"]),
            speed,
            f"{r['peak_bytes'] / 2**30:.2f}",
            peak,
            f"{r['of_ceiling']:.0%}" if r["of_ceiling"] else "",
            "" if r["loss"] is None else f"{r['loss']:.4f}",
        )
    console.print(table)
    for r in rows:
        if r["failed"]:
            rounds = f"{len(r['failed'])} of {len(r['runs'])} rounds"
            where = f"{r['kind']}, {r['shape']}, {r['contender']}"
            say(console, escape(f"{where}: {rounds} failed; {r['failed'][0]}."))


def _check_flags() -> None:
    """Checks names and sizes before a model is made.

    Raises:
      ConfigError: one sentence that names the flag, its value and the remedy.
    """
    for flag, values in (("kinds", _KINDS.value), ("shapes", _SHAPES.value), ("only", _ONLY.value)):
        for value in values:
            check_choice(f"--{flag}", value, _KNOWN[flag])
    for flag, python in (("trl", _TRL.value), ("tunix", _TUNIX.value)):
        if python and not (os.path.isfile(python) and os.access(python, os.X_OK)):
            raise ConfigError(f"--{flag} is {python!r}, which is no program; name a Python.")
    heads = max(1, _WIDTH.value // 64)
    if _WIDTH.value % heads or _WIDTH.value // heads % 2:
        raise ConfigError(
            f"--width is {_WIDTH.value}; it must be a multiple of 64, or below 128 an even number."
        )
    if _VOCAB.value < 8:
        raise ConfigError(f"--vocab is {_VOCAB.value}; it must be at least 8.")


def main(_: list[str]) -> None:
    """Measures every objective and shape, writing the JSON after each, and prints the table."""
    _check_flags()
    console, rows = plain_console(), []
    with tempfile.TemporaryDirectory() as root:
        model = Path(root) / "model"
        make_model(model)
        for kind in _KINDS.value:
            for shape in _SHAPES.value:
                rows += measure(kind, shape, model, console)
                if _OUTPUT.value and rows:
                    Path(_OUTPUT.value).write_text(
                        json.dumps(
                            {
                                "command": sys.argv,
                                "cores": len(os.sched_getaffinity(0)),
                                "rows": rows,
                            },
                            indent=1,
                        )
                        + "\n"
                    )
    show(console, rows)


if __name__ == "__main__":
    run_main(main)
