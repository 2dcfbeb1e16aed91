"""Accounts on loopback: tokens that the service asks for, where they are issued, and keys to ask with.

With STORAGE_EMULATOR_HOST the client is anonymous. With API_ENDPOINT_OVERRIDE it looks for credentials as on Google Cloud.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any

TOKEN, METADATA = "/token", "/computeMetadata/v1/"
ACCOUNT = "trainer@project.iam.gserviceaccount.com"


class Tokens:
    """The tokens that are valid, each for some seconds."""

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._ends: dict[str, float] = {}

    def issue(self) -> dict[str, Any]:
        """A new token, as an OAuth server answers it."""
        token = secrets.token_hex(8)
        self._ends[f"Bearer {token}"] = time.monotonic() + self._lifetime
        return {"access_token": token, "expires_in": int(self._lifetime), "token_type": "Bearer"}

    def knows(self, header: str | None) -> bool:
        """Whether the Authorization of a request is a token that has not expired."""
        return time.monotonic() < self._ends.get(header or "", 0.0)


def is_for_accounts(route: str) -> bool:
    """Whether a request asks for a token, and so cannot have one."""
    return route in (TOKEN, "/") or route.startswith(METADATA)


def metadata(path: str, tokens: Tokens | None) -> object:
    """What the metadata server of a machine on Google Cloud says of its account; None for anything else."""
    if not path:
        return "computeMetadata/"
    if path == "universe/universe-domain":
        return "googleapis.com"
    if path.strip("/") == "instance/service-accounts/default":
        return {"aliases": ["default"], "email": ACCOUNT, "scopes": ["https://www.googleapis.com/auth/cloud-platform"]}
    if path == "instance/service-accounts/default/token" and tokens is not None:
        return tokens.issue()
    return None


def write_key(file: Path, url: str) -> None:
    """A key file of a service account, made for this test, whose tokens are issued at `url`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    document = {
        "type": "service_account",
        "project_id": "test-project",
        "private_key_id": "1",
        "private_key": private.private_bytes(*form).decode(),
        "client_email": ACCOUNT,
        "client_id": "1",
        "token_uri": url + TOKEN,
    }
    file.write_text(json.dumps(document))


def environment(url: str, key: Path) -> dict[str, str]:
    """What leads a process to this service with a key, as GOOGLE_APPLICATION_CREDENTIALS does on any machine."""
    return {"STORAGE_EMULATOR_HOST": "", "API_ENDPOINT_OVERRIDE": url, "GOOGLE_APPLICATION_CREDENTIALS": str(key)}
