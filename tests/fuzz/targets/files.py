"""What lies on a disk: settings, repositories, scenarios, traces, profiles, journals, a torn cache."""

from __future__ import annotations

import gzip
import os
import shutil
from contextlib import suppress
from pathlib import Path

import msgspec
import zstandard

from clockwork_lab.bench.records import read_records
from clockwork_serve.apps.learned import delays_beside
from clockwork_serve.config.reader import read_settings
from clockwork_serve.devices.emulated import read_profile
from clockwork_serve.errors import ConfigError
from clockwork_serve.integrity import sealed
from clockwork_serve.messages import Profile
from clockwork_serve.store import Cache, Repository, StoreConfig
from clockwork_serve.store.onnx.compiler import OnnxArchitecture
from clockwork_serve.store.pbtxt import read_pbtxt
from clockwork_serve.store.repository import model_file
from clockwork_serve.store.settings import ProblemError, merged, read_toml
from clockwork_serve.telemetry import following
from clockwork_serve.telemetry.journal import HEADER
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import MIB
from clockwork_serve.workload.scenario import check_kinds, read_scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.trace_files import is_2021, read_minutes, rows_2021, rows_timestamps, survey
from clockwork_serve.workload.zoo import Zoo
from tests.fuzz import mutators
from tests.fuzz.engine import Target, scratch

_FOLDER = scratch()
_CONFIG = StoreConfig(cache_dir=str(_FOLDER / "cache"))
_REPOSITORY = _FOLDER / "repository"
_CACHE = Cache(_CONFIG.cache_dir)


def _written(name: str, data: bytes) -> Path:
    path = _FOLDER / name
    path.write_bytes(data)
    return path


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _clockwork_toml(data: bytes) -> None:
    settings = merged(read_toml(_text(data)), read_toml(""))
    msgspec.json.encode(settings)
    settings.compile_key(_CONFIG)


def _config_pbtxt(data: bytes) -> None:
    settings, warnings = read_pbtxt(_text(data), "m")
    msgspec.json.encode((settings, warnings))


def _settings(data: bytes) -> None:
    """Variables, one a line, up to a line of ``---``; then a file of settings."""
    variables, _, file = data.partition(b"---\n")
    environment = {}
    for line in _text(variables).splitlines():
        name, _, value = line.partition("=")
        if name.startswith("CLOCKWORK_") and name != "CLOCKWORK_CONFIG" and "\0" not in line:
            environment[name] = value
    path = _written("settings.toml", file)
    msgspec.json.encode(read_settings({}, environment, str(path)))


def _repository(data: bytes) -> None:
    """A line for each thing: ``d NAME``, ``f NAME TEXT``, ``l NAME TARGET``, ``p NAME`` (a pipe)."""
    shutil.rmtree(_REPOSITORY, ignore_errors=True)
    _REPOSITORY.mkdir()
    for line in data.split(b"\n")[:40]:
        kind, name, what = [*line.split(b" ", 2), b"", b""][:3]
        path = _REPOSITORY / os.fsdecode(name).lstrip("/")
        if b".." in name or b"\0" in line or not name or len(name) > 200:
            continue
        if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(_REPOSITORY)):
            continue  # a link leads out of it
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            match kind:
                case b"d":
                    path.mkdir(exist_ok=True)
                case b"f" if path.is_file() or not os.path.lexists(path):  # a pipe would wait for its reader
                    path.write_bytes(what.replace(b"|", b"\n"))
                case b"l":
                    path.symlink_to(os.fsdecode(what) or "x")
                case b"p":
                    os.mkfifo(path)
        except OSError:
            continue
    repository = Repository(_REPOSITORY, _CONFIG)
    for entry in repository.scan():
        msgspec.msgpack.encode((entry, *entry.problems))
        str(entry.problems).encode()
        for version in entry.versions:
            if entry.backend in ("onnx", "torch", "python"):
                try:
                    model_file(entry, version)
                except ProblemError as error:
                    msgspec.msgpack.encode(error.problem)
    msgspec.msgpack.encode(repository.misplaced)


def _scenario(data: bytes) -> None:
    scenario = read_scenario(_written("scenario.toml", data))
    check_kinds(scenario, ("a", "resnet50_v2"))
    if (
        all(load.trace is None for load in scenario.loads)
        and sum(each.copies for each in scenario.models) < 10_000
    ):
        next(iter(build(scenario, 1, _FOLDER).open()), None)


