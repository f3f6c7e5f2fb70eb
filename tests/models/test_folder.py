import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from deltapref_jax.hub import repository
from deltapref_jax.models import weights as weights_module
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import resolve, weights_hash
from deltapref_jax.models.weights import inspect_model, load

NAME = "someone/tiny"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    """The tiny model in several files with an index, and a file beside them."""
    monkeypatch.setattr(weights_module, "_SHARD_BYTES", 20_000)
    export(tiny.state, tiny.spec, tiny.text, tmp_path / "sharded")
    (tmp_path / "sharded" / "adapter.safetensors").write_bytes(b"stray")
    (tmp_path / "sharded" / "pytorch_model.bin").write_bytes(b"stray")
    return tmp_path / "sharded"


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights_asked(hub):
    """Requests for files of weights."""
    return [r for r in hub.requests if r[1].endswith(".safetensors") or "/content/" in r[1]]


def fetched(name):
    """Files of a model that are in the cache."""
    return {path.name for path in pathlib.Path(resolve(name, weights=False)).iterdir()}


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_model_on_the_hub_is_checked_and_hashed_without_its_weights(hub, request, kind):
    local = request.getfixturevalue(kind)
    commit = hub.push(NAME, local)
    spec, text = inspect_model(NAME)
    assert spec == inspect_model(str(local))[0]
    assert text.identity == inspect_model(str(local))[1].identity
    assert weights_hash(NAME) == weights_hash(f"{NAME}@{commit}") == weights_hash(str(local))
    # Of the weights, nothing but the beginning of each file was asked for.
    asked = [r for r in hub.requests if r[1].endswith(".safetensors")]
    assert asked and all(r[2] == "bytes=0-100000" for r in asked)
    assert not [name for name in fetched(NAME) if name.endswith((".safetensors", ".bin"))]


def test_only_the_weights_that_the_index_names_are_fetched_and_once(hub, sharded, tiny):
    hub.push(NAME, sharded)
    model = load(NAME)
    assert model.weights == weights_hash(str(sharded))
    jax.tree.map(np.testing.assert_array_equal, model.state, tiny.state)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {name for name in fetched(NAME) if name.endswith(".safetensors")} == shards
    assert not hub.asked("adapter.safetensors") and not hub.asked("pytorch_model.bin")
    hub.requests.clear()
    repository.cache_clear()  # as in a new program
    inspect_model(NAME)
    load(NAME)
    assert [path for _, path, _ in hub.requests] == [f"/api/models/{NAME}"]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda root: change(root / "config.json", model_type="mamba"), "model_type is 'mamba'"),
        (
            lambda root: change(root / "config.json", quantization_config={"bits": 4}),
            "quantization_config",
        ),
        (lambda root: (root / "tokenizer.json").write_text("{"), "The tokenizer in "),
        (lambda root: (root / "config.json").unlink(), "has no config.json"),
        (lambda root: (root / "model.safetensors").unlink(), "has no safetensors"),
    ],
)
def test_a_model_is_refused_before_its_weights_are_asked_for(hub, folder, damage, sentence):
    damage(folder)
    hub.push(NAME, folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        inspect_model(NAME)
    assert not [r for r in hub.requests if r[1].endswith(".safetensors")]


def test_shapes_and_quantised_weights_are_refused_by_the_headers_on_the_hub(hub, folder):
    change(folder / "config.json", intermediate_size=96)
    hub.push(NAME, folder)
    with pytest.raises(ValueError, match=r"has the shape .* its config\.json calls for"):
        inspect_model(NAME)
    header, data = {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"ab"
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    hub.push("someone/float8", folder)
    with pytest.raises(ValueError, match="Tensor w of someone/float8 is stored as F8_E4M3"):
        inspect_model("someone/float8")
    assert "model.safetensors" not in fetched(NAME) | fetched("someone/float8")


def test_an_index_that_names_what_is_not_there_is_one_sentence(hub, sharded):
    next(sharded.glob("model-00002*")).unlink()
    hub.push(NAME, sharded)
    for use in (inspect_model, weights_hash, load):
        with pytest.raises(
            FileNotFoundError,
            match=r"^The hub's model someone/tiny at \w{12} has no model-00002\S+, which "
            r"model\.safetensors\.index\.json names; choose a repository that is complete\.$",
        ):
            use(NAME)


def test_a_branch_that_moved_gives_another_hash_and_a_commit_does_not(hub, folder, tiny):
    first = hub.push(NAME, folder)
    before = weights_hash(NAME)
    other = jax.tree.map(lambda x: x * 1.5, tiny.state)
    export(other, tiny.spec, tiny.text, folder)
    hub.push(NAME, folder)
    hub.push(NAME, folder, branch="trial/2")
    assert weights_hash(NAME) == before  # one commit as long as a program runs
    repository.cache_clear()
    assert weights_hash(NAME) == weights_hash(f"{NAME}@trial/2") == weights_hash(str(folder))
    assert weights_hash(NAME) != before
    assert weights_hash(f"{NAME}@{first}") == before == load(f"{NAME}@{first}").weights


def test_offline_everything_comes_from_the_cache(hub, folder, offline):
    commit = hub.push(NAME, folder)
    online = load(NAME)
    hub.requests.clear()
    offline()
    for place in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        model = load(place)
        assert model.weights == weights_hash(place) == online.weights
        jax.tree.map(np.testing.assert_array_equal, model.state, online.state)
        assert inspect_model(place)[0] == online.spec
    assert not hub.requests


def test_offline_what_is_missing_is_one_sentence(hub, folder, sharded, offline):
    hub.push(NAME, folder)
    hub.push("someone/sharded", sharded)
    inspect_model(NAME)
    inspect_model("someone/sharded")
    offline()
    for name, lost in (
        (NAME, "safetensors"),
        ("someone/sharded", r"model-00001\S+, which \S+ names"),
    ):
        for use in (inspect_model, weights_hash, load):
            with pytest.raises(
                FileNotFoundError,
                match=rf"^The cached copy of the model {name} at \w{{12}} has no {lost}; unset "
                r"HF_HUB_OFFLINE to fetch it\.$",
            ):
                use(name)
    for place, at in (("some/other", ""), (f"{NAME}@v2", " at 'v2'")):
        with pytest.raises(
            FileNotFoundError,
            match=rf"^Nothing of the hub's model '\S+'{at} is in this machine's cache, and "
            r"HF_HUB_OFFLINE is set; unset it to fetch it, or give a folder or file that exists\.$",
        ):
            load(place)


def test_a_folder_of_that_name_comes_before_the_hub(hub, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert weights_hash(NAME) == weights_hash(str(folder))
    assert not hub.requests
