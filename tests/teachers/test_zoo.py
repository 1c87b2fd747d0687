import gzip
import hashlib
import http.server
import io
import socket
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import requests

from granq_jax.teachers import zoo
from tests.conftest import one_line_error

PAYLOAD = np.random.default_rng(0).bytes(500_000)  # which zip cannot make smaller
NAME = "net"
CHECKPOINT = zoo.Checkpoint(NAME, "0123", hashlib.sha1(PAYLOAD).hexdigest(), "v1")


def zipped(payload=PAYLOAD, member=CHECKPOINT.file):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zipfile.ZipInfo(member), payload)
    return buffer.getvalue()


ARCHIVE = zipped()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``body``; what is set after that says how it fails."""

    daemon_threads = False  # closing waits for them

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = ARCHIVE
        self.ranges = "heeded"  # or "ignored", or "misread": the answer is to another range
        self.says_length = True
        self.cuts = []  # after how many bytes the next answers end
        self.seen = []  # (Range, status, bytes sent) of each request


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        size = len(server.body)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges != "ignored" else 0
        if self.path != f"/v1/{CHECKPOINT.file}.zip":
            status, body = 404, b""
        elif start >= size:
            status, body = 416, b""
        else:
            status = 206 if start else 200
            start = start - 1 if start and server.ranges == "misread" else start
            body = server.body[start:]
        compresses = "gzip" in self.headers["Accept-Encoding"]
        body = gzip.compress(body) if compresses else body
        sent = body[: server.cuts.pop(0)] if server.cuts else body
        server.seen.append((asked, status, len(sent)))  # before the client, having read the headers, asks again
        self.send_response(status)
        if compresses:
            self.send_header("Content-Encoding", "gzip")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(zoo, "CHECKPOINTS", {NAME: CHECKPOINT})
    with Server() as server:
        monkeypatch.setattr(zoo, "RELEASES", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path):
    return tmp_path / CHECKPOINT.file


@pytest.fixture
def archive(tmp_path):
    return tmp_path / f"{CHECKPOINT.file}.zip"


@pytest.fixture
def part(tmp_path):
    return tmp_path / f"{CHECKPOINT.file}.zip.part"


def kept(folder):
    return {file.name for file in folder.iterdir() if file.suffix != ".lock"}


def test_urls():
    assert [(name, checkpoint.url) for name, checkpoint in zoo.CHECKPOINTS.items()] == [
        (
            "resnet20_cifar10",
            "https://github.com/osmr/imgclsmob/releases/download/v0.0.163/resnet20_cifar10-0597-9b0024ac.pth.zip",
        ),
        (
            "resnet20_cifar100",
            "https://github.com/osmr/imgclsmob/releases/download/v0.0.180/resnet20_cifar100-2964-a5322afe.pth.zip",
        ),
        (
            "resnet18",
            "https://github.com/osmr/imgclsmob/releases/download/v0.0.153/resnet18-0982-0126861b.pth.zip",
        ),
        (
            "resnet50",
            "https://github.com/osmr/imgclsmob/releases/download/v0.0.329/resnet50-0633-b00d1c8e.pth.zip",
        ),
        (
            "mobilenetv2_w1",
            "https://github.com/osmr/imgclsmob/releases/download/v0.0.213/mobilenetv2_w1-0887-13a021bc.pth.zip",
        ),
    ]
    assert all(len(checkpoint.sha1) == 40 for checkpoint in zoo.CHECKPOINTS.values())


def test_it_is_downloaded_once(server, tmp_path, path):
    for _ in range(2):
        assert zoo.fetch(NAME, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / path.name
    assert (tmp_path / "new" / "folder" / path.name).read_bytes() == PAYLOAD
    assert server.seen == [(None, 200, len(ARCHIVE))]
    assert kept(tmp_path / "new" / "folder") == {path.name}


def test_the_users_cache_is_the_default(server, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo.platformdirs, "user_cache_path", lambda app: tmp_path / app)
    assert zoo.fetch(NAME) == tmp_path / "granq-jax" / "checkpoints" / CHECKPOINT.file


def test_one_of_two_at_once_downloads(server, tmp_path, path, monkeypatch):
    arrived = threading.Barrier(2)

    class LockedWhenBothAreHere(zoo.filelock.FileLock):
        def acquire(self, *args, **kwargs):
            arrived.wait(10)
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(zoo.filelock, "FileLock", LockedWhenBothAreHere)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(zoo.fetch, [NAME] * 2, [tmp_path] * 2)) == [path] * 2
    assert path.read_bytes() == PAYLOAD
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            zipped(PAYLOAD[::-1]),
            (hashlib.sha1(PAYLOAD[::-1]).hexdigest(), CHECKPOINT.sha1),
        ),
        (b"<html>not found</html>", ("not a sound zip file",)),
        (ARCHIVE[:200_000] + b"!" * 1000 + ARCHIVE[201_000:], ("not a sound zip file",)),
        (zipped(member="other.pth"), ("not a sound zip file with", CHECKPOINT.file)),
        (zipped(member=f"../{CHECKPOINT.file}"), ("not a sound zip file with", CHECKPOINT.file)),
    ],
    ids=["another file", "no zip file", "damaged", "no such member", "member elsewhere"],
)
def test_nothing_is_left_of_a_wrong_download(server, tmp_path, archive, body, words):
    server.body = body
    with one_line_error(ValueError, "config.teacher: ", repr(NAME), CHECKPOINT.url, str(archive), *words):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == set()


def test_a_broken_transfer_is_resumed_by_the_same_call(server, tmp_path, path):
    server.cuts = [200_000]
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    (_, _, sent), (asked, status, rest) = server.seen
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    assert sent == 200_000
    assert 0 < start <= 200_000
    assert (status, rest) == (206, len(ARCHIVE) - start)
    assert kept(tmp_path) == {path.name}


def test_a_transfer_that_breaks_every_time_is_kept_for_the_next_call(server, tmp_path, archive, part, path):
    server.cuts = [100_000] * 3
    with one_line_error(
        ConnectionError, "config.teacher: ", repr(NAME), CHECKPOINT.url, "broke off 3 times", str(part), f"at {archive}"
    ):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == {part.name}
    assert ARCHIVE.startswith(part.read_bytes())
    start = part.stat().st_size
    assert 100_000 < start <= 300_000

    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    assert server.seen[3:] == [(f"bytes={start}-", 206, len(ARCHIVE) - start)]
    assert kept(tmp_path) == {path.name}


@pytest.mark.parametrize(("ranges", "statuses"), [("ignored", [200]), ("misread", [206, 200])])
def test_it_starts_over_if_it_cannot_resume(server, tmp_path, part, path, ranges, statuses):
    part.write_bytes(ARCHIVE[:1000])
    server.ranges = ranges
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    assert [status for _, status, _ in server.seen] == statuses
    assert kept(tmp_path) == {path.name}


def test_what_is_sent_again_replaces_what_there_was(server, tmp_path, part):
    part.write_bytes(ARCHIVE[:1000])
    server.ranges = "ignored"
    server.cuts = [100_000] * 3
    with one_line_error(ConnectionError, "broke off 3 times"):
        zoo.fetch(NAME, tmp_path)
    assert 0 < part.stat().st_size <= 100_000
    assert ARCHIVE.startswith(part.read_bytes())


@pytest.mark.parametrize("old", [ARCHIVE, ARCHIVE + b"more"], ids=["complete", "longer"])
def test_it_starts_over_if_nothing_is_to_be_added(server, tmp_path, part, path, old):
    part.write_bytes(old)
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    assert server.seen == [(f"bytes={len(old)}-", 416, 0), (None, 200, len(ARCHIVE))]
    assert kept(tmp_path) == {path.name}


def test_a_part_of_another_file_is_found_out(server, tmp_path, part):
    part.write_bytes(b"!" * 1000)
    with one_line_error(ValueError, CHECKPOINT.url):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == set()


def test_the_length_need_not_be_announced(server, tmp_path):
    server.says_length = False
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD


def test_an_answer_that_is_no_file_is_refused(server, tmp_path, archive, part, monkeypatch):
    part.write_bytes(ARCHIVE[:1000])
    monkeypatch.setattr(zoo, "RELEASES", f"{zoo.RELEASES}/elsewhere")
    with one_line_error(ConnectionError, "config.teacher: ", repr(NAME), CHECKPOINT.url, "404", f"at {archive}"):
        zoo.fetch(NAME, tmp_path)
    assert part.read_bytes() == ARCHIVE[:1000]


def test_offline(tmp_path, archive, monkeypatch):
    with socket.socket() as nobody:  # holds a port, listens to none
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(zoo, "CHECKPOINTS", {NAME: CHECKPOINT})
        monkeypatch.setattr(zoo, "RELEASES", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with one_line_error(
            ConnectionError,
            "config.teacher: ",
            repr(NAME),
            CHECKPOINT.url,
            "on another machine",
            f"put it at {archive}",
        ):
            zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == set()


def test_files_put_in_the_cache_are_used(server, tmp_path, path, archive):
    archive.write_bytes(ARCHIVE)
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    assert kept(tmp_path) == {path.name, archive.name}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_bytes(PAYLOAD)
    assert zoo.fetch(NAME, str(tmp_path / "other")) == tmp_path / "other" / path.name
    assert server.seen == []


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (CHECKPOINT.file, b"mine", (hashlib.sha1(b"mine").hexdigest(), CHECKPOINT.sha1)),
        (f"{CHECKPOINT.file}.zip", zipped(b"mine"), (hashlib.sha1(b"mine").hexdigest(), CHECKPOINT.sha1)),
        (f"{CHECKPOINT.file}.zip", b"mine", ("not a sound zip file",)),
    ],
    ids=["pth", "zip of another file", "no zip file"],
)
def test_wrong_files_put_in_the_cache_are_refused_and_kept(server, tmp_path, file, content, words):
    (tmp_path / file).write_bytes(content)
    path = str(tmp_path / file)
    with one_line_error(ValueError, "config.teacher: ", repr(NAME), path, "remove it", CHECKPOINT.url, *words):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == {file}
    assert (tmp_path / file).read_bytes() == content
    assert server.seen == []


def test_an_unknown_name_is_refused(tmp_path):
    with one_line_error(ValueError, "config.teacher: ", "'resnet19'", *zoo.CHECKPOINTS):
        zoo.fetch("resnet19", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


class LongBody:
    """Counts how much of it was read."""

    def __init__(self):
        self.read = 0

    def stream(self, size, decode_content=True):
        while self.read < 10_000_000:
            self.read += size
            yield b"!" * size

    def close(self):
        pass


@pytest.fixture
def answers(monkeypatch):
    """Answers by URL: the target of a redirect, or the body; returns those dictionaries and what was asked for."""
    table, asked = {}, []

    def send(self, request, **_):
        response = requests.Response()
        response.url, response.request = request.url, request
        asked.append(request.url)
        answer = table.get(request.url)
        if isinstance(answer, bytes):
            response.status_code, response.raw = 200, io.BytesIO(answer)
        else:
            response.status_code = 302 if answer else 404
            response.headers["Location"] = answer or ""
            table[request.url, "body"] = response.raw = LongBody()
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.setattr(zoo, "CHECKPOINTS", {NAME: CHECKPOINT})
    return table, asked


def test_a_redirect_to_another_host_is_followed(answers, tmp_path):
    table, asked = answers
    table[CHECKPOINT.url] = "https://objects.example.org/a?b=c"
    table["https://objects.example.org/a?b=c"] = "/d"
    table["https://objects.example.org/d"] = ARCHIVE
    assert zoo.fetch(NAME, tmp_path).read_bytes() == PAYLOAD
    assert asked == [CHECKPOINT.url, "https://objects.example.org/a?b=c", "https://objects.example.org/d"]
    assert table[CHECKPOINT.url, "body"].read == 0


@pytest.mark.parametrize(
    "target", ["http://example.org/a", "file:///etc/passwd", "ftp://example.org/a", "HTTP://example.org", "https://["]
)
def test_a_redirect_to_another_scheme_is_not_followed(answers, tmp_path, target):
    table, asked = answers
    table[CHECKPOINT.url] = target
    table[target] = ARCHIVE
    words = ["Invalid"] if target == "https://[" else ["redirects to", target[4:], "another scheme"]
    with one_line_error(ConnectionError, "config.teacher", CHECKPOINT.url, *words):
        zoo.fetch(NAME, tmp_path)
    assert asked == [CHECKPOINT.url]
    assert kept(tmp_path) == set()


def test_redirects_come_to_an_end(answers, tmp_path):
    table, asked = answers
    table[CHECKPOINT.url] = CHECKPOINT.url
    with one_line_error(ConnectionError, "config.teacher", "redirects more than 5 times"):
        zoo.fetch(NAME, tmp_path)
    assert len(asked) == 6


@pytest.mark.parametrize("says_length", [True, False])
def test_a_server_that_sends_without_end_is_cut_off(server, tmp_path, monkeypatch, says_length):
    monkeypatch.setattr(zoo, "_MAX_BYTES", 100_000)
    server.body, server.says_length = bytes(50_000_000), says_length
    with one_line_error(ConnectionError, "config.teacher", CHECKPOINT.url, "sends more than 100000 bytes"):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == set()
    assert len(server.seen) == 1


def test_an_archive_that_unpacks_to_more_than_any_checkpoint_is_refused(server, tmp_path, archive, monkeypatch):
    monkeypatch.setattr(zoo, "_MAX_BYTES", 1_000_000)
    monkeypatch.setattr(zoo.shutil, "copyfileobj", mock.Mock(side_effect=AssertionError("it was unpacked")))
    archive.write_bytes(zipped(bytes(100_000_000)))
    with one_line_error(ValueError, "config.teacher", str(archive), "unpacks to 100000000 bytes, allowed are 1000000"):
        zoo.fetch(NAME, tmp_path)


def test_no_more_is_unpacked_than_the_archive_announces(server, tmp_path, archive):
    """The limit holds for what is unpacked, not only for what is announced: zipfile stops there."""
    data = bytearray(zipped(bytes(100_000_000)))
    for signature, offset in (b"PK\1\2", 24), (b"PK\3\4", 22):  # the uncompressed size
        place = data.index(signature) + offset
        data[place : place + 4] = (5).to_bytes(4, "little")
    archive.write_bytes(data)
    with one_line_error(ValueError, str(archive), "not a sound zip file"):
        zoo.fetch(NAME, tmp_path)
    assert kept(tmp_path) == {archive.name}
