"""Publishing a merged model on the Hugging Face hub: checked before the work, sent after it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from raymerge.errors import RunError, UserError, one_line
from raymerge.files.urls import redact
from raymerge.runs.public_copy import public_copy

_NAME = re.compile(r"[A-Za-z0-9][\w-]*/(?=.{1,96}$)\w(?:[\w.-]*\w)?", re.ASCII)
_LOGIN = "set HF_TOKEN to a token that may write, or run `hf auth login`"


def require_target(repository: str) -> None:
    """Raise :class:`UserError` unless this name is one, and the token at hand may write there."""
    where = f"--push-to-hub {repository}"
    if not _NAME.fullmatch(repository) or "--" in repository or ".." in repository:
        raise UserError(
            f"{where}: is no name of a repository; write ORG/NAME, of letters, digits, '-', '_' "
            "and '.'"
        )
    organisation = repository.partition("/")[0]
    try:
        known = _api().whoami()
    except Exception as error:  # no token, a wrong one, offline
        raise UserError(f"{where}: the hub does not know you ({_short(error)}); {_LOGIN}") from None
    if (known.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{where}: the token may only read; {_LOGIN}")
    names = [known.get("name"), *(org.get("name") for org in known.get("orgs") or [])]
    if organisation not in names:
        raise UserError(
            f"{where}: {known.get('name')} is no member of {organisation}; push to one of "
            f"{', '.join(str(name) for name in names)}"
        )


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an output folder, without its state and without the paths of this machine; returns
    the repository's address.

    Raises :class:`RunError`; the folder is whole then, and may be pushed again.
    """
    api = _api()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        with public_copy(folder) as shown:
            api.upload_folder(
                repo_id=repository,
                folder_path=str(shown),
                commit_message="Merged with raymerge",
            )
    except Exception as error:
        raise RunError(
            f"{folder} is written, but not on the hub as {repository} ({_short(error)}); the "
            "same command with --resume pushes it again"
        ) from None
    return str(url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="raymerge")


def _short(error: Exception) -> str:
    """What the hub says, without a token."""
    import huggingface_hub

    text = redact(str(error).strip()) or type(error).__name__
    token = huggingface_hub.get_token()
    return one_line(text.replace(token, "…") if token else text)
