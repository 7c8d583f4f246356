"""--push-to-hub: what is refused before the work, and the upload behind it."""

from __future__ import annotations

import re
from pathlib import Path

from moesparse.cli.console import console
from moesparse.cli.job import job
from moesparse.errors import UsageError, reason_of

__all__ = ["check_push", "pushed"]

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_push(repository: str, base_model: str = "") -> None:
    """Refuse, before any work, what cannot be pushed to; nothing where nothing is to be pushed.

    Args:
        repository: of --push-to-hub, or "".
        base_model: of --base-model, or "".

    Raises:
        UsageError: no name that a repository can have, no token to push with, or no network that may be asked.
    """
    if base_model and not _ID.fullmatch(base_model):
        raise UsageError(f"--base-model must be NAME or OWNER/NAME, got {base_model!r}")
    if not repository:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub must be NAME or OWNER/NAME, got {repository!r}: {reason_of(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"--push-to-hub must be left out where HF_HUB_OFFLINE is set, got {repository}")
    if get_token() is None:
        raise UsageError(
            f"--push-to-hub must have a token of the hub to push {repository} with, got none: set HF_TOKEN, or run "
            "`hf auth login`"
        )


def pushed(out: Path, repository: str) -> dict[str, str]:
    """Upload a result, where that is asked for.

    Returns:
        For its JSON: the address under "pushed", or nothing.

    Raises:
        CheckpointError: it could not be; says that the folder is whole.
    """
    if not repository or job.rank:
        return {}
    from moesparse.checkpoints.card import base_of_card
    from moesparse.checkpoints.hub import push_folder

    card = out / "README.md"
    if not card.is_file() or base_of_card(card.read_text(errors="replace")) is None:
        console.print(
            f"[yellow]note:[/] the card names no base model, which nothing here tells the name of: write it into "
            f"{card}, or give prune --base-model OWNER/NAME",
            highlight=False,
            soft_wrap=True,
        )
    address = push_folder(out, repository)
    console.print(f"pushed to {address}", highlight=False, soft_wrap=True)
    return {"pushed": address}
