"""What a preflight prints."""

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from deltapref_jax.config import Experiment, PairTraining
from deltapref_jax.mesh import describe
from launch.chips import GIB, Topology
from launch.compile_programs import Result
from launch.proposals import Proposal, Tried
from launch.roofline import Speed, bounds
from launch.workload import Load, Step, step_line

_SHOWN = 0.01  # of a program's received bytes: smaller collectives are summed up


class Printer:
    """Prints tables and sentences."""

    def __init__(self, console: Console, topology: Topology, compiled: bool, level: str):
        self._console, self._topology = console, topology
        self._source = f"compiled at level {level}" if compiled else "by formula, not compiled"

    def say(self, sentence: str) -> None:
        """Prints one sentence."""
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def beginning(self, config: Experiment | PairTraining) -> None:
        """Says what is looked at."""
        t = self._topology
        memory = f", {t.chip.memory / GIB:,.2f} GiB each" if t.chip.memory else ""
        self.say(f"{config.name} on {t.name}: {t.devices.layout}{memory}; {self._source}.")
        meshes = [f"training {describe(config.training.mesh)}"]
        if isinstance(config, Experiment):
            meshes.append(f"scoring {describe(config.scoring.mesh)}")
            meshes.append(f"sampling, on each host, {describe(config.sampling.mesh)}")
        self.say(f"Meshes: {'; '.join(meshes)}.")

    def programs(self, results: Sequence[Result]) -> None:
        """Memory, bounds and collectives of every program."""
        self.say(
            f"\nMemory of one device in GiB ({self._source}; s: seconds of compiling; beside: what "
            "lies there while the program runs and is no argument of it):"
        )
        table = _table("program", "mesh", "fits", "arguments", "temporary", "peak", "beside", "s")
        for r in results:
            table.add_row(
                r.label,
                _mesh(r),
                _verdict(r),
                _gib(r.arguments),
                _gib(r.temporaries) if r.status == "fits" else "",
                _gib(r.peak) if r.fits else "",
                _gib(r.beside),
                f"{r.seconds:,.0f}" if r.seconds else "",
            )
        self._console.print(table)
        for r in results:
            if r.status in ("crashed", "timed out"):
                self.say(f"{r.label} {_what_is_known(r)}")
        self._bounds(results)
        self._collectives(results)

    def _bounds(self, results: Sequence[Result]) -> None:
        rows = [(r, bounds(r, self._topology)) for r in results]
        if not any(b for _, b in rows):
            return
        self.say(f"\nOne call, on one device (predicted from a roofline, {self._source}):")
        table = _table("program", "TFLOP", "GB moved", "GB received", "compute", "memory", "links")
        table.add_column("bound")
        for r, b in rows:
            if b is None:
                continue
            devices = math.prod(r.mesh.values())
            table.add_row(
                r.label,
                f"{r.executed / devices / 1e12:,.2f}",
                f"{r.memory_traffic / 1e9:,.1f}",
                f"{_received(r) / 1e9:,.2f}",
                *(_ms(x) for x in (b.compute, b.memory, b.interconnect)),
                b.binding,
            )
        self._console.print(table)

    def _collectives(self, results: Sequence[Result]) -> None:
        if not any(r.collectives for r in results):
            return
        self.say(f"\nCollectives of one call, received by a device ({self._source}):")
        table = _table("program", "kind", "axes", "times", "GB")
        for column in table.columns[1:3]:
            column.justify = "left"
        for r in results:
            total = _received(r)
            for kind, axes, _, size, count in r.collectives:
                if total and size >= _SHOWN * total:
                    table.add_row(r.label, kind, axes, f"{count:,.0f}", f"{size / 1e9:,.3f}")
        self._console.print(table)

    def steps(self, steps: Mapping[str, Step], mesh: Mapping[str, int]) -> None:
        """Says how full a training step is."""
        self.say("")
        for kind, step in steps.items():
            self.say(step_line(kind, step, mesh))

    def stages(self, reached: Sequence[Speed], loads: Sequence[Load]) -> dict[str, float]:
        """Speeds and chip-hours of the stages; returns the latter by stage and model.

        Args:
          reached: the speeds that are known.
          loads: of the stages that are looked at; none where they are not known.
        """
        if not reached:
            return {}
        self.say(f"\nStages, at best (predicted from a roofline, {self._source}):")
        table = _table("stage", "of", "s", "tokens/s", "MFU", "bound", "tokens", "chip-hours")
        hours: dict[str, float] = {}
        for speed in reached:
            tokens = sum(_tokens_of(speed, load) for load in loads)
            taken = tokens / speed.tokens * self._topology.chips / 3600
            if tokens:
                hours[f"{speed.stage} {speed.of}"] = taken
            table.add_row(
                speed.stage,
                speed.of,
                f"{speed.seconds:,.3g}",
                f"{speed.tokens:,.0f}",
                f"{speed.mfu:.0%}",
                speed.bound,
                f"{tokens:,}" if tokens else "?",
                f"{taken:,.2g}" if tokens else "?",
            )
        self._console.print(table)
        slow = [x for x in loads if not any(_tokens_of(speed, x) for speed in reached)]
        named = [f"{x.stage} {x.of}" for x in slow] + [f"{x.stage} {x.of}" for x in reached]
        left = ", ".join(dict.fromkeys(name for name in named if name not in hours))
        if hours:
            self.say(
                f"In all {sum(hours.values()):,.2g} chip-hours{' without ' * bool(left)}{left}, if "
                "every sequence has the longest length and every program runs at its bound."
            )
        return hours

    def proposal(
        self, refused: Result, proposal: Proposal | None, loads: Sequence[Load]
    ) -> dict[str, float]:
        """Says what to change and how fast it is then, or that nothing was found.

        Returns the chip-hours of the stage, as `stages` does.
        """
        if proposal is None:
            self.say(
                f"{refused.label} does not fit, and no change of remat, rows, moments, slots or "
                "mesh makes it fit; take a larger topology (--smallest finds it)."
            )
            return {}
        peak = max(proposal.results, key=lambda r: r.peak + r.beside)
        self.say(
            f"{refused.label} does not fit; it does with {' '.join(proposal.flags)} "
            f"({self._source}: at most {(peak.peak + peak.beside) / GIB:.2f} of "
            f"{self._topology.chip.memory / GIB:.2f} GiB)."
        )
        own = [x for x in loads if x.stage == refused.stage and x.of in refused.of.split(", ")]
        return self.stages(proposal.predicted, own)

    def smallest(self, tried: Sequence[Tried]) -> None:
        """Says which topology is the smallest that holds the study, and why smaller ones do not."""
        for each in tried[:-1]:
            self.say(f"{each.topology.name} does not hold it: {each.verdict}")
        last = tried[-1]
        if last.verdict == "fits":
            self.say(
                f"The smallest {last.topology.chip.name} that holds it is {last.topology.name}."
            )
        else:
            self.say(f"{last.topology.name} does not hold it either: {last.verdict}")


