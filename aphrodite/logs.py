"""Logging: plain lines on standard error, control characters of foreign text made harmless."""

from __future__ import annotations

import logging
import sys

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if code not in (0x09, 0x0A)}


class _SafeFormatter(logging.Formatter):
    """Escapes control characters, so that nothing a client sends can forge lines or colours."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\n", "\\n")
        return super().formatMessage(record).translate(_CONTROLS)


def configure_logging(level: str) -> None:
    """Send the package's records of `level` (a logging name) and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("aphrodite")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
