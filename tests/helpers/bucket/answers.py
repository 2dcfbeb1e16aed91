"""Errors as the service writes them."""

from typing import Any, Literal

LOOPBACK = "127.0.0.1"
QUANTUM = 256 * 1024  # what a resumable upload keeps is a multiple of this; also the largest piece of a transfer
PAGE = 1000
CONTROL = "/_control/"

Json = dict[str, Any]
Content = bytes | bytearray | memoryview
Action = Literal[
    "",
    "status",
    "reset",
    "close",
    "stall",
    "truncate",
    "lost_reply",
    "corrupt",
    "short",
    "cut_upload",
    "delay",
    "away",
    "hold",
    "hold_reply",
]


def error(code: int, message: str, reason: str = "", domain: str = "global") -> Json:
    """The body of an error of the JSON API."""
    errors = [{"message": message, "domain": domain, "reason": reason}] if reason else []
    return {"error": {"code": code, "message": message} | ({"errors": errors} if errors else {})}


def forbidden(permission: str = "storage.objects.create", account: str = "trainer@project.iam.gserviceaccount.com") -> Json:
    """403: the account lacks a permission, or the bucket is somebody else's."""
    message = (
        f"{account} does not have {permission} access to the Google Cloud Storage object. "
        f"Permission '{permission}' denied on resource (or it may not exist)."
    )
    return error(403, message, "forbidden")


def retained(bucket: str, name: str, until: str = "2030-01-01T00:00:00-08:00") -> Json:
    """403: a retention policy protects the object."""
    message = (
        f"Object '{bucket}/{name}' is subject to bucket's retention policy or object retention "
        f"and cannot be deleted or overwritten until {until}"
    )
    return error(403, message, "retentionPolicyNotMet")


def no_object(bucket: str, name: str) -> Json:
    """404: the bucket is there, the object is not."""
    return error(404, f"No such object: {bucket}/{name}", "notFound")


NO_BUCKET = error(404, "The specified bucket does not exist.", "notFound")
UNAUTHORIZED = error(401, "Invalid Credentials", "authError")
CONDITION_NOT_MET = error(412, "At least one of the pre-conditions you specified did not hold.", "conditionNotMet")
RATE_LIMITED = error(
    429,
    "The object exceeded the rate limit for object mutation operations (create, update, and delete). "
    "Please reduce your request rate.",
    "rateLimitExceeded",
    "usageLimits",
)
UNAVAILABLE = error(503, "We encountered an internal error. Please try again.", "backendError")
BUCKET_NOT_EMPTY = error(409, "The bucket you tried to delete is not empty.", "conflict")
TYPICAL = {"401": UNAUTHORIZED, "404": NO_BUCKET, "412": CONDITION_NOT_MET, "429": RATE_LIMITED, "503": UNAVAILABLE}
