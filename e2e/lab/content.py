"""Builds keyed by what goes into them: a key of the inputs, and a store in which a finished build is found by its key.

Imports the standard library alone.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEY_LENGTH_CHARS = 16
IGNORED_NAMES = frozenset({"__pycache__", ".pytest_cache", ".ruff_cache"})


def files_below(path: Path) -> Iterator[Path]:
    """Every file of a tree in a fixed order, caches of tools left out; a file is its own tree."""
    if not path.is_dir():
        yield path
        return
    for entry in sorted(path.iterdir()):
        if entry.name not in IGNORED_NAMES and not entry.name.endswith(".egg-info"):
            yield from files_below(entry)


def content_key(*inputs: str | Path) -> str:
    """A short hex key of texts and of files or trees (names below the tree, the executable bit, bytes).

    Raises FileNotFoundError for a path that does not exist: a misspelt input must not make a stable key.
    """
    digest = hashlib.sha256()
    for given in inputs:
        if isinstance(given, str):
            digest.update(f"text {len(given.encode())} {given}".encode())
            continue
        for path in files_below(given):
            data = path.read_bytes()
            name = path.relative_to(given) if path != given else path.name
            executable = int(os.access(path, os.X_OK))
            digest.update(f"file {name} {executable} {len(data)} ".encode() + data)
    return digest.hexdigest()[:KEY_LENGTH_CHARS]


@dataclass(frozen=True)
class Built:
    """A finished build in the store."""

    path: Path
    cached: bool


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (a file made for it); waits for another process that builds the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def build_once(store: Path, name: str, key: str, build: Callable[[Path], None]) -> Built:
    """Return `store`/`name`-`key`, calling `build` on an empty folder first when it is not there.

    The folder appears under its name only when `build` returned, so a build that was cut off leaves no half of itself.
    Earlier builds of the same name are removed.
    """
    finished = store / f"{name}-{key}"
    with locked(store / ".locks" / name):
        if finished.is_dir():
            return Built(finished, cached=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=store))
        try:
            build(work)
            work.chmod(0o755)
            work.rename(finished)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for other in store.glob(f"{name}-{'?' * KEY_LENGTH_CHARS}"):
            if other != finished:
                shutil.rmtree(other)
    return Built(finished, cached=False)
