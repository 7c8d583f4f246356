"""`--push-to-hub`: huggingface_hub's own client against a small hub on this machine, and the card that goes with it."""

import base64
import hashlib
import importlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants
from processes import Started, moesparse_command
from small_text import WORDS, make_tokenizer

from moesparse.checkpoints.card import base_of_card
from moesparse.checkpoints.hub import hub_id
from moesparse.cli.push import check_push
from moesparse.errors import UsageError
from moesparse.testing import tiny_model

COMMIT = "0" * 40
WANDA = ("--saliency", "wanda", "--update", "none")


class Hub(ThreadingHTTPServer):
    """What the client asks of a hub to make a repository and to commit a folder to it.

    Attributes:
        files: path -> bytes that were committed.
        made: what the repository was asked to be.
        refuses: answer every request to make one with 403.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.made, self.refuses, self.parts = {}, None, False, {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer({"error": "Repository not found"}, 404)

    def do_PUT(self):
        self.server.parts[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        assert self.headers["Authorization"] == "Bearer hf_test"
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            found = {"url": f"{hub.address}/owner/{hub.made['name']}"}
            self.answer({"error": "not yours"}, 403) if hub.refuses else self.answer(found)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            actions = {each["oid"]: {"upload": {"href": f"{hub.address}/lfs/{each['oid']}"}} for each in asked}
            self.answer({"transfer": "basic", "objects": [{**each, "actions": actions[each["oid"]]} for each in asked]})
        else:
            assert path.endswith("/owner/name/commit/main"), path
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    data = hub.parts[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"]
                    hub.files[value["path"]] = data
            self.answer({"commitUrl": f"{hub.address}/owner/name/commit/{COMMIT}", "commitOid": COMMIT})


@pytest.fixture
def hub():
    with Hub() as found:
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as the hub's client leaves it when it has downloaded it."""
    folder = tmp_path_factory.mktemp("home") / "hub" / "models--owner--dense" / "snapshots" / COMMIT
    tiny_model("qwen3_moe", vocab_size=320).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS) * 200)
    return ("--calibration", file, "--samples", "8", "--length", "32")


def with_this_hub(arguments):
    """A command in which huggingface_hub reads its variables anew: the server of the processes has imported it."""
    importlib.reload(constants)
    moesparse_command(arguments)


def run(hub, home, *arguments):
    asks = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    asks |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "COLUMNS": "200"}
    started = Started(with_this_hub, [*map(str, arguments)], environment=asks)
    started.communicate()
    return started


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_is_pushed_with_a_card_that_names_its_base(hub, source, text, tmp_path):
    out = tmp_path / "out"
    words = ("prune", source, out, *WANDA, *text, "--push-to-hub", "owner/name")
    done = run(hub, tmp_path / "home", *words, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{hub.address}/owner/name"
    assert (hub.made["name"], hub.made["organization"], hub.made["visibility"]) == ("name", "owner", "private")
    assert hub.files == files_of(out)
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == ("owner/dense", "transformers")
    assert "# owner/dense, experts pruned to 2:4" in card.text
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card.text, re.MULTILINE))
    assert len(rows) == 7 and "None" not in rows.values()
    assert (rows["pattern"], rows["mask rule"], rows["calibration tokens"]) == ("2:4", "wanda", "256")
    assert "Of the experts, 2 of every 4 weights stay (2:4), chosen by wanda" in card.text
    # what is finished is pushed again by the same command
    hub.files.clear()
    again = run(hub, tmp_path / "home", *words, "--resume")
    assert again.returncode == 0 and "already finished" in again.stderr
    assert hub.files == files_of(out)

    packed = run(hub, tmp_path / "home", "pack", out, tmp_path / "packed", "--push-to-hub", "owner/name")
    assert packed.returncode == 0, packed.stderr
    assert "names no base model" not in packed.stderr
    assert hub.files.items() >= files_of(tmp_path / "packed").items()
    assert ModelCard(hub.files["README.md"].decode()).data.base_model == "owner/dense"


def test_what_the_hub_refuses_is_whole_all_the_same(hub, source, text, tmp_path):
    hub.refuses, out = True, tmp_path / "out"
    done = run(hub, tmp_path / "home", "prune", source, out, *WANDA, *text, "--push-to-hub", "owner/name")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert f"{out} is whole and was not pushed to owner/name: " in said and f"`hf upload owner/name {out}`" in said
    assert (out / "config.json").exists()


@pytest.mark.parametrize(
    ("repository", "environment", "message"),
    [
        ("a/b/c", {"HF_TOKEN": "hf_test"}, r"^--push-to-hub must be NAME or OWNER/NAME, got 'a/b/c'"),
        ("a/b", {}, r"^--push-to-hub must have a token of the hub to push a/b with, got none: set HF_TOKEN"),
        ("a/b", {"HF_TOKEN": "hf_test", "offline": "1"}, "must be left out where HF_HUB_OFFLINE is set, got a/b"),
    ],
    ids=["name", "token", "offline"],
)
def test_what_cannot_be_pushed_to_is_refused_before_the_work(repository, environment, message, monkeypatch, tmp_path):
    environment = dict(environment)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", bool(environment.pop("offline", "")))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_push(repository)
    with pytest.raises(UsageError, match="--base-model must be NAME or OWNER/NAME, got 'a b'"):
        check_push("", "a b")


def test_the_name_of_a_base_is_one_of_the_hub_or_none(source, tmp_path):
    assert hub_id("owner/name-1.5") == "owner/name-1.5"
    assert hub_id("demo") is None and hub_id("/no/such/folder") is None
    assert hub_id(source) == "owner/dense"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, tags in ((ours, "[moesparse, mixture-of-experts]"), (theirs, "[other]")):
        folder.mkdir()
        (folder / "README.md").write_text(f"---\ntags: {tags}\nbase_model: owner/dense\n---\n# x\n")
    assert (hub_id(ours), hub_id(theirs), hub_id(tmp_path)) == ("owner/dense", None, None)
    assert base_of_card("# no head\nbase_model: owner/dense\n") is None
