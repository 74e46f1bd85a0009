"""A Hugging Face Hub in one process: the HTTP protocol on loopback, repositories in memory.

It speaks what the real ``huggingface_hub`` client asks for when a model is pushed and loaded: who am I, create a
repository or a branch, repository info, file trees, preupload (regular file or LFS), the LFS batch / upload / verify
round, commits in NDJSON, model card validation, and ``resolve`` with the headers that the client's cache lives on.

Xet, the Hub's newer storage protocol, is left out; a client of version 2 has to be told so, which `environment` does.

``huggingface_hub`` reads its endpoint when it is imported, so a client of this server is a process of its own:

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home"), check=True)
        assert "model.safetensors" in hub.files("me/tiny")
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

USER, TOKEN = "me", "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".gguf")
REGULAR_LIMIT = 10 * 2**20  # bytes: the Hub takes no larger file in a commit


@dataclass(frozen=True)
class File:
    """One version of one file."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """What git calls the blob; for an LFS file git holds only the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def oid(self) -> str:
        """What clients compare by: the sha256 of an LFS file, the git blob of a regular one."""
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id, **lfs}


@dataclass
class Repository:
    """Commits by id, each a whole tree of files, and branches that name them. It starts with one empty commit."""

    name: str
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, File], summary: str) -> str:
        tree = sorted((path, file.oid) for path, file in files.items())
        described = json.dumps([self.name, self.branches.get(branch), summary, len(self.commits), tree])
        self.branches[branch] = hashlib.sha1(described.encode()).hexdigest()
        self.commits[self.branches[branch]] = files
        return self.branches[branch]

    def resolve(self, revision: str) -> str:
        """The commit that a branch name or a commit id stands for."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit


class Refusal(Exception):
    """An answer that the client turns into its own exception, by status and X-Error-Code."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status, self.body = status, json.dumps({"error": message}).encode()
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class HubServer:
    """The server. Use as a context manager; `endpoint` is its address, `requests` what was asked of it.

    `requests` holds (method, path, status) in order of arrival, query strings left out.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.lock = threading.Lock()
        handler = type("HubHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process: this endpoint, its own empty cache, no proxy, no Xet, never offline."""
        ours = re.compile(r"HF_|HUGGINGFACE_|HUGGING_FACE_|TRANSFORMERS_|(http|https|all|no)_proxy$", re.IGNORECASE)
        inherited = {name: value for name, value in os.environ.items() if not ours.match(name)}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        """The tree of a repository at a revision."""
        repository = self.repositories[name]
        return repository.commits[repository.resolve(revision)]

    def asked(self, method: str, pattern: str) -> list[str]:
        """Paths of the requests of `method` that matched the regular expression `pattern` and were answered well."""
        return [p for m, p, status in self.requests if m == method and re.search(pattern, p) and status < 400]