def _trace(data: bytes) -> Path:
    packed = data[:2] == b"\x1f\x8b"
    return _written("trace.csv.gz" if packed else "trace.csv", data)


def _azure_trace(data: bytes) -> None:
    path = _trace(data)
    if is_2021(path):
        list(rows_2021(path))
        survey(path, lambda: rows_2021(path), 0, None)
    else:
        read_minutes([path], 0, None, 5)


def _csv_trace(data: bytes) -> None:
    path = _trace(data)
    trace = survey(path, lambda: rows_timestamps(path), 0, None)
    for _ in zip(range(100), trace.chunks(), strict=False):
        pass


def _zoo(data: bytes) -> None:
    path = _written("zoo.json" if data[:1] == b"{" else "zoo.csv", data)
    with suppress(ConfigError):
        delays_beside(str(path))
    zoo = Zoo.read(path)
    for kind in zoo.models:
        msgspec.json.encode((zoo.code(kind), zoo.profile(kind), zoo.model("m", kind)))


def _profiles(data: bytes) -> None:
    read_profile(str(_written("profile.toml", data)))


def _journal(data: bytes) -> None:
    path = _written("journal", data)
    view = LiveView()
    for _, record in following.read_records(path):
        view.on_record(record)


def _cache_records(data: bytes) -> None:
    """What was torn counts as absent; a record that can be read can be written."""
    for kind in (Profile, OnnxArchitecture):
        (_CACHE.root / "records").mkdir(exist_ok=True)
        for stored in (data, sealed("records/k.json", data)):
            (_CACHE.root / "records" / "k.json").write_bytes(stored)
            found = _CACHE.record("records", "k", kind)
            if found is not None:
                msgspec.json.encode(found)
    folder = _CACHE.root / "codes" / "c"
    for stored in (data, sealed("codes/c/code.json", data)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "code.json").write_bytes(stored)
        _CACHE.code("c")
    _CACHE.damage.clear()


def _bench_records(data: bytes) -> None:
    read_records(_written("records", data))


def _mutate_trace(data: bytes, dice: mutators.Random) -> bytes:
    if data[:2] == b"\x1f\x8b":
        try:
            content = mutators.text(gzip.decompress(data), dice)
        except (OSError, EOFError, gzip.zlib.error):
            return mutators.raw(data, dice)
        return gzip.compress(content, mtime=0) if dice.random() < 0.5 else mutators.raw(data, dice)
    return mutators.text(data, dice)


_RECORDS = mutators.framed(mutators.as_msgpack)


def _mutate_journal(data: bytes, dice: mutators.Random) -> bytes:
    """The records of its first chunk changed, and packed again; or the chunk itself."""
    if len(data) > HEADER.size and dice.random() < 0.8:
        try:
            records = _RECORDS(zstandard.decompress(data[HEADER.size :]), dice)
        except (zstandard.ZstdError, MemoryError):  # the chunk may claim any size
            return mutators.raw(data, dice)
        packed, (magic, one, *_, now_ns, first) = zstandard.compress(records), HEADER.unpack_from(data)
        return HEADER.pack(magic, one, len(packed), len(records), 1, now_ns, first) + packed
    return mutators.raw(data, dice)


TARGETS = (
    Target("clockwork_toml", _clockwork_toml, (ProblemError,), mutators.text),
    Target("config_pbtxt", _config_pbtxt, (ProblemError,), mutators.text),
    Target("settings", _settings, (ConfigError,), mutators.text),
    Target("repository", _repository, (), mutators.text),
    Target("scenario", _scenario, (ConfigError,), mutators.text),
    Target("azure_trace", _azure_trace, (ConfigError,), _mutate_trace),
    Target("csv_trace", _csv_trace, (ConfigError,), _mutate_trace),
    Target("zoo", _zoo, (ConfigError,), mutators.text),
    Target("profiles", _profiles, (ConfigError,), mutators.text),
    Target(
        "journal", _journal, (ConfigError, msgspec.ValidationError), _mutate_journal, growth_bytes=96 * MIB
    ),
    Target("cache_records", _cache_records, (), mutators.as_json),
    Target("bench_records", _bench_records, (ConfigError,), mutators.headed(12, mutators.raw)),
)
