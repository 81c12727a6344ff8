"""A file is stored whole or not at all, under a key that the server made, in a folder or somewhere else."""

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pusa.server.jobs.store import FileStore, StorageFullError

VIDEO = "results/video_1/1/video.mp4"
IMAGE = "inputs/video_1/0.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture(params=["local", "memory"])
def store(request: Any, folder: Path) -> FileStore:
    if request.param == "local":
        return FileStore(str(folder))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return FileStore("memory://bucket/pusa/")


def written(tmp_path: Path, data: bytes, name: str = "made.bin") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def keys(store: FileStore, prefix: str = "") -> set[str]:
    return {key for key, _ in store.keys(prefix)}


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_what_is_stored_is_read_back(store, tmp_path):
    began = time.time()
    store.put_bytes(IMAGE, b"image")
    store.put_file(VIDEO, written(tmp_path, b"0123456789"))
    assert store.get_bytes(IMAGE) == b"image"
    assert (store.size(VIDEO), store.exists(VIDEO), store.exists("results/video_1")) == (10, True, False)
    with store.open(VIDEO) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    assert store.fetch(VIDEO, tmp_path).read_bytes() == b"0123456789"
    assert keys(store) == {IMAGE, VIDEO}
    assert keys(store, "results/video_1") == {VIDEO}
    assert keys(store, "results/video_2") == set()
    assert all(began - 2 <= at <= time.time() + 2 for _, at in store.keys(""))


def test_storing_again_replaces_and_the_source_stays(store, tmp_path):
    path = written(tmp_path, b"long enough")
    store.put_file(IMAGE, path)
    store.put_bytes(IMAGE, b"short")
    assert store.get_bytes(IMAGE) == b"short"
    assert path.read_bytes() == b"long enough"


def test_what_was_made_long_ago_counts_as_stored_now(store, tmp_path):
    path = written(tmp_path, b"old")
    os.utime(path, (1, 1))
    store.put_file(IMAGE, path)  # else a sweep would take it for an orphan before its job is there
    [(_, at)] = store.keys()
    assert at > time.time() - 60


def test_an_absent_key_is_not_found_and_may_be_deleted(store, tmp_path):
    for read in (store.get_bytes, store.open, store.size, lambda key: store.fetch(key, tmp_path)):
        with pytest.raises(FileNotFoundError):
            read(IMAGE)
    assert not store.exists(IMAGE)
    store.delete(IMAGE)
    store.delete_prefix("results/video_1")


def test_deleting_leaves_the_others(store):
    for key in (VIDEO, "results/video_1/2/video.mp4", "results/video_10/1/video.mp4", IMAGE):
        store.put_bytes(key, b"x")
    store.delete_prefix("results/video_1")
    assert keys(store) == {"results/video_10/1/video.mp4", IMAGE}
    store.delete(IMAGE)
    assert keys(store) == {"results/video_10/1/video.mp4"}


@pytest.mark.parametrize(
    "key",
    [
        *(
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "a..b",
            "a//b",
            "a/",
            "./a",
            ".hidden",
            "a/.part-1",
            "A",
            "ä",
        ),
        *("a b", "a\\b", "a\0", "a\n", "~/x", "C:x", "http://x/y", "a" * 256),
    ],
)
def test_what_is_no_key_is_refused_by_every_verb(store, tmp_path, key):
    for verb in (
        store.get_bytes,
        store.open,
        store.size,
        store.exists,
        store.local,
        store.delete,
        store.delete_prefix,
        lambda key: store.fetch(key, tmp_path),
        lambda key: store.put_bytes(key, b"x"),
        lambda key: store.put_file(key, written(tmp_path, b"x")),
        lambda key: list(store.keys(key)) if key else store.size(key),
    ):
        if verb == store.local and store.local("a") is None:
            continue
        with pytest.raises(ValueError, match=r"is not a key: small letters, digits and _\.- in parts"):
            verb(key)


def test_what_lies_beside_the_store_is_never_seen(folder, tmp_path):
    store = FileStore(folder.as_uri())
    secret = written(tmp_path, b"secret")
    folder.joinpath("inputs").mkdir()
    folder.joinpath("inputs", "link.png").symlink_to(secret)
    assert list(store.keys()) == []


# ---- In a folder -----------------------------------------------------------------------------------------------------


def test_a_local_store_gives_paths_and_its_free_space(folder, tmp_path):
    store = FileStore(str(folder))
    store.put_bytes(IMAGE, b"image")
    assert store.local(IMAGE) == folder / IMAGE == store.fetch(IMAGE, tmp_path)
    assert store.free_bytes() == pytest.approx(shutil.disk_usage(tmp_path).free, abs=2**30)


def test_content_is_on_disk_before_its_name_and_every_new_folder_in_its_parent(folder, monkeypatch):
    store = FileStore(str(folder))
    steps: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        assert path.is_dir() or path.read_bytes() == b"image"  # nothing is left in a buffer
        steps.append(("sync", "part" if path.is_file() else str(path.relative_to(folder))))
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append(("rename", str(target.relative_to(folder))))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    store.put_bytes(IMAGE, b"image")
    assert steps == [("sync", "."), ("sync", "inputs"), ("sync", "part"), ("rename", IMAGE), ("sync", "inputs/video_1")]