class _Handler(BaseHTTPRequestHandler):
    """Routes and answers. Every answer is (status, body as bytes or JSON, headers)."""

    hub: HubServer
    protocol_version = "HTTP/1.1"  # connections stay open, so every answer carries its length

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self._read_body()
        try:
            with self.hub.lock:
                status, answer, headers = self._route(path, body)
        except Refusal as refusal:
            status, answer, headers = refusal.status, refusal.body, refusal.headers
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.hub.requests.append((self.command, path, status))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _read_body(self) -> bytes:
        """The request's body, whether its length was announced or it comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str, body: bytes):
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, action in _ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                if action not in _OPEN and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refusal(401, "Unauthorized", "Invalid username or password.")
                return action(self.hub, body, **match.groupdict())
        raise Refusal(404, "NotFound", f"no route for {method} {path}")

    def log_message(self, format, *args):
        """Silence: `HubServer.requests` is the log."""


def _repository(hub: HubServer, name: str) -> Repository:
    if name not in hub.repositories:
        raise Refusal(404, "RepoNotFound", f"Repository not found: {name}")
    return hub.repositories[name]


def _whoami(hub, body):
    return 200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}}, {}


def _create_repository(hub, body):
    wanted = json.loads(body)
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    answer = {"url": f"{hub.endpoint}/{name}", "name": name, "id": name}
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", **answer}, {}
    hub.repositories[name] = Repository(name)
    return 200, answer, {}


def _create_branch(hub, body, name, branch):
    repository = _repository(hub, name)
    if branch in repository.branches:
        return 409, {"error": f"Branch already exists: {branch}"}, {}
    repository.branches[branch] = repository.resolve(json.loads(body or b"{}").get("startingPoint", "main"))
    return 200, {}, {}


def _info(hub, body, name, revision=None):
    commit = _repository(hub, name).resolve(revision or "main")
    siblings = [{"rfilename": path} for path in hub.files(name, commit)]
    answer = {"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": commit, "tags": []}
    return 200, answer | {"private": False, "downloads": 0, "likes": 0, "siblings": siblings}, {}


def _tree(hub, body, name, revision, folder):
    files = hub.files(name, _repository(hub, name).resolve(revision))
    inside = [file.entry(path) for path, file in files.items() if path.startswith(folder + "/" if folder else "")]
    if folder and not inside:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
    return 200, inside, {}


def _preupload(hub, body, name, revision):
    known = hub.files(name, _repository(hub, name).resolve(revision))

    def mode(path, size):
        return "lfs" if path.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT else "regular"

    files = [
        {
            "path": wanted["path"],
            "uploadMode": mode(wanted["path"], wanted["size"]),
            "shouldIgnore": False,
            "oid": known[wanted["path"]].oid if wanted["path"] in known else None,
        }
        for wanted in json.loads(body)["files"]
    ]
    return 200, {"files": files}, {}


def _lfs_batch(hub, body, name):
    def actions(wanted):
        if wanted["oid"] in hub.lfs_objects:
            return wanted
        hrefs = {
            "upload": f"{hub.endpoint}/lfs/{wanted['oid']}",
            "verify": f"{hub.endpoint}/{name}.git/info/lfs/verify",
        }
        return wanted | {"actions": {action: {"href": href} for action, href in hrefs.items()}}

    _repository(hub, name)
    objects = [actions({"oid": o["oid"], "size": o["size"]}) for o in json.loads(body)["objects"]]
    return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}


def _lfs_upload(hub, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refusal(400, "BadDigest", f"the content sent is not that of {oid}")
    hub.lfs_objects[oid] = body
    return 200, b"", {}


def _lfs_verify(hub, body, name):
    wanted = json.loads(body)
    if len(hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refusal(404, "EntryNotFound", f"LFS object {wanted['oid']} was not uploaded whole")
    return 200, {}, {}


def _commit(hub, body, name, revision):
    repository = _repository(hub, name)
    files, summary = dict(hub.files(name, repository.resolve(revision))), ""
    for operation in map(json.loads, body.splitlines()):
        key, value = operation["key"], operation["value"]
        if key == "header":
            summary = value["summary"]
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in hub.lfs_objects:
            files[value["path"]] = File(hub.lfs_objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"])
        else:
            raise Refusal(400, "BadRequest", f"cannot commit {key} {value.get('path')}")
    commit = repository.commit(revision, files, summary)
    return 200, {"success": True, "commitOid": commit, "commitUrl": f"{hub.endpoint}/{name}/commit/{commit}"}, {}


def _validate_yaml(hub, body):
    has_metadata = re.match(r"---\r?\n.*?\n---\r?\n", json.loads(body)["content"], re.DOTALL)
    warnings = [] if has_metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return 200, {"errors": [], "warnings": warnings}, {}


def _resolve(hub, body, name, revision, path):
    commit = _repository(hub, name).resolve(revision)
    file = hub.files(name, commit).get(path)
    if file is None:
        raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision!r}", **{"X-Repo-Commit": commit})
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
    if file.lfs:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": len(file.content)}
    return 200, file.content, headers


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _whoami),
    ("POST", "/api/repos/create", _create_repository),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", f"/api/models/{_NAME}/branch/(?P<branch>.+)", _create_branch),
    ("POST", f"/api/models/{_NAME}/preupload/(?P<revision>.+)", _preupload),
    ("POST", f"/api/models/{_NAME}/commit/(?P<revision>.+)", _commit),
    ("GET", f"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _tree),
    ("GET", f"/api/models/{_NAME}(/revision/(?P<revision>.+))?", _info),
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch", _lfs_batch),
    ("POST", f"/{_NAME}.git/info/lfs/verify", _lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_upload),
    ("GET", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
]
_OPEN = {_validate_yaml, _lfs_upload, _info, _tree, _resolve}  # need no token; an LFS upload goes to a signed address
