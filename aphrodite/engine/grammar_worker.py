"""The process that tries grammars before the engine meets them, and may be killed for what they do to it.

Run as `python -m aphrodite.engine.grammar_worker TOKENIZER VOCABULARY_SIZE`. Messages are msgpack with a length of four
bytes before them: once None, or why grammars cannot be used here; then, for each grammar that comes, None or why it
cannot be used. The process ends with its standard input, and uses no more memory and time for a grammar than it may.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from aphrodite.errors import AphroditeError, InvalidRequestError
from aphrodite.sampling.grammar import GrammarCompiler, unusable
from aphrodite.sampling.table import Grammar
from aphrodite.sampling.vocabulary import Vocabulary
from aphrodite.tokenizer.loader import load_tokenizer

MEMORY = 1 << 30  # bytes that grammars may take
_CPU_SECONDS = 30  # of one grammar, for the case that nobody is left to end the process


def read(stream: BinaryIO) -> bytes | None:
    """The next message, None at the end."""
    head = stream.read(4)
    return stream.read(int.from_bytes(head, "little")) if len(head) == 4 else None


def write(stream: BinaryIO, message: bytes) -> None:
    stream.write(len(message).to_bytes(4, "little") + message)
    stream.flush()


def trial(grammars: GrammarCompiler, grammar: Grammar) -> str | None:
    """Compile a grammar and look for its first tokens; returns why it cannot be used."""
    try:
        row = grammars.follow(grammar, 0, ())
    except InvalidRequestError as error:
        return str(error)
    row.refresh(0)
    return None if row.failure is None else str(unusable(grammar, row.failure))


def main() -> int:
    path, vocabulary_size = sys.argv[1:]
    try:
        grammars = GrammarCompiler(Vocabulary(int(vocabulary_size), load_tokenizer(Path(path))))
        grammars.compile(Grammar("json_object", ""))  # builds the tables of the vocabulary
    except AphroditeError as error:
        write(sys.stdout.buffer, msgspec.msgpack.encode(str(error)))
        return 1
    if sys.platform == "linux":  # elsewhere there is no such limit, or none that holds
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    write(sys.stdout.buffer, msgspec.msgpack.encode(None))
    while (message := read(sys.stdin.buffer)) is not None:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + _CPU_SECONDS, most))
        answer = trial(grammars, msgspec.msgpack.decode(message, type=Grammar))
        write(sys.stdout.buffer, msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
