"""The Hugging Face Hub, as far as `huggingface_hub` asks it for one file and gives it a commit: a server in a thread.

    with FakeHub() as hub:
        hub.add("owner/name", {"a.yaml": b"..."})

Only those that write need the token. What it does not know is answered 404 and kept in `unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ofthisfakehubalone"


@dataclass
class Repo:
    """Commits, the oldest first, each its files; `refs`: other names of commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes]) -> str:
        content = {**(self.files("main") if self.commits else {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(content.items()))).encode()).hexdigest()
        self.commits[sha] = content
        self.refs["main"] = sha
        return sha

    def sha(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str) -> dict[str, bytes]:
        sha = self.sha(revision)
        assert sha is not None
        return self.commits[sha]


class FakeHub:
    """`asked`: method and path of every request; `listed`: sizes that a listing claims, in place of the true ones."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.unknown: list[str] = []
        self.listed: dict[str, int] = {}
        self.broken = 0  # a status with which everything is answered

    def add(self, repo: str, files: Mapping[str, bytes | str], **flags: Any) -> str:
        """A new commit there, its sha."""
        mine = self.repos.setdefault(repo, Repo(**flags))
        return mine.commit({name: text.encode() if isinstance(text, str) else text for name, text in files.items()})

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """What a new process needs to ask this hub, with a cache of its own."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self._parts()
        if self.fake.broken:
            return self._say(self.fake.broken, {"error": "Out of order"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:
            front = json.loads(body)["content"].split("---\n")
            errors = [] if len(front) > 2 and "license: no-such" not in front[1] else [{"message": '"license" is bad'}]
            return self._say(400 if errors else 200, {"errors": errors, "warnings": []})
        if parts[:2] == ["api", "models"] and len(parts) == 6 and parts[5] == "main":
            repo = self.fake.repos.get("/".join(parts[2:4]))
            if repo is None:
                return self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if parts[4] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._say(200, {"files": files})
            if parts[4] == "commit":
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                added = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                assert [line["key"] for line in lines] == ["header", *["file"] * len(added)]
                sha = repo.commit(added)
                url = f"{self.fake.endpoint}/{'/'.join(parts[2:4])}/commit/{sha}"
                return self._say(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})
        return self._strange()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.fake.endpoint}/{name}"}
        if asked["organization"] == "others":
            return self._say(403, {"error": "You don't have the rights to create a model under others"})
        if name in self.fake.repos:
            return self._say(409, {"error": "You already created this model repo", **url})
        self.fake.repos[name] = Repo(private=asked.get("private", asked.get("visibility") == "private"))
        self.fake.repos[name].commit({".gitattributes": b""})
        return self._say(200, {**url, "name": name})

    def _get(self) -> None:
        parts = self._parts()
        if self.fake.broken:
            return self._say(self.fake.broken, {"error": "Out of order"})
        if parts == ["api", "agent-harnesses"]:  # asked once a day by huggingface_hub
            return self._say(200, {})
        if parts[:2] == ["api", "models"] and len(parts) in (4, 6):
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) == 6 else "main"
        elif len(parts) >= 5 and parts[2] == "resolve":
            name, revision = "/".join(parts[:2]), parts[3]
        else:
            return self._strange()
        repo = self.fake.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha = repo.sha(revision)
        if sha is None:
            return self._say(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[sha]
        if parts[0] == "api":
            sizes = {path: self.fake.listed.get(path, len(content)) for path, content in files.items()}
            siblings = [{"rfilename": path, "size": size, "blobId": "0" * 40} for path, size in sizes.items()]
            return self._say(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})
        if repo.gated:
            return self._say(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        path = "/".join(parts[4:])
        if path not in files:
            return self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[path]
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return self._send(200, content, {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Content-Type": "text/plain"})

    def _parts(self) -> list[str]:
        path = urlsplit(self.path).path
        self.fake.asked.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def _strange(self) -> None:
        self.fake.unknown.append(f"{self.command} {self.path}")
        self._say(404, {"error": "this hub has no such page"})

    def _say(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
