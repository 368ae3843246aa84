"""Documents in a real etcd: what a lease needs of them, while members of it are lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clockwork_serve.store.etcd import EtcdDocuments
from clockwork_serve.store.settings import ProblemError
from harness.etcd import ETCD, Etcd, etcd
from harness.serving import until
from tests.serve.certificates import certificates, renewed_certificates

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(ETCD is None, reason="etcd is not installed: Debian's package is etcd-server"),
]


def nothing() -> None:
    """No one is told how far it is."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd(tmp_path_factory.mktemp("etcd")) as found:
        yield found


def test_what_was_written_is_read_and_listed_by_folder(cluster: Etcd) -> None:
    one, other = cluster.documents(), cluster.documents()
    one.put("a/1", b"\x00first", nothing)
    one.put("a/1", b"second", nothing)
    one.put("a/2", b"", nothing)
    one.put("ab/3", b"x", nothing)
    assert other.read("a/1") == b"second"
    assert other.names("a") == {"1", "2"}
    assert other.names("none") == set()
    with pytest.raises(FileNotFoundError):
        other.read("a/3")


def test_of_many_who_create_one_at_once_one_succeeds(cluster: Etcd) -> None:
    def create(number: int) -> bool:
        try:
            cluster.documents().put("created/1", b"%d" % number, nothing, new=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        created = [number for number, done in enumerate(threads.map(create, range(8))) if done]
    assert len(created) == 1
    assert cluster.documents().read("created/1") == b"%d" % created[0]
    cluster.documents().put("created/1", b"%d" % created[0], nothing, new=True)  # its answer had been lost


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_majority_answers_whoever_is_lost_and_a_minority_does_not(
    cluster: Etcd, number: signal.Signals
) -> None:
    documents = cluster.documents(timeout_s=0.5)

    def written(content: bytes) -> bool:
        try:
            documents.put("kept", content, nothing)
            return documents.read("kept") == content
        except OSError:
            return False

    for lost in range(3):
        cluster.members[lost].send(number)
        until("two of three answer", lambda lost=lost: written(b"%d" % lost))
        other = cluster.members[(lost + 1) % 3]
        other.send(number)
        with pytest.raises(OSError, match=r"no member of etcd answers: 127\.0\.0\.1:"):
            cluster.documents(timeout_s=0.5).read("kept")
        for member in (other, cluster.members[lost]):
            if number is signal.SIGKILL:
                cluster.start(member)
            else:
                member.send(signal.SIGCONT)
        until("all answer", lambda: written(b"all"))


def test_tls_is_asked_for_by_etcd_s_own_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, others = certificates(tmp_path), tmp_path / "others"
    others.mkdir()
    options = ("--cert-file", files.certificate, "--key-file", files.key)
    options += ("--client-cert-auth", "--trusted-ca-file", files.ca)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", renewed_certificates(others).ca)
    monkeypatch.setenv("ETCDCTL_CACERT", files.ca)
    monkeypatch.setenv("ETCDCTL_CERT", files.client_certificate)
    monkeypatch.setenv("ETCDCTL_KEY", files.client_key)
    with etcd(tmp_path, members=1, tls=options) as found:
        found.documents().put("a/1", b"x", nothing)
        assert found.documents().read("a/1") == b"x"
        monkeypatch.delenv("ETCDCTL_CERT")
        with pytest.raises(OSError, match="no member of etcd answers"):
            found.documents().read("a/1")


def test_without_its_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "etcd3gw", None)
    with pytest.raises(ProblemError, match=r"pip install '\./packages/clockwork-serve\[etcd\]'"):
        EtcdDocuments([("127.0.0.1", 2379)], 1.0)
