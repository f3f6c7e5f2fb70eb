"""Bad input to the entry point: one sentence on stderr, exit code 2, before JAX is imported."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from deltapref_jax.config import Experiment

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DRIVER = """
import json, os, sys
import launch.ablate
from absl import flags
from launch.flags import run_main

flags.mark_flag_as_required("config")
for arguments in json.loads(sys.argv[1]):
    out, into = os.pipe()
    if os.fork() == 0:
        os.dup2(into, 2)
        sys.argv = ["ablate", *arguments]
        code = None
        try:
            run_main(launch.ablate.main)
        except SystemExit as e:
            code = e.code
        sys.stderr.flush()
        os._exit(99 if "jax" in sys.modules else code)
    os.close(into)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    with os.fdopen(out) as said:
        print(json.dumps([status, said.read()]))
"""
QUICK = "--config=configs/quickstart.py"
FILES = {
    "syntax.py": "x = 1\ndef get_config(:\n",
    "nothing.py": "x = 1\n",
    "missing.py": "import no_such_module\n",
    "raises.py": "def get_config():\n    return 1 / 0\n",
    "misspelt.py": "from configs.quickstart import get_config as quick\n\n\ndef get_config():\n"
    "    e = quick()\n    e.training.step = 60\n    return e\n",
    "number.py": "from configs.quickstart import get_config as quick\n\n\ndef get_config(steps):\n"
    "    e = quick()\n    e.training.steps = int(steps)\n    return e\n",
}
CASES = {  # arguments to the whole of stderr; {0} is the folder of FILES
    (): r"--config is missing; give it a value \(--help\)\.",
    (
        "--config=configs/nope.py",
    ): r"There is no config file 'configs/nope\.py'; name a Python file with "
    r"get_config\(\), such as --config=configs/quickstart\.py\.",
    ("--config=README.md",): r"There is no config file 'README\.md'; name a Python file .*",
    ("--config=configs",): r"There is no config file 'configs'; name a Python file .*",
    (
        "--config={0}/syntax.py",
    ): r"The config \S+/syntax\.py, line 2, cannot be loaded \(SyntaxError: .*\); fix it\.",
    (
        "--config={0}/nothing.py",
    ): r"The config \S+/nothing\.py cannot be loaded \(AttributeError: the file has no "
    r"attribute 'get_config'\); fix it\.",
    (
        "--config={0}/missing.py",
    ): r"The config \S+/missing\.py, line 1, cannot be loaded \(ModuleNotFoundError: No "
    r"module named 'no_such_module'\); fix it\.",
    (
        "--config={0}/raises.py",
    ): r"The config \S+/raises\.py, line 2, cannot be loaded \(ZeroDivisionError: division "
    r"by zero\); fix it\.",
    (
        "--config={0}/number.py:many",
    ): r"The config \S+/number\.py:many, line 6, cannot be loaded \(ValueError: invalid literal "
    r"for int\(\) with base 10: 'many'\); fix it\.",
    (
        "--config={0}/misspelt.py",
    ): r"The config \S+/misspelt\.py, line 6, cannot be loaded: Training has no field 'step' \(did "
    r"you mean 'steps'\?\); it has pairs_per_step, .*, mesh\.",
    (
        "--config={0}/misspelt.py",
        "--config.seed=1",
    ): r"The config \S+/misspelt\.py, line 6, cannot be loaded: Training has no field 'step' .*",
    ("--config={0}/number.py:0",): r"config\.training\.steps is 0; it must be at least 1\.",
    (
        QUICK,
        "--nope=1",
    ): r"Unknown command line flag 'nope'.*; fix the flag \(--help lists them\)\.",
    (
        QUICK,
        "--config.student.pth=x",
    ): r"--config\.student\.pth=x: Model has no field 'pth' \(did you mean 'path'\?\); it has "
    r"path, dtype, quantization, revision\.",
    (
        QUICK,
        "--config.stepz=3",
    ): r"--config\.stepz=3: Experiment has no field 'stepz'.*; it has name, question, .*",
    (
        QUICK,
        "--config.generators[0].temprature=1",
    ): r"--config\.generators\[0\]\.temprature=1: Generator has no field "
    r"'temprature' \(did you mean 'temperature'\?\); it has name, model, temperature, .*",
    (
        QUICK,
        "--config.generators[9].top_k=1",
    ): r"--config\.generators\[9\]\.top_k=1: the config has no item of that "
    r"number; items count from 0\.",
    (
        QUICK,
        "--profile_steps=5:2",
    ): r"--profile_steps is '5:2'; give the first and the last step, from 1, such as "
    r"10:12\.",
    (
        QUICK,
        "--config.training.steps=abc",
    ): r"--config\.training\.steps=abc: it must be a whole number; fix the flag \(--help lists "
    r"them\)\.",
    (
        QUICK,
        "--config.training.clip=abc",
    ): r"--config\.training\.clip=abc: it must be a number; fix the flag \(--help lists them\)\.",
    (
        QUICK,
        "--config.generators[-1].samples=7",
    ): r"--config\.generators\[-1\]\.samples=7: config\.generators has no item \[-1\]; items count "
    r"from 0\.",
    (
        QUICK,
        "--only=",
    ): r"--only is empty; name arms or patterns, such as --only=dpo-\*,kto-top, or leave it out to "
    r"run all arms\.",
    (QUICK, "--config.training.steps=0"): r"config\.training\.steps is 0; it must be at least 1\.",
    (
        QUICK,
        "--config.generators[1].temperature=-1",
    ): r"temperature of generator 'fair' is -1\.0; it must be at least "
    r"0\.",
    (
        QUICK,
        "--config.generators[1].temperature=nan",
    ): r"temperature of generator 'fair' is nan; it must be at least "
    r"0\.",
    (
        QUICK,
        "--config.arms[0].chosen=clever",
    ): r"chosen of arm 'dpo-weak' is 'clever'; choose one of 'weak', .*'elm'\.",
    (
        QUICK,
        "--config.arms[0].objective=ppo",
    ): r"objective of arm 'dpo-weak' is 'ppo'; choose one of 'dpo', .*",
    (
        QUICK,
        "--config.arms[0].fraction=1.5",
    ): r"fraction of arm 'dpo-weak' is 1\.5; it must be at least 1e-09 and at "
    r"most 1\.",
    (
        QUICK,
        "--config.arms[0].name=dpo-fair",
    ): r"Two arms are named 'dpo-fair'; names must differ\.",
    (
        QUICK,
        "--config.judges[0].kind=human",
    ): r"kind of judge 'exact' is 'human'; choose one of 'exact', 'model', 'mean'\.",
    (
        QUICK,
        "--config.prompts[0].kind=csv",
    ): r"config\.prompts\[0\]\.kind is 'csv'; choose one of 'synthetic', .*",
    (
        QUICK,
        "--config.prompts[0].kind=jsonl",
    ): r"config\.prompts\[0\]\.path is empty; kind 'jsonl' needs a file, .*",
    (
        QUICK,
        "--config.suites[0].domain=outer",
    ): r"config\.suites\[0\]\.domain is 'outer'; choose one of 'in', 'out'\.",
    (
        QUICK,
        "--config.student.path=",
    ): r"config\.student\.path is empty; give a Hugging Face folder, a hub name or a "
    r"GGUF file\.",
    (
        QUICK,
        "--config.student.dtype=int8",
    ): r"dtype of student is 'int8'; choose one of 'float32', 'bfloat16'\.",
    (
        QUICK,
        "--config.training.mesh.data=-2",
    ): r"config\.training\.mesh is data=-2; sizes are positive, 0 where they "
    r"are to be chosen, and at most one is -1\.",
    (
        QUICK,
        "--devices=4x4",
    ): r"--devices is '4x4' and only a dry run assumes devices; leave it out, or add --dry_run\.",
    (
        QUICK,
        "--only=dpo-*,ppo",
    ): r"--only has 'ppo', which matches no arm; the study has 'dpo-weak', .*'dpo-reversed'\.",
    (
        QUICK,
        *(f"--config.{of}=()" for of in ("arms", "claims", "objectives", "suites")),
        "--only=x",
    ): (r"--only has 'x', .*; it has no arms\."),
    (
        QUICK,
        "--config.generators[week].top_k=1",
    ): r"--config\.generators\[week\]\.top_k=1: there is no 'week' in config\.generators; it has "
    r"\[weak\], \[fair\], \[good\], \[strong\], \[elm\]\.",
    (
        QUICK,
        "--config.generators[weak].temprature=1",
    ): r"--config\.generators\[weak\]\.temprature=1: Generator has no field 'temprature' .*",
    (
        QUICK,
        "--config.generators[weak].top_k=many",
    ): r"--config\.generators\[weak\]\.top_k=many: it must be a whole number; .*",
    (QUICK, "--config.scoring.rows=-1"): r"config\.scoring\.rows is -1; it must be at least 0\.",
}


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    arguments = json.dumps([[a.format(folder) for a in case] for case in CASES])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_bad_input_is_one_sentence_before_jax(said, case):
    code, stderr = said[case]
    assert re.fullmatch(CASES[case] + "\n", stderr), stderr
    assert code == 2


def test_an_item_of_a_list_is_set_by_its_name_or_number():
    script = (
        "import json, sys\nimport launch.ablate\nfrom launch.flags import run_main\n"
        "def show(_):\n    e = launch.ablate._CONFIG.value\n"
        "    arm = next(a for a in e.arms if a.name == 'dpo-top')\n"
        "    print(json.dumps([e.generators[0].temperature, e.generators[1].top_k,"
        " e.judges[1].dimensions, arm.seeds, e.suites[1].prompts.count, e.prompts[0].count]))\n"
        "run_main(show)\n"
    )
    flags = (
        "--config.generators[weak].temperature=0.7",
        "--config.generators[1].top_k=5",
        "--config.judges['model'].dimensions=('factuality',)",
        "--config.arms[dpo-top].seeds=(3, 4)",
        "--config.suites[shop].prompts.count",
        "7",
        "--config.prompts[0].count=9",
    )
    for config in ([QUICK], QUICK.split("=")):
        done = subprocess.run(
            [sys.executable, "-c", script, *config, *flags],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment(),
            timeout=120,
        )
        assert done.stderr == ""
        assert json.loads(done.stdout) == [0.7, 5, ["factuality"], [3, 4], 7, 9]


def test_help_lists_every_field_with_type_default_and_comment(command):
    done = command("launch.ablate", "--help")
    text = " ".join(done.stdout.split())
    for line in (
        "--config.seed=0 (int): Of sampled traces, evaluations, audits and random selections; ",
        "--config.prompts[0].count=0 (int): Questions kept; 0: all (files only).",
        "--config.generators[NAME].temperature=1.0 (float): 0 is greedy.",
        "--config.arms[NAME].keep=\"all\" (str): One of 'all', 'top', 'bottom', 'middle', "
        "'random', 'matched', or \"module:function\" (docs/extend.md), which returns",
        "--config.training.lora.rank=0 (int): ",
        "--config.suites[NAME].prompts has .kind, .path, ",
    ):
        assert line in text
    for field in dataclasses.fields(Experiment):
        assert f"--config.{field.name}" in text


def test_missing_model_is_one_sentence_and_nothing_is_written(command, tmp_path):
    models = [f"--config.generators[{i}].model.path=/nowhere" for i in range(5)]
    flags = (f"--config.workspace={tmp_path}/w", "--config.student.path=/nowhere", *models)
    done = command("launch.ablate", QUICK, *flags)
    assert done.stderr == (
        "There is no model at /nowhere; give a Hugging Face folder, a hub name or a .gguf file.\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "w").exists()
