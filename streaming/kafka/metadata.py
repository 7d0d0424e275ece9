"""Kafka's Metadata request of version 10, which answers with topic ids; aiokafka 0.14 itself speaks version 5.

Knows the bytes of this one request (KIP-516; brokers from 2.8 on) and nothing of what is asked for.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Schema, TaggedFields


class Uuid:
    """16 bytes, as they are."""

    @staticmethod
    def encode(value: bytes) -> bytes:
        """Return the bytes."""
        return value

    @staticmethod
    def decode(data: BytesIO) -> bytes:
        """Read the bytes."""
        return data.read(16)

    repr = staticmethod(repr)


class MetadataResponse10(Response):  # type: ignore[misc]
    """Brokers, cluster id and topics with their ids and partitions."""

    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("brokers", CompactArray(
            ("node_id", Int32), ("host", CompactString()), ("port", Int32), ("rack", CompactString()),
            ("tags", TaggedFields),
        )),
        ("cluster_id", CompactString()),
        ("controller_id", Int32),
        ("topics", CompactArray(
            ("error_code", Int16), ("name", CompactString()), ("topic_id", Uuid), ("is_internal", Boolean),
            ("partitions", CompactArray(
                ("error_code", Int16), ("partition", Int32), ("leader", Int32), ("leader_epoch", Int32),
                ("replicas", CompactArray(Int32)), ("isr", CompactArray(Int32)),
                ("offline_replicas", CompactArray(Int32)), ("tags", TaggedFields),
            )),
            ("authorized_operations", Int32), ("tags", TaggedFields),
        )),
        ("cluster_authorized_operations", Int32),
        ("tags", TaggedFields),
    )  # fmt: skip


class MetadataRequest10(RequestStruct):  # type: ignore[misc]
    """Topics by name, creating none."""

    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 10
    RESPONSE_TYPE = MetadataResponse10
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", Uuid), ("name", CompactString()), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class MetadataOf(Request[MetadataRequest10]):  # type: ignore[misc]
    """Asks for these topics with their ids."""

    API_KEY = 3

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def build(self, request_struct_class: type[MetadataRequest10]) -> MetadataRequest10:
        """Return the request; the client asks for it by the versions that the broker speaks."""
        topics: list[tuple[bytes, str, dict[int, bytes]]] = [(bytes(16), name, {}) for name in self._names]
        return request_struct_class(topics, False, False, False, {})


def uuid_text(uuid: bytes) -> str:
    """Return a topic id as Kafka's own tools write it; "" for none."""
    return base64.urlsafe_b64encode(uuid).rstrip(b"=").decode() if any(uuid) else ""
