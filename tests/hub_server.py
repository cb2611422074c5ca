"""A model hub over real HTTP on this machine, with as much of the Hub's interface as publishing and fetching use.

Repositories live in memory, those of data sets under a name with `datasets/` before it: branches are lists of commits,
large files are kept by SHA-256 and checked against it.
`faults` makes the next requests to a path fail in a chosen way.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_publishingTestToken0123456789abcdef"
SLOW_S = 3.0
READ_ONLY = "hf_readingTestToken0123456789abcdefgh"


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """`branches` names commits; a commit is {path: (content, large)}."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]]) -> str:
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, (data, _) in files.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), content]).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class HubServer:
    """Attributes:
    repos: by `org/name`.
    large: large files by SHA-256.
    collections: by slug, as the Hub describes them.
    part_bytes: large files above this go up in parts of this size; None takes them whole.
    parts: what has arrived of such files, by SHA-256 and number.
    requests: "METHOD /path" of every request, in order.
    served: bytes of files that were sent, by path.
    faults: [pattern of "METHOD /path", what, how often left]; the first that fits is used up. A status is answered
        instead; "reset" closes the connection, "half" within the answer's body; "slow" waits first, or between the
        pieces of a body; "lost" and "late" do what was asked, and then close the connection or answer 504.
    spoils: name of a file that commits keep with other bytes.
    asks: header with which a status of `faults` is answered, such as how long to wait.
    moments: of `requests`, in seconds of a clock that only goes forward.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, dict] = field(default_factory=dict)
    part_bytes: int | None = None
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[list] = field(default_factory=list)
    served: dict[str, int] = field(default_factory=dict)
    spoils: str | None = None
    asks: dict[str, str] = field(default_factory=dict)
    moments: list[float] = field(default_factory=list)
    url: str = ""

    def variables(self, token: str = TOKEN) -> dict[str, str]:
        """Of the environment of a client that is to find this hub, with a token, by the LFS protocol."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def sent(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault[2] > 0 and re.search(fault[0], request):
                fault[2] -= 1
                return fault[1]
        return None

    def __enter__(self) -> "HubServer":
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    manner = ""

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.manner == "lost":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.manner == "late":
            self.manner = ""
            self.fail(504)
            return
        self.send_response(status)
        for key, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.manner in ("half", "slow"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if self.manner == "half":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            time.sleep(SLOW_S)
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    def fail(self, status: int, code: str = "", message: str = "failed") -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message} if code else None)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.hub.moments.append(time.monotonic())
        fault = self.hub.fault(request)
        if fault == "reset":
            self.rfile.read(1)
            self.close_connection = True
            self.connection.close()
            return
        body = self.body()
        self.manner = fault if isinstance(fault, str) else ""
        if fault == "slow" and self.command != "GET":
            time.sleep(SLOW_S)
        elif isinstance(fault, int):
            self.answer(fault, {"error": "failed"}, self.hub.asks)
            return
        self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if self.command == "PUT":
            if found := re.fullmatch(r"/part/(\w+)/(\d+)", path):
                hub.parts.setdefault(found[1], {})[int(found[2])] = body
                self.answer(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
                return
            oid = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                self.fail(400, message="the content does not have this SHA-256")
                return
            hub.large[oid] = body
            self.answer(200, {})
            return
        if self.command == "POST" and path.startswith("/complete/"):
            self.complete(path.removeprefix("/complete/"), json.loads(body))
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            self.fail(401, message="Invalid credentials")
            return
        if self.command == "POST" and token == READ_ONLY:
            self.fail(403, message="this token cannot write")
            return
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repos:
                self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
                return
            visible = wanted.get("private", wanted.get("visibility") == "private")
            hub.repos[name] = Repo(private=bool(visible))
            hub.repos[name].commit("main", {".gitattributes": (b"", False)})
            self.answer(200, {"url": f"{hub.url}/{name}", "id": name, "name": name})
        elif path == "/api/repos/delete":
            wanted = json.loads(body)
            del hub.repos[f"{wanted['organization']}/{wanted['name']}"]
            self.answer(200, {})
        elif path.startswith("/api/collections"):
            self.collection(path, body, parse_qs(urlsplit(self.path).query))
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|branch|preupload|commit)/([^/]+)", path):
            self.model(*found.groups(), body)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self.model(found[1], "revision", "main", body)
        elif found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+?)(?:/revision/([^/]+))?", path):
            self.model(found[1], "revision", found[2] or "main", body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": wanted["oid"], "size": wanted["size"]}
                | ({} if wanted["oid"] in hub.large else {"actions": {"upload": self.upload(**wanted)}})
                for wanted in json.loads(body)["objects"]
            ]
            self.answer(
                200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}
            )
        elif found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.fail(404, "EntryNotFound")

    def upload(self, oid: str, size: int, **_) -> dict:
        """Where a large file goes: to one address, or in parts of fixed size to one address each."""
        step = self.hub.part_bytes
        if step is None or size <= step:
            return {"href": f"{self.hub.url}/lfs/{oid}"}
        parts = {str(number): f"{self.hub.url}/part/{oid}/{number}" for number in range(1, -(-size // step) + 1)}
        return {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(step), **parts}}

    def complete(self, oid: str, told: dict) -> None:
        arrived = self.hub.parts.get(oid, {})
        stated = {part["partNumber"]: part["etag"].strip('"') for part in told["parts"]}
        whole = b"".join(arrived[number] for number in sorted(arrived))
        if (
            stated != {number: hashlib.md5(part).hexdigest() for number, part in arrived.items()}
            or hashlib.sha256(whole).hexdigest() != oid
        ):
            self.fail(400, message="the parts are not the file")
            return
        self.hub.large[oid] = whole
        self.answer(200, {})

    def collection(self, path: str, body: bytes, query: dict[str, list[str]]) -> None:
        known = self.hub.collections
        if self.command == "GET" and path != "/api/collections":
            self.answer(200, known[path.removeprefix("/api/collections/")])
        elif self.command == "GET":
            owner, item = query["owner"][0], query["item"][0].removeprefix("models/")
            fits = [
                {key: value for key, value in one.items() if key != "position"}  # the client numbers what it lists
                for one in known.values()
                if one["owner"]["name"] == owner and item in [held["id"] for held in one["items"]]
            ]
            self.answer(200, fits)
        elif path == "/api/collections":
            wanted = json.loads(body)
            slug = f"{wanted['namespace']}/{re.sub(r'[^a-z0-9]+', '-', wanted['title'].lower())}"
            if slug in known:
                self.answer(409, {"error": "it exists", "slug": slug})
                return
            known[slug] = {
                "slug": slug,
                "title": wanted["title"],
                "owner": {"name": wanted["namespace"]},
                "items": [],
                "lastUpdated": "2024-01-01T00:00:00.000Z",
                "position": 0,
                "private": wanted["private"],
                "theme": "blue",
                "upvotes": 0,
            }
            self.answer(200, known[slug])
        else:
            held = known[path.removeprefix("/api/collections/").removesuffix("/items")]["items"]
            held.append({"_id": str(len(held)), "position": len(held), **json.loads(body)["item"]})
            self.answer(200, known[path.removeprefix("/api/collections/").removesuffix("/items")])

    def model(self, name: str, verb: str, revision: str, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self.fail(404, "RepoNotFound", "Repository not found")
            return
        if verb == "branch":
            if revision in repo.branches:
                self.fail(409, message="Reference already exists")
                return
            repo.branches[revision] = repo.branches["main"]
            self.answer(200, {})
            return
        commit = repo.find(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound", "Revision not found")
            return
        files = repo.commits[commit]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})
        elif verb == "tree":
            self.answer(200, [self.entry(path, *stored) for path, stored in files.items()])
        elif verb == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": modes})
        else:
            self.commit(name, revision, [json.loads(line) for line in body.splitlines()])

    def entry(self, path: str, content: bytes, large: bool) -> dict:
        found = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if large:
            found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return found

    def commit(self, name: str, branch: str, lines: list[dict]) -> None:
        repo = self.hub.repos[name]
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                    self.fail(412, message="A commit has happened since")
                    return
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "file":
                spoilt = b" " if value["path"] == self.hub.spoils else b""
                files[value["path"]] = (base64.b64decode(value["content"]) + spoilt, False)
            elif value["oid"] in self.hub.large:
                files[value["path"]] = (self.hub.large[value["oid"]], True)
            else:
                self.fail(400, message=f"{value['path']} was not uploaded")
                return
        oid = repo.commit(branch, files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo.find(revision) if repo else None
        if commit is None or path not in repo.commits[commit]:
            self.fail(404, "EntryNotFound")
            return
        content, large = repo.commits[commit][path]
        etag = hashlib.sha256(content).hexdigest() if large else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            part = content[first : last + 1]
        else:
            part = content
        self.hub.served[path] = self.hub.served.get(path, 0) + len(part) * (self.command == "GET")
        self.answer(206 if asked else 200, part, headers)
