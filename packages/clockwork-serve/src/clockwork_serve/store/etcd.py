"""Small documents in etcd, where a majority of its members decides: for the lease of several controllers.

A store has weights, which etcd takes none of, and may be a folder of one machine. etcd stays there while most
of its members do, so that somebody can lead although one of them is lost.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from clockwork_serve.errors import described, install_advice
from clockwork_serve.store.settings import problem

if TYPE_CHECKING:
    from etcd3gw import Etcd3Client

Answer = TypeVar("Answer")

ROOT: Final = "clockwork/"  # before the name of each key
API: Final = "/v3/"  # of etcd 3.4 and later; asking for it first would be one request more each time


class EtcdDocuments:
    """Documents by name, as files in a :class:`~clockwork_serve.store.shared.StoreFiles`. For any thread.

    ``members`` are hosts and client ports. One is asked at a time, at first the one that answered last; each
    may take ``timeout_s``. Every answer is of the majority: none is of a member that was cut off from it.
    TLS is used if ``ETCDCTL_CACERT`` names the authority's certificate, with ``ETCDCTL_CERT`` and
    ``ETCDCTL_KEY`` for the client's own, as etcd's own command has them.

    Raises ``ProblemError`` if etcd's library is not installed.
    """

    def __init__(self, members: Sequence[tuple[str, int]], timeout_s: float) -> None:
        try:
            from etcd3gw import Etcd3Client
            from requests import Session
        except ImportError as error:
            raise problem(
                "lease", expected="the library that speaks to etcd", found=described(error),
                advice=install_advice("clockwork-serve[etcd]"),
            ) from None  # fmt: skip
        authority, certificate, key = (
            os.environ.get(f"ETCDCTL_{name}") for name in ("CACERT", "CERT", "KEY")
        )
        session = Session()
        session.trust_env = False  # its authorities would go before ours, and its proxies lead elsewhere
        if authority:
            session.verify = authority
            session.cert = (certificate, key) if certificate and key else None
        self._members = [
            Etcd3Client(
                host, port, "https" if authority else "http", timeout=timeout_s, api_path=API, session=session
            )
            for host, port in members
        ]
        self._answered = 0

    def read(self, name: str) -> bytes:
        """The content of a document. Raises FileNotFoundError; as the others OSError if etcd fails."""
        found = self._ask(lambda member: member.get(ROOT + name))
        if not found:
            raise FileNotFoundError(errno.ENOENT, "it is not in etcd", name)
        return found[0]

    def put(
        self, name: str, source: bytes, tick: Callable[[], object], *, new: bool = False, lasts: bool = True
    ) -> None:
        """Write a document, replacing an earlier one; it is on the disks of a majority.

        ``new``: raises FileExistsError instead, and of several who try at once one succeeds. Their contents
        must differ: whoever finds its own has written it, by an earlier try whose answer was lost.
        """
        if not new:
            self._ask(lambda member: member.put(ROOT + name, source))
        elif not self._ask(lambda member: member.create(ROOT + name, source)) and self.read(name) != source:
            raise FileExistsError(errno.EEXIST, "it is in etcd", name)

    def persist(self, name: str) -> None:
        """Does nothing: what was written lasts."""

    def names(self, folder: str) -> set[str]:
        """The names in a folder, none if it is absent."""
        prefix = f"{ROOT}{folder}/"
        found = self._ask(lambda member: member.get_prefix(prefix))
        return {bytes(facts["key"]).decode().removeprefix(prefix) for _, facts in found}

    def _ask(self, question: Callable[[Etcd3Client], Answer]) -> Answer:
        from etcd3gw.exceptions import Etcd3Exception

        said = []
        for turn in range(len(self._members)):
            at = (self._answered + turn) % len(self._members)
            member = self._members[at]
            try:
                answer = question(member)
            except (Etcd3Exception, OSError, ValueError) as error:
                why = getattr(error, "detail_text", None) or described(error)
                said.append(f"{member.host}:{member.port}: {why.rpartition('Caused by ')[2]}")
            else:
                self._answered = at
                return answer
        raise ConnectionError(f"no member of etcd answers: {'; '.join(sorted(said))}")
