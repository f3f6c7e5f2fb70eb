"""Writes the table of families in docs/models.md: the worst figure of every check of the tests.

    python -m tests.models.family_table              all fixtures, about 15 minutes of one core
    python -m tests.models.family_table NAME ...     these alone; the other rows stay

It runs at the root. `tests/models/test_families.py` and `test_gguf_families.py` hold the same
figures to their bounds, which are the table's last row.
"""

import os
import sys
import tempfile
from pathlib import Path

# The devices that the tests have, set before JAX starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from docs.refresh import ROOT, between  # noqa: E402
from tests.models import family_checks as checks  # noqa: E402
from tests.models import test_gguf_families as gguf  # noqa: E402

PAGE, MARK = ROOT / "docs" / "models.md", "table of families"
COLUMNS = {
    "logits": checks.logits_difference,
    "bf16": checks.bfloat16_ratio,
    "cached": checks.cached_difference,
    "packed": checks.packed_difference,
    "shared prompts": checks.shared_difference,
    "8 devices": checks.devices_difference,
    "gradient": checks.gradient_difference,
}
HEAD = ("fixture", *COLUMNS, "round trip", "GGUF")


def row_of(name: str) -> list[str]:
    """The cells of one fixture."""
    case = checks.read_case(name)
    figures = {column: check(case) for column, check in COLUMNS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        changed = sum(
            checks.round_trip_differences(case, dtype, Path(scratch) / dtype)
            for dtype in ("float32", "bfloat16")
        )
        file = None
        if name in gguf.ARCHITECTURES:
            stored = gguf.open_gguf_model(gguf.write(name, Path(scratch) / "m.gguf"))
            file = gguf.logits_difference(name, stored)
    trip = f"{changed} tensors differ" if changed else "bit for bit"
    return [name, *(_cell(c, f) for c, f in figures.items()), trip, _cell("GGUF", file)]


def _cell(column: str, figure: float | None) -> str:
    if figure is None:
        return "-"
    return f"{figure:.2f}" if column == "bf16" else f"{figure:.1e}".replace("e-0", "e-")


def bounds() -> list[str]:
    """The last row: what the tests allow."""
    allowed = (_cell(column, checks.BOUNDS[check]) for column, check in COLUMNS.items())
    return ["allowed", *allowed, "bit for bit", _cell("GGUF", checks.LOGITS)]


def rows_of_page() -> dict[str, list[str]]:
    """The rows that the page has, by fixture."""
    table = PAGE.read_text().split(f"<!-- {MARK} -->")[1].split(f"<!-- end of {MARK} -->")[0]
    rows = [[c.strip() for c in r.strip("|").split("|")] for r in table.strip().splitlines()[2:]]
    return {row[0]: row for row in rows}


def write_page(rows: dict[str, list[str]]) -> None:
    """Writes the rows of the fixtures, in their order."""
    known = [rows[name] for name in checks.CASES if name in rows]
    lines = [HEAD, ["---"] * len(HEAD), *known, bounds()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    PAGE.write_text(between(PAGE.read_text(), MARK, f"\n{table}\n"))


if __name__ == "__main__":
    found = rows_of_page()
    for fixture in sys.argv[1:] or checks.CASES:
        found[fixture] = row_of(fixture)
        print(" | ".join(found[fixture]), flush=True)
        write_page(found)
