"""What other programs and other people need of an exported folder, beyond its numbers."""

import json


def test_transformers_4_and_5_know_the_tokenizer_class(tiny_folder):
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_weights_may_be_read_by_whom_the_config_may(tiny_folder):
    assert {file.stat().st_mode for file in tiny_folder.iterdir()} == {
        (tiny_folder / "config.json").stat().st_mode
    }
