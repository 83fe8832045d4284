"""Patches on a Hub: `huggingface_hub` itself, against a local stand-in for the Hub's HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from stagepatch.checkpoints import has_vae, load_captioner, load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.patch import Patch
from tests.tiny_pipelines import PIPELINES

COMMIT = "0" * 39 + "1"


class StandIn(BaseHTTPRequestHandler):
    """Repositories in memory: name -> file -> content. Every commit has the same id."""

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
        if found := re.fullmatch(r"/api/models/(.+?)/tree/\w+", self.path.split("?")[0]):
            files = self.server.repos.get(found[1], {})
            sizes = {name: len(content) for name, content in files.items()}
            return self.reply([{"type": "file", "path": n, "size": size, "oid": COMMIT} for n, size in sizes.items()])
        if found := re.fullmatch(r"/api/models/(.+?)(/revision/\w+)?", self.path.split("?")[0]):
            if found[1] not in self.server.repos:
                return self.missing()
            siblings = [{"rfilename": name} for name in self.server.repos[found[1]]]
            return self.reply({"id": found[1], "sha": COMMIT, "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/(.+?)/resolve/\w+/(.+)", self.path):
            content = self.server.repos.get(found[1], {}).get(found[2])
            if content is None:
                return self.missing()
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
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


def test_pushed_patch_comes_back_the_same(hub, tiny_dit, make_patch):
    patch = make_patch(tiny_dit(), preset="released")
    patch.facts = {"data": "digits", "steps": "2000"}
    url = patch.push_to_hub("somebody/patch", private=True, token="hf_none")
    assert url.startswith(hub.url + "/somebody/patch/commit/")
    assert hub.private == {"somebody/patch": True}
    assert sorted(hub.repos["somebody/patch"]) == ["README.md", "config.json", "model.safetensors"]
    loaded = Patch.from_pretrained("somebody/patch")
    assert (loaded.config, loaded.facts) == (patch.config, patch.facts)
    torch.testing.assert_close(loaded.state_dict(), patch.state_dict(), rtol=0, atol=0)


def test_saved_patch_is_pushed_under_the_directorys_name_or_another(hub, tiny_dit, make_patch, tmp_path):
    patch = make_patch(tiny_dit())
    patch.save_pretrained(tmp_path / "mine", push_to_hub=True, token="hf_none")
    patch.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="somebody/theirs", token="hf_none")
    assert sorted(hub.repos) == ["somebody/mine", "somebody/theirs"]
    assert (tmp_path / "mine" / "config.json").is_file()


def test_repository_that_is_not_there_is_named(hub):
    with pytest.raises(UserError, match=r"No patch at 'somebody/nothing': no such directory, and the Hub does not"):
        Patch.from_pretrained("somebody/nothing")


def test_model_of_the_hub_is_found_by_its_id(hub, tmp_path):
    pipe = PIPELINES["UNet2DConditionModel"].build()
    pipe.save_pretrained(tmp_path / "model")
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    hub.repos["somebody/model"] = {str(path.relative_to(tmp_path / "model")): path.read_bytes() for path in files}
    model, scheduler = load_denoiser("somebody/model")
    assert type(model) is type(pipe.unet)
    torch.testing.assert_close(model.state_dict(), pipe.unet.state_dict(), rtol=0, atol=0)
    assert type(scheduler) is type(pipe.scheduler)
    assert has_vae("somebody/model")
    assert load_captioner("somebody/model")(["a cat"])["encoder_hidden_states"].shape[0] == 1
    with pytest.raises(UserError, match=r"No model at 'somebody/none': no such directory, and the Hub does not"):
        load_denoiser("somebody/none")


def test_refused_push_is_told(hub, tiny_dit, make_patch):
    with pytest.raises(UserError, match="Cannot push to 'forbidden/patch'"):
        make_patch(tiny_dit()).push_to_hub("forbidden/patch", token="hf_none")


@pytest.mark.parametrize("source", ["nowhere", "./some/where", "a/b/c", "/tmp/nowhere"])
def test_paths_are_not_asked_of_the_hub(source):
    with pytest.raises(UserError, match=f"No patch at '{source}': no such directory"):
        Patch.from_pretrained(source)


def test_card_says_what_the_patch_is_and_how_to_load_it(model, make_patch, tmp_path):
    model.register_to_config(_name_or_path="somebody/model")
    patch = make_patch(model)
    patch.facts = {"data": "10 images", "steps": "20", "loss": "0.5"}
    patch.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["library_name"]) == ("somebody/model", "stagepatch")
    for fact in ("| data | 10 images |", "| steps | 20 |", "| loss | 0.5 |", "3: blocks.0 … blocks.2"):
        assert fact in card
    assert 'DiffusionPipeline.from_pretrained("somebody/model")' in card
    assert f"{patch.num_parameters():,}" in card
