"""Every bad input of every entry point ends with exit code 2, one sentence, and nothing made."""

import importlib.util
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

_spec = importlib.util.spec_from_file_location(
    "bad_input", pathlib.Path(__file__).with_name("bad_input.py")
)
bad_input = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bad_input)
# Lines of libraries, and of stages that read files on the host before any device works.
NOTICES = re.compile(
    r"\[transformers\] PyTorch was not found\..*|"
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (tokens|prompts|suite\S*): .*|$"
)

STUDY = """
from deltapref_jax.config import *


def get_config():
    return Experiment(
        name="study",
        student=Model({model!r}),
        prompts=(Prompts(tasks=("chain",), count=4),),
        generators=(Generator(name="weak"), Generator(name="strong", model=Model({model!r}))),
        judges=(Judge(name="exact"),),
        objectives=(Objective(name="dpo"),),
        arms=(Arm(name="a", chosen="strong", rejected="weak"),),
        suites=(Suite(name="s", prompts=Prompts(tasks=("shop",), count=4)),),
        training=Training(rows=1, row_length=256),
        scoring=Scoring(rows=1, row_length=256),
        sampling=Sampling(max_prompt=128, max_tokens=64, slots=4),
    )
"""
TRAIN = "from deltapref_jax.config import *\n\n\ndef get_config():\n    return PairTraining()\n"
ZOO = """
from deltapref_jax.config import *


def get_config():
    return ModelZoo(
        output={output!r},
        models=(SmallModel(name="oak", tasks=("chain",), steps=1),),
        release=("oak",),
    )
"""


@pytest.fixture(scope="module")
def root(tiny_folder, tmp_path_factory):
    """A folder with a model, pairs and configs that are right."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_folder, root / "model")
    (root / "empty").mkdir()
    (root / "pairs.jsonl").write_text(json.dumps(bad_input.PAIR) + "\n")
    (root / "study.py").write_text(STUDY.format(model=str(root / "model")))
    (root / "train.py").write_text(TRAIN)
    (root / "zoo.py").write_text(ZOO.format(output=str(root / "zoo")))
    return root


@pytest.fixture
def launch(command, root, tmp_path):
    """Runs an entry point; its exit code and the lines that it printed on stderr."""

    def run(entry, *arguments):
        good = bad_input.GOOD[entry]
        if any(a.startswith("--config=") for a in arguments):
            good = [a for a in good if not a.startswith("--config=")]
        # A config must come before what it overrides.
        given = sorted((*good, *arguments), key=lambda a: not a.startswith("--config="))
        filled = [a.replace("{root}", str(root)).replace("{own}", str(tmp_path)) for a in given]
        environment = os.environ | {"XLA_FLAGS": "", "NO_GCE_CHECK": "true"}
        done = command(f"launch.{entry}", *filled, folder=tmp_path, environment=environment)
        lines = done.stderr.splitlines()
        return done.returncode, [line for line in lines if not NOTICES.fullmatch(line)]

    return run


def check(launched, words, tmp_path):
    """Exit code 2, one sentence with `words`, and no artifact."""
    code, lines = launched
    assert (code, len(lines)) == (2, 1), "\n".join(lines)
    assert re.search(words, lines[0]), lines[0]
    assert lines[0].endswith((".", "…", ")")), lines[0]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lines[0])
    made = {path.parts[-3] for path in tmp_path.rglob("manifest.json")}
    assert made <= {"prompts", "tokens"}  # what only reads files
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out.")]


@pytest.mark.parametrize(
    ("entry", "arguments", "words"),
    [(entry, *case) for entry, cases in bad_input.FLAGS.items() for case in cases],
    ids=lambda x: re.sub(r"[^\w.=/-]", "_", x)[:60],
)
def test_a_bad_flag(launch, tmp_path, entry, arguments, words):
    check(launch(entry, *arguments.split()), words, tmp_path)


@pytest.mark.parametrize("number", range(len(bad_input.CONFIGS)))
@pytest.mark.parametrize("entry", ["train", "ablate"])
def test_a_bad_config_file(launch, tmp_path, entry, number):
    text, words = list(bad_input.CONFIGS.items())[number]
    (tmp_path / "bad.py").write_text(text)
    check(launch(entry, "--config={own}/bad.py"), words, tmp_path)


@pytest.mark.parametrize("name", bad_input.MODELS)
def test_a_bad_model_folder(launch, root, tmp_path, name):
    bad_input.broken_model(root / "model", tmp_path / "broken", name)
    launched = launch("train", "--config.student.path={own}/broken")
    check(launched, bad_input.MODELS[name][1], tmp_path)


def test_a_generator_with_nan_is_refused_before_anything_is_made(launch, root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] = np.nan
    save_file(tensors, file)
    study = STUDY.format(model=str(root / "model"))
    generator = f'name="strong", model=Model({str(root / "model")!r})'
    assert generator in study
    broken = study.replace(generator, f'name="strong", model=Model({str(file.parent)!r})')
    (tmp_path / "study.py").write_text(broken)
    words = (
        r"^Tensor model\.layers\.1\.mlp\.down_proj\.weight in model\.safetensors of \S+/broken "
        r"holds NaN or infinity; fetch it again, or choose another model\.$"
    )
    check(launch("ablate", "--config={own}/study.py"), words, tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("number", range(len(bad_input.JINJA)))
def test_a_bad_chat_template(launch, root, tmp_path, number):
    template, words = list(bad_input.JINJA.items())[number]
    shutil.copytree(root / "model", tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text(template)
    check(launch("ablate", "--config.student.path={own}/broken"), words, tmp_path)


@pytest.mark.parametrize("number", range(len(bad_input.GGUF)))
def test_a_bad_gguf_file(launch, tmp_path, number):
    data, words = list(bad_input.GGUF.items())[number]
    (tmp_path / "bad.gguf").write_bytes(data)
    check(launch("train", "--config.student.path={own}/bad.gguf"), words, tmp_path)


@pytest.mark.parametrize("number", range(len(bad_input.PAIRS)))
def test_a_bad_file_of_pairs(launch, tmp_path, number):
    lines, words = list(bad_input.PAIRS.items())[number]
    (tmp_path / "pairs.jsonl").write_text(lines)
    check(launch("train", "--config.data.path={own}/pairs.jsonl"), words, tmp_path)


def test_a_config_that_is_given_twice(launch, tmp_path):
    launched = launch("ablate", "--config={root}/train.py", "--config={root}/study.py")
    check(launched, r"^--config is given twice; give it once\.$", tmp_path)
