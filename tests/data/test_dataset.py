import json

import pytest

from deltapref_jax.config import ConfigError, Pairs, Prompts
from deltapref_jax.data.dataset import content_of, load_split
from deltapref_jax.data.sources import read_prompts
from deltapref_jax.hub import repository

NAME = "someone/questions"


def write(root, **files):
    """Parquet files by their place below `root`; the values are questions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for place, questions in files.items():
        file = root / (place.replace("__", "/") + ".parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        answers = [str(i) for i in range(len(questions))]
        pq.write_table(pa.table({"prompt": questions, "answer": answers}), file)
    return root


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "questions", data__train=["a?", "b?"], data__test=["c?"])


@pytest.fixture
def several(tmp_path):
    """A data set with the subsets `easy` and `hard`, as its card declares them."""
    root = write(tmp_path / "several", easy__train=["1 + 1?"], hard__train=["7 * 8?", "9 * 9?"])
    subsets = [{"config_name": n, "data_files": f"{n}/*.parquet"} for n in ("easy", "hard")]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n")
    return root


def asked(source):
    return [json.loads(p.messages)[-1]["content"] for p in read_prompts(source)[0]]


def data_asked(hub):
    """Parquet files that were asked for, each once."""
    return {r[1].rsplit("/", 2)[1] for r in hub.asked("/resolve/") if r[1].endswith(".parquet")}


def test_a_data_set_on_the_hub_is_its_commit(hub, folder):
    first = hub.push(NAME, folder, kind="dataset")
    source = Prompts(kind="hub", path=NAME)
    assert content_of(source) == f"{NAME}@{first}"
    assert not data_asked(hub)
    assert asked(source) == ["a?", "b?"]
    assert asked(Prompts(kind="hub", path=NAME, split="test")) == ["c?"]
    write(folder, data__train=["d?"])
    second = hub.push(NAME, folder, kind="dataset")
    assert asked(source) == ["a?", "b?"]  # one commit as long as a program runs
    repository.cache_clear()
    assert content_of(source) == f"{NAME}@{second}"
    assert asked(source) == ["d?"]
    old = Prompts(kind="hub", path=NAME, revision=first)
    assert content_of(old) == f"{NAME}@{first}"
    assert asked(old) == ["a?", "b?"]


def test_subset_and_split_are_looked_up_before_data_are_fetched(hub, several):
    commit = hub.push(NAME, several, kind="dataset")
    for source, sentence in (
        (Pairs(path=NAME), f"The subset (name) of the data set {NAME} is ''"),
        (Pairs(path=NAME, name="hart"), f"The subset (name) of the data set {NAME} is 'hart'"),
    ):
        with pytest.raises(ConfigError) as raised:
            content_of(source)
        assert str(raised.value) == f"{sentence}; choose one of 'easy', 'hard'."
    with pytest.raises(ConfigError) as raised:
        content_of(Pairs(path=NAME, name="hard", split="test"))
    assert str(raised.value) == (
        f"The split of the data set {NAME} is 'test'; choose one of 'train'."
    )
    assert not data_asked(hub)
    assert content_of(Pairs(path=NAME, name="hard")) == f"{NAME}@{commit} hard"
    assert content_of(Pairs(path=NAME, name="hard", split="train[:1]"))
    assert load_split(Pairs(path=NAME, name="hard"))["prompt"][:] == ["7 * 8?", "9 * 9?"]
    assert data_asked(hub) == {"hard"}
    assert load_split(Pairs(path=NAME, name="easy"))["prompt"][:] == ["1 + 1?"]
    assert data_asked(hub) == {"easy", "hard"}


def test_a_subset_that_its_author_made_the_default_need_not_be_named(hub, several):
    card = several / "README.md"
    card.write_text(card.read_text().replace('"hard",', '"hard", "default": true,'))
    hub.push(NAME, several, kind="dataset")
    content_of(Pairs(path=NAME))
    assert load_split(Pairs(path=NAME))["prompt"][:] == ["7 * 8?", "9 * 9?"]


def test_offline_the_data_of_the_same_commit_come_from_the_cache(hub, folder, offline):
    first = hub.push(NAME, folder, kind="dataset")
    load_split(Pairs(path=NAME))
    write(folder, data__train=["d?"])
    second = hub.push(NAME, folder, kind="dataset")
    repository.cache_clear()
    load_split(Pairs(path=NAME))
    hub.requests.clear()
    offline()
    for revision, commit, questions in (("", second, ["d?"]), (first, first, ["a?", "b?"])):
        source = Pairs(path=NAME, revision=revision)
        assert content_of(source) == f"{NAME}@{commit}"
        assert load_split(source)["prompt"][:] == questions
    with pytest.raises(ConfigError, match=r"\(split 'no'\) cannot be loaded"):
        load_split(Pairs(path=NAME, split="no"))
    assert not hub.requests


def test_another_commit_is_no_stand_in_when_the_hub_fails(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.push(NAME, folder, kind="dataset")
    load_split(Pairs(path=NAME))
    write(folder, data__train=["d?"])
    hub.push(NAME, folder, kind="dataset")
    repository.cache_clear()
    repository(NAME, "", "dataset")
    hub.status = 503
    with pytest.raises(
        ConfigError, match=r"\(ConnectionError: the hub does not give the commit \w+\)"
    ):
        load_split(Pairs(path=NAME))


def test_offline_what_is_missing_is_one_sentence(hub, several, offline):
    hub.push(NAME, several, kind="dataset")
    content_of(Pairs(path=NAME, name="easy"))
    offline()
    with pytest.raises(
        FileNotFoundError,
        match=rf"^The cached copy of the data set {NAME} at \w{{12}} has no data, and "
        r"HF_HUB_OFFLINE is set; unset it to fetch the data\.$",
    ):
        load_split(Pairs(path=NAME, name="easy"))
    with pytest.raises(FileNotFoundError, match="^Nothing of the hub's data set 'a/b' is in this"):
        content_of(Pairs(path="a/b"))


def test_offline_several_cached_subsets_are_listed(hub, several, offline):
    hub.push(NAME, several, kind="dataset")
    for name in ("easy", "hard"):
        load_split(Pairs(path=NAME, name=name))
    offline()
    assert load_split(Pairs(path=NAME, name="hard"))["prompt"][:] == ["7 * 8?", "9 * 9?"]
    with pytest.raises(ConfigError, match=r"is ''; choose one of 'easy', 'hard'\.$"):
        load_split(Pairs(path=NAME))


def test_a_local_folder_has_subsets_and_no_revisions(hub, several):
    path = str(several)
    assert load_split(Pairs(path=path, name="hard"))["prompt"][:] == ["7 * 8?", "9 * 9?"]
    assert content_of(Pairs(path=path, name="hard")) != content_of(Pairs(path=path, name="easy"))
    file = str(several / "easy" / "train.parquet")
    for source, field in (
        (Pairs(path=path, revision="v1"), "revision"),
        (Pairs(path=file, name="easy"), "name"),
    ):
        with pytest.raises(ConfigError) as raised:
            content_of(source)
        assert str(raised.value) == (
            f"{field} of the data {source.path} is {getattr(source, field)!r}, and it is on this "
            f"machine, where it has no {field}; leave the field empty."
        )
    assert not hub.requests
