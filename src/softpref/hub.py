"""Upload files to the Hugging Face hub in one commit, with HF_TOKEN or the hub's login."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

from softpref.errors import UsageError, first_line

logger = logging.getLogger(__name__)

RepoKind = Literal["model", "dataset"]
CARD = "README.md"
_KEYS = re.compile(r"(^|_)(token|api_key|secret|password)$", re.IGNORECASE)
_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|://[^/\s:@]*:[^/\s@]+@"
)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub refuses, and a hub that cannot be reached, into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = f"check the network, and that {constants.ENDPOINT} can be reached"
        if status in (401, 403):
            remedy = "use a token that may write to it: set HF_TOKEN, or run `hf auth login`"
        elif status is not None or isinstance(error, ValueError):
            remedy = "check the name, ORGANIZATION/NAME or NAME, and what the hub says"
        raise UsageError(f"{repo}: not uploaded: {first_line(error)}; {remedy}.") from error


def create_repository(
    repo: str, kind: RepoKind, private: bool | None = None, token: str | None = None
) -> str:
    """Create a repository if it does not exist, and return its full name.

    Raises:
        UsageError: there is no token, the hub refuses, or `private` and it exists and is public.
    """
    if not (token or get_token()):
        raise UsageError(
            f"{repo}: there is no token to upload with: set HF_TOKEN, or run `hf auth login`."
        )
    with hub_errors(repo):
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, repo_type=kind, exist_ok=True).repo_id
        if private and not api.repo_info(name, repo_type=kind).private:
            raise UsageError(
                f"{name} exists and is public, and --private changes no repository: choose "
                "another name, or make it private in its settings on the hub."
            )
    return name


def upload(
    repo: str,
    kind: RepoKind,
    files: Mapping[str, Path],
    *,
    token: str | None = None,
    revision: str | None = None,
) -> None:
    """Upload files to an existing repository in one commit; log them with their sizes.

    Raises:
        UsageError: the hub refuses, or cannot be reached.
    """
    sizes = {name: path.stat().st_size for name, path in files.items()}
    with hub_errors(repo):
        api = HfApi(token=token)
        info = api.model_info(repo) if kind == "model" else api.dataset_info(repo)
        of_whom = "private" if info.private else "public"
        total = size_text(sum(sizes.values()))
        logger.info(f"uploading {total} in {len(files)} files to {repo}, a {of_whom} {kind}:")
        for name, size in sizes.items():
            logger.info(f"  {name}  {size_text(size)}")
        there = {file.rfilename for file in info.siblings or ()}
        if others := sorted(there - files.keys() - {".gitattributes"}):
            logger.warning(f"warning: {repo} keeps other files that it holds: {', '.join(others)}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            commit = api.create_commit(
                repo,
                [CommitOperationAdd(name, path) for name, path in files.items()],
                commit_message="Upload by softpref",
                repo_type=kind,
                revision=revision,
            )
    logger.info(f"uploaded: {commit.commit_url}")


def size_text(size: int) -> str:
    """Return a number of bytes for people."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.1f} {unit}" if unit != "B" else f"{size} B"


def without_secrets(file: Path) -> tuple[str, list[str]]:
    """Return a JSON file's text with null for secrets, and their keys.

    A secret is the token in use, what looks like a token or an address with a password, or a value
    whose key is called so. Placeholders such as <HUB_TOKEN> are none.
    """
    token = get_token()
    removed: list[str] = []

    def cleaned(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [cleaned(each, key) for each in value]
        if not isinstance(value, str) or not value or re.fullmatch(r"<\w+>", value):
            return value
        if _KEYS.search(key) or _SECRETS.search(value) or (token and token in value):
            removed.append(key)
            return None
        return value

    record = cleaned(json.loads(file.read_text(encoding="utf-8")), "")
    return json.dumps(record, indent=2) + "\n", removed
