"""`megavl push` against a server that answers as the Hub's API does."""

import base64
import hashlib
import json
import shutil
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.util import find_spec
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from megavl.main.cli import main

needs_hub = pytest.mark.skipif(find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
REPO = "someone/model"


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded; large files come by LFS, as on the Hub."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.blobs, self.files, self.commits, self.uploads = [], {}, {}, [], 0
        self.fail, self.odd = {}, {}

    def answer(self, method, path, body, token):
        for part, status in self.fail.items():
            if part in path:
                return status, {"error": "as told"}
        for part, content in self.odd.items():
            if part in path:
                return 200, content
        if token != "Bearer hf_test":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{self.url}/{REPO}", "name": REPO}
        if path == f"/api/models/{REPO}/preupload/main":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            return 200, {"files": modes}
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = [
                {
                    **wanted,
                    **(
                        {}
                        if wanted["oid"] in self.blobs
                        else {"actions": {"upload": {"href": f"{self.url}/put", "header": {}}}}
                    ),
                }
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path == "/put":
            self.blobs[hashlib.sha256(body).hexdigest()] = body
            self.uploads += 1
            return 200, {}
        if path == f"/api/models/{REPO}/commit/main":
            header, *rest = map(json.loads, body.splitlines())
            for line in rest:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del self.files[value["path"]]
                    continue
                content = base64.b64decode(value["content"]) if line["key"] == "file" else self.blobs[value["oid"]]
                self.files[value["path"]] = content
            self.commits.append(header["value"]["summary"])
            return 200, {"commitOid": "c0ffee", "commitUrl": f"{self.url}/{REPO}/commit/c0ffee", "success": True}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            return 200, {"id": REPO, "sha": "c0ffee", "siblings": []}
        if path == f"/api/models/{REPO}/tree/main":
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files]
        return 404, {"error": f"no {path}"}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # A signed address takes no token.
        token = "Bearer hf_test" if self.path == "/put" else self.headers.get("Authorization")
        status, content = self.server.answer(self.command, self.path.split("?")[0], body, token)
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def hub_server():
    server = Hub()
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """A folder with weights, as an export has them."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (path / "README.md").write_text("---\ntags: [megavl]\n---\n# Model\n![Loss](./odd[1]name.png)\n")
    (path / "odd[1]name.png").write_text("x")
    save_file({"a": torch.arange(1000.0)}, path / "model.safetensors")
    return path


@pytest.fixture
def push(hub, monkeypatch, capsys, caplog, tmp_path):
    """Runs the command against the server: code, output and errors."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    # The server speaks LFS alone.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True, raising=False)
    sessions = getattr(huggingface_hub.utils, "reset_sessions", None) or huggingface_hub.utils.close_session

    def run(*words, token="hf_test"):
        monkeypatch.setenv("HF_TOKEN", token)
        sessions()
        code = main(["push", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err + caplog.text

    yield run
    sessions()


def kept_private(request):
    """Whether a request makes a private repository; huggingface_hub 2 says it in words."""
    return request.get("private") is True or request.get("visibility") == "private"


@needs_hub
def test_every_file_arrives_and_nothing_is_sent_twice(hub, folder, push):
    (folder / "vocab.json").mkdir()
    code, out, err = push(folder, REPO, "--message", "First upload")
    assert code == 0, err
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert kept_private(hub.created[0]) and hub.created[0]["name"] == "model"
    assert hub.commits == ["First upload"] and "c0ffee" in out
    assert "4 files" in out and "README.md, config.json, model.safetensors, odd[1]name.png" in out
    assert "vocab.json: not a file, left out" in err
    assert push(folder, REPO, "--public")[0] == 0
    assert hub.uploads == 1 and not kept_private(hub.created[1])


@needs_hub
def test_only_files_of_an_export_are_sent(hub, folder, push):
    kept = ["LICENSE", "loss curve.svg", "merges.txt", "picture.png", "tokenizer.model", "tokenizer_config.json"]
    secret = [
        *(".env", ".git-credentials", ".hidden.json", ".hidden.png", "LICENSE.key", "checkpoint.pt"),
        *("client_secret.json", "id_rsa", "key.png", "model-key.safetensors", "notes.txt", "optimizer.safetensors"),
        *("private.model", "service-account-key.json", "\udcff.json"),
    ]
    for name in (*kept, *secret):
        (folder / name).write_text("x")
    (folder / "logs").mkdir()
    with (folder / "README.md").open("a") as card:
        card.write('![](loss%20curve.svg) <img src="picture.png"> [](client_secret.json) ![](.hidden.png) key.png\n')
    code, _, err = push(folder, REPO)
    assert code == 0, err
    assert sorted(hub.files) == sorted([*kept, "README.md", "config.json", "model.safetensors", "odd[1]name.png"])
    assert all(name in err for name in (*secret[:-1], "logs"))


@needs_hub
def test_weights_of_an_earlier_push_are_deleted(hub, folder, push):
    assert push(folder, REPO)[0] == 0
    others = ["nested/model.safetensors", "notes.txt", ".gitattributes", "adapter_model.safetensors", "vae.safetensors"]
    others += ["adapter_model.safetensors.index.json", "model-extra.safetensors"]
    hub.files |= dict.fromkeys(others, b"")
    weights = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": weights.name}}))
    code, out, err = push(folder, REPO)
    assert code == 0, err
    assert "model.safetensors" not in hub.files and "deleted there, as this model does not have them: model.s" in out
    assert {weights.name, *others} < hub.files.keys()
    assert len(hub.commits) == 2
    # And back again.
    weights.rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert push(folder, REPO)[0] == 0
    assert weights.name not in hub.files and "model.safetensors.index.json" not in hub.files


@needs_hub
@pytest.mark.parametrize(
    ("fail", "token", "code", "expected"),
    [
        ({}, "hf_other", 2, "may write there"),
        ({"/api/": 403}, "hf_test", 2, "the Hub refused it"),
        ({"/commit/main": 412}, "hf_test", 2, "the Hub refused it"),
        ({"/preupload/": 501}, "hf_test", 7, "repeat the command to go on"),
        ({"/put": 400}, "hf_test", 7, "repeat the command to go on"),
        ({"/validate-yaml": 400}, "hf_test", 2, "README.md"),
        ({"/repos/create": 302}, "hf_test", 7, "not understood"),
        ({}, "", 2, "no token; run `hf auth login`"),
        ({}, "hf_te\u2019st", 2, "U+2019"),
        ({}, "hf_te st", 2, "U+0020"),
    ],
)
def test_what_the_hub_refuses(fail, token, code, expected, hub, folder, push):
    hub.fail = fail
    found, _, err = push(folder, REPO, token=token)
    assert found == code and expected in err and "Traceback" not in err, err


@needs_hub
@pytest.mark.parametrize(
    ("part", "content"),
    [
        ("/repos/create", ["x"]),
        ("/repos/create", {}),
        ("/tree/", {"error": "login"}),
        ("/preupload/", {"files": []}),
        ("/preupload/", "login"),
        ("/commit/", {"commitOid": None}),
    ],
)
def test_odd_answers_are_one_error(part, content, hub, folder, push):
    hub.odd = {part: content}
    code, _, err = push(folder, REPO)
    assert code == 7 and f"not understood (huggingface_hub {version('huggingface_hub')}, " in err, err
    assert "Traceback" not in err


@needs_hub
@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError])
def test_own_bugs_are_not_odd_answers(error, hub, folder, push, monkeypatch):
    def broken(*_):
        raise error("ours")

    monkeypatch.setattr("megavl.main.push._stale", broken)
    with pytest.raises(error, match="ours"):
        push(folder, REPO)


@needs_hub
def test_names_and_cards_that_cannot_be_sent(hub, folder, push):
    card = folder / "README.md"
    card.write_text("![](a%0Ab.png)\n")
    odd = folder / "a\nb.png"
    odd.write_text("x")
    code, _, err = push(folder, REPO)
    assert code == 2 and "rename it" in err, err
    odd.unlink()
    for words in (["--revision", "\udcff"], ["--message", "\udcff"]):
        code, _, err = push(folder, REPO, *words)
        assert code == 2 and words[0] in err, err
    card.write_bytes(b"\xff\xfe---\n")
    code, _, err = push(folder, REPO)
    assert code == 2 and "README.md: no text in UTF-8" in err, err
    assert not hub.created


@needs_hub
def test_no_hub_at_all(hub, folder, push):
    hub.server_close()
    code, _, err = push(folder, REPO)
    assert code == 7 and "Traceback" not in err


@needs_hub
def test_folders_and_names_that_are_refused(folder, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    linked = shutil.copytree(folder, tmp_path / "linked")
    (linked / "tokenizer.json").symlink_to(secret)
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, pickled / "pytorch_model.bin")
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    (renamed / "model.safetensors").rename(renamed / "a.safetensors")
    (renamed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    truncated = shutil.copytree(folder, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    for words, code, expected in (
        ([folder, "model"], 2, "give OWNER/NAME"),
        ([folder, "a/b/c"], 2, "give OWNER/NAME"),
        ([folder, "some one/model"], 2, "REPO"),
        ([tmp_path / "missing", REPO], 4, "no folder with a config.json"),
        ([truncated, REPO], 4, "model.safetensors"),
        ([linked, REPO], 2, "a link"),
        ([pickled, REPO], 2, "only weights in safetensors"),
        ([renamed, REPO], 2, "a.safetensors: only weights in safetensors"),
    ):
        assert main(["push", *map(str, words)]) == code, words
        assert expected in capsys.readouterr().err


def test_help_says_which_files_are_replaced(capsys):
    with pytest.raises(SystemExit):
        main(["push", "--help"])
    assert "model.safetensors, its shards and its index there are replaced" in " ".join(capsys.readouterr().out.split())
