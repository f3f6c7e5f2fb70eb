import pytest

from deltapref_jax.hub import repository
from deltapref_jax.models.licence import NOT_STATED, licence

CARD = "---\nlicense: {}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({}, NOT_STATED),
        ({"README.md": CARD.format("apache-2.0")}, "apache-2.0 (README.md)"),
        (
            {"README.md": CARD.format("other\nlicense_name: llama3.1")},
            "other, llama3.1 (README.md)",
        ),
        # A card without a licence, an empty one and one that is no YAML leave it to the text.
        (
            {"README.md": "# A model\n", "LICENSE": "\n MIT License\n\nCopyright"},
            "MIT License (LICENSE)",
        ),
        ({"README.md": CARD.format("''"), "LICENCE": "Gemma Terms"}, "Gemma Terms (LICENCE)"),
        ({"README.md": CARD.format("[mit"), "LICENSE.md": "# MIT\n"}, "# MIT (LICENSE.md)"),
        ({"README.md": CARD.format("mit"), "LICENSE": "GPL\n"}, "mit (README.md)"),
        ({"LICENSE": "\n\n"}, NOT_STATED),
    ],
)
def test_the_licence_is_what_the_files_of_a_model_state(tmp_path, files, stated):
    (tmp_path / "model.gguf").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence(str(tmp_path)) == stated
    assert licence(str(tmp_path / "model.gguf")) == stated


def test_the_licence_of_a_model_on_the_hub_costs_its_card_only(hub, tmp_path, offline):
    for name, text in {"README.md": CARD.format("mit"), "config.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    hub.push("someone/stated", tmp_path)
    assert licence("someone/stated") == "mit (README.md)"
    assert not hub.asked("/config.json")
    (tmp_path / "README.md").unlink()
    hub.push("someone/silent", tmp_path)
    assert licence("someone/silent") == NOT_STATED
    # Without the hub nobody can tell what it states.
    hub.push("someone/unseen", tmp_path)
    offline()
    repository.cache_clear()
    with pytest.raises(FileNotFoundError, match="someone/unseen"):
        licence("someone/unseen")
    assert licence("someone/stated") == "mit (README.md)"
