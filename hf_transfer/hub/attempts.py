"""Calls to the Hub that may fail: what may pass is waited for and tried again, the rest is said with its remedy."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

log = logging.getLogger(__name__)

RETRIED = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 5
LONGEST_WAIT_S = 60.0

T = TypeVar("T")


class PushError(RuntimeError):
    """The push did not succeed; the run is as it was, and the command can be repeated."""


class Attempts:
    """Makes calls about one repository; `then` is what the user does once the cause is mended, in a sentence."""

    def __init__(self, repo_id: str, then: str, *, first_wait_s: float = 1.0) -> None:
        self.repo_id, self.then, self.first_wait_s = repo_id, then, first_wait_s

    def __call__(self, what: str, call: Callable[[], T]) -> T:
        """What `call` returns. Raises PushError where the Hub refuses, and where it fails ATTEMPTS times."""
        wait_s = self.first_wait_s
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except OfflineModeIsEnabled as error:
                raise self.refuse(what, "HF_HUB_OFFLINE=1 is set: unset it") from error
            except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
                # huggingface_hub wraps whatever went wrong with a file in a RuntimeError.
                cause = error.__cause__ if isinstance(error, RuntimeError) else error
                if not isinstance(cause, (HfHubHTTPError, httpx2.HTTPError, OSError)):
                    raise
                status = _status(cause)
                if status is not None and status not in RETRIED:
                    raise self.refuse(what, self._remedy(status, cause)) from error
                if attempt == ATTEMPTS:
                    reason = f"the Hub answers {status}" if status else f"the connection fails ({type(cause).__name__})"
                    raise self.refuse(what, f"{reason}, {ATTEMPTS} times") from error
                log.info("could not %s (%s); again in %.0f s", what, status or type(cause).__name__, wait_s)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("not reached")

    def refuse(self, what: str, why: str) -> PushError:
        """The error to raise."""
        return PushError(f"could not {what}: {why}. {self.then}")

    def _remedy(self, status: int, error: Exception) -> str:
        if status == 403:
            return refusal_of(self.repo_id)
        return {
            401: "no token, or one that is not valid: `hf auth login`, or set HF_TOKEN to a token with write access",
            404: f"{self.repo_id} is not there for this token: it is private to someone else, or the branch is missing",
        }.get(status, f"the Hub answers {status}: {str(error).splitlines()[0] if str(error) else ''}")


def refusal_of(repo_id: str) -> str:
    """What is said where the token may not write there."""
    return f"the token may not write to {repo_id.split('/')[0]!r}: take one with write access, and a repository of your own"


def _status(error: Exception) -> int | None:
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
