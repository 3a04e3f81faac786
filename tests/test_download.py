from __future__ import annotations

import gc
import hashlib
import io
import os
import socket
import threading
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from urllib3.connection import HTTPConnection

from cellseg.data.download import NAME, fetch, is_wanted
from cellseg.data.groups import dsb2018
from cellseg.errors import InputError

NOTE = f"{NAME}.sha256"


class Server(ThreadingHTTPServer):
    body = b""
    status = 200
    missing = 0  # bytes of the body that are announced, but never sent
    announces_length = True
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        body = self.server.body
        self.send_response(self.server.status)
        if self.server.announces_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - self.server.missing])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _sockets_end_here() -> Iterator[None]:
    # requests leaves the socket of a broken-off transfer to the garbage collector.
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def png() -> bytes:
    file = io.BytesIO()
    Image.frombytes("L", (16, 16), bytes(range(256))).save(file, "PNG")
    return file.getvalue()


def kaggle_zip(
    ids: Iterable[str] = tuple(dsb2018()), compression: int = zipfile.ZIP_DEFLATED
) -> bytes:
    images = {f"{image_id}/images/{image_id}.png": png() for image_id in ids}
    masks = {f"{image_id}/masks/nucleus.png": png() for image_id in ids}
    return zip_of(images | masks, compression)


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def corrupted(archive: bytes) -> bytes:
    """The archive with other bytes in its first member's data; its directory stays whole."""
    start = archive.index(b".png") + 4
    return archive[: start + 20] + b"\xff" * 20 + archive[start + 40 :]


def refusal(folder: Path, url: str) -> str:
    with pytest.raises(InputError) as caught:
        fetch(folder, url)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_archive_is_stored_with_its_sha256(tmp_path: Path, server: Server) -> None:
    server.body = kaggle_zip()
    path = fetch(tmp_path / "new" / "folder", server.url)
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == server.body
    digest = hashlib.sha256(server.body).hexdigest()
    assert (path.parent / NOTE).read_text() == f"{digest}  {NAME}\n"
    assert sorted(os.listdir(path.parent)) == [NAME, NOTE]


def test_a_server_may_leave_the_length_out(tmp_path: Path, server: Server) -> None:
    server.body = kaggle_zip()
    server.announces_length = False
    assert fetch(tmp_path, server.url).read_bytes() == server.body


def test_a_second_call_makes_no_request(tmp_path: Path, server: Server) -> None:
    server.body = kaggle_zip()
    first = fetch(tmp_path, server.url)
    assert fetch(tmp_path, server.url) == first
    assert server.requests == 1


def test_an_archive_put_there_by_hand_is_checked_and_gets_its_sha256(
    tmp_path: Path, server: Server
) -> None:
    archive = kaggle_zip()
    (tmp_path / NAME).write_bytes(archive)
    fetch(tmp_path, server.url)
    digest = hashlib.sha256(archive).hexdigest()
    assert (tmp_path / NOTE).read_text() == f"{digest}  {NAME}\n"
    assert sorted(os.listdir(tmp_path)) == [NAME, NOTE]
    assert server.requests == 0


def test_a_wrong_archive_put_there_by_hand_is_refused_but_not_removed(
    tmp_path: Path, server: Server
) -> None:
    (tmp_path / NAME).write_bytes(corrupted(kaggle_zip()))
    message = refusal(tmp_path, server.url)
    assert message.startswith(f"{tmp_path / NAME}: ")
    assert message.endswith("delete it and run again")
    assert os.listdir(tmp_path) == [NAME]
    assert server.requests == 0


def test_a_changed_archive_is_refused_until_it_is_deleted(tmp_path: Path, server: Server) -> None:
    server.body = kaggle_zip()
    path = fetch(tmp_path, server.url)
    # Sound in itself, so that only its SHA-256 tells.
    server.body = kaggle_zip(list(dsb2018())[1:])
    path.write_bytes(server.body)
    message = refusal(tmp_path, server.url)
    assert message.startswith(f"{path}: ")
    assert NOTE in message
    assert message.endswith("delete it and run again")
    path.unlink()
    assert fetch(tmp_path, server.url) == fetch(tmp_path, server.url)
    assert server.requests == 2


