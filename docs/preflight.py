"""Runs `launch.preflight` for the configs by size, and writes the tables of docs/preflight.md.

    python -m docs.preflight [CASE …]      all cases without any; those that are named otherwise

Needs libtpu and no accelerator. A case takes minutes on two cores. Results are kept in
docs/preflight.json; the tables are made from all of them.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from deltapref_jax.config import Experiment
from deltapref_jax.progress import plain_console
from deltapref_jax.validation import validate
from launch.chips import GIB, parse_topology
from launch.preflight import Options, preflight

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "preflight.json"
PAGE = ROOT / "docs" / "preflight.md"
MODELS = ROOT / "tests" / "models" / "published"
_BEGIN, _END = "<!-- {} -->", "<!-- end of {} -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of `launch.preflight`.

    Attributes:
      name: that the command line and the tables use.
      config: of configs/.
      topology: and number of slices.
      stages: that are looked at.
      flags: that the command has besides.
      change: what these flags do to the config.
    """

    name: str
    config: str
    topology: str
    slices: int = 1
    stages: tuple[str, ...] = ("train",)
    flags: str = ""
    change: Callable[[Experiment], Any] = lambda e: None

    @property
    def command(self) -> str:
        """As a user types it."""
        slices = f" --num_slices={self.slices}" * (self.slices > 1)
        return (
            f"python -m launch.preflight --config=configs/{self.config}.py "
            f"--topology={self.topology}{slices} --stages={','.join(self.stages)}"
            f"{' ' * bool(self.flags)}{self.flags}"
        )


def _reference(e: Experiment) -> None:
    e.reference = dataclasses.replace(e.student, path="Qwen/Qwen3-30B-A3B")


def _rows(e: Experiment) -> None:
    e.training.rows, e.training.remat = 32, "projections"


CASES = (
    Case("8B-v5e-4x4", "llama_8b", "v5e:4x4"),
    Case(
        "8B-refused",
        "llama_8b",
        "v5e:4x4",
        flags="--config.training.rows=32 --config.training.remat=projections",
        change=_rows,
    ),
    Case("8B-v5e-2x4", "llama_8b", "v5e:2x4"),
    Case("8B-decode", "llama_8b", "v6e:2x4", stages=("sample",)),
    Case("30B-A3B-sample", "qwen_30b_a3b", "v6e:2x4", stages=("sample",)),
    Case(
        "30B-A3B-score",
        "qwen_30b_a3b",
        "v6e:2x4",
        stages=("score",),
        flags="--config.reference.path=Qwen/Qwen3-30B-A3B --config.reference.dtype=bfloat16",
        change=_reference,
    ),
    Case("8B-v5p-2x4x4", "llama_8b", "v5p:2x4x4"),
    Case("8B-two-slices", "llama_8b", "v5e:4x4", slices=2),
    Case("32B-v5p-4x4x4", "qwen_32b", "v5p:4x4x4"),
    Case("8B-v5e-16x16", "llama_8b", "v5e:16x16"),
    Case("1B-v5e-2x4", "llama_1b", "v5e:2x4", stages=("train", "score", "judge", "sample")),
    Case("8B-h100", "llama_8b", "h100:1x8", stages=("train", "score", "judge", "sample")),
)


