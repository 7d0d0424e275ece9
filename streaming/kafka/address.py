"""Addresses of Kafka with TLS and SASL in them; knows nothing of topics, imports nothing of ours.

`host:port,host:port`, or `ssl://`, `sasl_plaintext://user:password@`, `sasl_ssl://user:password@` before it and, after
a `?`, `ca=PATH` (what to trust, PEM; default the system's), `cert=PATH&key=PATH` (what to show), `mechanism=` (PLAIN,
SCRAM-SHA-256, SCRAM-SHA-512). User and password are percent-encoded.
"""

from __future__ import annotations

import re
import ssl
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
FORMS: Final = (
    "host:port, several separated by commas, or [ssl|sasl_ssl|sasl_plaintext]://[user:password@]host:port?ca=…"
)
_SERVERS = re.compile(r"[^\s:/@,]+:\d{1,5}(,[^\s:/@,]+:\d{1,5})*")
_SCHEMES = {"ssl": "SSL", "sasl_ssl": "SASL_SSL", "sasl_plaintext": "SASL_PLAINTEXT"}
_MASK = "********"


class AddressError(ValueError):
    """An address of Kafka that cannot be used; the message never holds a password."""


def client_options(kafka: str) -> dict[str, Any]:
    """Return what every aiokafka client takes: servers, protocol, TLS context, credentials.

    Raises AddressError naming what cannot be used.
    """
    if "://" not in kafka:
        if not _SERVERS.fullmatch(kafka):
            raise AddressError(f"Kafka's address: expected {FORMS}")
        return {"bootstrap_servers": kafka}
    scheme, _, rest = kafka.partition("://")
    parts = urlsplit(f"kafka://{rest}")  # a scheme with an underscore is none to urlsplit
    login, _, servers = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    query = dict(parse_qsl(parts.query))
    if scheme not in _SCHEMES or not _SERVERS.fullmatch(servers) or parts.path not in ("", "/"):
        raise AddressError(f"Kafka's address: expected {FORMS}, got {shown(kafka)}")
    if unknown := query.keys() - {"ca", "cert", "key", "mechanism"}:
        raise AddressError(
            f"Kafka's address: expected ca, cert, key or mechanism after the ?, got {', '.join(unknown)}"
        )
    protocol = _SCHEMES[scheme]
    options: dict[str, Any] = {"bootstrap_servers": servers, "security_protocol": protocol}
    if protocol.endswith("SSL"):
        options["ssl_context"] = _context(query)
    if protocol.startswith("SASL"):
        mechanism = query.get("mechanism", "SCRAM-SHA-512")
        if mechanism not in MECHANISMS or not user or not password:
            raise AddressError(
                f"Kafka's address: {scheme} needs user:password@ and a mechanism of {', '.join(MECHANISMS)}"
            )
        options |= {
            "sasl_mechanism": mechanism, "sasl_plain_username": unquote(user), "sasl_plain_password": unquote(password),
        }  # fmt: skip
    return options


def _context(query: dict[str, str]) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=query.get("ca"))
        if "cert" in query:
            context.load_cert_chain(query["cert"], query.get("key"))
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(f"{name}={query[name]}" for name in ("ca", "cert", "key") if name in query)
        raise AddressError(f"Kafka's address: expected readable PEM files, got {files} ({error})") from error
    return context


def servers(kafka: str) -> list[tuple[str, int]]:
    """Return (host, port) of each server that an address names."""
    listed = kafka.partition("://")[2].rpartition("@")[2].partition("?")[0].strip("/") if "://" in kafka else kafka
    found = (server.rpartition(":") for server in listed.split(",") if server)
    return [(host, int(port)) for host, _, port in found]


def shown(address: str) -> str:
    """Return an address of Kafka or Redis with its password masked."""
    return re.sub(r"(://[^:/@]*:)\S*@", rf"\g<1>{_MASK}@", address)
