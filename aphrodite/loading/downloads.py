"""Downloads from the hub that go on where they broke off, into the Hugging Face cache.

huggingface-hub says where a file is and what its hash must be, and links it into the snapshot; the bytes are streamed
here, since its own downloads begin anew after an interruption. A partial file lies beside the blobs until it is whole
and its hash is right.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.loading.model_cache import repository_folder
from aphrodite.loading.report import one_line

logger = logging.getLogger(__name__)

PARTIAL = ".aphrodite.incomplete"
_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5  # in a row that bring nothing
_WAIT = 0.5  # seconds before the second attempt; doubles
_PARALLEL = 4  # files at a time
_MARGIN = 1 << 26  # bytes of the disk to leave free
_LARGEST = 50 * 10**9  # bytes that the hub sends by HTTP
_SHA256 = re.compile(r"[0-9a-f]{64}")

Report = Callable[[int], None]  # bytes that have come since the last call; negative where they were dropped
Listener = Callable[[int, int], None]  # bytes that have come, and of how many; called from several threads


class Source(NamedTuple):
    """Where files come from, and where they go."""

    repo: str
    commit: str
    cache: Path
    endpoint: str | None


class DownloadError(AphroditeError):
    """A download broke off.

    Attributes:
        cause: what the hub's client or its HTTP library raised.
    """

    def __init__(self, message: str, cause: Exception) -> None:
        super().__init__(message)
        self.cause = cause


class DownloadCancelledError(AphroditeError):
    """Whoever listened to the download wants it no more, and said so by raising this."""


class _Stopped(Exception):
    """The user has interrupted."""


def download(source: Source, files: Mapping[str, int], listener: Listener | None = None) -> None:
    """Put `files` (path in the repository -> bytes) into the snapshot.

    Args:
        listener: hears how far it is.

    Raises:
        DownloadCancelledError: raised by `listener`; what has come is kept.
        DownloadError: the hub refuses, or the connection breaks off again and again; what has come is kept.
        ConfigError: the disk is full, or the cache cannot be written.
    """
    total = sum(files.values())
    _check_disk(source.cache, total - _partial_bytes(source))
    stop = threading.Event()
    with _progress(source.repo, total) as shown, ThreadPoolExecutor(min(_PARALLEL, len(files))) as pool:
        report = shown if listener is None else _told(shown, total, listener)
        futures = [pool.submit(_fetch, source, file, report, stop) for file in files]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            stop.set()  # the others end at their next piece
            pool.shutdown(cancel_futures=True)
            if isinstance(error, OSError) and not hasattr(error, "response"):
                raise ConfigError(f"cannot write to {source.cache}: {error.strerror or error}") from None
            raise


def _check_disk(cache: Path, needed: int) -> None:
    folder = next(parent for parent in (cache, *cache.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed + _MARGIN > free:
        raise ConfigError(
            f"{needed / 1e9:.1f} GB are to be fetched, but {folder} has {free / 1e9:.1f} GB free: make room, or name"
            " another place with --cache-dir or HF_HOME"
        )


def _partial_bytes(source: Source) -> int:
    return sum(file.stat().st_size for file in _blobs(source).glob(f"*{PARTIAL}"))


def _blobs(source: Source) -> Path:
    return repository_folder(source.cache, source.repo) / "blobs"


def _fetch(source: Source, file: str, report: Report, stop: threading.Event) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    if stop.is_set():
        raise _Stopped
    url = hf_hub_url(source.repo, file, revision=source.commit, endpoint=source.endpoint)
    try:
        found = get_hf_file_metadata(url, timeout=_TIMEOUT, endpoint=source.endpoint)
    except Exception as error:  # of the hub's client or of its HTTP library
        raise DownloadError(f"{source.repo}: {file} cannot be fetched: {one_line(error)}", error) from None
    if found.etag is None or found.size is None or not re.fullmatch(r"[\w.-]+", found.etag):
        raise ConfigError(f"{url}: the server does not say how large the file is and what its hash is")
    blob = _blobs(source) / found.etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    locks = source.cache / ".locks" / repository_folder(source.cache, source.repo).name
    locks.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / f"{found.etag}.lock"):  # another process may be fetching it
        if blob.exists() or found.size > _LARGEST:
            report(found.size)
        else:
            _Stream(url, file, blob, found.size, report, stop).run()
    try:  # links the blob into the snapshot, or brings what only the hub's own protocol can
        hf_hub_download(source.repo, file, revision=source.commit, cache_dir=source.cache, endpoint=source.endpoint)
    except Exception as error:  # as above
        raise DownloadError(f"{source.repo}: {file} cannot be put into the cache: {one_line(error)}", error) from None


class _Stream:
    """One file's bytes into `blob`, by way of a partial file that outlives an interruption."""

    def __init__(self, url: str, file: str, blob: Path, size: int, report: Report, stop: threading.Event) -> None:
        self._url = url
        self._file = file
        self._blob = blob
        self._partial = blob.with_name(blob.name + PARTIAL)
        self._size = size
        self._report = report
        self._stop = stop

    def run(self) -> None:
        have, failures = self._have(), 0
        self._report(have)
        while have < self._size or not self._partial.exists():
            cause = self._try(have)
            before, have = have, self._have()
            failures = 0 if have > before else failures + 1
            if failures == _ATTEMPTS:
                raise DownloadError(
                    f"the download of {self._file} broke off after {have / 1e9:.2f} of {self._size / 1e9:.2f} GB "
                    f"({one_line(cause)}); what has come is kept: run the same again to go on",
                    cause,
                )
            if have < self._size and self._stop.wait(_WAIT * 2**failures):
                raise _Stopped
        self._verify()
        self._partial.replace(self._blob)

    def _try(self, have: int) -> Exception:
        """Go on from byte `have`; returns why it ended before the end of the file, if it did.

        Raises:
            DownloadError: the server refuses, and would again.
            OSError: the disk is full, or refuses.
        """
        try:
            self._receive(have)
        except (_Stopped, AphroditeError):
            raise
        except Exception as error:  # of the HTTP library, whichever the hub's client uses
            if isinstance(error, OSError) and not _is_passing(error):
                raise
            return error
        return EOFError("the server ended the file early")

    def _receive(self, have: int) -> None:
        """The rest of the file, or all of it where the server does not send parts."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with get_session().stream("GET", self._url, headers=headers, timeout=_TIMEOUT) as response:
            _raise_refusal(response, hf_raise_for_status, self._file)
            whole = response.status_code != 206
            if whole and have:
                self._report(-have)
            with self._partial.open("wb" if whole else "ab") as output:
                for chunk in response.iter_bytes(_CHUNK):
                    if self._stop.is_set():
                        raise _Stopped
                    output.write(chunk)
                    self._report(len(chunk))

    def _have(self) -> int:
        """Bytes that have come; what is longer than the file is none of it."""
        size = self._partial.stat().st_size if self._partial.exists() else 0
        if size > self._size:
            self._partial.unlink()
            return 0
        return size

    def _verify(self) -> None:
        """Large files are named by their SHA-256; others are trusted to the connection.

        Raises:
            ConfigError: the bytes are not the file's; they are removed.
        """
        if not _SHA256.fullmatch(self._blob.name):
            return
        with self._partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._blob.name:
            self._partial.unlink()
            raise ConfigError(f"{self._file} came damaged (its SHA-256 differs) and was removed; fetch it again")


def _raise_refusal(response: Any, raise_for_status: Callable[[Any], None], file: str) -> None:
    """
    Raises:
        DownloadError: the server refuses, and would again.
        OSError: it is out of order.
    """
    try:
        raise_for_status(response)
    except OSError as error:
        if _is_passing(error):
            raise
        raise DownloadError(f"{file} cannot be fetched: {one_line(error)}", error) from None


def _is_passing(error: OSError) -> bool:
    """Whether trying again may help: the server is out of order or too busy, or the connection broke."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None:
        return isinstance(error, ConnectionError | TimeoutError)
    return status in (408, 429) or status >= 500


def _told(shown: Report, total: int, listener: Listener) -> Report:
    """`shown`, and `listener` told of the sum."""
    lock, come = threading.Lock(), 0

    def report(count: int) -> None:
        nonlocal come
        with lock:
            come += count
            now = come
        shown(count)
        listener(now, total)

    return report


@contextmanager
def _progress(repo: str, total: int) -> Iterator[Report]:
    """A bar on a terminal, else a line at the beginning and one at the end."""
    if not sys.stderr.isatty():
        logger.info("fetching %s (%.2f GB)", repo, total / 1e9)
        yield lambda count: None
        logger.info("fetched %s", repo)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, markup=False)) as bar:
        task = bar.add_task(f"Fetching {repo}", total=total)
        yield lambda count: bar.advance(task, count)
