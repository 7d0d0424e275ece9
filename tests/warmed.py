"""What test processes are forked from (tests/forked.py): imports and compiled kernels, paid once."""

from __future__ import annotations

from streaming import worker
from streaming.training import process

worker.warm()
process.warm()
