"""Keys of content and the store of builds: what makes a new build, and what a build that fails leaves."""

from pathlib import Path

import pytest

from e2e.lab.content import build_once, content_key


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub").mkdir(parents=True)
    (root / "a.go").write_text("package a")
    (root / "sub" / "b.go").write_text("package b")
    return root


def test_the_key_is_the_same_for_the_same_content_elsewhere(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    tree.rename(copy)
    before = content_key("v1", copy)
    copy.rename(tree)
    assert content_key("v1", tree) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root: (root / "a.go").write_text("package c"), id="bytes"),
        pytest.param(lambda root: (root / "a.go").rename(root / "c.go"), id="name"),
        pytest.param(lambda root: (root / "a.go").chmod(0o755), id="executable"),
        pytest.param(lambda root: (root / "new").write_text(""), id="new file"),
    ],
)
def test_the_key_follows_every_change_that_a_build_can_see(tree: Path, change) -> None:
    before = content_key(tree)
    change(tree)
    assert content_key(tree) != before


def test_the_key_ignores_caches_of_tools(tree: Path) -> None:
    before = content_key(tree)
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "a.pyc").write_bytes(b"x")
    assert content_key(tree) == before


def test_texts_cannot_be_shifted_between_neighbours() -> None:
    assert content_key("ab", "c") != content_key("a", "bc")


def test_a_misspelt_input_is_an_error(tree: Path) -> None:
    with pytest.raises(FileNotFoundError):
        content_key(tree / "missing")


def test_a_build_runs_once_and_is_found_afterwards(tmp_path: Path) -> None:
    calls = []

    def build(out: Path) -> None:
        calls.append(out)
        (out / "tool").write_text("binary")

    first = build_once(tmp_path, "tool", "0" * 16, build)
    second = build_once(tmp_path, "tool", "0" * 16, build)
    assert (first.cached, second.cached, len(calls)) == (False, True, 1)
    assert (second.path / "tool").read_text() == "binary"


def test_a_failed_build_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").write_text("")
        raise RuntimeError("compiler")

    with pytest.raises(RuntimeError, match="compiler"):
        build_once(tmp_path, "tool", "0" * 16, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]
    assert not build_once(tmp_path, "tool", "0" * 16, lambda out: None).cached


def test_a_new_build_replaces_older_ones_of_its_name_alone(tmp_path: Path) -> None:
    for name, key in (("tool", "0" * 16), ("tool-box", "1" * 16), ("tool", "2" * 16)):
        build_once(tmp_path, name, key, lambda out: None)
    assert sorted(path.name for path in tmp_path.glob("tool*")) == [
        "tool-2222222222222222",
        "tool-box-1111111111111111",
    ]
