"""Files over HTTP and HTTPS: what an answer must be to count, and connections that nobody waits on in vain."""

import email.utils
import functools
import http.client
import io
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, BinaryIO

from adala.data.remote import AbsentError, OtherAnswer, RemoteError, Setback, call_within, short

# Within which a server that is up accepts a connection, where the stall time-out is not shorter.
CONNECT_TIMEOUT_S = 20.0
# Longest wait that a server may ask for.
MAX_RETRY_AFTER_S = 120.0
# Answers that say that the same request may succeed later, besides all of 500 and above.
PASSING_STATUSES = (408, 421, 425, 429)
# First byte, and bytes of the whole.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")


class HttpSource:
    """A file over HTTP or HTTPS, through the proxies that the environment names."""

    def __init__(self, url: str):
        # A shard may have a space or an umlaut in its name; what is escaped stays so.
        self._url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        self._takes_ranges = True

    def __str__(self) -> str:
        return self._url

    def open(self, position: int, validator: str | None, seconds: float) -> "HttpBody":
        """See :class:`Source`.

        Raises:
            RemoteError: An answer that stays the same whoever asks how often.
            Setback: Another one that is not the file.
            OSError, http.client.HTTPException: The connection fails.
        """
        asks_range = position > 0 and validator is not None and self._takes_ranges
        headers = {"User-Agent": "adala", "Accept-Encoding": "identity"}
        if asks_range:
            headers |= {"Range": f"bytes={position}-", "If-Range": validator}
        # In a thread of its own, since looking up a name has no time-out.
        body = call_within(seconds, self._request, headers, seconds)
        try:
            self._check(body, position if asks_range else 0, validator)
        except BaseException:
            body.close()
            raise
        return body

    def _request(self, headers: dict[str, str], seconds: float) -> "HttpBody":
        clock = _Clock(seconds)
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            _HttpHandler(clock),
            _HttpsHandler(clock),
            _RedirectHandler(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ):
            opener.add_handler(handler)
        try:
            request = urllib.request.Request(self._url, headers=headers)
            return HttpBody(opener.open(request, timeout=min(seconds, CONNECT_TIMEOUT_S)), clock)
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refusal(error) from error
        except (ValueError, http.client.InvalidURL) as error:
            raise RemoteError(f"its address is none ({short(error)}): correct it") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise RemoteError(
                    f"the server's certificate is not trusted ({error.reason.verify_message}): correct the address, or "
                    "name the file of its authority in SSL_CERT_FILE"
                ) from error
            raise

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        answer = short(f"{error.code} {error.reason}")
        if error.code == 416:
            self._takes_ranges = False
            return Setback(f"the server does not have the rest ({answer})")
        if error.code >= 500 or error.code in PASSING_STATUSES:
            wait_s = _retry_after(error.headers.get("Retry-After"))
            return Setback(f"the server answers {answer}", wait_s=wait_s)
        if error.code in (401, 403):
            return AbsentError(f"the server answers {answer}: see who may read it, or whether the address is right")
        if error.code in (404, 410):
            return AbsentError(f"the server answers {answer}: correct the address, or put the file there")
        return RemoteError(f"the server answers {answer}: correct the address, or have the server mended")

    def _check(self, body: "HttpBody", position: int, validator: str | None) -> None:
        """Whether an answer is the file, and begins where it says."""
        encoding = body.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity") and not self._url.endswith((".gz", ".tgz")):
            raise OtherAnswer(
                f"the server sends it packed (Content-Encoding: {short(encoding)}), although that was not asked for"
            )
        if body.status not in (200, 206):
            raise OtherAnswer(f"the server answers {body.status} without the file")
        if body.status == 200:
            return
        given = body.headers.get("Content-Range", "none that it names")
        found = _CONTENT_RANGE.fullmatch(given.strip())
        if not found or not position or int(found[1]) != position or body.validator not in (None, validator):
            self._takes_ranges = False
            raise Setback(f"the server was asked for bytes {position}- and sent others ({short(given)})")
        body.start, body.length, body.validator = position, int(found[2]), validator


class HttpBody:
    """The body of an answer, see :class:`Body`."""

    def __init__(self, response: http.client.HTTPResponse, clock: "_Clock"):
        self.start = 0
        self.status = response.status
        self.headers = response.headers
        self.length = None if response.chunked else response.length
        etag = self.headers.get("ETag", "")
        # A weak one is not enough for If-Range.
        self.validator = etag if etag.startswith('"') else self.headers.get("Last-Modified")
        self._response = response
        self._clock = clock

    def read(self, count: int, seconds: float) -> bytes:
        self._clock.start(seconds)
        return self._response.read1(count)

    def close(self) -> None:
        self._response.close()


def _retry_after(value: str | None) -> float | None:
    """Seconds that a server asks to wait, in either form of the header; None where it does not say."""
    if value is None:
        return None
    try:
        seconds = float(value) if value.strip().isdecimal() else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()


class _Clock:
    """When what is waited for on a connection must have come."""

    def __init__(self, seconds: float):
        self.start(seconds)

    def start(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left; raises TimeoutError where there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class _TimedReader(io.RawIOBase):
    """What comes over a socket, until the clock runs out: a socket's own time-out begins again with every byte."""

    def __init__(self, connected: socket.socket, clock: _Clock):
        self._socket = connected
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._clock.left())
        return self._socket.recv_into(buffer)

    def close(self) -> None:
        self._socket.close()
        super().close()


class _TimedSocket:
    """As much of a socket as ``http.client`` uses, which closes with what was made to read from it."""

    def __init__(self, connected: socket.socket, clock: _Clock):
        self._socket = connected
        self._clock = clock
        self._is_read = False

    def sendall(self, data: bytes) -> None:
        self._socket.settimeout(self._clock.left())
        self._socket.sendall(data)

    def makefile(self, mode: str) -> BinaryIO:
        self._is_read = True
        return io.BufferedReader(_TimedReader(self._socket, self._clock), 2**16)

    def close(self) -> None:
        if not self._is_read:
            self._socket.close()


class _Timed:
    """A connection of ``http.client`` on a clock."""

    def __init__(self, *arguments: Any, clock: _Clock, **options: Any):
        super().__init__(*arguments, **options)
        self._clock = clock

    def connect(self) -> None:
        super().connect()
        self.sock = _TimedSocket(self.sock, self._clock)


class _HttpConnection(_Timed, http.client.HTTPConnection):
    pass


class _HttpsConnection(_Timed, http.client.HTTPSConnection):
    pass


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, clock: _Clock):
        super().__init__()
        self._clock = clock

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpConnection, request, clock=self._clock)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, clock: _Clock):
        super().__init__(context=_trust())
        self._clock = clock

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_HttpsConnection, request, context=_trust(), clock=self._clock)


@functools.cache
def _trust() -> ssl.SSLContext:
    """The authorities that this machine trusts; they take a while to load."""
    return ssl.create_default_context()


class _RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from HTTPS to HTTP."""

    def redirect_request(
        self, request: urllib.request.Request, answer: Any, code: int, message: str, headers: Any, url: str
    ) -> urllib.request.Request | None:
        # It may have a body without end, which urllib would read.
        answer.close()
        if request.full_url.lower().startswith("https:") and not url.lower().startswith("https:"):
            raise RemoteError(f"the server leads from HTTPS to {short(url)}, which is not safe: name that address")
        return super().redirect_request(request, answer, code, message, headers, url)
