"""Writes what an image installs beside the project, so that a change elsewhere in pyproject.toml rebuilds no heavy layer.

`requirements.py PYPROJECT FOLDER NAME=EXTRA,EXTRA ...` writes FOLDER/NAME.txt a set of extras, and FOLDER/overrides.txt with the
project's overrides and one that drops every distribution the base image already has (vLLM's own image brings torch). Runs in the
image's build, standard library alone.
"""

import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

NEVER = "python_version < '3'"


def requirements(project: Mapping[str, Any], extras: Iterable[str]) -> list[str]:
    """The project's own dependencies and those of `extras`; KeyError names an extra that does not exist."""
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


def overrides(declared: Iterable[str], installed: Iterable[str]) -> list[str]:
    """uv overrides: the declared ones, less those of installed distributions, which are dropped from the resolution."""
    present = {name.lower().replace("_", "-") for name in installed}
    kept = [line for line in declared if line.split(";")[0].split("=")[0].strip().lower() not in present]
    return kept + [f"{name} ; {NEVER}" for name in sorted(present)]


def main(pyproject: Path, folder: Path, wanted: Iterable[str]) -> None:
    table = tomllib.loads(pyproject.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for word in wanted:
        name, _, extras = word.partition("=")
        lines = requirements(table["project"], extras.split(","))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    installed = [each.metadata["Name"] for each in distributions()]
    lines = overrides(table["tool"]["uv"]["override-dependencies"], installed)
    (folder / "overrides.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
