"""A scripted hub on loopback: repositories, their commits, and what was asked with which token."""

from __future__ import annotations

import base64
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants

TOKEN = "hf_" + "s" * 34


@dataclass
class Hub:
    """What the hub holds, and what it has seen."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    """Status to answer with, by a part of the path."""
    at_commit: list = field(default_factory=list)
    """Functions to call before a commit."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(b"")

    def do_POST(self):
        self.answer(self.body())

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: bytes) -> None:
        hub: Hub = self.server.hub
        for part, status in hub.answers.items():
            if part in self.path:
                return self.send({"error": "the script says no"}, status)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.send({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            return self.create(hub, json.loads(body))
        kind, repo, verb = re.match(
            r"/api/(model|dataset)s/([\w.-]+/[\w.-]+)(?:/(\w+))?", self.path
        ).groups()
        key = f"{kind} {repo}"
        if key not in hub.files:
            return self.send({"error": "Repository not found"}, 404)
        if verb == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self.send({"files": files})
        if verb == "commit":
            for call in hub.at_commit:
                call()
            lines = [json.loads(line) for line in body.splitlines() if line]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            hub.files[key] |= added
            hub.commits.append((key, added))
            url = f"{hub.url}/{repo}/commit/{'0' * 40}"
            return self.send({"commitUrl": url, "commitOid": "0" * 40})
        siblings = [{"rfilename": name} for name in hub.files[key]]
        info = {"id": repo, "private": hub.private[key], "siblings": siblings, "sha": "0" * 40}
        return self.send(info)

    def create(self, hub: Hub, asked: dict) -> None:
        kind = asked.get("type", "model")
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        key = f"{kind} {repo}"
        exists = key in hub.files
        if not exists:
            hub.files[key] = {".gitattributes": b""}
            hub.private[key] = asked.get("visibility") == "private" or bool(asked.get("private"))
        prefix = "datasets/" if kind == "dataset" else ""
        self.send({"url": f"{hub.url}/{prefix}{repo}"}, 409 if exists else 200)

    def send(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(monkeypatch):
    """Serve an empty hub, and make the library use it, with its token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
