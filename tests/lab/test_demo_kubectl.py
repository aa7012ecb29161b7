"""`kubectl exec` that loses its output is asked again; one that never gives any is an error with a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.demo.kubectl import EXEC_TRIES, Kubectl
from e2e.lab.errors import LabError


def program(folder: Path, silent_calls: int) -> Kubectl:
    """A kubectl that prints nothing, and ends well, for its first calls."""
    path = folder / "kubectl"
    path.write_text(
        f"#!/bin/sh\necho call >> {folder}/calls\n[ $(wc -l < {folder}/calls) -gt {silent_calls} ] && echo '[1]'\nexit 0\n"
    )
    path.chmod(0o755)
    return Kubectl(program=path, kubeconfig=folder / "config", namespace="default")


def test_a_lost_output_is_asked_for_again(tmp_path: Path) -> None:
    assert program(tmp_path, EXEC_TRIES - 1).python("pod", "print('[1]')") == [1]


def test_output_that_never_comes_is_an_error_with_the_pods_name(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="`kubectl exec pod` gave no output, 3 times"):
        program(tmp_path, EXEC_TRIES).python("pod", "print('[1]')")
