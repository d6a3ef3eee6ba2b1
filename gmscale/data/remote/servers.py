"""What http(s) and S3 servers answer when asked for a file, in one vocabulary."""

import email.utils
import errno
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from gmscale.errors import UsageError

CHUNK = 1 << 20
CONNECT_TIMEOUT = 30.0
STALL_TIMEOUT = 60.0
"""Seconds without a byte after which a connection counts as broken."""

_RESERVED = "/:@!$&'()*+,;=~%?"


class MissingFileError(FileNotFoundError, UsageError):
    """A file that its server does not have."""

    def __str__(self) -> str:
        return str(self.args[-1])


@dataclass(frozen=True)
class Address:
    """A directory or a file on a server."""

    url: str
    """In full, with credentials and query: not for people."""

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme

    def __truediv__(self, name: str) -> "Address":
        """Return the address of a file in this directory; the query is kept."""
        if self.scheme == "s3":
            return Address(f"{self.url.rstrip('/')}/{name}")
        parts = urlsplit(self.url)
        path = f"{quote(parts.path.rstrip('/'), safe=_RESERVED)}/{quote(name)}"
        return Address(parts._replace(path=path, query=quote(parts.query, safe=_RESERVED)).geturl())

    def __str__(self) -> str:
        """For people: without credentials and query."""
        if self.scheme == "s3":
            return re.sub(r"//[^/]*@", "//", self.url).partition("?")[0]
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"


class Version(NamedTuple):
    """What a server says of a file's contents; None where it says nothing."""

    size: int | None
    tag: str | None
    """ETag, or else the time of the last modification."""


class Answer(NamedTuple):
    """A server has begun to send: the bytes that follow begin at `start`."""

    start: int
    version: Version


