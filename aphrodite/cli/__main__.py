"""The `aphrodite` command, also as `python -m aphrodite.cli`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command. A Ctrl-C while its modules are imported ends the process without a trace of them."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # as it is, unless a shell starts the process with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from aphrodite.cli.main import main as command

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
