import errno
import socket
import time

import huggingface_hub
import pytest

from deltapref_jax.hub import repository

NAME = "someone/tiny"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    (root / "config.json").write_text('{"a": 1}')
    (root / "model.safetensors").write_bytes(b"weights")
    return root


def refusal(name=NAME, revision="", kind="model"):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        repository(name, revision, kind).fetch(["config.json"])
    assert time.monotonic() - began < 30
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_have_the_hashes_of_the_hub_and_are_fetched_once(hub, folder):
    commit = hub.push(NAME, folder)
    repo = repository(NAME, "", "model")
    assert repo.commit == commit
    assert {name: (f.size, len(f.sha256)) for name, f in repo.files.items()} == {
        "config.json": (8, 0),
        "model.safetensors": (7, 64),
    }
    for _ in range(2):
        assert (repo.fetch(repo.files) / "model.safetensors").read_bytes() == b"weights"
    assert [method for method, path, _ in hub.asked("config.json")] == ["HEAD", "GET"]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_name_or_revision_that_is_not_there_is_one_sentence(hub, folder, kind):
    hub.push(NAME, folder, kind=kind)
    what = "data set" if kind == "dataset" else kind
    for name in ("someone/typo", "no such/name"):
        assert refusal(name, kind=kind) == (
            f"The hub has no {what} {name!r} that this machine may see, and there is no such file "
            "or folder here; check the name, or set HF_TOKEN to a token that may read it."
        )
    assert refusal(revision="v2", kind=kind) == (
        f"The hub's {what} 'someone/tiny' has no revision 'v2'; give a branch, a tag or a whole "
        "commit, or leave revision empty."
    )


def test_a_gated_repository_is_one_sentence(hub, folder):
    hub.push(NAME, folder, gated=True)
    assert refusal() == (
        "The hub's model 'someone/tiny' is gated; accept its terms on its page, and set HF_TOKEN "
        "to a token of that account."
    )


def test_a_hub_in_trouble_is_one_sentence(hub, folder):
    hub.push(NAME, folder)
    hub.status = 503
    assert refusal() == (
        "The hub answers with status 503 for the model 'someone/tiny'; run the same command again "
        "later, or give a local folder."
    )
    hub.status = 403
    assert refusal().startswith("The hub has no model 'someone/tiny' that this machine may see")


def test_no_network_is_one_sentence(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        assert refusal() == (
            f"The hub at {nowhere} cannot be reached for the model 'someone/tiny' (ConnectError), "
            "and there is no such file or folder here; check the name and this machine's "
            "connection, or set HF_HUB_OFFLINE=1 to use what was fetched before."
        )


def test_a_hub_that_does_not_answer_is_left_within_seconds(hub, folder, monkeypatch):
    monkeypatch.setattr("deltapref_jax.hub._ANSWER_SECONDS", 0.5)
    hub.push(NAME, folder)
    hub.seconds = 2.0
    assert "cannot be reached for the model 'someone/tiny' (ReadTimeout)" in refusal()


def test_content_that_changed_on_the_way_is_removed(hub, folder):
    commit = hub.push(NAME, folder)
    repo = repository(NAME, "", "model")
    hub.repos["model", NAME].commits[commit]["model.safetensors"] = b"Weights"
    with pytest.raises(FileNotFoundError, match="arrived with another content than the hub has"):
        repo.fetch(["model.safetensors"])
    hub.repos["model", NAME].commits[commit]["model.safetensors"] = b"weights"
    assert (repo.fetch(["model.safetensors"]) / "model.safetensors").read_bytes() == b"weights"


def test_a_hub_that_fails_in_the_middle_is_one_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.push(NAME, folder)
    repository(NAME, "", "model")
    hub.status = 503
    assert refusal().startswith("The hub answers with status 503 for the model 'someone/tiny'; ")


def test_a_full_disk_is_one_sentence(hub, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.push(NAME, folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    assert refusal() == (
        f"There is no room for someone/tiny in {huggingface_hub.constants.HF_HUB_CACHE} ([Errno "
        "28] No space left on device); make room, or set HF_HOME to another folder."
    )
