"""Models by their name on the Hugging Face hub: ORG/NAME, ORG/NAME:Q4_K_M, ORG/NAME@REVISION.

What is needed is fetched once into the Hugging Face cache, shared with other programs, and found there when there is no
network. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface-hub, which asks the hub
here and is imported only when something has to be asked.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.loading.checkpoint import LoadFormat
from aphrodite.loading.downloads import DownloadError, Listener, Source, download
from aphrodite.loading.model_cache import MAIN, find_snapshot, hub_cache, repository_folder, store_revision
from aphrodite.loading.report import one_line
from aphrodite.loading.repository import Room, Selection, select

logger = logging.getLogger(__name__)

_LIST_TIMEOUT = 15.0  # seconds
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(rf"({_REPO.pattern})((?:[:@][^:@\s]+)*)")
# As a browser shows it, and as other programs name models: with a revision and a file, or what _NAME takes.
_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/({_REPO.pattern})"
    r"(?:/(tree|blob|resolve)/([^/?#]+)(?:/([^?#]+))?)?/?((?:[:@][^:@\s?#]+)*)(?:[?#].*)?"
)
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model on the hub.

    Attributes:
        repo: ORG/NAME.
        variant: a quantization (`Q4_K_M`) or the name of a GGUF file; None leaves the choice.
        revision: a branch, tag or commit; None is the main branch.
    """

    repo: str
    variant: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        variant = f":{self.variant}" if self.variant else ""
        return self.repo + variant + (f"@{self.revision}" if self.revision else "")


class Fetched(NamedTuple):
    """A model on this machine: the file or folder to open, and as what."""

    path: Path
    load_format: LoadFormat


def parse_name(text: str) -> ModelName | None:
    """The name that `text` is; None where it cannot be one, or names something that exists on this machine.

    A model's address on the hub is a name, too: of its page, of one of its GGUF files or of a quantization's folder.

    Raises:
        ConfigError: it has two variants or revisions, or a revision that leaves its folder.
    """
    text = _without_address(text)
    match = _NAME.fullmatch(text)
    if match is None or ".." in match[1] or "--" in match[1] or Path(text).exists():
        return None
    if match[1].endswith((".gguf", ".safetensors")) and Path(match[1]).parent.is_dir():  # a file that is not there
        return None
    parts: dict[str, str] = {}
    for mark, value in re.findall(r"([:@])([^:@]+)", match[2]):
        if mark in parts:
            raise ConfigError(
                f"{text}: name one {'quantization' if mark == ':' else 'revision'}, as in ORG/NAME{mark}X"
            )
        parts[mark] = value
    for value in parts.values():
        if not re.fullmatch(r"[\w./-]+", value) or value.startswith("/") or ".." in value:
            raise ConfigError(f"{text}: {value!r} is neither a quantization, a file nor a revision of a model")
    return ModelName(match[1], parts.get(":"), parts.get("@"))


def _without_address(text: str) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return text
    repo, page, revision, path, rest = match.groups()
    variant = ""
    if path and page == "tree":  # a folder: of a quantization's files
        variant = f":{PurePosixPath(path).name}"
    elif path and path.endswith(".gguf"):
        variant = f":{path}"
    return repo + variant + (f"@{revision}" if revision not in (None, MAIN) else "") + rest


def fetch(
    name: ModelName,
    *,
    cache_dir: str | Path | None,
    load_format: LoadFormat,
    room: Callable[[], Room],
    allow_download: bool = True,
    listener: Listener | None = None,
) -> Fetched:
    """The model on this machine, downloaded as far as it is not yet here.

    Args:
        load_format: what was asked for.
        room: see `select`.
        allow_download: otherwise only what is here counts.
        listener: hears how far the download of weights is, and may end it (`DownloadCancelledError`).

    Raises:
        ConfigError: there is no such model or nothing in it to load; it is private, gated or out of reach and not
            here; or there is no room on the disk. The message says what to do.
    """
    cache = hub_cache(cache_dir)
    listing = _listing(name, cache, allow_download=allow_download)

    def fetch_file(file: str) -> Path:
        return _have(name, listing, cache, {file: listing.files[file]}) / file

    selection = select(
        name.repo,
        listing.files,
        variant=name.variant,
        load_format=load_format,
        room=room,
        fetch=fetch_file,
    )
    logger.info("%s: %s", name.repo, selection.reason)
    wanted = _sizes(name, listing, selection)
    folder = _have(name, listing, cache, wanted, listener)
    if listing.online:
        _remember(cache, name, listing)
    return Fetched(folder / selection.entry if selection.entry is not None else folder, selection.load_format)


class _Listing(NamedTuple):
    """A repository's files: as the hub lists them, or as they are in the cache."""

    commit: str
    files: Mapping[str, int]
    online: bool


