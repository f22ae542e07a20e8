"""What is in the cache of downloaded models: the Hugging Face cache, which other programs share.

Its layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache): a folder `models--ORG--NAME` a repository,
with `refs/REVISION` (a file with a commit), `snapshots/COMMIT/…` (links, by the repository's file names) and `blobs/…`
(the files, by their hash). This module reads and prunes it without a network and without the hub's library.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aphrodite.errors import ConfigError, ModelFormatError
from aphrodite.loading.repository import GgufModel, gguf_models, is_split
from aphrodite.loading.safetensors import INDEX_NAME, shard_names

MAIN = "main"  # the revision that is meant where none is named
_PREFIX = "models--"
_PARTIAL = ".incomplete"


def hub_cache(cache_dir: str | Path | None = None) -> Path:
    """Where models of the hub are: `hub` in `cache_dir`, else what HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME say."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser() / "hub"
    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(os.path.expandvars(named)).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Files of one commit of a repository, as far as they are here.

    Attributes:
        repo: ORG/NAME.
        revisions: names under which the commit was asked for.
        files: path in the repository -> bytes.
    """

    repo: str
    commit: str
    revisions: tuple[str, ...]
    path: Path
    files: Mapping[str, int]

    @property
    def suffix(self) -> str:
        """What of a model's name says the revision."""
        if MAIN in self.revisions:
            return ""
        return "@" + (self.revisions[0] if self.revisions else self.commit[:12])


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model that can be loaded, or what there is of one.

    Attributes:
        name: what to run it by.
        format: "safetensors", "GGUF", or "incomplete" where files are missing.
        size: bytes.
        last_used: Unix seconds of the latest access, as the file system keeps it.
    """

    name: str
    format: str
    size: int
    last_used: float
    path: Path


class Removal(NamedTuple):
    """What of the cache goes: whole folders, then single files."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    files: tuple[Path, ...]
    size: int


def repository_folder(cache: Path, repo: str) -> Path:
    return cache / (_PREFIX + repo.replace("/", "--"))


def _repository_of(folder: Path) -> str:
    return folder.name.removeprefix(_PREFIX).replace("--", "/", 1)


def snapshots(cache: Path) -> list[Snapshot]:
    """All snapshots, by repository."""
    found: list[Snapshot] = []
    for folder in sorted(cache.glob(f"{_PREFIX}*--*")):
        found += _snapshots_of(folder, _repository_of(folder))
    return found


def find_snapshot(cache: Path, repo: str, revision: str) -> Snapshot | None:
    """The snapshot of a branch, tag or commit (in full, or its first characters)."""
    for snapshot in _snapshots_of(repository_folder(cache, repo), repo):
        if revision in snapshot.revisions or (len(revision) >= 7 and snapshot.commit.startswith(revision)):
            return snapshot
    return None


def store_revision(cache: Path, repo: str, revision: str, commit: str) -> None:
    """Remember which commit a branch or tag is, for when there is no network."""
    if revision == commit:
        return
    file = repository_folder(cache, repo) / "refs" / revision
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(commit)
    fresh.replace(file)


def cached_models(cache: Path) -> list[CachedModel]:
    """All models of the cache, by name."""
    found: list[CachedModel] = []
    for snapshot in snapshots(cache):
        found += _models_of(snapshot)
    for folder in cache.glob(f"{_PREFIX}*--*"):
        partial = [file for file in (folder / "blobs").glob(f"*{_PARTIAL}") if file.is_file()]
        if partial:
            size = sum(file.stat().st_size for file in partial)
            used = max(file.stat().st_mtime for file in partial)
            found.append(
                CachedModel(name=_repository_of(folder), format="incomplete", size=size, last_used=used, path=folder)
            )
    return sorted(found, key=lambda model: (model.name, model.format))


