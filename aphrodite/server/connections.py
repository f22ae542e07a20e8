"""What the operating system is told of connections: how many there may be, and when a silent peer is gone."""

from __future__ import annotations

import contextlib
import logging
import socket

logger = logging.getLogger(__name__)

# For everything that is no client's connection: the model's files, the engine's sockets, logs.
_SPARE_FILES = 512
_KEEP_ALIVE_PROBES = 3
_LONGEST_WATCH = 7200.0  # seconds; the system takes no more than about four times as much


def allow_connections(count: int) -> None:
    """Let this process have so many connections open, as far as its hard limit on open files goes.

    A usual soft limit is 1,024, which is for `select`; beyond it connections are not even refused.
    """
    try:
        import resource
    except ImportError:  # no such limit on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft < wanted:
        logger.warning(
            "at most %d files may be open (ulimit -n), too few for %d connections; raise the hard limit", soft, count
        )


def watch_peer(sock: socket.socket, seconds: float) -> None:
    """Have a connection end once its peer has acknowledged nothing for about so long, be there data for it or not.

    A peer that lost its network says no goodbye: without this its answer would be computed to the end.
    """
    seconds = min(seconds, _LONGEST_WATCH)
    options = {
        "TCP_KEEPIDLE": max(1, round(seconds / 2)),
        "TCP_KEEPINTVL": max(1, round(seconds / 2 / _KEEP_ALIVE_PROBES)),
        "TCP_KEEPCNT": _KEEP_ALIVE_PROBES,
        "TCP_USER_TIMEOUT": max(1, round(seconds * 1000)),
    }
    with contextlib.suppress(OSError):  # it may have gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # Linux has them all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
