"""Publishing an output folder on the Hugging Face hub.

The repository name and the token are checked before the merge; the upload follows it. What is
uploaded is the redacted copy of the folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from raymerge.errors import RunError, UserError, one_line
from raymerge.files.urls import redact
from raymerge.runs.redacted_copy import redacted_copy

_NAME = re.compile(r"[A-Za-z0-9][\w-]*/(?=.{1,96}$)\w(?:[\w.-]*\w)?", re.ASCII)
_LOGIN = "set HF_TOKEN to a token that may write, or run `hf auth login`"


def require_target(repository: str) -> None:
    """Raise :class:`UserError` unless the name is valid and the user's token may write there."""
    where = f"--push-to-hub {repository}"
    if not _NAME.fullmatch(repository) or "--" in repository or ".." in repository:
        raise UserError(
            f"{where}: is not a repository name; write ORG/NAME with letters, digits, '-', '_' "
            "and '.'"
        )
    organisation = repository.partition("/")[0]
    try:
        account = _api().whoami()
    except Exception as error:  # no token, a wrong one, offline
        raise UserError(f"{where}: the hub does not know you ({_short(error)}); {_LOGIN}") from None
    if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{where}: the token is read-only; {_LOGIN}")
    names = [account.get("name"), *(org.get("name") for org in account.get("orgs") or [])]
    if organisation not in names:
        raise UserError(
            f"{where}: {account.get('name')} is not a member of {organisation}; push to one of "
            f"{', '.join(str(name) for name in names)}"
        )


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the redacted copy of an output folder and return the repository's URL.

    Raises :class:`RunError`; the folder itself is complete then and can be pushed again.
    """
    api = _api()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        with redacted_copy(folder) as copy:
            api.upload_folder(
                repo_id=repository,
                folder_path=str(copy),
                commit_message="Merged with raymerge",
            )
    except Exception as error:
        raise RunError(
            f"{folder} is written, but was not uploaded to {repository} ({_short(error)}); run the "
            "same command with --resume to upload it"
        ) from None
    return str(url)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="raymerge")


def _short(error: Exception) -> str:
    """Return the hub's error in one line, without the user's token."""
    import huggingface_hub

    text = redact(str(error).strip()) or type(error).__name__
    token = huggingface_hub.get_token()
    return one_line(text.replace(token, "…") if token else text)
