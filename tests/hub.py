"""A hub on this machine: the part of the Hugging Face hub's API that its client libraries use here.

Every request is noted, so that tests can tell what was asked for, and in which order.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".parquet", "tokenizer.json")  # stored by SHA-256 (LFS), as on the hub


@dataclasses.dataclass
class Repo:
    """A repository: files of every commit, and the commits of its branches."""

    commits: dict = dataclasses.field(default_factory=dict)
    branches: dict = dataclasses.field(default_factory=dict)
    gated: bool = False


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large(name):
    return name.endswith(LARGE)


class Hub:
    """Serves repositories until `close`.

    Attributes:
      url: for HF_ENDPOINT.
      requests: (method, path, Range header or "") of all requests so far.
      status: answers everything with this status, unless 0.
      seconds: waits before every answer.
    """

    def __init__(self):
        self.repos, self.requests, self.status, self.seconds = {}, [], 0, 0.0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def push(self, name, folder, kind="model", branch="main", gated=False):
        """Commits a folder's files, and returns the commit."""
        folder = pathlib.Path(folder)
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos.setdefault((kind, name), Repo())
        seed = json.dumps([name, len(repo.commits), {n: oid(d) for n, d in files.items()}])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[commit] = files
        repo.branches[branch], repo.gated = commit, gated
        return commit

    def asked(self, part):
        """The requests whose path has `part`."""
        return [request for request in self.requests if part in request[1]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(None)

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body):
        url = urllib.parse.urlsplit(self.path)
        path = url.path  # a slash in the name of a branch stays quoted
        self.hub.requests.append(
            (self.command, urllib.parse.unquote(path), self.headers.get("Range", ""))
        )
        time.sleep(self.hub.seconds)
        if self.hub.status:
            return self._send(self.hub.status, b"{}")
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.+))?", path):
            return self._api(match[1], match[2], match[3] or "revision/main", body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file("dataset" if match[1] else "model", *match.groups()[1:])
        if match := re.fullmatch(r"/content/([0-9a-f]{64})", path):
            return self._content(match[1])
        return self._send(404, b"{}")

    def _commit(self, kind, name, revision):
        revision = urllib.parse.unquote(revision)
        repo = self.hub.repos.get((kind, name))
        if repo is None:  # the hub does not tell a missing repository from a private one
            self._send(401, b'{"error": "Invalid username or password."}')
            return None, ""
        commit = revision if revision in repo.commits else repo.branches.get(revision, "")
        if not commit:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return repo, commit

    def _api(self, kind, name, rest, body):
        what, _, rest = rest.partition("/")
        revision, _, folder = rest.partition("/")
        repo, commit = self._commit(kind, name, revision)
        if not commit:
            return None
        files = repo.commits[commit]
        entries = [_entry(file, data) for file, data in files.items()]
        entries += _folders(files)
        if what == "tree":
            inside = [e for e in entries if e["path"].startswith(folder and f"{folder}/")]
            if "recursive=true" not in self.path.lower():
                depth = folder.count("/") + bool(folder)
                inside = [e for e in inside if e["path"].count("/") == depth]
            if not inside:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._send(200, json.dumps(inside).encode())
        if what == "paths-info":
            asked = urllib.parse.parse_qs(body.decode()).get("paths", [])
            if self.headers.get("Content-Type", "").startswith("application/json"):
                asked = json.loads(body)["paths"]
            found = [e for e in entries if e["path"] in asked]
            return self._send(200, json.dumps(found).encode())
        siblings = [
            {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
            | ({"lfs": {**e["lfs"], "sha256": e["lfs"]["oid"]}} if "lfs" in e else {})
            for e in entries
            if e["type"] == "file"
        ]
        about = {"id": name, "sha": commit, "siblings": siblings, "private": False}
        about |= {"gated": "auto" if repo.gated else False, "downloads": 0, "likes": 0, "tags": []}
        return self._send(200, json.dumps(about).encode())

    def _file(self, kind, name, revision, file):
        repo, commit = self._commit(kind, name, revision)
        if not commit:
            return None
        if repo.gated:
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        head = {"X-Repo-Commit": commit}
        data = repo.commits[commit].get(urllib.parse.unquote(file))
        if data is None:
            return self._send(404, b"{}", head | {"X-Error-Code": "EntryNotFound"})
        if not large(file):
            return self._send(200, data, head | {"ETag": f'"{oid(data)}"'})
        sha256 = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        # Large files are on another host, to which clients do not send their token.
        there = self.hub.url.replace("127.0.0.1", "localhost")
        return self._send(302, b"", head | linked | {"Location": f"{there}/content/{sha256}"})

    def _content(self, sha256):
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == sha256:
                        return self._send(200, data, {"ETag": f'"{sha256}"'})
        return self._send(404, b"{}")

    def _send(self, status, data, headers=None):
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and status == 200:
            status, data = 206, data[int(part[1]) : int(part[2] or len(data) - 1) + 1]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError):  # a client that did not wait
                self.wfile.write(data)


def _entry(file, data):
    entry = {"type": "file", "path": file, "size": len(data), "oid": oid(data)}
    if large(file):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return entry


def _folders(files):
    parents = {str(p) for file in files for p in pathlib.PurePosixPath(file).parents} - {"."}
    return [{"type": "directory", "path": p, "size": 0, "oid": "0" * 40} for p in sorted(parents)]
