"""What is in the cache is whole: after a kill, with two processes at once, and on a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from clockwork_serve.errors import RepositoryError
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import Code, CodeFile, Profile
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all
from clockwork_serve.store.cache import KEPT_DAMAGED, Compiled
from clockwork_serve.store.trial import difference
from tests.mounts import with_everything_read_only
from tests.store import graphs

CODE = Code(
    code_id="c", backend="onnx", path="", inputs=(), outputs=(), batched=False, batch_sizes=(1,), lifted=True
)  # fmt: skip
PROFILE = Profile(
    code_id="c", device_kind="emulated:v100/x", infer_ns={1: 5, 2: 7}, load_base_ns=3, load_ns_per_mib=2
)


@pytest.fixture
def cache(tmp_path):
    cache = Cache(tmp_path / "cache")
    yield cache
    cache.close()


def child(code: str, *arguments: object, under: Sequence[str] = (), **options) -> subprocess.Popen[str]:
    """A Python process that has the store at hand; ``under`` a command that runs it."""
    return subprocess.Popen(
        [*under, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def drafts(cache_dir) -> list:
    return list(cache_dir.glob("*/tmp/*"))


def test_profiles_are_kept_by_code_and_kind_of_device(cache):
    assert cache.profile("c", "emulated:v100/x") is None
    cache.save_profile(PROFILE)
    assert cache.profile("c", "emulated:v100/x") == PROFILE
    assert cache.profile("c", "cpu") is None
    assert cache.profile("d", "emulated:v100/x") is None


def test_a_torn_record_counts_as_absent(cache):
    cache.save_profile(PROFILE)
    (path,) = cache.root.glob("profiles/*")
    path.write_bytes(path.read_bytes()[:20])
    assert cache.profile("c", "emulated:v100/x") is None


def test_another_runtime_or_cpu_has_another_cache(tmp_path, cache):
    other = Cache(tmp_path / "cache", fingerprint={"onnxruntime": "0.1", "cpu_flags": "mmx"})
    cache.save_profile(PROFILE)
    assert other.root != cache.root
    assert other.profile("c", "emulated:v100/x") is None
    other.close()


def test_the_first_of_two_equal_codes_stays(cache):
    first = cache.save_code(CODE, {"model.onnx": b"first"})
    assert cache.save_code(CODE, {"model.onnx": b"second"}) == first
    assert (cache.root / "codes/c/model.onnx").read_bytes() == b"first"
    files = (CodeFile("model.onnx", hash_of(b"first")),)
    assert cache.code("c") == msgspec.structs.replace(CODE, path=str(cache.root / "codes/c"), files=files)


def test_a_code_folder_that_someone_emptied_is_written_again(cache):
    cache.save_code(CODE, {"model.onnx": b"first"})
    (cache.root / "codes/c/code.json").unlink()
    assert cache.code("c") is None
    cache.save_code(CODE, {"model.onnx": b"second"})
    assert (cache.root / "codes/c/model.onnx").read_bytes() == b"second"


def test_weights_are_stored_once_and_truncated_ones_again(cache):
    blob = np.arange(256, dtype=np.uint8)
    weights_id = cache.save_weights(blob)
    path = cache.weights_path(weights_id)
    inode = path.stat().st_ino
    assert cache.save_weights(blob.tobytes()) == weights_id
    assert path.stat().st_ino == inode
    path.write_bytes(b"short")
    assert not cache.has_weights(weights_id, 256)
    cache.save_weights(blob)
    assert path.read_bytes() == blob.tobytes()


def test_no_weights_at_all_are_a_blob_too(cache):
    assert cache.has_weights(cache.save_weights(np.zeros(0, np.uint8)), 0)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RepositoryError, match=r"cache_dir: expected a folder that can be written, found .*file"
    ):
        Cache(tmp_path / "file")


def test_a_folder_whose_name_is_no_text_is_an_error(tmp_path):
    with pytest.raises(RepositoryError, match=r"cache_dir: expected a path in UTF-8, found .*\\udcff"):
        Cache(tmp_path / "\udcff")


def test_it_is_its_owner_s_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        with Cache(tmp_path / "new") as cache:
            assert mode_of(tmp_path / "new") == mode_of(cache.root) == 0o700
    finally:
        os.umask(before)


def test_one_that_was_open_to_others_is_closed_and_the_folder_around_it_is_left_alone(tmp_path, caplog):
    Cache(tmp_path).close()
    (root,) = tmp_path.iterdir()
    tmp_path.chmod(0o755)
    root.chmod(0o775)
    Cache(tmp_path).close()
    assert (mode_of(tmp_path), mode_of(root)) == (0o755, 0o700)
    assert f"cache: {root} was open to other users (mode 0775)" in caplog.text
    caplog.clear()
    Cache(tmp_path).close()
    assert not caplog.records


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_another_user_s_that_more_may_write_is_warned_of_and_left(tmp_path, caplog):
    Cache(tmp_path).close()
    (root,) = tmp_path.iterdir()
    for mode, warned in ((0o777, 1), (0o755, 0)):
        root.chmod(mode)
        os.chown(root, 12345, 12345)
        caplog.clear()
        Cache(tmp_path).close()
        assert (mode_of(root), len(caplog.records)) == (mode, warned)
        assert not warned or "who can write there can change what is served" in caplog.text


def mode_of(path) -> int:
    return path.stat().st_mode & 0o777


READ_ONLY = """
    import sys
    from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all

    config = StoreConfig(cache_dir=sys.argv[2])
    with Cache(config.cache_dir) as cache:
        served, problems = compile_all(Repository(sys.argv[1], config), cache, threads=1)
        for each in (*[one.model.key for one in served], *problems):
            print(each)
