"""`moesparse serve MODEL`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import typer

from moesparse.cli.console import console
from moesparse.cli.options import model_source
from moesparse.errors import MoESparseError, UsageError


def serve(context: typer.Context) -> None:
    """Serve a model, packed or dense, by transformers' OpenAI-compatible server.

    `moesparse serve --help` lists the options, which are those of `transformers serve`.
    """
    # a parser of its own: what transformers offers is known only once it is imported
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    from moesparse.packed.server import serve_signature

    app.command()(serve_signature(_serve))
    app(context.args, prog_name="moesparse serve")


def _serve(model: str, chat_template: str | None, host: str, port: int, **options: Any) -> None:
    """Serve a model, packed or dense, by transformers' OpenAI-compatible server.

    Clients name the model as it is named here. It answers /v1/chat/completions, /v1/completions, /v1/models and
    /health until Ctrl-C. It asks nobody for a key: keep it on this machine, or behind something that does.

    Examples:

      moesparse serve out/olmoe-2to4 --port 8000

      moesparse serve demo --chat-template plain --dtype float32

      moesparse serve out/olmoe-2to4 --continuous-batching
    """
    from transformers.utils import is_accelerate_available
    from transformers.utils.import_utils import is_serve_available

    from moesparse.checkpoints.hub import local_folder
    from moesparse.checkpoints.pretrained import check_model_folder
    from moesparse.checkpoints.tokenizer import load_tokenizer
    from moesparse.packed import server as serving

    if not (is_serve_available() and is_accelerate_available()):
        raise MoESparseError(
            "moesparse serve needs fastapi, uvicorn, openai and accelerate; pip install 'moesparse[serve]'"
        )
    source = model_source(model)
    if Path(source).is_file():
        raise UsageError(f"MODEL must be a folder or a hub id, got the file {model}")
    if Path(source).is_dir() and "@" in source:
        # transformers' server would read what follows as a revision
        raise UsageError(f"MODEL must be a folder whose path has no '@', got {source}")
    folder = local_folder(source)
    check_model_folder(folder)
    load_tokenizer(folder)
    template = serving.chat_template(chat_template)
    listener = serving.bind(host, port)
    server = serving.Server(model, source, listener, template, host=host, port=port, **options)
    address, bound = listener.getsockname()[:2]
    where = f"[{address}]" if ":" in address else address
    console.print(f"serving {model} at http://{where}:{bound}/v1 until Ctrl-C", highlight=False, soft_wrap=True)
    if not server.has_chat_template:
        console.print(
            "this model has no chat template: chat requests are refused; --chat-template gives it one", soft_wrap=True
        )
    server.run()
    console.print("the server has ended")
    if threading.active_count() > 1:
        # a generation under way cannot be stopped, and the interpreter would wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
