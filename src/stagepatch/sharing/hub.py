"""A folder on the Hub."""

from pathlib import Path

from stagepatch.core import as_user_error


def push_folder(folder: Path, repo_id: str, private: bool = False, revision: str = "") -> str:
    """Upload a folder as a model repository, made if need be; returns the commit's URL.

    The token is huggingface_hub's own: of `hf auth login`, or HF_TOKEN.

    Args:
        private: of a repository that is made; else it is public, or the organisation's default.
        revision: branch, made if need be; empty for the main one.

    Raises:
        UserError: no such namespace, no token or permission, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with as_user_error(f"Cannot push to '{repo_id}'", Exception):  # a dozen kinds, HTTP's among them
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision or None,
                commit_message="Upload with stagepatch",
            )
        )
