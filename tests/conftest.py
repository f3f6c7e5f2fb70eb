import http.server
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

# eight devices on the CPU, set before JAX starts, so that sharded runs can be compared with one
os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM's optimisations, and fusions by way of MLIR, take longer than the small programs run. Flags
# in the environment count after these, and .ci/run gives the slow tier those that users have.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
)
os.environ["HF_HUB_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402
from flax import nnx  # noqa: E402

from deltapref_jax.config import MeshShape  # noqa: E402
from deltapref_jax.hub import repository  # noqa: E402
from deltapref_jax.mesh import make_mesh  # noqa: E402
from deltapref_jax.models.decoder import Decoder  # noqa: E402
from deltapref_jax.models.export import export
from deltapref_jax.models.spec import ModelSpec  # noqa: E402
from deltapref_jax.models.weights import load  # noqa: E402
from deltapref_jax.synthetic.families import FAMILIES  # noqa: E402
from deltapref_jax.synthetic.tokenizer import build  # noqa: E402
from deltapref_jax.synthetic.world import problem, solution  # noqa: E402
from deltapref_jax.text.template import ChatTokenizer  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs go with their module: thousands of them use up a process's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    problems = [problem(name, 2, 7, i) for name in FAMILIES for i in range(40)]
    build([f"user\n{p.question}\nassistant\n{solution(p)}\n" for p in problems], 400, folder)
    return folder


@pytest.fixture(scope="session")
def text(tokenizer_folder):
    return ChatTokenizer.load(str(tokenizer_folder))


@pytest.fixture(scope="session")
def tiny_folder(text, tmp_path_factory):
    """A random decoder as a Hugging Face folder, untied."""
    spec = ModelSpec(len(text.tokenizer), 32, 2, 4, 2, 8, 64, tied=False, max_positions=512)
    folder = tmp_path_factory.mktemp("tiny")
    export(nnx.state(Decoder(spec, rngs=nnx.Rngs(0))), spec, text, folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load(str(tiny_folder))


ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def forks():
    """The process that forks entry points."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "launch" / "forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
    )
    assert process.stdout.readline() == "ready\n"
    with process:  # closes the pipes, on which it ends
        yield process


@pytest.fixture
def command(forks, tmp_path_factory):
    """Runs an entry point as a user's command: by default here, on one device.

    It is a fork of a process that has imported everything; `JAX_PLATFORMS` and what else is read on
    import are those of the tests.
    """
    printed = tmp_path_factory.mktemp("printed")

    def run(entry, *arguments, folder=ROOT, environment=None):
        environment = environment or os.environ | {"XLA_FLAGS": ""}
        line = [entry, list(map(str, arguments)), str(folder), environment, str(printed)]
        print(json.dumps(line), file=forks.stdin, flush=True)
        code = int(forks.stdout.readline())
        texts = [(printed / name).read_text(errors="replace") for name in ("out", "err")]
        return subprocess.CompletedProcess(line[:2], code, *texts)

    return run


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(MeshShape(), jax.devices()[:1])


@pytest.fixture
def metadata_server():
    """Starts Google's metadata server: returns its attributes, to be filled in, and its address."""
    servers = []

    def start():
        attributes = {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.headers["Metadata-Flavor"] == "Google"
                value = attributes.get(self.path.rpartition("/")[2], 404)
                code, text = (value, "error") if isinstance(value, int) else (200, value)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return attributes, f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def metadata(metadata_server):
    """A metadata server with the attributes that a test puts into the dictionary."""
    return metadata_server()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that the libraries ask, with caches of its own."""
    import datasets
    import huggingface_hub

    module = importlib.util.spec_from_file_location(
        "fake_hub", pathlib.Path(__file__).with_name("hub.py")
    )
    fake = importlib.util.module_from_spec(module)
    sys.modules["fake_hub"] = fake
    module.loader.exec_module(fake)
    served = fake.Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        served.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    repository.cache_clear()
    yield served
    repository.cache_clear()
    served.close()


@pytest.fixture
def offline(monkeypatch):
    """Returns a function that is HF_HUB_OFFLINE=1 in a new program."""
    import datasets
    import huggingface_hub

    def switch():
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        repository.cache_clear()

    return switch
