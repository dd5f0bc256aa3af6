"""A small Hub on loopback for tests: enough for the real huggingface_hub client to create, push to, read and list repositories,
and for `datasets` to read data sets.

    with HubServer(tokens={"hf_alice": Token("alice", "write")}) as hub:
        HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/model")

Everything is in memory, files use plain LFS (no Xet, so set HF_HUB_DISABLE_XET=1), and requests can fail: `hub.faults` maps the
index of a request to a status that replaces its response. Endpoints: whoami, create, preupload, LFS batch and PUT, commit,
resolve, revision, refs, tree, paths-info, branch, validate-yaml (by `card_rules`).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.card_rules import find_errors

LFS_FILES = re.compile(r"\.(safetensors|bin|png|jpg)$")  # as in the Hub's .gitattributes
DATE = "2026-01-01T00:00:00.000Z"
DROP = 0  # as a fault: closes the connection without a response

Files = dict[str, tuple[bytes, bool]]  # path -> content, whether by LFS


@dataclass(frozen=True)
class Token:
    """Its owner and role."""

    user: str
    role: Literal["read", "write"] = "write"


@dataclass
class Repository:
    """Commits by their hash, branches by name."""

    name: str
    is_private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False  # nobody has accepted the terms

    def commit(self, files: Files, branch: str) -> str:
        """Adds a commit to `branch`; returns its hash."""
        digest = hashlib.sha1(f"{self.name} {branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        return digest

    def find(self, revision: str) -> str | None:
        """The commit hash of a branch or a hash; None if unknown."""
        revision = self.branches.get(revision.removeprefix("refs/heads/"), revision)
        return revision if revision in self.commits else None

    def describe(self, commit: str) -> dict[str, Any]:
        """The API's description of the repository at `commit`."""
        files = self.commits[commit]
        card: dict[str, Any] = {}
        if "README.md" in files:
            block = re.match(r"---\n(.*?)\n---", files["README.md"][0].decode(), re.DOTALL)
            card = (yaml.safe_load(block[1]) if block else None) or {}
        return {
            "_id": "1", "id": self.name, "modelId": self.name, "author": self.name.split("/")[0], "sha": commit,
            "private": self.is_private, "disabled": False, "gated": False, "downloads": 0, "likes": 0,
            "tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag"), "cardData": card,
            "library_name": card.get("library_name"), "lastModified": DATE, "createdAt": DATE,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }  # fmt: skip


