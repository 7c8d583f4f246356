"""`moesparse serve MODEL`."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesparse.cli.console import console, quiet_libraries
from moesparse.cli.options import Model, model_source, resolve_device
from moesparse.errors import MoESparseError, UsageError

if TYPE_CHECKING:
    import socket

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Name or address to listen at; 0.0.0.0 is every one.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="Refuse clients that do not send this key.", envvar="MOESPARSE_API_KEY", show_envvar=True),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="For chat: a file with a Jinja template, or 'plain': the messages' texts as they are."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Texts that are continued together at most; others wait for their turn.", min=1)
    ] = 32,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its answer together; the model's own if left out.", min=2)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the folder's own), float32, bfloat16, float16.")
    ] = "auto",
    log_level: Annotated[
        str, typer.Option(help="critical, error, warning, info (a line a request) or debug.")
    ] = "info",
) -> None:
    """Serve a model, packed or dense, to clients of OpenAI's API.

    Clients name the model as it is named here. It answers /v1/chat/completions, /v1/completions, /v1/models and
    /health until Ctrl-C, all clients together. Without --api-key it asks nobody for a key: keep it on this machine, or
    behind something that does.

    Examples:

      moesparse serve out/olmoe-2to4 --port 8000

      moesparse serve demo --chat-template plain --dtype float32

      moesparse serve out/olmoe-2to4 --host 0.0.0.0 --api-key KEY --max-batch 8
    """
    for option, value, known in (("--dtype", dtype, DTYPES), ("--log-level", log_level, LOG_LEVELS)):
        if value not in known:
            raise UsageError(f"{option} must be one of {', '.join(known)}, got {value!r}")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise UsageError("--api-key must be printable ASCII and not empty, got what is not")
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise MoESparseError(f"moesparse serve needs {' and '.join(missing)}; pip install 'moesparse[serve]'")
    from moesparse.serving import server as serving

    template = serving.chat_template(chat_template)
    target = resolve_device(device)
    with quiet_libraries():
        folder, tokenizer = _opened(model)
        listener = serving.bind(host, port)
        network = _loaded(folder, dtype, target)
        server = serving.Server(
            model,
            network,
            tokenizer,
            listener,
            rows=max_batch,
            chat_template=template,
            max_context=max_context,
            api_key=api_key,
            log_level=log_level,
        )
    _say(model, listener, server, asked=max_batch, key=api_key is not None)
    done = server.run()
    console.print("the server has ended")
    if not done:
        # a pass under way cannot be stopped, and the interpreter would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _opened(model: str) -> tuple[Path, Any]:
    """The folder of MODEL, looked at, and its tokenizer."""
    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.pretrained import check_model_folder
    from moesparse.models.tokenizer import load_tokenizer

    source = model_source(model)
    if Path(source).is_file():
        raise UsageError(f"MODEL must be a folder or a hub id, got the file {model}")
    folder = local_folder(source)
    check_model_folder(folder)
    return folder, load_tokenizer(folder)


def _loaded(folder: Path, dtype: str, device: Any) -> Any:
    """The model on the device, or on a GPU where there is one."""
    import torch

    from moesparse.checkpoints.pretrained import load_model

    network = load_model(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if device is None and torch.cuda.is_available():
        device = torch.device("cuda")
    return network if device is None else network.to(device)


def _say(model: str, listener: socket.socket, server: Any, *, asked: int, key: bool) -> None:
    """Where it is, and a command to try it."""
    address, bound = listener.getsockname()[:2]
    url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"
    plain: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
    console.print(f"serving {model} at {url}/v1 until Ctrl-C", **plain)
    if server.rows < asked:
        console.print("this model's cache cannot be shared: requests are answered one after the other", **plain)
    if not server.has_chat_template:
        console.print(
            "this model has no chat template: chat requests are refused; --chat-template gives it one", **plain
        )
    body = json.dumps({"model": model, "prompt": "It is a truth", "max_tokens": 32}).replace("'", "'\\''")
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    console.print(f"try: curl {url}/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'", **plain)
