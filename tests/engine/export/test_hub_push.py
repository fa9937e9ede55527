"""A push makes a private repository with the adapter's files alone, and none of them names this machine."""

from __future__ import annotations

import base64
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from engine.export.__main__ import main
from engine.model.device import one_thread
from tests.support.export_models import save_adapter, save_model

TOKEN = "hf_for_tests"
FILES = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json",
]  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    """Answer as the hub does, as far as a push asks. `repos`: name -> private; `files`: what a commit brought."""

    repos: dict[str, bool]
    files: dict[str, bytes]

    def do_GET(self):
        repo = self.path.removeprefix("/api/models/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/whoami-v2":
            self._answer(200, {"name": "me"})
        elif repo in self.repos:
            self._answer(200, {"id": repo, "private": self.repos[repo], "siblings": []})
        else:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            self.repos[name] = asked.get("visibility") == "private" or asked.get("private") is True
            self._answer(200, {"url": f"{self.server.address}/{name}", "id": name})
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self._answer(200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(200, {"commitUrl": f"{self.server.address}/me/x/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _answer(self, code, content, headers=()):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Return a hub of this test, whose token this user has."""
    handler = type("TestHub", (Hub,), {"repos": {}, "files": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("secret-place") / "llama")


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """Return an adapter that names its base by its place on this machine, as PEFT writes it."""
    with one_thread():
        save_adapter(tmp_path / "given", base)
    (tmp_path / "given" / "README.md").unlink(missing_ok=True)
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "given" / file.name)
    shutil.copy(base / "chat_template.jinja", tmp_path / "given")
    return tmp_path / "given"


def pushed(adapter, *options):
    return main([str(adapter), "--to", "hub", "--no-losses", "--repo", *options])


def test_a_push_is_private_and_brings_the_adapters_files_alone(hub, base, adapter, capsys):
    data, loop = {"train": str(base / "private.jsonl")}, {"max_tokens": 8, "num_reports": 1}
    config = {"model": {"path": str(base)}, "data": data, "train": loop}
    (adapter / "train_config.json").write_text(json.dumps(config))
    assert pushed(adapter, "me/support", "--base-model", "org/llama") == 0
    assert hub.repos == {"me/support": True} and sorted(hub.files) == FILES
    assert "me/support" in capsys.readouterr().out
    for name, content in hub.files.items():
        for secret in (str(base), str(adapter), "secret-place", TOKEN, str(Path.cwd())):
            assert secret.encode() not in content, (name, secret)
    values = json.loads(hub.files["adapter_config.json"])
    assert values["base_model_name_or_path"] == "org/llama" and values["r"] == 4
    card = hub.files["README.md"].decode()
    assert 'base_model: "org/llama"' in card and "private.jsonl" in card and "library_name: peft" in card
    assert pushed(adapter, "me/support", "--base-model", "org/llama") == 0  # again, into the same private repository
    assert hub.repos == {"me/support": True}


def test_a_public_repository_is_made_only_when_asked(hub, adapter, capsys):
    named = ("--base-model", "org/llama")
    assert pushed(adapter, "me/open", "--public", *named) == 0
    assert hub.repos == {"me/open": False} and sorted(hub.files) == FILES
    hub.files.clear()
    assert pushed(adapter, "me/open", *named) == 2 and "is public" in capsys.readouterr().err and not hub.files


@pytest.mark.parametrize(
    ("repo", "spoil", "said"),
    [
        ("support", "", "must be organisation/name"),
        ("me/../x", "", "must be organisation/name"),
        ("me/support", "no token", "hf auth login"),
        ("me/support", "bad token", "refused by the hub"),
        ("me/support", "offline", "HF_HUB_OFFLINE"),
        ("me/support", "no adapter", "adapter_config.json is not in it"),
        ("me/support", "foreign", "is no part of an adapter"),
        ("me/support", "link", "is a link"),
        ("me/support", "local base", "--base-model"),
        ("me/support", "bad base", "--base-model"),
        ("me/support", "tokenizer", "is a place on this machine"),
    ],
)
def test_what_should_not_be_pushed_is_one_line_and_sends_nothing(repo, spoil, said, hub, adapter, base, monkeypatch, capsys):
    named = () if spoil == "local base" else ("--base-model", "org/a b" if spoil == "bad base" else "org/llama")
    if spoil in ("no token", "bad token"):
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None if spoil == "no token" else "hf_other")
    if spoil == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if spoil == "no adapter":
        (adapter / "adapter_config.json").unlink()
    if spoil == "foreign":
        (adapter / "notes.txt").write_text("for me alone")
    if spoil == "link":
        (adapter / "vocab.json").symlink_to(base / "config.json")
    if spoil == "tokenizer":
        values = json.loads((adapter / "tokenizer_config.json").read_text()) | {"name_or_path": str(base)}
        (adapter / "tokenizer_config.json").write_text(json.dumps(values))
    assert pushed(adapter, repo, *named) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and said in error and "hf_" not in error, error
    assert not hub.repos and not hub.files


def test_options_of_a_push_do_not_mix_with_those_of_a_folder(adapter, tmp_path, capsys):
    hub = ["--to", "hub"]
    for options in (hub, [*hub, "--repo", "me/x", "--out", str(tmp_path / "o")], ["--out", "o", "--public"], []):
        with pytest.raises(SystemExit, match="2"):
            main([str(adapter), *options])
    assert "--out" in capsys.readouterr().err
