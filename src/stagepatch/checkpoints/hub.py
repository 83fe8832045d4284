"""Repositories of the Hub: 'name/model', or 'name/model@revision' with a branch, tag or commit, as in hf:// paths."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stagepatch.core import UserError

_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w][\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The commit of each repository that this process has loaded from, by the name that it was asked for.
_COMMITS: dict[str, str] = {}


def is_hub_id(source: str | Path) -> bool:
    """Whether it may name a repository on the Hub, such as 'name/model' or 'name/model@v1.0'."""
    return _ID.fullmatch(str(source)) is not None


def split_revision(source: str | Path) -> tuple[str, str | None]:
    """The repository, and its revision where one is given; anything else than a Hub id as it is."""
    found = _ID.fullmatch(str(source))
    return (found[1], found[2]) if found else (str(source), None)


def from_hub(source: str | Path, patterns: list[str], kind: str, **options: Any) -> Path:
    """The directory where a repository's files are kept, fetched if need be. Its commit is kept for `pinned`.

    Args:
        patterns: names of the files.
        kind: what is in it, for the message.
        options: of `snapshot_download`; a revision among them goes before that of `source`.

    Raises:
        UserError: no such repository or revision, or it cannot be reached and is not in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(source)
    options["revision"] = options.get("revision") or revision
    try:
        directory = Path(snapshot_download(repository, allow_patterns=patterns, **options))
    except Exception as error:  # a dozen kinds, from HTTP to a missing cache
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UserError(
            f"No {kind} at '{source}': no such directory, and the Hub does not give it ({reason})."
        ) from error
    note_commit(source, directory.name)
    return directory


def load_lora(pipe: Any, source: str, name: str) -> None:
    """Load a LoRA by a pipeline's own loader: from a file, a directory, or the Hub.

    Args:
        name: that the pipeline calls the adapter by.
    """
    if Path(source).exists() or not is_hub_id(source):
        pipe.load_lora_weights(source, adapter_name=name)
    else:
        commit = from_hub(source, ["README.md"], "LoRA").name  # its loader chooses among the weights
        pipe.load_lora_weights(split_revision(source)[0], adapter_name=name, revision=commit)


def note_commit(source: str | Path, commit: str) -> None:
    """Keep what a name stood for, if it is a commit."""
    if _COMMIT.fullmatch(commit):
        _COMMITS[str(source)] = commit


def pinned(source: str | Path) -> str:
    """'name/model@commit' of what was loaded under a name; of a directory its name as it is."""
    commit = _COMMITS.get(str(source))
    return f"{split_revision(source)[0]}@{commit}" if commit else str(source)


def commits_of(names: Iterable[str]) -> dict[str, str]:
    """Of names, those that were loaded from the Hub, as 'name/model@commit'."""
    return {name: pinned(name) for name in names if name in _COMMITS}


def with_commits(text: str) -> str:
    """A config as YAML, with a comment for each repository that it names and that was loaded: which commit it was."""
    lines = [f"# {source} was {pinned(source)}\n" for source in _COMMITS if source in text]
    return text.rstrip("\n") + "\n" + "".join(lines) if lines else text


def pretrained_arguments(source: str) -> str:
    """What `from_pretrained` takes for a Hub id, as Python: '"name/model", revision="v1.0"'."""
    repository, revision = split_revision(source)
    return f'"{repository}"' + (f', revision="{revision}"' if revision else "")
