import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from deltapref_jax.hub import repository
from deltapref_jax.models import export as exporting
from deltapref_jax.models.export import export
from deltapref_jax.models.folder import resolve, weights_hash
from deltapref_jax.models.weights import describe_files, inspect_model, load

NAME = "someone/tiny"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    """The tiny model in several files with an index, and a file beside them."""
    monkeypatch.setattr(exporting, "_SHARD_BYTES", 20_000)
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
    assert weights_hash(NAME) == weights_hash(str(sharded))
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
    assert weights_hash(f"{NAME}@{first}") == before


def test_offline_everything_comes_from_the_cache(hub, folder, offline):
    commit = hub.push(NAME, folder)
    online, before = load(NAME), weights_hash(NAME)
    hub.requests.clear()
    offline()
    for place in (NAME, f"{NAME}@main", f"{NAME}@{commit}"):
        model = load(place)
        assert weights_hash(place) == before
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


def refused(root, words):
    for use in (weights_hash, inspect_model, describe_files):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            use(str(root))
        assert "\n" not in str(error.value)


def test_files_of_two_models_or_of_an_adapter_are_refused(sharded, folder):
    shutil.copy(folder / "model.safetensors", sharded)
    refused(sharded, r"has model\.safetensors and model\.safetensors\.index\.json")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "has an adapter_config.json.*merge it into the weights")


def test_a_pickle_alone_is_refused_by_its_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is a pickle.*convert it")


def test_an_index_that_differs_from_its_shards_is_refused(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    files = list(index.values())
    first = next(name for name in index if files.count(index[name]) > 1)
    last = next(name for name in index if index[name] != index[first])
    for change, words in (
        ({"ghost": index[last]}, "Tensor ghost .* is in no file"),
        ({first: index[last]}, f"{first} .* is in {index[first]}, and .* says in {index[last]}"),
        ({first: None}, f"{first} .* says in no file"),
    ):
        changed = {k: v for k, v in (index | change).items() if v is not None}
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=words):
            inspect_model(str(sharded))


def test_a_token_without_a_row_of_the_embedding_is_refused(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    change(folder / "generation_config.json", eos_token_id=10**6)
    for use in (load, inspect_model, describe_files):
        with pytest.raises(ValueError, match=f"id 1000000, and the embedding has {rows} rows"):
            use(str(folder))
    (folder / "generation_config.json").unlink()
    tokens = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    tokens["added_tokens"].append({"id": rows, "content": "<|extra|>"} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match=rf"token '<\|extra\|>' with the id {rows}"):
        inspect_model(str(folder))
