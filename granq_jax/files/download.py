"""A file from the web that is trusted no further than need be: transfers go on where they broke off."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from tqdm.auto import tqdm

_ATTEMPTS = 3
_MAX_REDIRECTS = 5  # one is usual: from a release to where its files are kept
_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 16


def download(url: str, part: Path, max_bytes: int) -> None:
    """Downloads ``url`` to ``part``; what is there of it already is not sent again.

    Args:
      url: of the file.
      part: where it is written, and kept if the transfer breaks off.
      max_bytes: no more than so many are taken.

    Raises:
      ConnectionError: if the file could not be had, in few redirects that all stay with the scheme of
        ``url``. What has arrived is kept then, unless it is more than ``max_bytes``.

    Example::

      download("https://example.org/weights.zip", Path("weights.zip.part"), max_bytes=1 << 20)
    """
    try:
        _download(url, part, max_bytes)
    except (requests.RequestException, ValueError) as error:  # ValueError: a redirect to what is no URL
        raise ConnectionError(" ".join(str(error).split())) from error


class _Session(requests.Session):
    """Follows redirects itself: they may be few, none to another scheme, and their bodies are not read."""

    def get_redirect_target(self, response: requests.Response) -> None:
        """None: what requests does with a redirect begins with reading its body, however long."""

    def answer(self, url: str, headers: dict[str, str]) -> requests.Response:
        """The answer to a GET, its body unread."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = self.get(url, headers=headers, stream=True, timeout=_TIMEOUT_S)
            if not response.is_redirect:
                return response
            response.close()
            origin, url = url, urljoin(url, response.headers["Location"])
            if urlsplit(url).scheme != urlsplit(origin).scheme:
                raise requests.exceptions.InvalidSchema(f"it redirects to {url!r}, of another scheme")
        raise requests.TooManyRedirects(f"it redirects more than {_MAX_REDIRECTS} times")


def _download(url: str, part: Path, max_bytes: int) -> None:
    for _ in range(_ATTEMPTS):
        start = _size(part)
        # A compressed answer would make lengths and ranges those of something else than the file.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with _Session() as session, session.answer(url, headers) as response:
            status = response.status_code
            resumed = status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if start and not resumed and status in (206, 416):
                part.unlink()  # what there is cannot be added to
                continue
            if not resumed and status != 200:
                raise requests.HTTPError(f"the server answered {status} {response.reason}")
            if _receive(response, part, start if resumed else 0, max_bytes):
                return
    raise requests.ConnectionError(
        f"the transfer broke off {_ATTEMPTS} times, {_size(part)} bytes are kept in {part}, the next try goes on there"
    )


def _receive(response: requests.Response, part: Path, start: int, max_bytes: int) -> bool:
    """Whether the whole answer arrived; it is written to ``part`` from the byte ``start``, its end, on."""
    length = response.headers.get("Content-Length")
    end = start + int(length) if length is not None and length.isdecimal() else None
    bar = tqdm(total=end, initial=start, desc=part.stem, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    try:
        with bar, part.open("ab" if start else "wb") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > max_bytes:
                    break
    except requests.RequestException:
        return False
    if _size(part) > max_bytes:
        part.unlink()
        raise requests.HTTPError(f"the server sends more than {max_bytes} bytes")
    return end in (None, _size(part))  # not every version of urllib3 raises if there is less than announced


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
