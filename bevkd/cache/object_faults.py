"""What the failures of an object store mean, in words."""

from __future__ import annotations

import dataclasses
import errno
import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a failed request means.

    Attributes:
        number: the ``errno`` of the OSError to raise.
        words: its ``strerror``; ``{bucket}`` stands for the bucket.
        transient: repeating the request may help.
        unreachable: nothing answers, which is rather a wrong address than a failure if nothing ever has.
    """

    number: int
    words: str
    transient: bool = False
    unreachable: bool = False


_REFUSED = (
    ("NoSuchBucket", errno.ENOENT, "{bucket} does not exist; check the address, AWS_REGION and AWS_ENDPOINT_URL"),
    ("ExpiredToken", errno.EACCES, "the credentials for {bucket} have expired; renew them"),
    ("InvalidAccessKeyId", errno.EACCES, "{bucket} does not know the access key; check AWS_ACCESS_KEY_ID"),
    ("SignatureDoesNotMatch", errno.EACCES, "{bucket} refuses the secret key; check AWS_SECRET_ACCESS_KEY"),
    ("RequestTimeTooSkewed", errno.EACCES, "{bucket} refuses requests because this machine's clock is wrong; set it"),
    ("Missing AccessKeyId", errno.EACCES, "half of the credentials is missing; set AWS_ACCESS_KEY_ID"),
    ("Missing SecretAccessKey", errno.EACCES, "half of the credentials is missing; set AWS_SECRET_ACCESS_KEY"),
    ("Account must be specified", errno.EINVAL, "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY"),
    ("BadScheme", errno.EINVAL, "the endpoint is not https://; set AWS_ALLOW_HTTP=true if that is meant"),
    ("AuthorizationHeaderMalformed", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    ("PermanentRedirect", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    ("BareRedirect", errno.EINVAL, "{bucket} lies in another region; set AWS_REGION"),
    (
        "NotImplemented",
        errno.ENOTSUP,
        "{bucket} has no conditional writes (If-None-Match), which writing a cache needs",
    ),
)
_NO_CREDENTIALS = (
    "no credentials for {bucket} were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public bucket "
    "AWS_SKIP_SIGNATURE=true"
)
_METADATA_SERVICES = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


def status_of(error: Exception) -> int | None:
    """Return the HTTP status in an exception of obstore, None if no answer came."""
    match = re.search(r"status code: (\d{3})", str(error))
    return int(match[1]) if match else None


def fault_of(error: Exception) -> Fault:
    """Return what an exception of obstore means."""
    text, status = str(error), status_of(error)
    for code, number, words in _REFUSED:
        if code in text:
            return Fault(number, words)
    if any(service in text for service in _METADATA_SERVICES):
        return Fault(errno.EACCES, _NO_CREDENTIALS, transient=status is None or status >= 500, unreachable=True)
    if isinstance(error, FileNotFoundError):
        return Fault(errno.ENOENT, "there is no such object in {bucket}")
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
        return Fault(
            errno.EACCES, "{bucket} denies access; check the credentials and their rights to read, write, list"
        )
    if status is not None:
        words = re.split(r"status code: ", text, maxsplit=1)[1].partition(":")[0].replace("{", "(").strip()
        busy = status >= 500 or status in (408, 429) or "ConditionalRequestConflict" in text
        return Fault(
            errno.EIO, f"{{bucket}} answers {words}; {'try again later' if busy else 'check the address'}", busy
        )
    return _no_answer(text)


def _no_answer(text: str) -> Fault:
    if "kind: Timeout" in text or "TimedOut" in text:
        return Fault(errno.ETIMEDOUT, "{bucket} does not answer; check the network, or try again later", transient=True)
    if "kind: Connect" in text:
        cause = re.search(r'(?:message|error): "([^"{}]+)"', text)
        words = f"cannot be reached ({cause[1] if cause else 'no connection'}); check the network and the address"
        return Fault(errno.EIO, f"{{bucket}} {words}", transient=True, unreachable=True)
    if any(f"kind: {kind}" in text for kind in ("Request", "Interrupted", "Body", "Decode")):
        return Fault(errno.EIO, "the connection to {bucket} was cut; check the network", transient=True)
    line = text.partition("\n")[0].replace("{", "(").replace("}", ")")
    return Fault(errno.EIO, f"{{bucket}}: {line[:300]}; check the address and the environment variables")