def run(case: Case) -> dict[str, Any]:
    """The report of a case, with the commit whose programs were compiled and the seconds."""
    e: Experiment = validate(importlib.import_module(f"configs.{case.config}").get_config())
    case.change(e)
    began = time.monotonic()
    own = [*(g.model for g in e.generators), *(j.model for j in e.judges)]
    for model in (e.student, e.reference, *own):
        if model.path:
            model.path = str(MODELS / model.path)
    options = Options(
        compile_seconds=3000.0,
        stages=case.stages,
        cache=str(pathlib.Path.home() / ".cache" / "deltapref-jax" / "preflight"),
    )
    topology = parse_topology(case.topology, case.slices)
    report = preflight(e, topology, options, plain_console(width=130))
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    return report | {
        "command": case.command,
        "commit": commit,
        "seconds": round(time.monotonic() - began),
        "memory": topology.chip.memory,
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page by name."""
    known = {case.name: results[case.name] for case in CASES if case.name in results}
    return {
        "programs": _table(
            "case | program | mesh | fits | arguments | temporary | peak | beside | of | level | s",
            (row for name, report in known.items() for row in _programs(name, report)),
        ),
        "speeds": _table(
            "case | stage | bound | s | tokens/s | MFU | chip-hours of the study | level",
            (row for name, report in known.items() for row in _speeds(name, report)),
        ),
        "collectives": _table(
            "case | program | kind | axes | times | GB received | level",
            (row for name, report in known.items() for row in _collectives(name, report)),
        ),
        "proposals": _table(
            "case | refused | what fits instead | peak and beside | s | tokens/s | MFU | level",
            (row for name, report in known.items() for row in _proposals(name, report)),
        ),
        "commands": _table(
            "case | command | commit | s in all",
            (
                f"{name} | `{report['command']}` | {report['commit']} | {report['seconds']:,}"
                for name, report in known.items()
            ),
        ),
    }


def _table(head: str, rows: Iterator[str]) -> str:
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|---" * columns + "|", *(f"| {row} |" for row in rows)])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _level(report: dict[str, Any]) -> str:
    """The compiler's level of a case, as the table of programs has it."""
    return "formula" if report["level"] == "by formula" else str(report["level"])


def _programs(name: str, report: dict[str, Any]) -> Iterator[str]:
    for p in report["programs"]:
        mesh = " ".join(f"{axis}={n}" for axis, n in p["mesh"].items() if n > 1) or "1"
        fits = {"fits": "yes", "refused": f"**no**, needs {_gib(p['needed'])}"}
        fits["by formula"] = "yes" if p["peak"] <= p["limit"] else "no"
        # What is not known is left out, as `launch.preflight` does.
        temporary = _gib(p["temporaries"]) if p["status"] == "fits" else ""
        peak = _gib(p["peak"]) if p["status"] in ("fits", "by formula") else ""
        sizes = _gib(p["arguments"]), temporary, peak, _gib(p["beside"]), _gib(report["memory"])
        shown = " | ".join(sizes)
        level = p["level"] or "formula"
        program = f"{p['stage']} {p['of']}: {p['name']}"
        status = fits.get(p["status"], p["status"])
        yield f"{name} | {program} | {mesh} | {status} | {shown} | {level} | {p['seconds']:.0f}"


def _speeds(name: str, report: dict[str, Any]) -> Iterator[str]:
    for s in report["predicted"]:
        hours = report["predicted_chip_hours"].get(f"{s['stage']} {s['of']}", math.nan)
        yield (
            f"{name} | {s['stage']} {s['of']} | {s['bound']} | {s['seconds']:.3g} | "
            f"{s['tokens']:,.0f} | {s['mfu']:.0%} | {hours:,.2g} | {_level(report)}"
        )


def _collectives(name: str, report: dict[str, Any]) -> Iterator[str]:
    for p in report["programs"]:
        total = sum(c[3] for c in p["collectives"])
        for kind, axes, _, size, count in p["collectives"]:
            if size > 0.05 * total and p["flops"]:
                program = f"{p['stage']} {p['of']}: {p['name']}"
                figures = f"{kind} | {axes} | {count:,.0f} | {size / 1e9:,.2f}"
                yield f"{name} | {program} | {figures} | {_level(report)}"


def _proposals(name: str, report: dict[str, Any]) -> Iterator[str]:
    for p in report.get("proposals", ()):
        if not p["proposal"]:
            yield f"{name} | {p['refused']} | nothing was found | | | | | {_level(report)}"
            continue
        most = max(r["peak"] + r["beside"] for r in p["proposal"]["results"])
        flags = " ".join(p["proposal"]["flags"])
        room = f"{_gib(most)} of {_gib(report['memory'])}"
        speeds = [
            f"{s['seconds']:.3g} | {s['tokens']:,.0f} | {s['mfu']:.0%}"
            for s in p["proposal"]["predicted"]
        ]
        reached = speeds[0] if speeds else " | | "
        yield f"{name} | {p['refused']} | `{flags}` | {room} | {reached} | {_level(report)}"


def main(names: list[str]) -> None:
    """Runs cases and writes the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in CASES:
        if not names or case.name in names:
            results[case.name] = run(case)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)


def write(results: dict[str, Any]) -> None:
    """Puts the tables between their marks on the page."""
    page = PAGE.read_text()
    for name, table in tables(results).items():
        before, _, rest = page.partition(_BEGIN.format(name))
        _, _, after = rest.partition(_END.format(name))
        page = f"{before}{_BEGIN.format(name)}\n{table}\n{_END.format(name)}{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