def _tokens_of(speed: Speed, load: Load) -> int:
    """Tokens of a load that are read or written at a speed."""
    if load.of not in speed.of.split(", "):
        return 0
    if load.stage == "sample":
        prefilled, written = load.prompts * load.prompt, load.sequences * load.written
        return {"prefill": prefilled, "decode": written}.get(speed.stage, 0)
    return load.tokens if load.stage == speed.stage else 0


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in names:
        left = name in (names[0], "mesh", "fits", "of", "bound")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


def _mesh(r: Result) -> str:
    return " ".join(f"{a}={n}" for a, n in r.mesh.items() if n > 1) or "1 device"


def _verdict(r: Result) -> str:
    if r.status == "fits":
        return "yes"
    if r.status == "by formula" and r.limit:
        return "yes, by formula"
    if r.status == "refused":
        return f"no: needs {r.needed / GIB:.2f} of {r.limit / GIB:.2f}"
    return r.status


def _what_is_known(r: Result) -> str:
    known = f"its arguments are {r.arguments / GIB:.2f} GiB, beside {r.beside / GIB:.2f} GiB"
    if r.status == "timed out":
        return (
            f"was not compiled within {r.seconds:,.0f} s (--compile_seconds), so that it is not "
            f"known whether it fits; {known}."
        )
    return f"ended the compiler ({r.error}); {known}."


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size else "0"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _received(r: Result) -> float:
    return float(sum(size for _, _, _, size, _ in r.collectives))
