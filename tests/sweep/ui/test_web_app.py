"""Only the holder of the address is answered, and nothing of a sweep is ever markup or script."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
from starlette.testclient import TestClient

from sweep.ui import page_commands
from sweep.ui.gate import METHODS, new_token
from sweep.ui.live_sweep import LiveSweep
from sweep.ui.web_app import STATIC, make_app, static_files
from tests.support.swept import TAG, swept

TOKEN = new_token()
ORIGIN = {"Origin": "http://127.0.0.1:5000"}
API = f"/{TOKEN}/api/sweeps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("sweep"))


def client_of(folder, control=None) -> TestClient:
    return TestClient(make_app([LiveSweep(folder)], TOKEN, control), base_url="http://127.0.0.1:5000")


@pytest.fixture
def client(folder) -> TestClient:
    return client_of(folder)


MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc"
FIGURE = "/api/sweeps/0/figure?title=Slices"
PATHS = ("/", "/static/page.js", "/static/plotly.min.js", "/api/sweeps", "/api/sweeps/0/changes", FIGURE)


@pytest.mark.parametrize("path", PATHS)
def test_each_path_is_answered_with_the_token_alone(client, path):
    answer = client.get(f"/{TOKEN}{path}")
    assert answer.status_code == 200 and len(answer.content) > 100
    for wrong in ("", f"/{TOKEN[:-1]}", f"/{TOKEN}x", f"/{new_token()}", "/é", f"/x/{TOKEN}"):
        assert client.get(f"{wrong}{path}").status_code == 403
        assert TOKEN not in client.get(f"{wrong}{path}").text


def test_an_address_without_its_last_slash_leads_to_the_page(client):
    answer = client.get(f"/{TOKEN}", follow_redirects=False)
    assert answer.status_code == 308 and answer.headers["Location"] == f"/{TOKEN}/"
    assert client.get(f"/{TOKEN}").content == client.get(f"/{TOKEN}/").content


@pytest.mark.parametrize("host", ["evil.example", "evil.example:5000", "127.0.0.1.evil.example", "", "[", "0.0.0.0:5000"])
def test_a_request_to_another_name_is_refused(client, host):
    assert client.get(API, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:5000", "localhost:8000", "[::1]:5000", "127.0.0.1"])
def test_this_machine_is_known_by_its_names_on_any_port_that_ssh_forwards(client, host):
    assert client.get(API, headers={"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"}, {"Origin": "https://127.0.0.1:5000"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    ],
)  # fmt: skip
def test_a_request_of_another_site_is_refused(client, headers):
    assert client.get(API, headers=headers).status_code == 403
    assert client.get(API, headers={**ORIGIN, "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}).status_code == 200


def test_other_methods_are_refused_and_a_command_must_say_where_it_comes_from(folder):
    client = client_of(folder, lambda words: 0)
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert method not in METHODS and client.request(method, API, headers=ORIGIN).status_code == 403
    path, body = f"{API}/0/command", {"line": "status"}
    assert client.post(path, json=body).status_code == 403
    assert client.post(path, json=body, headers=ORIGIN).status_code == 200
    text = {**ORIGIN, "Content-Type": "text/plain"}  # what a form of another site can send
    assert client.post(path, content='{"line": "status"}', headers=text).status_code == 415


def test_every_answer_forbids_foreign_scripts_frames_caches_and_referrers(client):
    for path in (*(f"/{TOKEN}{each}" for each in PATHS), "/", f"/{TOKEN}/none"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "frame-ancestors 'none'" in policy
        assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store" and "set-cookie" not in headers
        assert not [name for name in headers if name.startswith("access-control-")]


def test_the_page_has_no_script_in_its_text_and_no_way_to_read_text_as_markup():
    page = (STATIC / "page.html").read_text()
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""] and not re.search(r"\son\w+=", page)
    for name, file in static_files().items():
        if name.endswith(".js") and file.is_file():
            code = file.read_text()
            assert not re.search(MARKUP, code), name
            assert "http:" not in code and "https:" not in code, name


def test_what_looks_like_a_tag_travels_as_json_only(client, folder):
    answer = client.get(f"{API}/0/changes")
    assert answer.headers["content-type"] == "application/json"
    trials = answer.json()["trials"]
    assert TAG in {trial["params"].get("lora.target_modules") for trial in trials}
    assert any(trial["error"] == f"no {TAG}" for trial in trials)


def test_what_is_not_there_is_404(client):
    for path in ("/api/sweeps/1/changes", "/api/sweeps/0/figure?title=x", "/static/..%2f__main__.py", "/static/web_app.py", "/x"):
        assert client.get(f"/{TOKEN}{path}").status_code == 404


def test_without_control_no_command_is_taken(client):
    assert client.get(API).json()["takes_commands"] is False
    assert client.post(f"{API}/0/command", json={"line": "stop 3"}, headers=ORIGIN).status_code == 501


def test_a_command_line_goes_to_control_with_the_folder_and_its_answer_comes_back(folder):
    taken = []

    def control(words):
        taken.append(words)
        print(f"told {words[-1]}")
        return 0 if words[1] == "stop" else 2

    client = client_of(folder, control)
    assert client.get(API).json()["takes_commands"] is True

    def send(line):
        return client.post(f"{API}/0/command", json={"line": line}, headers=ORIGIN)

    assert send("stop 3").json() == {"is_done": True, "text": "told 3"}
    refused = send("clone 3 'data.train=my data'")
    assert (refused.status_code, refused.json()["is_done"]) == (409, False)
    assert taken == [[str(folder.path), "stop", "3"], [str(folder.path), "clone", "3", "data.train=my data"]]
    for line in ("", "rm -rf /", "stop '3", "x" * 2000, "--help"):
        assert send(line).json()["text"].startswith("error: ") and len(taken) == 2
    for body in ({}, {"line": 3}, [], "stop", {"line": "stop " + "3" * 20_000}):
        assert client.post(f"{API}/0/command", json=body, headers=ORIGIN).status_code == 400


def test_control_is_found_where_this_version_has_it(monkeypatch):
    monkeypatch.setattr(page_commands, "CONTROL", "sweep.no_such_command")
    assert page_commands.find_control() is None
    module = ModuleType("made_control")
    module.main = len
    module.__spec__ = page_commands.find_spec("json")
    monkeypatch.setitem(sys.modules, "made_control", module)
    monkeypatch.setattr(page_commands, "CONTROL", "made_control")
    assert page_commands.find_control()(["sweeps/x", "stop", "3"]) == 3
