"""A local stand-in for the Hub's HTTP, for `huggingface_hub` itself to talk to."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

COMMIT = "0" * 39 + "1"
TAGGED = "0" * 39 + "2"  # the commit of the tag v1


class StandIn(BaseHTTPRequestHandler):
    """Repositories in memory: name, or name@v1 -> file -> content. Every commit of a branch has the same id."""

    def log_message(self, *args):
        pass

    def reply(self, value, status=200, headers=None):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def missing(self):
        self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def files(self, name, revision):
        """Those of a repository at a revision, and its commit; None where there is no such."""
        if revision in ("v1", TAGGED):
            return self.server.repos.get(f"{name}@v1"), TAGGED
        return self.server.repos.get(name) if revision in ("main", COMMIT) else None, COMMIT

    def do_POST(self):
        repos, body = self.server.repos, self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization") or "somebody", asked["name"]) if part)
            if name.startswith("forbidden/"):
                return self.reply({"error": "You don't have the rights"}, 403)
            repos.setdefault(name, {})
            self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return self.reply({"url": f"{self.server.url}/{name}", "name": name})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.reply({"files": files})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    repos[found[1]][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.reply({"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        return self.missing()

    def do_GET(self):
        path = self.path.split("?")[0]
        if re.fullmatch(r"/api/models/(.+?)/tree/(\w+)/(.+)", path):  # files of folders are listed with the root
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if found := re.fullmatch(r"/api/models/(.+?)/tree/(\w+)", path):
            files, _ = self.files(found[1], found[2])
            sizes = {name: len(content) for name, content in (files or {}).items()}
            return self.reply([{"type": "file", "path": n, "size": size, "oid": COMMIT} for n, size in sizes.items()])
        if found := re.fullmatch(r"/api/models/(.+?)(?:/revision/([\w.-]+))?", path):
            files, commit = self.files(found[1], found[2] or "main")
            if files is None:
                return self.missing()
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": found[1], "sha": commit, "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/(.+?)/resolve/(\w+)/(.+)", self.path):
            files, commit = self.files(found[1], found[2])
            content = (files or {}).get(found[3])
            if files is not None and content is None:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
                return self.reply({"error": "Entry not found"}, 404, headers)
            if content is None:
                return self.missing()
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        return self.missing()

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.repos, server.private = {}, {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {"ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "hub-cache")}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "hf_api", "file_download"):
        for name, value in values.items():
            monkeypatch.setattr(f"huggingface_hub.{module}.{name}", value, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
    yield server
    server.shutdown()
    server.server_close()
