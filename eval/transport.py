"""HTTP requests to a server, with limits on time, size and retries. No proxy is used for a loopback address."""

import asyncio
import ipaddress
import json
import os
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from eval.errors import EvalError
from eval.redaction import excerpt


_LARGEST = 2**28  # bytes of one answer
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_CONNECT_SECONDS = 30.0


class ServerFailedError(EvalError):
    """Failure of a server: no answer, or not a valid one."""


@dataclass(frozen=True)
class Site:
    """A server: its address, and the key that is sent along, if any."""

    url: str
    key: str | None = field(default=None, repr=False)

    @property
    def loopback(self) -> bool:
        """Tell whether the server is on this machine."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


@dataclass(frozen=True)
class Patience:
    """Limits of one question: seconds for an answer, how often it is asked again, and the pauses between.

    Attributes:
        option: command-line option that sets ``seconds``, for the message; empty when there is none.
        longest_wished: longest pause that is made on a server's request.
    """

    seconds: float = 3600.0
    retries: int = 5
    first_pause: float = 1.0
    longest_pause: float = 60.0
    longest_wished: float = 300.0
    option: str = "--request-timeout"

    def pause(self, attempt: int, wished: float | None) -> float:
        """Compute the seconds to wait before attempt ``attempt`` + 1.

        It is what the server asked for (``wished``), else twice the pause before; both are bounded.
        """
        if wished is not None:
            return min(max(wished, 0.0), self.longest_wished)
        return float(min(self.first_pause * 2.0 ** min(attempt, 30), self.longest_pause))


class _RefusalError(Exception):
    """An HTTP status that is no success."""

    def __init__(self, status: int, words: str, retry_after: str | None) -> None:
        self.status, self.words, self.wished = status, words, seconds_of(retry_after)
        super().__init__(f"HTTP {status}{f': {words}' if words else ''}")


def seconds_of(retry_after: str | None) -> float | None:
    """Parse the seconds that a ``Retry-After`` header asks for, as a number or a date; None where it holds neither."""
    text = (retry_after or "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def fetch(site: Site, path: str, body: Mapping[str, Any] | None = None, patience: Patience | None = None) -> Any:
    """Fetch a JSON document from a server, by POST where there is a ``body``, else by GET.

    Raises:
        ServerFailedError: there is no answer in time, or none in JSON.
    """
    limits = patience or Patience(seconds=30.0 if body is None else 300.0, retries=2, option="")
    documents: list[Any] = []
    asker = Asker(site, path, 1, limits, connection_retries=0)
    try:
        asker.ask([body], lambda _, document: document, lambda _, document: documents.append(document))
    except ServerFailedError as error:
        raise ServerFailedError(f"no OpenAI-compatible server answers at {site.url}{path}: {error}") from error
    return documents[0]


def healthy(site: Site) -> bool:
    """Tell whether ``/health`` answers with success within five seconds."""
    return asyncio.run(_healthy(site))


async def _healthy(site: Site) -> bool:
    try:
        async with _session(site, 5.0) as session, session.get(f"{site.url}/health") as answer:
            return bool(answer.ok)
    except (TimeoutError, aiohttp.ClientError, OSError):
        return False


def _session(site: Site, seconds: float) -> aiohttp.ClientSession:
    """Open a session that uses the environment's proxies for servers elsewhere and none for this machine.

    aiohttp's ``trust_env`` is left off: it also reads ``~/.netrc``, whose password would be sent where no key is set,
    and clash with a key.
    """
    timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
    headers = {"Authorization": f"Bearer {site.key}"} if site.key else {}
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, proxy=_proxy_of(site))


def _proxy_of(site: Site) -> str | None:
    parts = urlsplit(site.url)
    if site.loopback or proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme)


@dataclass
class Asker:
    """Client that sends many questions at a time to one address.

    Attributes:
        concurrency: most questions under way.
        ended: returns why the server's process has ended, or None; called before a question is repeated.
        repeated: failures after which a question was asked again, as kind or status alone, with counts. The exceptions
            themselves hold headers.
    """

    site: Site
    path: str
    concurrency: int
    patience: Patience
    ended: Callable[[], str | None] = lambda: None
    connection_retries: int | None = None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    repeated: Counter[str] = field(default_factory=Counter)

    def ask(self, bodies: Sequence[Any], read: Callable[[int, Any], Any], keep: Callable[[int, Any], None]) -> None:
        """Send every body (by POST; GET for None), and pass to ``keep`` what ``read`` returns for each answer.

        Raises:
            ServerFailedError: the first failure that asking again does not resolve; the other questions are given up.
            EvalError: what ``read`` and ``keep`` raise.
        """
        asyncio.run(self._ask_all(bodies, read, keep))

    async def _ask_all(
        self, bodies: Sequence[Any], read: Callable[[int, Any], Any], keep: Callable[[int, Any], None]
    ) -> None:
        waiting = iter(enumerate(bodies))
        async with _session(self.site, self.patience.seconds) as session:
            several = range(min(self.concurrency, len(bodies)))
            workers = [asyncio.create_task(self._work(session, waiting, read, keep)) for _ in several]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(
        self,
        session: aiohttp.ClientSession,
        waiting: Iterator[tuple[int, Any]],
        read: Callable[[int, Any], Any],
        keep: Callable[[int, Any], None],
    ) -> None:
        for index, body in waiting:
            keep(index, read(index, await self._patiently(session, body)))

    async def _patiently(self, session: aiohttp.ClientSession, body: Any) -> Any:
        for attempt in range(self.patience.retries + 1):
            try:
                return await self._once(session, body)
            except TimeoutError as error:
                named = f" ({self.patience.option})" if self.patience.option else ""
                raise ServerFailedError(f"it did not answer within {self.patience.seconds:g} s{named}") from error
            except _RefusalError as error:
                if error.status not in _AGAIN or attempt == self.patience.retries:
                    raise ServerFailedError(f"{error}{_tried(attempt)}") from None
                kind, wished = f"HTTP {error.status}", error.wished
            except (aiohttp.ClientError, OSError, ValueError) as error:
                allowed = self.patience.retries if self.connection_retries is None else self.connection_retries
                if attempt >= allowed or isinstance(error, ValueError):
                    raise ServerFailedError(f"{_words(error)}{_tried(attempt)}") from None
                kind, wished = type(error).__name__, None
            if (why := self.ended()) is not None:
                raise ServerFailedError(why)
            self.repeated[kind] += 1
            await self.sleep(self.patience.pause(attempt, wished))
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, session: aiohttp.ClientSession, body: Any) -> Any:
        try:
            return await self._exchange(session, body)
        except aiohttp.ServerTimeoutError as error:  # a TimeoutError too, but nothing was asked yet
            raise aiohttp.ClientConnectionError(f"no connection within {_CONNECT_SECONDS:g} s") from error

    async def _exchange(self, session: aiohttp.ClientSession, body: Any) -> Any:
        method = "GET" if body is None else "POST"
        address = f"{self.site.url}{self.path}"
        async with session.request(method, address, json=body, allow_redirects=False) as answer:
            raw = await _read(answer)
            if answer.status in range(300, 400):
                elsewhere = excerpt(answer.headers.get("Location", "?"), 200)
                raise _RefusalError(answer.status, f"it sends on to {elsewhere}", None)
            if not answer.ok:
                said = excerpt(raw.decode("utf-8", "replace"), 300)
                raise _RefusalError(answer.status, said, answer.headers.get("Retry-After"))
        try:
            return json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ServerFailedError(f"its answer is no JSON document ({str(error)[:120]})") from None


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """Read the body of an answer, up to ``_LARGEST`` bytes."""
    parts, size = [], 0
    async for part in answer.content.iter_chunked(2**16):
        parts.append(part)
        size += len(part)
        if size > _LARGEST:
            raise ServerFailedError(f"its answer is longer than {_LARGEST // 2**20} MiB")
    return b"".join(parts)


def _words(error: Exception) -> str:
    """Describe a connection error without its headers: by number and meaning, else by kind and text."""
    number = getattr(error, "os_error", error)
    if isinstance(number, ssl.SSLError):  # its number is one of OpenSSL's
        return f"no TLS can be spoken with it ({excerpt(str(number), 200)}); try http:// in place of https://"
    if isinstance(number, OSError) and number.errno is not None:
        return f"[Errno {number.errno}] {os.strerror(number.errno) if number.errno > 0 else number.strerror}"
    if isinstance(error, ValueError):  # its text may be the proxy's address with a password
        return "its address, or a proxy of the environment (http_proxy, https_proxy), is none"
    return f"{type(error).__name__}: {excerpt(str(error), 200)}"


def _tried(attempt: int) -> str:
    return f" (tried {attempt + 1} times)" if attempt else ""