def test_a_full_disk_leaves_what_was_there_and_nothing_half(folder, tmp_path, monkeypatch):
    store = FileStore(str(folder))
    store.put_bytes(IMAGE, b"before")

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(3))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    for key in (IMAGE, VIDEO):
        with pytest.raises(StorageFullError, match=f"No space left on device: {key} was not stored; delete") as told:
            store.put_file(key, written(tmp_path, b"too much"))
        assert told.value.errno == errno.ENOSPC
    assert store.get_bytes(IMAGE) == b"before"
    assert [path for path in everything(folder) if (folder / path).is_file()] == [IMAGE]


def test_a_disk_that_is_full_when_it_comes_to_writing_is_one_too(folder, monkeypatch):
    store = FileStore(str(folder))

    def full(handle: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    folder.joinpath("inputs").mkdir()
    folder.joinpath("inputs/video_1").mkdir()
    with pytest.raises(StorageFullError):
        store.put_bytes(IMAGE, b"image")
    assert [path for path in everything(folder) if (folder / path).is_file()] == []


def test_other_errors_stay_what_they_are(folder, tmp_path):
    store = FileStore(str(folder))
    with pytest.raises(FileNotFoundError):
        store.put_file(IMAGE, tmp_path / "none")
    store.put_bytes("inputs/video_1", b"a file where a folder is wanted")
    with pytest.raises(OSError) as told:
        store.put_bytes(IMAGE, b"x")
    assert not isinstance(told.value, StorageFullError)


WRITE_FOR_EVER = """
import sys
from pusa.server.jobs.store import FileStore
store = FileStore(sys.argv[1])
data = [bytes([n]) * 200_000 for n in (65, 66)]
n = 0
while True:
    store.put_bytes(f"results/{n % 3}/video.mp4", data[n % 2])
    n += 1
    if n == 5:
        print("going", flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_files(folder):
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.kill()
    process.wait(timeout=60)
    store = FileStore(str(folder))
    assert len(keys(store)) == 3
    for key in keys(store):
        assert store.get_bytes(key) in (b"A" * 200_000, b"B" * 200_000)
    assert store.remove_unfinished(time.time() - 60) == 0  # may still be written by somebody
    left = [path for path in everything(folder) if ".part-" in path]
    assert store.remove_unfinished(time.time() + 1) == len(left)
    assert not [path for path in everything(folder) if ".part-" in path]


def test_readers_see_whole_files_while_they_are_replaced(folder):
    store = FileStore(str(folder))
    store.put_bytes(IMAGE, b"a" * 100_000)
    done = threading.Event()

    def write() -> None:
        for n in range(30):
            store.put_bytes(IMAGE, bytes([98 + n % 2]) * 100_000)
        done.set()

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(write)
        seen = 0
        while not done.is_set() or not seen:
            data = store.get_bytes(IMAGE)
            assert len(data) == 100_000
            assert len(set(data)) == 1
            seen += 1
        writing.result()


def test_folders_that_are_left_empty_go_even_while_others_write_there(folder):
    store = FileStore(str(folder))

    def use(name: str) -> None:
        for n in range(40):
            store.put_bytes(f"inputs/{n % 2}/{name}.png", b"x")
            store.delete(f"inputs/{n % 2}/{name}.png")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(use, "abcd"))
    assert everything(folder) == []


# ---- Elsewhere -------------------------------------------------------------------------------------------------------


def test_a_remote_store_has_no_paths_and_fetches_copies(tmp_path):
    store = FileStore("memory://elsewhere")
    store.put_bytes(VIDEO, b"video")
    assert (store.local(VIDEO), store.free_bytes()) == (None, None)
    copy = store.fetch(VIDEO, tmp_path)
    assert (copy.parent, copy.suffix, copy.read_bytes()) == (tmp_path, ".mp4", b"video")


def test_an_upload_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    store = FileStore("memory://failing")
    store.put_bytes(VIDEO, b"before")
    memory = fsspec.filesystem("memory")

    def broken(target: str, data: bytes) -> None:
        memory.store[target] = io.BytesIO(data[:2])
        raise ConnectionError("broken pipe")

    monkeypatch.setattr(memory, "pipe_file", broken)
    with pytest.raises(ConnectionError):
        store.put_bytes(VIDEO, b"after")
    monkeypatch.undo()
    assert store.get_bytes(VIDEO) == b"before"
    assert keys(store) == {VIDEO}
    assert store.remove_unfinished(time.time() + 1) == 0


@pytest.mark.parametrize("url", ["nonsense://x", "s4://bucket"])
def test_a_store_that_nothing_knows_is_refused(url):
    with pytest.raises(ValueError, match=rf"the store {url.partition(':')[0]}://... cannot be used"):
        FileStore(url)
