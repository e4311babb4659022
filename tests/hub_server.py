"""A hub on this machine, with as much of the Hugging Face Hub's interface as one model's way there and back takes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories: for each its commits, oldest first, as (id, files by name). `requests` is what was asked."""

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.address = ""

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Adds a commit with these files in place of older ones of their names; returns its id."""
        commits = self.repositories[repository]
        files = {**(commits[-1][1] if commits else {}), **files}
        digest = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits.append((digest, files))
        return digest

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) at `main`, or a commit; None where there is no such revision."""
        commits = self.repositories[repository]
        return commits[-1] if revision == "main" and commits else next((c for c in commits if c[0] == revision), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _file(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not asked or asked[1] not in self.hub.repositories:
            return self._answer(404, X_Error_Code="RepoNotFound")
        found = self.hub.files(asked[1], asked[2])
        if found is None:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        commit, files = found
        if asked[3] not in files:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        body = files[asked[3]]
        self._answer(200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    do_GET = do_HEAD = _file

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer a-token":
            return self._answer(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'lab'}/{asked['name'].split('/')[-1]}"
            if name in self.hub.repositories:
                return self._answer(409, json.dumps({"url": f"{self.hub.address}/{name}"}).encode())
            self.hub.repositories[name] = []
            return self._json({"url": f"{self.hub.address}/{name}"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        name, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", path).groups()
        if action == "preupload":
            files = json.loads(body)["files"]
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": file["path"], **answer} for file in files]})
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        commit = self.hub.commit(name, sent)
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A hub at `address`, for as long as the block lasts; whoever writes needs the token a-token."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