def is_offline() -> bool:
    """Whether the user forbids to ask the hub."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _listing(name: ModelName, cache: Path, *, allow_download: bool) -> _Listing:
    revision = name.revision or MAIN
    if not allow_download:
        return _cached(name, cache, f"fetch it: aphrodite models pull {name}")
    if is_offline():
        logger.info("HF_HUB_OFFLINE is set: %s is looked for in the cache only", name)
        return _cached(name, cache, "fetch it without HF_HUB_OFFLINE")
    try:
        return _ask_hub(name, revision)
    except AphroditeError:
        raise
    except Exception as error:  # whatever the hub's client and its HTTP library raise where there is no connection
        reason = f"{_host()} cannot be reached ({one_line(error)})"
        if find_snapshot(cache, name.repo, revision) is not None:
            logger.warning("%s: using %s as it is in the cache", reason, name)
        return _cached(name, cache, f"{reason}: check the connection")


def _cached(name: ModelName, cache: Path, advice: str) -> _Listing:
    snapshot = find_snapshot(cache, name.repo, name.revision or MAIN)
    if snapshot is None:
        raise ConfigError(f"{name} is not on this machine; {advice}")
    return _Listing(snapshot.commit, snapshot.files, online=False)


def _ask_hub(name: ModelName, revision: str) -> _Listing:
    """The hub's list of files.

    Raises:
        ConfigError: the hub refuses.
        Exception: it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = api.model_info(name.repo, revision=revision, files_metadata=True, timeout=_LIST_TIMEOUT)
    except HfHubHTTPError as error:
        refusal = _refusal(name, error)
        if refusal is None:
            raise
        raise refusal from None
    files = {file.rfilename: file.size or 0 for file in info.siblings or () if _is_inside(file.rfilename)}
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{7,64}", info.sha):
        raise ConfigError(f"{_host()} does not say which commit of {name.repo} it lists; is HF_ENDPOINT a model hub?")
    return _Listing(info.sha, files, online=True)


def _is_inside(file: str) -> bool:
    """Whether a name that a server sent stays in the folder that it is put into."""
    return not (file.startswith("/") or re.search(r"[\\\0:]", file) or ".." in file.split("/"))


def _refusal(name: ModelName, error: Exception) -> ConfigError | None:
    """The hub's no in words; None where it is rather out of order."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, GatedRepoError):
        return ConfigError(
            f"{name.repo} is gated: accept its terms on its page at {_host()}, then set HF_TOKEN to a token of that"
            " account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(
            f"{_host()} has no model {name.repo}, or it is private: check the spelling, or set HF_TOKEN to a token that"
            " may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{name.repo} has no revision {name.revision or MAIN}; leave @… out for its main branch")
    if isinstance(error, DisabledRepoError):
        return ConfigError(f"{_host()} has disabled access to {name.repo}")
    if status in (401, 403):
        return ConfigError(f"{_host()} refuses access to {name.repo} ({status}): check the token in HF_TOKEN")
    if 400 <= status < 500 and status not in (408, 429):
        return ConfigError(f"{_host()} refuses to list {name.repo} ({status})")
    return None


def _sizes(name: ModelName, listing: _Listing, selection: Selection) -> dict[str, int]:
    absent = [file for file in selection.files if file not in listing.files]
    if absent and listing.online:
        raise ConfigError(
            f"{name.repo} lacks {', '.join(absent[:4])}, which its index lists; it was not uploaded whole"
        )
    if absent:
        raise ConfigError(
            f"{name} is only in part on this machine ({', '.join(absent[:4])} missing); fetch the rest online"
        )
    return {file: listing.files[file] for file in selection.files}


def _have(
    name: ModelName, listing: _Listing, cache: Path, files: Mapping[str, int], listener: Listener | None = None
) -> Path:
    """The snapshot's folder, with `files` in it."""
    folder = repository_folder(cache, name.repo)
    snapshot = folder / "snapshots" / listing.commit
    missing = {file: size for file, size in files.items() if not (snapshot / file).exists()}
    if missing:
        source = Source(name.repo, listing.commit, cache, os.environ.get("HF_ENDPOINT"))
        try:
            download(source, missing, listener)
        except DownloadError as error:
            refusal = _refusal(name, error.cause)
            raise refusal or ConfigError(str(error)) from None
    return snapshot


def _remember(cache: Path, name: ModelName, listing: _Listing) -> None:
    try:
        store_revision(cache, name.repo, name.revision or MAIN, listing.commit)
    except OSError as error:  # a cache that may only be read still serves
        logger.warning("cannot note in %s which commit %s is: %s", cache, name, error.strerror)


def _host() -> str:
    return os.environ.get("HF_ENDPOINT") or "huggingface.co"
