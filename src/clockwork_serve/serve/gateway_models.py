"""The models that a gateway serves, as the controller process told; it never makes one up."""

from __future__ import annotations

from clockwork_serve.messages import CodeAdded, Model
from clockwork_serve.oip import Served, UnknownModel, default_slo_ns, missing
from clockwork_serve.serve.quarantines import Quarantines


class GatewayModels:
    """All versions of all models by name. ``server_slo_ns`` is the server's own default SLO, if any."""

    def __init__(self, server_slo_ns: int | None) -> None:
        self.quarantines = Quarantines()
        self._server_slo_ns = server_slo_ns
        self._codes: dict[str, CodeAdded] = {}
        self._by_version: dict[tuple[str, str], Served] = {}
        self._versions: dict[str, list[str]] = {}  # of all and only names with a version, ascending

    def __len__(self) -> int:
        return len(self._by_version)

    @property
    def all_quarantined(self) -> bool:
        """Whether there are models, and every request for one fails."""
        held = self.quarantines
        return (
            bool(held)
            and bool(self._by_version)
            and all(served.model.key in held for served in self._by_version.values())
        )

    def add_code(self, added: CodeAdded) -> None:
        """A code that models may name from now on."""
        self._codes[added.code.code_id] = added

    def remove_code(self, code_id: str) -> None:
        """No model names it any more."""
        self._codes.pop(code_id, None)

    def add(self, model: Model) -> None:
        """Serve a model whose code is known; it replaces an earlier one of that name and version."""
        added = self._codes[model.code_id]
        batch_1_ns = max((profile.infer_ns.get(1, 0) for profile in added.profiles), default=None)
        slo_ns = default_slo_ns(model.slo_ns, self._server_slo_ns, batch_1_ns)
        served = Served(model, added.code, slo_ns)
        self._by_version[model.name, model.version] = served
        versions = {*self._versions.get(model.name, ()), model.version}
        self._set_versions(model.name, versions)

    def remove(self, key: str) -> None:
        """Serve a model no more."""
        name, _, version = key.rpartition("/")
        if self._by_version.pop((name, version), None) is not None:
            self._set_versions(name, set(self._versions[name]) - {version})

    def find(self, name: str, version: str = "") -> Served:
        """The version of that name, or its highest one. Raises :class:`UnknownModel`."""
        served = self._by_version.get((name, version))
        if served is None:
            raise UnknownModel(missing(name, version))
        return served

    def versions(self, name: str) -> list[str]:
        """The versions of a name that are served, ascending."""
        return self._versions.get(name, [])

    def all(self) -> list[Served]:
        """Every version of every name."""
        return [served for (_, version), served in self._by_version.items() if version]

    def names(self) -> list[str]:
        """Every name."""
        return sorted(self._versions)

    def _set_versions(self, name: str, versions: set[str]) -> None:
        if not versions:
            del self._versions[name]
            del self._by_version[name, ""]
            return
        ordered = self._versions[name] = sorted(versions, key=_order)
        # A request without a version means the highest.
        self._by_version[name, ""] = self._by_version[name, ordered[-1]]


def _order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)