"""


def test_a_full_cache_serves_from_a_file_system_that_cannot_be_written(shop, tmp_path):
    shop.add("known", graphs.mlp(1))
    shop.add("touched", graphs.mlp(2))
    cache_dir = tmp_path / "cache"
    with Cache(cache_dir) as cache:
        served, _ = compile_all(Repository(shop.root, StoreConfig(cache_dir=str(cache_dir))), cache)
        assert len(served) == 2
    # Their records say other times: what they compiled to is found by what is in them.
    for path in (shop.root / "touched").rglob("*.onnx"):
        os.utime(path, ns=(10**18, 10**18))
    shop.add("new", graphs.mlp(3, width=24))
    before = {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}
    process = child(READ_ONLY, shop.root, cache_dir, under=with_everything_read_only(cache_dir))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    *served, problem = out.splitlines()
    assert served == ["known/1", "touched/1"]
    for part in (
        "model 'new' version 1: cache_dir: expected the model in the cache",
        str(cache_dir),
        "Read-only",
    ):
        assert part in problem
    assert {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")} == before


def test_an_empty_one_that_cannot_be_written_says_how_to_fill_it(shop, tmp_path):
    (tmp_path / "v1-of-another-version").mkdir()
    process = child(READ_ONLY, shop.root, tmp_path, under=with_everything_read_only(tmp_path))
    _, err = process.communicate(timeout=100)
    said = err.splitlines()[-1]
    for part in (
        f"found {tmp_path} (Read-only file system)",
        "another version",
        "clockwork profile",
        "--cache",
    ):
        assert part in said


def test_damage_in_one_that_cannot_be_written_is_logged_and_a_problem_of_its_model(shop, tmp_path):
    shop.add("good", graphs.mlp(1))
    shop.add("bad", graphs.mlp(2))
    cache_dir = tmp_path / "cache"
    with Cache(cache_dir) as cache:
        served, _ = compile_all(Repository(shop.root, StoreConfig(cache_dir=str(cache_dir))), cache)
        path = {each.model.name: each.model.weights.path for each in served}["bad"]
    with open(path, "r+b") as file:
        file.write(b"damage")
    process = child(READ_ONLY, shop.root, cache_dir, under=with_everything_read_only(cache_dir))
    out, err = process.communicate(timeout=100)
    assert out.splitlines()[0] == "good/1"
    assert "model 'bad' version 1: cache_dir: expected the model in the cache" in out
    assert f"is damaged (other content), and cannot be set aside: {path}" in err


def test_drafts_of_the_living_stay_and_those_of_the_dead_go(tmp_path):
    living = Cache(tmp_path)
    dead = drafts(tmp_path)[0].parent / "dead"
    dead.mkdir()
    (dead / "alive").touch()
    (dead / "half").write_bytes(b"half a blob")
    Cache(tmp_path).close()
    assert drafts(tmp_path) == [living._own]
    living.close()
    assert drafts(tmp_path) == []


HALF_WRITTEN = """
    import os, signal, sys
    from pathlib import Path
    from clockwork_serve.store import Cache

    class Dying(Cache):
        def _write_draft(self, draft, data, place):
            draft.write_bytes(bytes(data)[: len(data) // 2])
            if place.suffix == ".bin":
                os.kill(os.getpid(), signal.SIGKILL)

    Dying(sys.argv[1]).save_weights(b"w" * 1000)
"""


def test_a_process_killed_while_it_writes_leaves_no_half_a_blob(tmp_path):
    process = child(HALF_WRITTEN, tmp_path)
    assert process.wait(60) == -signal.SIGKILL
    process.communicate()
    left = [path for folder in drafts(tmp_path) for path in folder.iterdir()]
    assert any(path.stat().st_size == 500 for path in left)
    assert not list(tmp_path.glob("*/weights/*/*"))
    cache = Cache(tmp_path)
    assert drafts(tmp_path) == [cache._own]
    cache.close()


COMPILE = """
    import sys
    from clockwork_serve.store import Cache, Compiler, Repository, StoreConfig, compile_all

    config = StoreConfig(cache_dir=sys.argv[2])
    cache = Cache(config.cache_dir)
    compiler = Compiler(cache, config)
    print("ready", flush=True)
    sys.stdin.readline()
    tell = lambda done, total, text: print(text, flush=True)
    served, problems = compile_all(Repository(sys.argv[1], config), cache, tell, compiler=compiler)
    assert not problems, problems
    print("runs", compiler.optimiser.runs, "models", sorted(each.model.weights.weights_id for each in served))
    cache.close()
"""


def test_a_compilation_killed_half_way_is_finished_by_the_next_one(shop, tmp_path):
    for number in range(30):
        shop.add(f"m{number:02d}", graphs.normalised(number))
    process = child(COMPILE, shop.root, tmp_path / "killed", stdin=subprocess.PIPE)
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if "/1" in line:  # the first model is done, the rest is on its way
            break
    process.kill()
    process.communicate(timeout=60)
    config = StoreConfig(cache_dir=str(tmp_path / "killed"))
    cache = Cache(config.cache_dir)
    served, problems = compile_all(Repository(shop.root, config), cache)
    assert not problems
    assert drafts(tmp_path / "killed") == [cache._own]
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    for number in (0, 1, 2, 15, 29):
        wanted = graphs.answers(graphs.normalised(number), {"x": x})
        assert difference(shop.run(served[number], {"x": x}), wanted) <= 1e-5
    cache.close()


def test_two_processes_at_once_compile_everything_once(shop, tmp_path):
    for number in range(8):
        shop.add(f"m{number}", graphs.convnet(number))
    processes = [child(COMPILE, shop.root, tmp_path / "both", stdin=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        results.append(out.splitlines()[-1].split(" ", 2))
    assert sum(int(runs) for _, runs, _ in results) == 8
    assert results[0][2] == results[1][2]
    assert drafts(tmp_path / "both") == []
    assert len(list((tmp_path / "both").glob("*/weights/*/*.bin"))) == 8


def test_whoever_holds_a_lock_can_take_an_inner_one_of_any_key(cache):
    done = threading.Event()

    def take_both():
        with cache.lock("a"), cache.lock("a", inner=True):
            done.set()

    threading.Thread(target=take_both, daemon=True).start()
    assert done.wait(60)


FULL = """
    import resource, signal, sys
    from clockwork_serve.errors import RepositoryError
    from clockwork_serve.store import Cache

    cache = Cache(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        cache.save_weights(b"w" * 200_000)
    except RepositoryError as error:
        print(error)
    cache.close()
"""


def test_a_full_disk_is_an_error_with_path_needed_and_free_and_leaves_nothing(tmp_path):
    process = child(FULL, tmp_path)
    out, err = process.communicate(timeout=60)
    assert not err
    assert "cache_dir: expected room for 200000 bytes at " in out
    assert "bytes free" in out
    assert "free some space or put cache_dir on another disk" in out
    assert not list(tmp_path.glob("*/weights/*/*"))
    assert drafts(tmp_path) == []


def test_compiling_on_a_disk_that_fills_serves_what_fits_and_later_the_rest(shop, tmp_path):
    """On a file system of its own, which only the superuser can make."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs the superuser")
    try:
        for number in range(6):
            shop.add(f"m{number}", graphs.mlp(number, width=30_000))  # blobs of 1.4 MB
        config = StoreConfig(cache_dir=str(disk))
        cache = Cache(disk)
        served, problems = compile_all(Repository(shop.root, config), cache, threads=1)
        assert len(served) == 1
        assert {problem.field for problem in problems} == {"cache_dir"}
        assert "room for" in problems[0].expected
        assert not [path for path in cache._own.iterdir() if path.name != "alive"]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True, capture_output=True)
        served, problems = compile_all(Repository(shop.root, config), cache, threads=1)
        assert len(served) == 6
        assert not problems
        cache.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_artefacts_that_disappeared_are_compiled_again(shop):
    first = shop.served("m", graphs.mlp())
    key = next(shop.cache.root.glob("compiled/*")).stem
    compiled = shop.cache.record("compiled", key, Compiled)
    assert compiled.present(shop.cache)
    shop.cache.weights_path(compiled.weights_id).unlink()
    assert not compiled.present(shop.cache)
    assert shop.compile()[0]["m/1"] == first
    assert compiled.present(shop.cache)


# What was damaged


def damage(path, at=None):
    """Change one bit in the middle of a file, or at some place."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 20, 71, 72, -1])
def test_a_record_with_a_changed_bit_is_set_aside_wherever_it_is(cache, at):
    cache.save_profile(PROFILE)
    (path,) = cache.root.glob("profiles/*")
    damage(path, at)
    assert cache.profile("c", "emulated:v100/x") is None
    assert [one.what for one in cache.damage] == ["record"]
    assert not path.exists()
    assert len(list((cache.root / "damaged").iterdir())) == 1
    cache.save_profile(PROFILE)
    assert cache.profile("c", "emulated:v100/x") == PROFILE


def test_a_record_in_the_place_of_another_is_not_that(cache):
    cache.save_record("seen", "a", ["one"])
    cache.save_record("seen", "b", ["two"])
    (cache.root / "seen" / "a.json").replace(cache.root / "seen" / "b.json")
    assert cache.record("seen", "b", list) is None


@pytest.mark.parametrize("name", ["model.onnx", "index.json", "code.json"])
def test_a_code_with_a_damaged_file_is_set_aside_and_stored_again(cache, name):
    files = {"model.onnx": b"graph" * 100, "index.json": b"{}"}
    stored = cache.save_code(CODE, files)
    assert {file.name for file in stored.files} == set(files)
    damage(cache.root / "codes" / "c" / name)
    assert not cache.inspect("code", "c")
    assert [(one.what, one.name) for one in cache.damage] == [("code", "c")]
    assert cache.save_code(CODE, files) == stored
    assert cache.code_file("c", "model.onnx") == files["model.onnx"]
    assert cache.code_file("c", "other") is None


def test_a_code_is_set_aside_though_somebody_removed_the_folder_for_that(cache):
    cache.save_code(CODE, {"model.onnx": b"graph"})
    damage(cache.root / "codes" / "c" / "model.onnx")
    (cache.root / "damaged").rmdir()
    assert cache.save_code(CODE, {"model.onnx": b"graph"}) is not None
    assert cache.code_file("c", "model.onnx") == b"graph"


def test_what_another_process_stores_while_it_is_looked_for_is_not_taken_for_damaged(tmp_path, cache):
    """A code is looked for all the while that another process stores it: absent, then whole."""
    codes = 150
    maker = child(
        """
        import sys
        import msgspec
        from clockwork_serve.store import Cache
        from tests.store.test_cache import CODE
        with Cache(sys.argv[1]) as cache:
            for number in range(int(sys.argv[2])):
                files = {"model.onnx": b"graph"}
                cache.save_code(msgspec.structs.replace(CODE, code_id=str(number)), files)
        """,
        tmp_path / "cache", codes,
    )  # fmt: skip
    for number in range(codes):
        while cache.code(str(number)) is None:
            assert maker.poll() in (None, 0), maker.communicate()[1]
    assert maker.communicate(timeout=60)[1] == ""
    assert cache.damage == [] == list((cache.root / "damaged").iterdir())


@pytest.mark.parametrize("what", ["code", "record", "weights"])
def test_what_took_the_place_of_a_damaged_artefact_since_it_was_read_stays(cache, monkeypatch, what):
    """Between the reading of damage and setting it aside another process set it aside and made it again."""
    weights_id = hash_of(b"w" * 1000)

    def store(other: Cache) -> None:
        other.save_code(CODE, {"model.onnx": b"graph"})
        other.save_profile(PROFILE)
        other.save_weights(b"w" * 1000)

    store(cache)
    place = cache._place(what, {"code": "c", "weights": weights_id}.get(what, "profiles"))
    found = {"code": place / "model.onnx", "record": next(cache.root.glob("profiles/*")), "weights": place}
    damage(found[what])
    real = cache.set_aside

    def made_again_first(*asked) -> bool:
        monkeypatch.undo()
        with Cache(cache.root.parent) as other:
            assert other.set_aside(*asked)
            store(other)
        return real(*asked)

    monkeypatch.setattr(cache, "set_aside", made_again_first)
    looked = {
        "code": lambda: cache.code("c"),
        "record": lambda: cache.profile("c", "emulated:v100/x"),
        "weights": lambda: cache.has_weights(weights_id, 1000),
    }
    assert looked[what]()
    assert cache.damage == []


def test_a_code_that_lacks_a_file_is_absent(cache):
    cache.save_code(CODE, {"model.onnx": b"graph"})
    (cache.root / "codes" / "c" / "model.onnx").unlink()
    assert cache.code("c") is None
    assert "No such file" in cache.damage[0].found


def test_weights_are_absent_if_they_are_others_of_the_same_size(cache):
    weights_id = cache.save_weights(b"w" * 1000)
    cache.weights_path(weights_id).write_bytes(bytes(1000))
    assert not cache.has_weights(weights_id, 1000)
    assert [(one.what, one.name) for one in cache.damage] == [("weights", weights_id)]
    assert cache.save_weights(b"w" * 1000) == weights_id
    assert cache.has_weights(weights_id, 1000)


def test_weights_of_the_right_size_and_other_content_are_replaced_when_they_are_stored(cache):
    weights_id = cache.save_weights(b"w" * 1000)
    cache.weights_path(weights_id).write_bytes(bytes(1000))
    cache.save_weights(b"w" * 1000)
    assert cache.weights_path(weights_id).read_bytes() == b"w" * 1000
    assert len(cache.damage) == 1


def test_a_start_compares_sizes_alone_and_reads_what_is_suspected(tmp_path):
    with Cache(tmp_path, reads_weights=False) as cache:
        weights_id = cache.save_weights(b"w" * 1000)
        cache.weights_path(weights_id).write_bytes(bytes(1000))
        assert cache.has_weights(weights_id, 1000)
        assert not cache.inspect("weights", weights_id)
        assert not cache.has_weights(weights_id, 1000)


def test_of_what_was_set_aside_the_last_few_are_kept(cache):
    for number in range(KEPT_DAMAGED + 5):
        cache.save_record("seen", str(number), number)
        damage(cache.root / "seen" / f"{number}.json")
        cache.record("seen", str(number), int)
    kept = sorted(path.name for path in (cache.root / "damaged").iterdir())
    assert len(kept) == KEPT_DAMAGED
    assert kept[-1].endswith(f"{KEPT_DAMAGED + 4}.json")
    assert len(cache.damage) == KEPT_DAMAGED + 5
