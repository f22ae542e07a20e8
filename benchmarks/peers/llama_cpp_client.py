"""llama.cpp in the peers' environment, asked for one timing at a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".peers" / "bin" / "python"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")


class LlamaCppPeer:
    """A worker process that holds the model and sleeps between requests."""

    def __init__(self, model: str, *, threads: int) -> None:
        self._process = subprocess.Popen(
            [str(PYTHON), str(WORKER), model, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def declines() -> str | None:
        """Why it cannot be measured here, or None."""
        if not PYTHON.exists():
            return "`make peers` installs it (compiles for about ten minutes)"
        probe = subprocess.run([str(PYTHON), "-c", "import llama_cpp"], capture_output=True, text=True, check=False)
        return None if probe.returncode == 0 else "its installation is incomplete; run `make peers` again"

    def decode(self, *, streams: int, start: int, steps: int) -> float:
        """Seconds of a step, on average over `steps` that follow prompts of `start` tokens."""
        return self._ask({"kind": "decode", "streams": streams, "start": start, "steps": steps})

    def prefill(self, *, length: int) -> float:
        """Seconds to the first token."""
        return self._ask({"kind": "prefill", "length": length})

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> float:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with {self._process.wait()}; its message is above")
        return float(json.loads(line)["seconds"])
