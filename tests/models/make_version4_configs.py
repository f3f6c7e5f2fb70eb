"""Makes `version4/`: the config.json of every family as `transformers` 4.57 saves it.

    pip install torch==2.13.0 'transformers==4.57.*'    # in an environment of its own
    python -m tests.models.make_version4_configs PYTHON

PYTHON is the interpreter of that environment. Version 4.57 loads the export of every checkpoint of
`families/` and saves its config again. Printed are the largest differences of its logits from those
of 5.24 for three forms of the config:

    as it is      config.json of the fixture, which leaves out what has a default
    exported      what `models.config_json.portable` makes of it
    version 5     what 5.24 saves, which has rope_parameters alone
"""

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import CONFIG_MAPPING

from deltapref_jax.models.config_json import family_of, portable

HERE = Path(__file__).parent
FORMS = ("as it is", "exported", "version 5")
_VERSION_4 = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, logging
logging.set_verbosity_error()
families, scratch, out = map(Path, sys.argv[1:])
for folder in sorted(scratch.iterdir()):
    expected = load_file(families / folder.name / "expected.safetensors")
    cells = []
    for form in FORMS:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder / form, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except Exception as e:
            cells.append(f"refused: {e}".splitlines()[0])
            continue
        with torch.no_grad():
            cells.append("%.1e" % max(
                float((
                    model(expected[f"tokens_{i}"].long()[None], use_cache=False).logits[0]
                    - expected[f"logits_{i}"]
                ).abs().max())
                for i in range(3)
            ))
    print(" | ".join([folder.name, *cells]), flush=True)
    config = AutoConfig.from_pretrained(folder / "exported")
    del config.rope_parameters  # of version 5, which version 4 keeps and does not read
    config.save_pretrained(out / folder.name)
"""


def forms_of(config: dict) -> dict[str, dict]:
    """The three forms of a config."""
    family, text = family_of(config)
    # The class changes the options of rotary embeddings in place.
    saved = CONFIG_MAPPING[family.model_type].from_dict(copy.deepcopy(dict(text))).to_dict()
    version_5 = {key: value for key, value in saved.items() if value is not None}
    return dict(zip(FORMS, (config, portable(config), version_5), strict=True))


def main(python: str) -> None:
    """Writes the configs and prints the table."""
    with tempfile.TemporaryDirectory() as scratch:
        for folder in sorted((HERE / "families").iterdir()):
            config = json.loads((folder / "config.json").read_text())
            for form, fields in forms_of(config).items():
                place = Path(scratch) / folder.name / form
                place.mkdir(parents=True)
                (place / "config.json").write_text(json.dumps(fields))
                shutil.copy(folder / "model.safetensors", place)
        out = HERE / "version4"
        program = f"FORMS = {FORMS!r}\n{_VERSION_4}"
        subprocess.run([python, "-c", program, HERE / "families", scratch, out], check=True)
    for file in out.glob("*/config.json"):  # one file for each, so that no folder is needed
        file.rename(out / f"{file.parent.name}.json")
        file.parent.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