class PassingError(Exception):
    """What may be over at the next attempt."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause
        """Seconds that the server asked for."""


Put = Callable[[Answer | bytes], None]


async def send_http(address: Address, start: int, version: Version | None, put: Put) -> None:
    """Put an Answer and the bytes that one connection brings, from `start` if the server still has `version`."""
    import aiohttp
    from fsspec.config import conf
    from fsspec.implementations.http import HTTPFileSystem

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=STALL_TIMEOUT)
    # The only way out of a cluster is often the proxy in the environment.
    settings = {"timeout": timeout, "trust_env": True} | conf.get("http", {}).get("client_kwargs", {})
    files = HTTPFileSystem(asynchronous=True, skip_instance_cache=True, encoded=True, client_kwargs=settings)
    options = dict(files.kwargs)
    headers = dict(options.pop("headers", {})) | {"Accept-Encoding": "identity"}
    if start and version and version.tag:
        headers["Range"] = f"bytes={start}-"
    session = await files.set_session()
    try:
        async with session.get(files.encode_url(address.url), headers=headers, **options) as response:
            status, answer = response.status, response.headers
            if status == 416 and start:
                return await send_http(address, 0, None, put)
            _check_status(address, status, f"{status} {response.reason or ''}".rstrip(), answer.get("Retry-After"))
            # What is compressed on its way has neither a known size nor bytes to begin at.
            plain = answer.get("Content-Encoding", "identity") == "identity"
            tag = (answer.get("ETag") or answer.get("Last-Modified")) if plain else None
            size = response.content_length if plain else None
            if status == 206:
                part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("Content-Range", "").strip())
                size = int(part[2]) if part else None
                if not part or int(part[1]) != start or Version(size, tag) != version:
                    return await send_http(address, 0, None, put)
            put(Answer(start if status == 206 else 0, Version(size, tag)))
            await _pump(response.content.read, put)
    except aiohttp.ClientConnectorDNSError as error:
        if error.os_error.errno == socket.EAI_AGAIN:
            raise PassingError("the name server did not answer") from None
        raise UsageError(f"{address}: there is no server of that name") from None
    except aiohttp.ClientConnectorCertificateError:
        raise UsageError(f"{address}: the server's certificate is not valid") from None
    except aiohttp.InvalidURL:
        raise UsageError(f"{address} is not a valid address, or leads to one that is not") from None
    except (aiohttp.TooManyRedirects, aiohttp.NonHttpUrlRedirectClientError):
        raise UsageError(f"{address}: redirected too often, or to what is not http") from None
    except MissingFileError:
        raise
    except (aiohttp.ClientError, OSError) as error:
        raise PassingError(_cause(error)) from None
    finally:
        await session.close()


async def send_s3(address: Address, start: int, version: Version | None, put: Put) -> None:
    """Do the same as send_http."""
    import aiohttp
    import botocore.exceptions as boto
    from fsspec.config import conf
    from s3fs import S3FileSystem

    settings = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": STALL_TIMEOUT,
        "retries": {"total_max_attempts": 1},
    } | conf.get("s3", {}).get("config_kwargs", {})
    files = S3FileSystem(asynchronous=True, skip_instance_cache=True, config_kwargs=settings)
    files.retries = 1
    bucket, key, _ = files.split_path(address.url)
    condition = {"Range": f"bytes={start}-", "IfMatch": version.tag} if start and version and version.tag else {}
    session = None
    try:
        session = await files.set_session()
        try:
            response = await files._call_s3("get_object", Bucket=bucket, Key=key, **condition)
        except OSError as error:
            answer = getattr(error.__cause__, "response", {})
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status in (412, 416) and start:
                return await send_s3(address, 0, None, put)
            if not status:
                raise
            _check_status(address, status, f"{status} {answer.get('Error', {}).get('Code', '')}".rstrip(), None)
            raise
        size, tag = response["ContentLength"], response.get("ETag")
        if condition:
            part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.get("ContentRange", ""))
            if not part or int(part[1]) != start or Version(int(part[2]), tag) != version:
                return await send_s3(address, 0, None, put)
            size = int(part[2])
        put(Answer(start if condition else 0, Version(size, tag)))
        async with response["Body"] as body:
            await _pump(body.read, put)
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound):
        raise UsageError(
            f"{address}: no credentials were found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        ) from None
    except boto.ParamValidationError:
        raise UsageError(f"{address} is not a valid address; expected s3://BUCKET/DIRECTORY") from None
    except MissingFileError:
        raise
    except (aiohttp.ClientError, boto.BotoCoreError, OSError) as error:
        raise PassingError(_cause(error)) from None
    finally:
        if session is not None:
            await session.close()


async def _pump(read: Callable[[int], Awaitable[Any]], put: Put) -> None:
    """Pass on what arrives in whole chunks, and what came before an error."""
    buffer = bytearray()
    try:
        while piece := await read(CHUNK - len(buffer)):
            buffer += piece
            if len(buffer) == CHUNK:
                put(bytes(buffer))
                buffer.clear()
    finally:
        if buffer:
            put(bytes(buffer))


def _check_status(address: Address, status: int, answer: str, pause: str | None) -> None:
    """Raise for every answer but those that carry a file."""
    if status in (200, 206):
        return
    if status in (404, 410):
        raise MissingFileError(errno.ENOENT, f"{address} does not exist: the server answered {answer}")
    if status in (401, 403):
        raise UsageError(f"{address}: access was refused, the server answered {answer}")
    if status in (408, 425, 429) or status >= 500:
        raise PassingError(f"the server answered {answer}", _seconds(pause))
    raise UsageError(f"{address}: the server answered {answer}; expected 200")


def _seconds(pause: str | None) -> float:
    """Return what a Retry-After header asks for: seconds, or a date."""
    if pause is None:
        return 0.0
    if pause.strip().isdigit():
        return float(pause)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(pause).timestamp() - time.time())
    except ValueError:
        return 0.0


def _cause(error: Exception) -> str:
    """Say what broke a connection; the libraries' own text may hold the whole address."""
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    inner = getattr(error, "os_error", error)
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else type(error).__name__
    return f"the connection failed ({text})"
