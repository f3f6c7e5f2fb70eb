"""Properties of an exported folder that other programs and users rely on, beside its weights."""

import json


def test_transformers_4_and_5_know_the_tokenizer_class(tiny_folder):
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_weights_have_the_permissions_of_the_config(tiny_folder):
    assert {file.stat().st_mode for file in tiny_folder.iterdir()} == {
        (tiny_folder / "config.json").stat().st_mode
    }
