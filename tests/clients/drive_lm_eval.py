"""lm-eval's `local-completions` against a running server, and beside it lm-eval's own transformers back end.

    aphrodite run model.gguf --dtype float32 --executor torch     # the reference mode
    python tests/clients/drive_lm_eval.py http://127.0.0.1:2242 model.gguf [KEY]

Every choice's log-likelihood has to be that of transformers within 1e-3, where transformers reads the same GGUF in
float32. Tokens come from the server (`/tokenizer_info`, `/tokenize`). `lm-eval[api]`, torch, transformers and gguf have
to be installed.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from checks import HERE, Checks, require
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASK = HERE / "lm_eval_task"
TOLERANCE = 1e-3


def likelihoods(model: str, settings: dict[str, Any], tasks: TaskManager) -> tuple[list[list[float]], float]:
    """Each question's choices, and the accuracy."""
    result = simple_evaluate(
        model, model_args=settings, tasks=["aphrodite_endings"], task_manager=tasks, log_samples=True, bootstrap_iters=0
    )
    samples = sorted(result["samples"]["aphrodite_endings"], key=lambda sample: int(sample["doc_id"]))
    values = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return values, float(result["results"]["aphrodite_endings"]["acc,none"])


def main() -> None:
    url, path, *key = sys.argv[1:]
    os.environ["OPENAI_API_KEY"] = (key or ["none"])[0]
    model = Path(path).resolve()
    os.chdir(TASK)  # the task names its data relative to itself
    tasks = TaskManager(include_path=str(TASK))
    check = Checks(f"lm-eval {version('lm-eval')}")
    reference, accuracy = likelihoods(
        "hf", {"pretrained": str(model.parent), "gguf_file": model.name, "dtype": "float32", "device": "cpu"}, tasks
    )
    print(f"transformers: accuracy {accuracy:.3f}")
    for batch in (1, 4):
        with check(f"log-likelihoods of {len(reference)} questions, {batch} a request"):
            settings = {
                "model": "", "base_url": f"{url}/v1/completions", "num_concurrent": 4, "batch_size": batch,
                "tokenizer_backend": "remote", "max_retries": 1,
            }  # fmt: skip
            served, accuracy = likelihoods("local-completions", settings, tasks)
            differences = [
                abs(one - other) for ours, theirs in zip(served, reference, strict=True)
                for one, other in zip(ours, theirs, strict=True)
            ]  # fmt: skip
            print(
                f"    accuracy {accuracy:.3f}; largest difference of {len(differences)} choices {max(differences):.2e}"
            )
            require(max(differences) < TOLERANCE, served, reference)
    check.end()


if __name__ == "__main__":
    main()
