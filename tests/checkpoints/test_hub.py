"""What is downloaded of a hub id: all that a result takes over, the weights that are read, and no others."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest

import moesparse
from moesparse.checkpoints.hub import local_folder
from moesparse.errors import CheckpointError
from moesparse.testing import tiny_model

COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that a server on this machine offers as someone/small-moe, as the hub does; and what was asked for."""
    folder, asked = tmp_path / "hub", list[str]()
    folder.mkdir()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
            start = f"/someone/small-moe/resolve/{COMMIT}/"
            if self.path.startswith("/api/models/someone/small-moe/revision/"):
                siblings = [{"rfilename": name} for name in files]
                data = json.dumps({"id": "someone/small-moe", "sha": COMMIT, "siblings": siblings}).encode()
                self.reply(200, data, body, {"Content-Type": "application/json"})
            elif self.path.startswith(f"/api/models/someone/small-moe/tree/{COMMIT}"):
                sizes = {name: (folder / name).stat().st_size for name in files}
                tree = [{"type": "file", "oid": "0", "size": size, "path": name} for name, size in sizes.items()]
                self.reply(200, json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
            elif self.path.startswith(start) and self.path.removeprefix(start) in files:
                name = self.path.removeprefix(start)
                asked.append(name)
                data = (folder / name).read_bytes()
                held = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                self.reply(200, data, body, held)
            else:
                self.reply(404, b"", body, {"X-Error-Code": "RepoNotFound"})

        def reply(self, code, data, body, headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder, asked
    server.shutdown()
    thread.join()


def files_of(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_code_and_subfolders_come_with_the_weights_and_other_formats_do_not(shard, hub, tmp_path):
    folder, asked = hub
    tiny_model("mixtral").save_pretrained(folder, max_shard_size=shard)
    beside = {
        "modeling_mine.py": "raise SystemExit('nobody runs this')",
        "configuration_mine.py": "raise SystemExit('nobody runs this')",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "figures/loss.svg": "<svg/>",
        "LICENSE": "mine",
        ".gitattributes": "*.safetensors lfs",
        "merges.txt": "",
        "tokenizer.model": "a",
    }
    weights = {"pytorch_model.bin", "model-q4.gguf", "original/consolidated.00.pth", "onnx/model.onnx_data"}
    weights |= {"consolidated.safetensors", "original/model.safetensors"}
    for name, text in {**beside, **dict.fromkeys(weights, "weights")}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    found = local_folder("someone/small-moe")
    assert files_of(found) == files_of(folder) - weights == set(asked)
    assert not weights & set(asked)
    # a result takes all of it over
    recipe = moesparse.Recipe(saliency="magnitude", update="none")
    report = moesparse.prune_checkpoint(found, tmp_path / "out", None, recipe)
    # what was not downloaded is named as what lies beside the weights of a local folder is
    assert set(report.surplus["formats"]) == weights
    assert "original/consolidated.00.pth" in (tmp_path / "out" / "moesparse_report.json").read_text()
    for name, text in beside.items():
        assert (tmp_path / "out" / name).read_text() == text


def test_an_id_that_the_hub_does_not_know_is_one_sentence(hub):
    with pytest.raises(CheckpointError, match=r"MODEL must be a local folder or a hub id .*, got 'someone/else': "):
        local_folder("someone/else")
