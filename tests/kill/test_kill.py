"""A disturbed study ends as an undisturbed one, in every way of the harness."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.kill.compare import contents, differences
from tests.kill.harness import KINDS
from tests.marks import mostly

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What the harness says of the cases that are run, by number."""
    file = tmp_path_factory.mktemp("kill") / "results.json"
    ours = (item for item in request.session.items if item.path == request.path)
    calls = (item.callspec for item in ours if "results" in item.fixturenames)
    numbers = [str(call.params["number"]) for call in calls]
    command = [sys.executable, "-m", "tests.kill.harness", "--case", *numbers]
    done = subprocess.run(
        [*command, f"--json={file}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    print(done.stdout)
    assert file.exists(), done.stderr
    return {result["number"]: result for result in json.loads(file.read_text())}


NAMES = [f"{i} {kind.name} {kind.when}" for i, kind in enumerate(KINDS)]
FEW = (0, 3, 4, 7, 8, 10, 13, 16, 19, 22)  # every signal, disk, clock and number of runners


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", mostly(pytest.mark.exhaustive, range(len(KINDS)), *FEW), ids=NAMES
)
def test_a_disturbed_study_ends_as_an_undisturbed_one(results, number):
    if number not in results:
        pytest.skip("no tmpfs may be mounted here")
    assert results[number]["problems"] == []


@pytest.fixture
def workspaces(tmp_path):
    """Two equal workspaces, and what is found of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "train" / "key" / "claims").mkdir(parents=True)
    for name, text in {
        "shard.parquet": "rows",
        "metrics.jsonl": '{"step": 1}\n',
        "manifest.json": json.dumps({"seconds": 1, "stats": {"rows": 2}, "files": {"a": [1, "x"]}}),
    }.items():
        (one / "train" / "key" / name).write_text(text)
    (one / "link").symlink_to("train/key")
    shutil.copytree(one, two, symlinks=True)
    return two / "train" / "key", lambda: differences(contents(one), contents(two))


def test_what_is_time_does_not_differ(workspaces):
    folder, compare = workspaces
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"seconds": 1', '"seconds": 2'))
    assert compare() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "shard.parquet").write_text("row"), ["train/key/shard.parquet differs"]),
        (lambda f: (f / "metrics.jsonl").write_text(""), ["train/key/metrics.jsonl differs"]),
        (lambda f: (f / ".a.x").touch(), ["train/key/.a.x is left over"]),
        (lambda f: (f / "claims" / "all").touch(), ["train/key/claims/all is left over"]),
        (lambda f: (f / "shard.parquet").unlink(), ["train/key/shard.parquet is missing"]),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"rows": 2', '"rows": 3')
            ),
            ["train/key/manifest.json differs at stats.rows: 2 and 3"],
        ),
        (
            lambda f: ((f.parents[1] / "link").unlink(), (f.parents[1] / "link").symlink_to("x")),
            ["link differs"],
        ),
    ],
)
def test_what_a_killed_run_could_leave_is_seen(workspaces, change, expected):
    folder, compare = workspaces
    change(folder)
    assert compare() == expected
