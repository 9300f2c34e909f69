"""A bucket in a folder: `gs://` without a network, with what a bucket does not do.

Files appear when they are closed; nothing is appended, renamed in place or locked; a folder is no
more than the common beginning of names.
"""

import contextlib
import os
import shutil
import sys
import types
from pathlib import Path

from etils.epath import backend, gpath, stat_utils
from orbax.checkpoint._src.path import gcs_utils


class Bucket(backend.Backend):
    """The objects `gs://NAME/KEY` are the files `root/NAME/KEY`."""

    def __init__(self, root: Path):
        self.root = root

    def file(self, path) -> Path:
        return self.root / os.fspath(path).removeprefix("gs://")

    @contextlib.contextmanager
    def open(self, path, mode):
        assert "a" not in mode, "objects of a bucket cannot be appended to"
        file = self.file(path)
        if "r" in mode:
            with file.open(mode) as opened:
                yield opened
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        part = self.root / f"upload-{os.getpid()}-{id(file)}"
        with part.open(mode) as opened:
            yield opened
        part.replace(file)

    def exists(self, path):
        return self.file(path).is_file() or self.isdir(path)

    def isdir(self, path):
        return any(p.is_file() for p in self.file(path).rglob("*"))

    def listdir(self, path):
        found = self.file(path).iterdir()
        return [p.name for p in found if p.is_file() or self.isdir(p)]

    def glob(self, path):
        file = self.file(path)
        return [f"gs://{p.relative_to(self.root)}" for p in file.parent.glob(file.name)]

    def walk(self, top, *, top_down=True, on_error=None):
        raise NotImplementedError

    def makedirs(self, path, *, exist_ok=False, mode=None):
        pass

    def mkdir(self, path, *, exist_ok=False, mode=None):
        pass

    def rmtree(self, path):
        shutil.rmtree(self.file(path))

    def remove(self, path):
        self.file(path).unlink()

    def rename(self, path, dst):
        raise AssertionError("renaming in a bucket is copying")

    replace = rename

    def copy(self, path, dst, overwrite):
        with self.open(dst, "wb") as file:
            file.write(self.file(path).read_bytes())

    def stat(self, path):
        found = self.file(path).stat()
        return stat_utils.StatResult(self.isdir(path), found.st_size, int(found.st_mtime))


def install(monkeypatch, root: Path) -> None:
    """Makes `gs://` the folder `root`, for etils and for what orbax writes itself."""
    bucket = Bucket(root)
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", bucket)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)

    def kvstore(path):
        end = "" if path.rstrip("/").endswith("_sharding") else "/"  # orbax writes it as a file
        return dict(driver="file", path=f"{bucket.file(path)}{end}")

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", kvstore)
    client = types.SimpleNamespace(get_bucket=lambda name: None)
    storage = types.SimpleNamespace(Client=lambda: client)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", storage)