@pytest.mark.parametrize("noticed_by_urllib3", [True, False])
def test_fault_34_a_broken_off_transfer_leaves_nothing(
    tmp_path: Path, server: Server, noticed_by_urllib3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not noticed_by_urllib3:  # as before version 2
        request = HTTPConnection.request

        def lenient(self: HTTPConnection, *args: Any, **options: Any) -> None:
            request(self, *args, **{**options, "enforce_content_length": False})

        monkeypatch.setattr(HTTPConnection, "request", lenient)
    server.body = kaggle_zip() + b"\0" * 1000
    server.missing = 1000  # what comes is a sound archive, so that only the length tells
    message = refusal(tmp_path, server.url)
    came, announced = len(server.body) - 1000, len(server.body)
    cause = f"{came} bytes read" if noticed_by_urllib3 else f"{came:,} of {announced:,} bytes"
    assert cause in message
    assert message.startswith(f"{server.url}: ")
    assert message.endswith("--data.root")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"<!DOCTYPE html><title>Moved</title>", "not a zip archive, or a broken-off one"),
        (zip_of({"readme.txt": b"hello"}), "holds 0 of the 664 images of the 2018 Data Science"),
        (kaggle_zip(["elsewhere", *list(dsb2018())[:6]]), "holds 6 of the 664 images"),
        (corrupted(kaggle_zip(compression=zipfile.ZIP_STORED)), ".png in it is damaged"),
        (corrupted(kaggle_zip()), "a damaged zip archive"),
    ],
    ids=["html", "another-zip", "other-ids", "wrong-crc", "undecompressible"],
)
def test_a_wrong_archive_leaves_nothing(
    tmp_path: Path, server: Server, body: bytes, cause: str
) -> None:
    server.body = body
    message = refusal(tmp_path, server.url)
    assert message.startswith(f"{server.url}: ")
    assert cause in message
    assert message.endswith("--data.root")
    assert str(tmp_path) not in message
    assert os.listdir(tmp_path) == []


def test_an_http_error_is_named_and_leaves_nothing(tmp_path: Path, server: Server) -> None:
    server.body = kaggle_zip()
    server.status = 404
    message = refusal(tmp_path, server.url)
    assert message.startswith(f"{server.url}: ")
    assert "404" in message
    assert message.endswith("--data.root")
    assert os.listdir(tmp_path) == []


def test_a_server_that_is_not_there_is_named(tmp_path: Path, server: Server) -> None:
    with socket.socket() as unheard:  # bound, but nobody listens
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/{NAME}"
        message = refusal(tmp_path, url)
    assert message.startswith(f"{url}: no download ([Errno")
    assert message.endswith("--data.root")
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal(folder, server.url)
        assert message.startswith(f"{folder / NAME}: cannot be read or written")
        assert message.endswith("--data.root")
    assert server.requests == 0


def test_a_folder_in_the_way_of_the_archive_is_named(tmp_path: Path, server: Server) -> None:
    (tmp_path / NAME).mkdir()
    assert refusal(tmp_path, server.url).startswith(f"{tmp_path / NAME}: ")
    assert os.listdir(tmp_path) == [NAME]


def test_a_read_only_folder_is_named_before_anything_is_downloaded(
    tmp_path: Path, server: Server
) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("nothing is read-only for root")
    message = refusal(folder, server.url)
    assert message.startswith(f"{folder / NAME}: cannot be read or written (Permission denied)")
    assert server.requests == 0


def test_images_that_are_there_are_not_downloaded_again(tmp_path: Path) -> None:
    assert is_wanted(tmp_path)
    assert is_wanted(tmp_path / "absent")
    for name in ("a.png", "a_labels.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    assert not is_wanted(tmp_path)
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for name in ("a.png", "a_labels.png"):
            archive.write(tmp_path / name, name)
    assert not is_wanted(tmp_path / "mine.zip")
    (tmp_path / NAME).touch()  # to be held against its SHA-256
    assert is_wanted(tmp_path)
