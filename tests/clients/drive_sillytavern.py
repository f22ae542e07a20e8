"""Drive SillyTavern's own server against a running Aphrodite, as each of its connection types.

    python tests/clients/drive_sillytavern.py http://127.0.0.1:22420 [http://127.0.0.1:8123]

The second address is SillyTavern's (see README.md beside this file). Prints a line a check; ends with 1 if one failed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx

PROMPT = "The sea was"
BREAKERS = ["\n", ":", '"', "*"]
# What its settings send to every text completion type.
COMMON: dict[str, Any] = {
    "prompt": PROMPT, "max_new_tokens": 12, "max_tokens": 12, "temperature": 0.7, "top_p": 0.95, "typical_p": 1,
    "typical": 1, "sampler_seed": 7, "min_p": 0.05, "repetition_penalty": 1.1, "frequency_penalty": -0.1,
    "presence_penalty": 0.1, "top_k": 40, "skew": 0, "min_tokens": 2, "add_bos_token": True, "smoothing_factor": 0.1,
    "smoothing_curve": 1, "dry_allowed_length": 2, "dry_multiplier": 0.8, "dry_base": 1.75, "dry_penalty_last_n": 0,
    "dry_sequence_breakers": BREAKERS, "max_tokens_second": 0, "stopping_strings": ["\nUser:"], "stop": ["\nUser:"],
    "truncation_length": 4096, "ban_eos_token": False, "skip_special_tokens": True, "include_reasoning": True,
    "top_a": 0.1, "tfs": 0.99, "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "xtc_threshold": 0.1,
    "xtc_probability": 0.5, "banned_strings": ["tapestry"], "sampler_order": [6, 0, 1, 3, 4, 2, 5], "nsigma": 0,
    "top_n_sigma": 0, "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9, "logit_bias": {"5": -100},
    "dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.2, "dynatemp_range": 0.35,
    "dynatemp_exponent": 1,
}  # fmt: skip
OF_TYPE: dict[str, dict[str, Any]] = {
    "aphrodite": {
        "n": 3, "seed": 7, "custom_token_bans": [1, 2], "dry_sequence_breakers": json.dumps(BREAKERS),
        "temperature_last": True, "eta_cutoff": 0, "epsilon_cutoff": 0, "ignore_eos": False,
        "spaces_between_special_tokens": True, "early_stopping": False, "include_stop_str_in_output": False,
        "dynatemp_min": 0.5, "dynatemp_max": 1.2, "no_repeat_ngram_size": 0,
        "sampler_priority": ["dry", "penalties", "no_repeat_ngram", "temperature", "top_nsigma", "top_p_top_k", "top_a",
                             "min_p", "tfs", "eta_cutoff", "epsilon_cutoff", "typical_p", "quadratic", "xtc"],
    },
    "vllm": {
        "n": 3, "seed": 7, "ignore_eos": False, "spaces_between_special_tokens": True,
        "dry_sequence_breakers": json.dumps(BREAKERS), "custom_token_bans": "1,2",
    },
    "tabby": {
        "n": 3, "temperature_last": True, "repetition_decay": 0, "speculative_ngram": False, "rep_pen_range": 1024,
        "guidance_scale": 1, "negative_prompt": "", "grammar_string": "", "custom_token_bans": "1,2",
        "dry_sequence_breakers": json.dumps(BREAKERS),
    },
    "koboldcpp": {
        "grammar": "", "grammar_retain_state": False, "trim_stop": True, "rep_pen": 1.1, "rep_pen_range": 1024,
        "rep_pen_slope": 0.7, "repeat_penalty": 1.1, "repeat_last_n": 1024, "custom_token_bans": "1,2",
    },
    "llamacpp": {
        "repeat_penalty": 1.1, "repeat_last_n": 1024, "n_predict": 12, "num_predict": 12, "num_ctx": 4096,
        "mirostat": 0, "n_probs": 5, "ignore_eos": False, "cache_prompt": True, "grammar": "",
        "custom_token_bans": "1,2",
        "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "tfs_z", "typical_p", "top_p", "min_p",
                     "adaptive_p", "xtc", "temperature"],
    },
    "ollama": {"repeat_penalty": 1.1, "repeat_last_n": 1024, "num_predict": 12, "num_ctx": 4096, "mirostat": 0},
    "generic": {"n": 1, "seed": 7},
}  # fmt: skip
CLASSIC: dict[str, Any] = {
    "prompt": PROMPT, "gui_settings": False, "can_abort": True, "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "max_context_length": 2048, "max_length": 12, "rep_pen": 1.1, "rep_pen_range": 600, "rep_pen_slope": 0,
    "temperature": 0.7, "tfs": 1, "top_a": 0, "top_k": 0, "top_p": 0.9, "min_p": 0.05, "typical": 1, "mirostat": 0,
    "mirostat_tau": 5, "mirostat_eta": 0.1, "use_default_badwordsids": False, "grammar": "", "sampler_seed": 5,
    "stop_sequence": ["\nUser:"], "trim_stop": True,
}  # fmt: skip
MERGED = "min_p: 0.05\ndry_multiplier: 0.8\nxtc_probability: 0.5\nbanned_strings:\n  - tapestry\n"


class Driver:
    def __init__(self, engine: str, tavern: str) -> None:
        self.engine = engine
        self.failed = 0
        self._http = httpx.Client(base_url=tavern, timeout=60)
        self.model = httpx.get(f"{engine}/v1/models").json()["data"][0]["id"]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, str]:
        response = self._http.post(path, json=body)
        return response.status_code, response.text

    def check(self, label: str, answer: tuple[int, str], *wanted: str) -> None:
        status, text = answer
        good = status == 200 and '"error"' not in text and all(word in text for word in wanted)
        self.failed += not good
        print(f"{'ok ' if good else 'BAD'} {label}: {text[:100]!r}")

    def text_completion(self, kind: str) -> None:
        base = {"api_server": self.engine, "api_type": kind}
        root = "/api/backends/text-completions"
        body = {**COMMON, **OF_TYPE[kind], **base, "model": self.model}
        self.check(f"{kind} status", self.post(f"{root}/status", base), self.model)
        for stream in (False, True):
            answer = self.post(f"{root}/generate", {**body, "stream": stream})
            self.check(f"{kind} {'stream' if stream else 'whole'}", answer, "data:" if stream else "{")
        self.check(f"{kind} logprobs", self.post(f"{root}/generate", {**body, "stream": False, "logprobs": 10}))
        if kind not in ("generic", "ollama"):  # these it counts itself
            count = {"text": "Hello there", "api_type": kind, "url": self.engine, "model": self.model}
            self.check(f"{kind} tokens", self.post("/api/tokenizers/remote/textgenerationwebui/encode", count), "ids")
        if kind in ("koboldcpp", "llamacpp"):
            self.check(f"{kind} props", self.post(f"{root}/props", {**base, "model": self.model}), "n_ctx")

    def custom_chat(self) -> None:
        base = {"chat_completion_source": "custom", "custom_url": f"{self.engine}/v1"}
        root = "/api/backends/chat-completions"
        messages = [{"role": "system", "content": "You are Ann."}, {"role": "user", "content": "Hi", "name": "Bob"}]
        body = {
            **base, "messages": messages, "model": self.model, "temperature": 0.8, "max_tokens": 12, "top_p": 1, "n": 3,
            "seed": 5, "logprobs": 5, "stop": ["\nBob:"], "logit_bias": {}, "presence_penalty": 0,
            "frequency_penalty": 0, "custom_include_body": MERGED, "custom_exclude_body": "",
            "custom_include_headers": "",
        }  # fmt: skip
        self.check("custom chat status", self.post(f"{root}/status", base), self.model)
        self.check("custom chat whole", self.post(f"{root}/generate", {**body, "stream": False}), "choices")
        self.check("custom chat stream", self.post(f"{root}/generate", {**body, "stream": True}), "data:")

    def classic_kobold(self) -> None:
        server = {"api_server": f"{self.engine}/api"}
        root = "/api/backends/kobold"
        self.check("classic kobold status", self.post(f"{root}/status", server), "KoboldCpp")
        self.check("classic kobold whole", self.post(f"{root}/generate", {**server, **CLASSIC, "streaming": False}))
        self.check(
            "classic kobold stream", self.post(f"{root}/generate", {**server, **CLASSIC, "streaming": True}), "token"
        )
        count = {"text": "Hello there", "url": f"{self.engine}/api"}
        self.check("classic kobold tokens", self.post("/api/tokenizers/remote/kobold/count", count), "count")


def main() -> None:
    driver = Driver(sys.argv[1], (sys.argv[2:] or ["http://127.0.0.1:8123"])[0])
    for kind in OF_TYPE:
        driver.text_completion(kind)
    driver.custom_chat()
    driver.classic_kobold()
    sys.exit(int(driver.failed > 0))


if __name__ == "__main__":
    main()