def plan_removal(cache: Path, repo: str, *, variant: str | None, revision: str | None) -> Removal:
    """What to remove of a repository: all of it, or one GGUF model, or one revision, or both.

    Raises:
        ConfigError: there is nothing of that name.
    """
    folder = repository_folder(cache, repo)
    everything = _snapshots_of(folder, repo)
    chosen = [s for s in everything if revision is None or revision in s.revisions or s.commit.startswith(revision)]
    if not folder.is_dir() or (revision is not None and not chosen):
        name = f"{repo}@{revision}" if revision else repo
        raise ConfigError(f"{name} is not in the cache; aphrodite models ls lists what is")
    doomed = {file for snapshot in chosen for file in _matching(snapshot, variant)}
    if variant is not None and not doomed:
        raise ConfigError(f"{repo} has no {variant} in the cache; aphrodite models ls lists what it has")
    names = sorted({model.name for s in chosen for model in _models_of(s) if _titled(model, variant)}) or [repo]
    if not any(_has_weights(snapshot, doomed) for snapshot in everything):
        size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
        return Removal(tuple(names), (folder, cache / ".locks" / folder.name), (), size)
    kept = {(s.path / name).resolve() for s in everything for name in s.files if s.path / name not in doomed}
    blobs = {file.resolve() for file in doomed} - kept
    size = sum(blob.stat().st_size for blob in blobs)
    return Removal(tuple(names), (), (*sorted(doomed), *sorted(blobs - doomed)), size)


def remove(removal: Removal) -> None:
    """Do what was planned.

    Raises:
        ConfigError: the file system refuses.
    """
    try:
        for folder in removal.folders:
            if folder.is_dir():
                shutil.rmtree(folder)
        for file in removal.files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot remove {error.filename}: {error.strerror}") from None


def _snapshots_of(folder: Path, repo: str) -> list[Snapshot]:
    refs: dict[str, list[str]] = {}
    for file in sorted((folder / "refs").rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            commit = file.read_text("utf-8", "replace").strip()
            refs.setdefault(commit, []).append(file.relative_to(folder / "refs").as_posix())
    return [
        Snapshot(
            repo=repo, commit=path.name, revisions=tuple(refs.get(path.name, ())), path=path, files=_files_below(path)
        )
        for path in sorted((folder / "snapshots").glob("*"))
        if path.is_dir()
    ]


def _files_below(path: Path) -> dict[str, int]:
    """Files whose bytes are here; links to blobs that are gone do not count."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def _models_of(snapshot: Snapshot) -> Iterator[CachedModel]:
    ggufs = gguf_models(snapshot.files)
    for gguf in ggufs:
        yield _model(snapshot, f":{gguf.title}", "GGUF", gguf.files)
    whole = {name for gguf in ggufs for name in gguf.files}
    parts = [name for name in snapshot.files if is_split(name) and name not in whole]
    if parts:
        yield _model(snapshot, "", "incomplete", parts)
    others = [name for name in snapshot.files if not name.endswith(".gguf")]
    if any(name.endswith((".safetensors", INDEX_NAME)) for name in others):
        yield _model(snapshot, "", "safetensors" if _is_complete(snapshot) else "incomplete", others)


def _model(snapshot: Snapshot, variant: str, kind: str, names: list[str] | tuple[str, ...]) -> CachedModel:
    return CachedModel(
        name=f"{snapshot.repo}{variant}{snapshot.suffix}",
        format=kind,
        size=sum(snapshot.files[name] for name in names),
        last_used=max((snapshot.path / name).stat().st_atime for name in names),
        path=snapshot.path / names[0] if kind == "GGUF" else snapshot.path,
    )


def _is_complete(snapshot: Snapshot) -> bool:
    """Whether all files that an index lists are there, and a configuration."""
    if "config.json" not in snapshot.files:
        return False
    if "model.safetensors" in snapshot.files or INDEX_NAME not in snapshot.files:
        return any(name.endswith(".safetensors") for name in snapshot.files)
    try:
        return all(name in snapshot.files for name in shard_names(snapshot.path / INDEX_NAME))
    except ModelFormatError:
        return False


def _matching(snapshot: Snapshot, variant: str | None) -> list[Path]:
    if variant is None:
        return [snapshot.path / name for name in snapshot.files]
    models = [gguf for gguf in gguf_models(snapshot.files) if _is_meant(gguf, variant)]
    return [snapshot.path / name for gguf in models for name in gguf.files]


def _is_meant(gguf: GgufModel, variant: str) -> bool:
    return variant.upper() == gguf.label or variant in (gguf.files[0], Path(gguf.files[0]).name)


def _titled(model: CachedModel, variant: str | None) -> bool:
    return variant is None or f":{variant.upper()}" in model.name.upper() or model.path.name == Path(variant).name


def _has_weights(snapshot: Snapshot, doomed: set[Path]) -> bool:
    """Whether something to load is left of a snapshot."""
    kept = {name: size for name, size in snapshot.files.items() if snapshot.path / name not in doomed}
    return bool(gguf_models(kept)) or any(name.endswith(".safetensors") for name in kept)
