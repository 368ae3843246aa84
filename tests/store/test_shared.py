"""What one machine compiled, the others take from the shared store; whatever that is like, they serve."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.errors import RepositoryError
from clockwork_serve.integrity import hash_of, sealed
from clockwork_serve.messages import Code, Profile
from clockwork_serve.store import Cache, Compiler, Repository, StoreConfig, compile_all
from clockwork_serve.store.shared import DRAFT_S, FolderFiles, SharedStore
from tests.mounts import with_read_only, with_small_disk
from tests.store import graphs

CODE = Code(
    code_id="c", backend="onnx", path="", inputs=(), outputs=(), batched=False, batch_sizes=(1,), lifted=True
)  # fmt: skip
FILES = {"model.onnx": b"graph" * 100, "index.json": b"{}"}
PROFILE = Profile(code_id="c", device_kind="cpu", infer_ns={1: 5}, load_base_ns=3, load_ns_per_mib=2)
FACTS = {"onnxruntime": "1.99", "build": "b", "machine": "m", "cpu_flags": "f"}


@pytest.fixture
def store(tmp_path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@contextmanager
def machine(folder: Path, store: object, **options):
    """The cache of a machine, empty at first, before the store."""
    with Cache(folder, store=str(store), **options) as cache:
        yield cache


def fill(cache: Cache) -> str:
    """Store one of each kind; the id of the weights."""
    cache.save_code(CODE, FILES)
    cache.save_profile(PROFILE)
    return cache.save_weights(b"w" * 1000)


def holds(cache: Cache, weights_id: str) -> list[bool]:
    return [
        cache.code("c") is not None,
        cache.profile("c", "cpu") == PROFILE,
        cache.has_weights(weights_id, 1000),
    ]


def compiled(repository: Path, cache: Cache) -> tuple[list[str], list[str], int]:
    """Keys of what can be served, problems, and how many graphs had to be optimised for it."""
    config = StoreConfig(cache_dir="")
    compiler = Compiler(cache, config)
    served, problems = compile_all(Repository(repository, config), cache, compiler=compiler, threads=1)
    return [each.model.key for each in served], [str(one) for one in problems], compiler.optimiser.runs


def files_of(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


# What is in it


def test_without_a_store_there_is_none(tmp_path):
    with Cache(tmp_path) as cache:
        assert cache.shared is None
        assert cache.share() == ()


def test_another_machine_has_what_one_stored(tmp_path, store):
    with machine(tmp_path / "one", store) as one:
        weights_id = fill(one)
        assert one.shared.problems == ()
    with machine(tmp_path / "two", store) as two:
        assert holds(two, weights_id) == [True, True, True]
        assert two.code_file("c", "model.onnx") == FILES["model.onnx"]
        assert two.weights_path(weights_id).read_bytes() == b"w" * 1000
    # From then on it has it of its own.
    with Cache(tmp_path / "two") as alone:
        assert holds(alone, weights_id) == [True, True, True]


def test_it_holds_contents_by_their_hash_once_and_records_by_runtime(tmp_path, store):
    for name in ("one", "two"):
        with machine(tmp_path / name, store) as cache:
            weights_id = fill(cache)
            runtime = cache.root.name
    contents = {hash_of(data) for data in FILES.values()} | {weights_id}
    found = {str(path.relative_to(store)) for path in files_of(store)}
    assert found == {
        *(f"objects/{each[:2]}/{each}" for each in contents),
        f"{runtime}/runtime.json", f"{runtime}/codes/c/code.json",
        *(f"{runtime}/profiles/{path.name}" for path in (store / runtime / "profiles").iterdir()),
    }  # fmt: skip
    assert len(list((store / runtime / "profiles").iterdir())) == 1
    assert list((store / "tmp").iterdir()) == []


def test_models_that_one_machine_compiled_are_compiled_nowhere_else(shop, tmp_path, store):
    for number in range(3):
        shop.add(f"copy{number}", graphs.normalised(number))
        shop.add(f"other{number}", graphs.mlp(number, width=16 + number))
    with machine(tmp_path / "one", store) as one:
        keys, problems, runs = compiled(shop.root, one)
        assert (len(keys), problems) == (6, []) and runs > 3
    with machine(tmp_path / "two", store) as two:
        assert compiled(shop.root, two) == (keys, [], 0)


def test_what_was_compiled_before_the_store_was_named_is_added_to_it(shop, tmp_path, store):
    shop.add("m", graphs.mlp())
    with Cache(tmp_path / "one") as alone:
        compiled(shop.root, alone)
        alone.save_profile(PROFILE)
    with machine(tmp_path / "one", store) as one:
        assert compiled(shop.root, one)[2] == 0
        assert one.share() == ()
        before = {path: path.stat().st_mtime_ns for path in files_of(store)}
        assert one.share() == ()
        assert {path: path.stat().st_mtime_ns for path in files_of(store)} == before
    with machine(tmp_path / "two", store) as two:
        assert compiled(shop.root, two) == (["m/1"], [], 0)
        assert two.profile("c", "cpu") == PROFILE


def test_it_may_be_where_fsspec_reaches(shop, tmp_path):
    place = f"memory://{tmp_path.name}/store"
    shop.add("m", graphs.mlp())
    with machine(tmp_path / "one", place) as one:
        keys, problems, _ = compiled(shop.root, one)
        weights_id = fill(one)
        assert problems == [] and one.share() == ()
    with machine(tmp_path / "two", place) as two:
        assert compiled(shop.root, two) == (keys, [], 0)
        assert holds(two, weights_id) == [True, True, True]
        assert two.shared.problems == ()


def test_one_model_of_an_earlier_cache_is_added_to_it(tmp_path, store):
    with Cache(tmp_path / "one") as alone:
        weights_id = fill(alone)
    with machine(tmp_path / "one", store) as one:
        one.share_model("c", weights_id)
        one.share_model("python", "f" * 64)  # neither is in a cache
    with machine(tmp_path / "two", store) as two:
        assert holds(two, weights_id) == [True, False, True], "profiles are the server's own"


def test_a_web_server_that_shows_a_folder_is_a_store_to_read(tmp_path, store):
    pytest.importorskip("aiohttp", reason="fsspec reaches http:// by it")
    with machine(tmp_path / "one", store) as one:
        weights_id = fill(one)
    handler = partial(SimpleHTTPRequestHandler, directory=str(store))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        serving = threading.Thread(target=web.serve_forever)
        serving.start()
        with machine(tmp_path / "two", f"http://127.0.0.1:{web.server_port}") as two:
            assert holds(two, weights_id) == [True, True, True]
            assert two.code("other") is None
            assert two.shared.problems == ()
        web.shutdown()
        serving.join()


def test_a_url_that_nothing_reaches_is_an_error_with_what_to_install(tmp_path):
    with pytest.raises(RepositoryError, match=r"store: expected .* found nowhere://x .*pip install"):
        Cache(tmp_path, store="nowhere://x")


# Damage


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["code.json", "profile", "weights", "model.onnx"])
def test_what_is_damaged_there_is_absent_and_stored_anew_by_who_makes_it_again(tmp_path, store, caplog, what):
    with machine(tmp_path / "one", store) as one:
        weights_id = fill(one)
    named = {
        "code.json": "*/codes/c/code.json", "profile": "*/profiles/*", "weights": f"objects/*/{weights_id}",
        "model.onnx": f"objects/*/{hash_of(FILES['model.onnx'])}",
    }  # fmt: skip
    [path] = store.glob(named[what])
    whole = path.read_bytes()
    damage(path)
    lost = ["code" if what in {"code.json", "model.onnx"} else what]
    with machine(tmp_path / "two", store) as two:
        assert holds(two, weights_id) == [name not in lost for name in ("code", "profile", "weights")]
        assert "is damaged (" in caplog.text and path.name in caplog.text
        fill(two)
    assert path.read_bytes() == whole
    with machine(tmp_path / "three", store) as three:
        assert holds(three, weights_id) == [True, True, True]


def test_a_record_in_the_place_of_another_is_not_that(tmp_path, store):
    with machine(tmp_path / "one", store) as one:
        one.save_record("compiled", "a", ["one"])
        (path,) = store.glob("*/compiled/a.json")
        path.rename(path.with_name("b.json"))
    with machine(tmp_path / "two", store) as two:
        assert two.record("compiled", "b", list) is None


def test_a_code_whose_files_are_not_all_there_is_absent(tmp_path, store):
    with machine(tmp_path / "one", store) as one:
        fill(one)
    (store / "objects" / hash_of(b"{}")[:2] / hash_of(b"{}")).unlink()
    with machine(tmp_path / "two", store) as two:
        assert two.code("c") is None
        assert two.save_code(CODE, FILES) is not None
    with machine(tmp_path / "three", store) as three:
        assert three.code("c") is not None


def test_damage_in_the_cache_is_mended_from_the_store(tmp_path, store):
    with machine(tmp_path / "one", store) as one:
        weights_id = fill(one)
        damage(one.weights_path(weights_id))
        damage(one.root / "codes" / "c" / "model.onnx")
        assert one.inspect("weights", weights_id) and one.inspect("code", "c")
        assert {each.what for each in one.damage} == {"weights", "code"}


# Stores that fail. Their machines go on alone, and say why, once.


def child(code: str, *arguments: object, under: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A Python process; ``under`` a command that runs it."""
    return subprocess.Popen(
        [*under, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


COMPILE = """
    import sys
    from clockwork_serve.store import Cache, Compiler, Repository, StoreConfig, compile_all

    config = StoreConfig(cache_dir=sys.argv[2])
    with Cache(config.cache_dir, store=sys.argv[3]) as cache:
        compiler = Compiler(cache, config)
        served, problems = compile_all(Repository(sys.argv[1], config), cache, compiler=compiler, threads=1)
        for each in (*[one.model.key for one in served], *problems, *cache.share()):
            print(each)
        print(compiler.optimiser.runs)
"""


def said(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """What it printed, line by line, and what it logged."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out.splitlines(), err


def test_one_that_cannot_be_written_is_read_and_the_rest_is_compiled(shop, tmp_path, store):
    shop.add("known", graphs.mlp(1))
    with machine(tmp_path / "one", store) as one:
        compiled(shop.root, one)
    shop.add("new", graphs.mlp(2, width=24))
    cache_dir = tmp_path / "two"

    under = with_read_only(store)
    lines, err = said(child(COMPILE, shop.root, cache_dir, store, under=under))
    *keys, problem, runs = lines
    assert keys == ["known/1", "new/1"]
    assert int(runs) > 0
    assert "store: expected a store that this process may write, found" in problem
    assert str(store) in problem and "Read-only" in problem
    assert err.count("store: expected") == 1


def test_one_that_is_full_keeps_no_half_and_the_rest_is_compiled(shop, tmp_path, store):
    for number in range(3):
        shop.add(f"m{number}", graphs.mlp(number, width=30_000))  # blobs of 1.4 MB
    under = with_small_disk(store, "2m")
    show = (
        COMPILE
        + """
        import pathlib
        print(sorted(path.name for path in pathlib.Path(sys.argv[3], "tmp").iterdir()))
        print(sorted(path.stat().st_size for path in pathlib.Path(sys.argv[3]).glob("objects/*/*")))
    """
    )
    lines, err = said(child(textwrap.dedent(show), shop.root, tmp_path / "one", store, under=under))
    *keys, problem, _, drafts, sizes = lines
    assert keys == ["m0/1", "m1/1", "m2/1"]
    assert "store: expected a store with room, found" in problem and "free some space" in problem
    assert drafts == "[]"
    assert sum(size > 1_000_000 for size in msgspec.json.decode(sizes)) == 1
    assert err.count("store: expected") == 1


def test_one_that_is_not_there_is_never_made(tmp_path, caplog):
    missing = tmp_path / "not" / "mounted"
    with machine(tmp_path / "one", missing) as one:
        weights_id = fill(one)
        assert holds(one, weights_id) == [True, True, True]
        assert not one.has_weights("0" * 64)
        found = "\n".join(map(str, one.share()))
    assert "there is no such folder: make it, or mount it" in found
    assert not missing.parent.exists()
    assert caplog.text.count("there is no such folder") == 2  # it is neither read nor written any more


def test_one_that_does_not_answer_is_given_up(tmp_path, store):
    """A pipe that nobody writes to is what a hung file system looks like."""
    name = "v6-0/profiles/a.json"
    (store / name).parent.mkdir(parents=True)
    os.mkfifo(store / name)
    shared = SharedStore(str(store), "v6-0", b"{}", stall_s=0.2)
    began_s = time.monotonic()
    assert shared.record("profiles/a.json") is None
    assert shared.record("profiles/b.json") is None
    assert time.monotonic() - began_s < 60
    (problem,) = shared.problems
    assert "expected a store that moves a byte within 0.2 s" in str(problem)
    os.close(os.open(store / name, os.O_WRONLY))  # lets the thread go


class Failing(FolderFiles):
    """A store whose first ``times`` operations fail."""

    def __init__(self, root: Path, times: int, error: OSError) -> None:
        super().__init__(root)
        self.times, self.error, self.asked = times, error, 0

    def _check(self) -> None:
        super()._check()
        self.asked += 1
        if self.asked <= self.times:
            raise self.error


@pytest.mark.parametrize(
    ("times", "error", "works", "asked"),
    [
        (2, OSError(errno.EIO, "lost"), True, 3), (3, OSError(errno.EIO, "lost"), False, 3),
        (1, PermissionError(errno.EACCES, "no"), False, 1),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_three_times(store, times, error, works, asked):
    shared = SharedStore(str(store), "v6-0", b"{}", pauses_s=(0.0, 0.0))
    shared.save_record("profiles/a.json", sealed("profiles/a.json", b"[]"))
    files = shared._files = Failing(store, times, error)
    assert (shared.record("profiles/a.json") == b"[]") is works
    assert files.asked == asked
    assert bool(shared.problems) is not works
    if not works:
        assert shared.record("profiles/a.json") is None
        assert files.asked == asked, "it is asked no more"


def test_a_store_for_other_machines_is_told_in_what_they_differ(tmp_path, store, caplog):
    with machine(tmp_path / "one", store, fingerprint=FACTS) as one:
        weights_id = fill(one)
    with machine(tmp_path / "two", store, fingerprint=FACTS | {"cpu_flags": "g"}) as two:
        assert holds(two, weights_id) == [False, False, True], "weights are contents"
        assert two.profile("d", "cpu") is None
    assert caplog.text.count("store: expected artefacts for this version, runtime and kind of CPU") == 1
    assert "those for another kind of CPU" in caplog.text
    caplog.clear()
    with machine(tmp_path / "three", store, fingerprint=FACTS | {"onnxruntime": "2.0"}) as three:
        assert three.code("c") is None
    assert "onnxruntime 1.99, not 2.0" in caplog.text


def test_what_need_not_last_is_written_over_and_leaves_no_draft(tmp_path):
    files = FolderFiles(tmp_path)
    for content in (b"of some length", b"shorter", b"of some length again"):
        files.put("a/b", content, lambda: None, lasts=False)
        assert files.read("a/b") == content
    files.persist("a/b")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_one_that_every_user_may_write_to_is_warned_of(store, caplog):
    store.chmod(0o777)
    SharedStore(str(store), "v6-0", b"{}")
    assert f"every user may write to {store}" in caplog.text


# Several machines at once, and killed ones


def test_a_process_killed_while_it_writes_leaves_a_draft_that_is_removed_later(tmp_path, store):
    dying = child(
        """
        import os, signal, sys
        from clockwork_serve.store import Cache, shared

        def half(file, data):
            file.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        with Cache(sys.argv[1], store=sys.argv[2]) as cache:
            shared._write = half
            cache.save_weights(b"w" * 1000)
        """,
        tmp_path / "one", store,
    )  # fmt: skip
    assert dying.wait(60) == -signal.SIGKILL
    dying.communicate()
    (draft,) = files_of(store)
    assert (draft.parent, draft.stat().st_size) == (store / "tmp", 500)
    with machine(tmp_path / "two", store) as two:
        assert not two.has_weights(hash_of(b"w" * 1000))
        fill(two)
    assert draft.exists(), "its process may live, on another machine"
    os.utime(draft, (time.time() - DRAFT_S - 60,) * 2)
    with machine(tmp_path / "three", store) as three:
        three.save_weights(b"v" * 1000)
    assert not draft.exists()


def test_machines_that_fill_it_at_once_leave_it_whole(shop, tmp_path, store):
    for number in range(4):
        shop.add(f"m{number}", graphs.convnet(number))
    processes = [child(COMPILE, shop.root, tmp_path / name, store) for name in ("one", "two", "three")]
    for process in processes:
        assert said(process)[0][:-1] == [f"m{number}/1" for number in range(4)]
    with machine(tmp_path / "four", store) as four:
        assert compiled(shop.root, four) == ([f"m{number}/1" for number in range(4)], [], 0)
        assert four.shared.problems == ()
    assert list((store / "tmp").iterdir()) == []


def test_threads_that_ask_for_the_same_code_all_get_it(tmp_path, store):
    with machine(tmp_path / "one", store) as one:
        fill(one)
    with machine(tmp_path / "two", store) as two:
        found: list[Code | None] = []
        threads = [threading.Thread(target=lambda: found.append(two.code("c"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and None not in found
        assert two.damage == []
