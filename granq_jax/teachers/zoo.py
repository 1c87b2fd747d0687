"""Public checkpoints by name, kept in the user's cache.

They are pytorchcv's, which publishes each as a zip file that holds one ``.pth``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import filelock
import platformdirs

from granq_jax.errors import InputError
from granq_jax.files.archives import open_zip
from granq_jax.runtime.paths import expanded

RELEASES = "https://github.com/osmr/imgclsmob/releases/download"

_MAX_BYTES = 256 << 20  # the largest checkpoint, ResNet-50's, has 98


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
      name: of the network, in the zoo.
      error: its error in 1/100 % (top-1 of CIFAR, top-5 of ImageNet), as in the file's name.
      sha1: of the ``.pth`` file, unzipped.
      release: tag of the release it is attached to.

    Examples:
      >>> CHECKPOINTS["resnet18"].file
      'resnet18-0982-0126861b.pth'
      >>> CHECKPOINTS["resnet18"].url
      'https://github.com/osmr/imgclsmob/releases/download/v0.0.153/resnet18-0982-0126861b.pth.zip'
    """

    name: str
    error: str
    sha1: str
    release: str

    @property
    def file(self) -> str:
        """Name of the ``.pth`` file, in the zip file and in the cache."""
        return f"{self.name}-{self.error}-{self.sha1[:8]}.pth"

    @property
    def url(self) -> str:
        """Where the zip file is."""
        return f"{RELEASES}/{self.release}/{self.file}.zip"


CHECKPOINTS = {
    checkpoint.name: checkpoint
    for checkpoint in (
        Checkpoint("resnet20_cifar10", "0597", "9b0024ac4c2f374cde2c5052e0d0344a75871cdb", "v0.0.163"),
        Checkpoint("resnet20_cifar100", "2964", "a5322afed92fa96cb7b3453106f73cf38e316151", "v0.0.180"),
        Checkpoint("resnet18", "0982", "0126861b4cd7f7b14196b1e01827da688f8bab6d", "v0.0.153"),
        Checkpoint("resnet50", "0633", "b00d1c8e52aa7a2badc705b1545aaf6ccece6ce9", "v0.0.329"),
        Checkpoint("mobilenetv2_w1", "0887", "13a021bca5b679b76156829743f7182da42e8bb6", "v0.0.213"),
    )
}


def fetch(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """The path of a public checkpoint, downloaded unless it is in the cache already.

    A transfer that breaks off is resumed, by this call or a later one. A machine that is offline
    takes the ``.pth`` file, or the ``.pth.zip`` file as published, that someone put in the cache.

    Args:
      name: one of :data:`CHECKPOINTS`.
      cache_dir: where checkpoints are kept, ``checkpoints`` in the user's cache of ``granq-jax`` by
        default.

    Returns:
      The path of the ``.pth`` file, whose SHA-1 is the published one.

    Raises:
      InputError: if there is no checkpoint of that name, or the file is not the published one. A
        file found in the cache is left there then; a downloaded one is not.
      ConnectionError: if it could not be downloaded, in few redirects that all stay with ``https``.
        What has arrived is kept, unless it is more than any checkpoint has.

    Examples:
      >>> fetch("resnet19")
      Traceback (most recent call last):
      ...
      granq_jax.errors.InputError: config.teacher: got 'resnet19', allowed are resnet20_cifar10, ..., mobilenetv2_w1
    """
    if not isinstance(name, str) or name not in CHECKPOINTS:
        raise InputError(f"config.teacher: got {name!r}, allowed are {', '.join(CHECKPOINTS)}")
    checkpoint = CHECKPOINTS[name]
    users = platformdirs.user_cache_path("granq-jax") / "checkpoints"
    cache = expanded(users if cache_dir is None else cache_dir, "cache_dir")
    path = cache / checkpoint.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):  # which ends with the process, too
            if not path.exists():  # no other process was faster
                _provide(checkpoint, path)
    if (found := _sha1(path)) != checkpoint.sha1:
        raise InputError(
            f"config.teacher: got {name!r}, but {path} has SHA-1 {found} instead of {checkpoint.sha1}; "
            f"remove it, and it will be downloaded from {checkpoint.url}"
        )
    return path


def _provide(checkpoint: Checkpoint, path: Path) -> None:
    given = f"config.teacher: got {checkpoint.name!r}"
    archive = path.with_name(path.name + ".zip")
    if archive.exists():
        try:
            _unpack(archive, path, checkpoint.sha1)
        except ValueError as error:
            raise InputError(
                f"{given}, but {archive} {error}; remove it, and it will be downloaded from {checkpoint.url}"
            ) from error
        return

    by_hand = f"download it on another machine and put it at {archive}"
    part = archive.with_name(archive.name + ".part")
    from granq_jax.files.download import download  # a tenth of a second that runs with another teacher need not wait

    try:
        download(checkpoint.url, part, _MAX_BYTES)
    except ConnectionError as error:
        raise ConnectionError(f"{given}, but {checkpoint.url} cannot be downloaded: {error}; {by_hand}") from error
    try:
        _unpack(part, path, checkpoint.sha1)
    except ValueError as error:
        raise InputError(f"{given}, but what came from {checkpoint.url} {error}; try again, or {by_hand}") from error
    finally:
        part.unlink()


def _unpack(archive: Path, path: Path, sha1: str) -> None:
    """Writes the member of ``archive`` that is named like ``path`` there, whole and right or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        try:
            with (
                open_zip(archive) as archived,
                archived.open(path.name) as member,
                unfinished.open("wb") as file,
            ):
                # No more is read than the archive says there is.
                if (size := archived.getinfo(path.name).file_size) > _MAX_BYTES:
                    raise InputError(f"it unpacks to {size} bytes, allowed are {_MAX_BYTES}")
                shutil.copyfileobj(member, file)
        except OSError:
            raise
        except Exception as error:  # of many kinds; what failed is always the zip file
            raise InputError(
                f"is not a sound zip file with {path.name} in it: {' '.join(str(error).split())}"
            ) from error
        if (found := _sha1(unfinished)) != sha1:
            raise InputError(f"holds a file with SHA-1 {found} instead of {sha1}")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _sha1(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()
