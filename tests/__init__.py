"""Tests, flat: `test_<module>.py`, through the front door, on one real Kafka broker and one real Redis per run."""
