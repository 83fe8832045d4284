"""Patches on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from stagepatch.core.errors import UserError


def upload(directory: Path, repo_id: str, private: bool, token: str | None, message: str) -> str:
    """Put a directory's files into a repository, made if need be; returns the commit's URL.

    Raises:
        UserError: no such namespace, no permission, or the Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=message)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"Cannot push to '{repo_id}': {error}") from error
    return str(commit.commit_url)


def download(repo_id: str, files: list[str], revision: str | None, token: str | None) -> Path:
    """The local directory of a repository's files.

    Raises:
        UserError: no such repository, or it cannot be reached and is not in the cache.
    """
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"No patch at '{repo_id}': no such directory, and the Hub does not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]})."
        ) from error
