"""llama.cpp as a peer: answers timing requests over standard input and output. Runs in the peers' environment.

    python llama_cpp_worker.py MODEL.gguf --threads 2

A request is a line of JSON, `{"kind": "decode", "streams": 8, "start": 225, "steps": 64}` or
`{"kind": "prefill", "length": 512}`; the answer is a line of JSON with `seconds` (of a step, of a prefill).
Prompts of decode stay in the cache for requests of the same start. Between requests it does nothing, so it can be
measured in turn with another engine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import sys
import time

import llama_cpp as api
import numpy as np

BATCH = 512


class LlamaCpp:
    """One model, one context of up to `streams` sequences; greedy sampling, as the cheapest there is."""

    def __init__(self, model: str, *, threads: int, streams: int, positions: int) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp cannot load {model}")
        params = api.llama_context_default_params()
        params.n_ctx = streams * positions
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = streams
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(BATCH, 0, 1)
        self._streams = streams
        self._filled: tuple[int, int] | None = None  # prompt length and the token after it, in all sequences

    def clear(self) -> None:
        api.llama_memory_clear(self._memory, True)
        self._filled = None

    def fill(self, start: int) -> int:
        """Make every sequence hold a prompt of `start` tokens, computed only once; returns the token after it."""
        if self._filled is None or self._filled[0] != start:
            self.clear()
            token = self.prefill(random_tokens(self, start), 0)
            for sequence in range(1, self._streams):
                api.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            self._filled = start, token
        for sequence in range(self._streams):
            api.llama_memory_seq_rm(self._memory, sequence, start, -1)
        return self._filled[1]

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute rows of (token, position, sequence, wants logits)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, logits) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = logits
        status = api.llama_decode(self._context, batch)
        if status != 0:
            sys.exit(f"llama_decode failed with {status}")

    def argmax(self, row: int) -> int:
        pointer = api.llama_get_logits_ith(self._context, row)
        logits = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))
        return int(logits.argmax())

    def prefill(self, tokens: list[int], sequence: int) -> int:
        """Compute a prompt in chunks; returns the first token of the answer."""
        last = len(tokens) - 1
        for start in range(0, len(tokens), BATCH):
            chunk = range(start, min(start + BATCH, len(tokens)))
            self.decode([(tokens[position], position, sequence, position == last) for position in chunk])
        return self.argmax(last % BATCH)


def time_decode(engine: LlamaCpp, *, streams: int, start: int, steps: int) -> float:
    """Mean seconds of a step of `streams` sequences, over `steps` that follow prompts of `start` tokens."""
    tokens = [engine.fill(start)] * streams
    began = time.perf_counter()
    for step in range(steps):
        engine.decode([(token, start + step, sequence, True) for sequence, token in enumerate(tokens)])
        tokens = [engine.argmax(row) for row in range(streams)]
    return (time.perf_counter() - began) / steps


def time_prefill(engine: LlamaCpp, *, length: int) -> float:
    """Seconds from a prompt of `length` tokens to the first token of its answer."""
    engine.clear()
    tokens = random_tokens(engine, length)
    began = time.perf_counter()
    engine.prefill(tokens, 0)
    return time.perf_counter() - began


def random_tokens(engine: LlamaCpp, count: int) -> list[int]:
    return [random.randrange(engine.vocab_size) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, None)
    engines: dict[int, LlamaCpp] = {}
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("kind")
        streams = request.get("streams", 1)
        if streams not in engines:
            positions = 4096 if streams == 1 else 512
            engines[streams] = LlamaCpp(
                arguments.model, threads=arguments.threads, streams=streams, positions=positions
            )
        measure = {"decode": time_decode, "prefill": time_prefill}[kind]
        print(json.dumps({"seconds": measure(engines[streams], **request)}), flush=True)


if __name__ == "__main__":
    main()