def blob_id(content: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def describe_file(path: str, content: bytes, by_lfs: bool) -> dict[str, Any]:
    """The API's description of a file."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if by_lfs:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class RefusedError(Exception):
    """An error response: status, the Hub's error code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubServer:
    """The server, as a context manager; `requests` lists the requests in order."""

    def __init__(self, tokens: dict[str, Token]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.renamed: dict[str, str] = {}  # old name -> name
        self.faults: dict[int, int] = {}  # zero-based request index -> status, or DROP
        self.lock = threading.Lock()
        self.before_answer: Callable[[int], None] = lambda number: None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """Content by path."""
        stored = self.repositories[repository]
        return {path: content for path, (content, _) in stored.commits[stored.branches[branch]].items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing."""

    def _handle(self) -> None:
        hub = self.server_hub
        body = self._read_body()
        with hub.lock:
            number = len(hub.requests)
            hub.requests.append(f"{self.command} {self.path}")
        hub.before_answer(number)
        fault = hub.faults.get(number)
        if fault == DROP:
            self.close_connection = True
            return
        try:
            if fault is not None:
                raise RefusedError(fault, "Fault", f"the test asked for {fault}")
            self._answer(body)
        except RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, {"error": refused.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - the base class's names

    def _read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        raw = isinstance(content, bytes)
        data = content if raw else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _token(self) -> Token | None:
        return self.server_hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _writer(self, namespace: str | None = None) -> Token:
        token = self._token()
        if token is None:
            raise RefusedError(401, "Unauthorized", "Invalid username or password.")
        if token.role != "write" or namespace not in (None, token.user):
            raise RefusedError(403, "Forbidden", f"you have no write access to {namespace or 'repositories'}")
        return token

    def _repository(self, name: str, *, writes: bool) -> Repository:
        repository = self.server_hub.repositories.get(name)
        token = self._token()
        if repository is None or (repository.is_private and (token is None or token.user != name.split("/")[0])):
            raise RefusedError(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if writes:
            self._writer(name.split("/")[0])
        elif repository.is_gated and "/resolve/" in self.path:
            raise RefusedError(403, "GatedRepo", f"Access to model {name} is restricted")
        return repository

    def _answer(self, body: bytes) -> None:
        for old, new in self.server_hub.renamed.items():
            if f"/{old}/" in f"{urlsplit(self.path).path}/":
                self._send(307, headers={"Location": self.path.replace(old, new, 1)})
                return
        url = urlsplit(self.path)
        path = unquote(url.path)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, body, url.query, *match.groups())
                return
        raise RefusedError(404, "NotFound", f"no such endpoint: {path}")

    def _whoami(self, body: bytes, query: str) -> None:
        token = self._token()
        if token is None:
            raise RefusedError(401, "Unauthorized", "Invalid credentials in Authorization header")
        access = {"displayName": "test", "role": token.role}
        auth = {"type": "access_token", "accessToken": access}
        self._send(
            200, {"type": "user", "id": "1", "name": token.user, "fullname": token.user, "orgs": [], "auth": auth}
        )

    def _validate_yaml(self, body: bytes, query: str) -> None:
        errors = [{"message": message} for message in find_errors(json.loads(body)["content"])]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self, body: bytes, query: str) -> None:
        asked = json.loads(body)
        namespace = asked.get("organization") or self._writer().user
        self._writer(namespace)
        name = f"{namespace}/{asked['name']}"
        if name in self.server_hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.server_hub.url}/{name}"})
            return
        repository = Repository(name, bool(asked.get("private")) or asked.get("visibility") == "private")
        repository.commit({".gitattributes": (b"", False)}, "main")
        self.server_hub.repositories[name] = repository
        self._send(200, {"url": f"{self.server_hub.url}/{name}", "name": name, "id": "1"})

    def _lfs_batch(self, body: bytes, query: str, name: str) -> None:
        self._repository(name, writes=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server_hub.blobs:
                upload = {"href": f"{self.server_hub.url}/lfs/{wanted['oid']}", "header": {}}
                entry |= {"authenticated": True, "actions": {"upload": upload}}
            objects.append(entry)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, query: str, digest: str) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            raise RefusedError(400, "BadHash", "the content does not match its hash")
        self.server_hub.blobs[digest] = body
        self._send(200)

    def _preupload(self, body: bytes, query: str, name: str, revision: str) -> None:
        self._repository(name, writes=True)
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if LFS_FILES.search(f["path"]) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def _commit(self, body: bytes, query: str, name: str, revision: str) -> None:
        repository = self._repository(name, writes=True)
        wants_pull_request = "1" in parse_qs(query).get("create_pr", [])
        with self.server_hub.lock:
            base = repository.find(revision)
            if base is None:
                raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = dict(repository.commits[base])
            for line in body.decode().splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = (base64.b64decode(value["content"]), False)
                elif operation["key"] == "lfsFile":
                    if value["oid"] not in self.server_hub.blobs:
                        raise RefusedError(400, "LfsMissing", f"{value['path']} was not uploaded")
                    files[value["path"]] = (self.server_hub.blobs[value["oid"]], True)
                elif operation["key"] == "deletedFile":
                    files.pop(value["path"], None)
            branch = f"refs/pr/{len(repository.branches)}" if wants_pull_request else revision
            digest = repository.commit(files, branch)
        request = f"{self.server_hub.url}/{name}/discussions/1" if wants_pull_request else None
        url = f"{self.server_hub.url}/{name}/commit/{digest}"
        self._send(
            200, {"success": True, "commitOid": digest, "commitUrl": url, "pullRequestUrl": request, "hookOutput": ""}
        )

    def _repository_at(self, name: str, revision: str) -> tuple[Repository, str]:
        repository = self._repository(name, writes=False)
        commit = repository.find(revision)
        if commit is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _revision(self, body: bytes, query: str, name: str, revision: str | None) -> None:
        repository, commit = self._repository_at(name, revision or "main")
        self._send(200, repository.describe(commit))

    def _refs(self, body: bytes, query: str, name: str) -> None:
        branches = self._repository(name, writes=False).branches
        rows = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in branches.items()]
        self._send(200, {"branches": rows, "tags": [], "converts": []})

    def _branch(self, body: bytes, query: str, name: str, branch: str) -> None:
        repository = self._repository(name, writes=True)
        if branch in repository.branches:
            raise RefusedError(409, "Conflict", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._send(200, {})

    def _tree(self, body: bytes, query: str, name: str, revision: str, inside: str | None) -> None:
        repository, commit = self._repository_at(name, revision)
        start = f"{inside}/" if inside else ""
        files = {p: c for p, c in repository.commits[commit].items() if p.startswith(start)}
        if start and not files:
            raise RefusedError(404, "EntryNotFound", f"{inside} does not exist on {revision!r}")
        self._send(200, [describe_file(p, content, lfs) for p, (content, lfs) in sorted(files.items())])

    def _paths_info(self, body: bytes, query: str, name: str, revision: str) -> None:
        repository, commit = self._repository_at(name, revision)
        is_json = "json" in (self.headers.get("Content-Type") or "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        files = repository.commits[commit]
        self._send(200, [describe_file(p, *files[p]) for p in asked if p in files])

    def _resolve(self, body: bytes, query: str, name: str, revision: str, path: str) -> None:
        repository, commit = self._repository_at(name, revision)
        stored = repository.commits[commit].get(path)
        if stored is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._send(404, b"Entry not found", headers)
            return
        content, by_lfs = stored
        tag = hashlib.sha256(content).hexdigest() if by_lfs else blob_id(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "X-Linked-ETag": f'"{tag}"'}
        headers |= {"X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, content[start:stop], headers)
            return
        self._send(200, content, headers)


_NAME = r"([^/]+/[^/]+)"
_KIND = "(?:models|datasets)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", _Handler._whoami),
    (r"/api/validate-yaml", _Handler._validate_yaml),
    (r"/api/repos/create", _Handler._create),
    (r"/lfs/(\w{64})", _Handler._lfs_put),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler._preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler._commit),
    (rf"/api/{_KIND}/{_NAME}/revision/(.+)", _Handler._revision),
    (rf"/api/{_KIND}/{_NAME}/refs", _Handler._refs),
    (rf"/api/{_KIND}/{_NAME}/branch/(.+)", _Handler._branch),
    (rf"/api/{_KIND}/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    (rf"/api/{_KIND}/{_NAME}/paths-info/(.+)", _Handler._paths_info),
    (rf"/api/{_KIND}/{_NAME}()", lambda handler, body, query, name, _: handler._revision(body, query, name, None)),
    (rf"/(?:datasets/)?{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
