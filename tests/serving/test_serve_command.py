"""`moesparse serve`: what it refuses before a model is loaded, and its help."""

import socket
import sys

import pytest

from moesparse.cli import main

pytest.importorskip("starlette")


def in_process(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moesparse", "serve", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return stop.value.code, " ".join(out.split()), " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["EMPTY"], 1, "MODEL must be a folder with a config.json"),
        ([__file__], 2, "MODEL must be a folder or a hub id, got the file"),
        (["demo", "--port", "99999"], 2, "--port must be between 0 and 65535, got 99999"),
        (["demo", "--host", "nowhere.invalid"], 2, "--host must be a name or address of this machine"),
        (["demo", "--chat-template", "nofile"], 2, "--chat-template must be 'plain' or a file"),
        (["demo", "--dtype", "float33"], 2, "--dtype must be one of auto, float32, bfloat16, float16, got 'float33'"),
        (["demo", "--log-level", "loud"], 2, "--log-level must be one of critical, error, warning, info, debug, got"),
        (["demo", "--api-key", ""], 2, "--api-key must be printable ASCII and not empty"),
        (["demo", "--api-key", "schlüssel"], 2, "--api-key must be printable ASCII and not empty"),
        (["demo", "--device", "abacus"], 2, "--device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["demo", "--max-batch", "0"], 2, "Invalid value for '--max-batch'"),
        (
            ["demo", "--max-context", "257", "--port", "0"],
            2,
            "--max-context must be at most the model's own context of 256",
        ),
        (["demo", "--frobnicate"], 2, "No such option: --frobnicate"),
        ([], 2, "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, capsys):
    found, _, err = in_process(monkeypatch, capsys, *(tmp_path if word == "EMPTY" else word for word in arguments))
    assert found == code, err
    assert message in err
    assert "Traceback" not in err


def test_a_port_in_use_is_named_before_the_model_is_loaded(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, err = in_process(monkeypatch, capsys, "demo", "--port", port)
    assert code == 1
    assert f"--port must be one that can be bound, got {port} on localhost: Address already in use" in err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    # the module: moesparse.cli.serve is the command
    monkeypatch.setattr(sys.modules["moesparse.cli.serve"], "find_spec", lambda name: None)
    code, _, err = in_process(monkeypatch, capsys, "demo")
    assert code == 1
    assert "moesparse serve needs starlette and uvicorn; pip install 'moesparse[serve]'" in err


def test_help_lists_the_options(monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "--help")
    assert code == 0
    for option in ("--host", "--port", "--api-key", "--chat-template", "--max-batch", "--max-context", "--dtype"):
        assert option in out
