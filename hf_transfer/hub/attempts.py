"""Retries calls to the Hub after transient failures. All other failures become a PushError with a remedy."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from hf_transfer.network.source import HTTP_ERRORS

log = logging.getLogger(__name__)

RETRIED = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0

T = TypeVar("T")


class PushError(RuntimeError):
    """The error of a failed push to the Hub. The run's files are unchanged, and the same command can be repeated."""


class RefusedPushError(PushError, ValueError):
    """The error of a push that fails until the user changes something: the token, the repository or a flag."""


class Attempts:
    """Calls the Hub for one repository, with retries. Errors end with `next_step`, which says what the user can do next."""

    def __init__(self, repo_id: str, next_step: str) -> None:
        self.repo_id, self.next_step = repo_id, next_step

    def __call__(self, action: str, call: Callable[[], T]) -> T:
        """Returns the result of `call`. Raises PushError if the Hub refuses the call, or after ATTEMPTS failures."""
        wait_s = FIRST_WAIT_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except OfflineModeIsEnabled as error:
                raise self.refuse(action, "HF_HUB_OFFLINE=1 is set; unset this variable") from error
            except (*HTTP_ERRORS, RuntimeError) as error:
                # huggingface_hub wraps any failure to upload a file in a RuntimeError.
                cause = error.__cause__ if isinstance(error, RuntimeError) else error
                if not isinstance(cause, HTTP_ERRORS):
                    raise
                status = _status(cause)
                if status is not None and status not in RETRIED:
                    raise self.refuse(action, self._remedy(status, cause)) from error
                if attempt == ATTEMPTS:
                    reason = f"the Hub answers {status}" if status else f"the connection fails ({type(cause).__name__})"
                    raise PushError(self._explain(action, f"{reason}, in {ATTEMPTS} attempts")) from error
                log.info(
                    "the attempt to %s failed (%s); retrying in %.0f s", action, status or type(cause).__name__, wait_s
                )
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise AssertionError("not reached")

    def refuse(self, action: str, reason: str) -> RefusedPushError:
        """Returns an error for the caller to raise: `action` failed for `reason`, and the next step."""
        return RefusedPushError(self._explain(action, reason))

    def _explain(self, action: str, reason: str) -> str:
        return f"could not {action}: {reason}. {self.next_step}"

    def _remedy(self, status: int, error: Exception) -> str:
        if status == 403:
            return no_write_access(self.repo_id)
        return {
            401: "the token is missing or invalid: run `hf auth login`, or set HF_TOKEN to a token with write access",
            404: f"this token cannot see {self.repo_id}: someone else owns this private repository, or its branch is missing",
        }.get(status, f"the Hub answers {status}: {str(error).splitlines()[0] if str(error) else ''}")


def no_write_access(repo_id: str) -> str:
    """Returns the sentence for a token that may not write to `repo_id`: the reason and the remedy."""
    return f"the token may not write to {repo_id.split('/')[0]!r}: use a token with write access, and a repository of your own"


def _status(error: Exception) -> int | None:
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)
