"""Names and numbers that clients use for the steps of a sampling order, as names of our stages.

Known spellings: Aphrodite's names and its ids 0 to 13, the names of llama.cpp and text-generation-webui,
and KoboldCpp's ids. KoboldCpp's seven ids mean other samplers than Aphrodite's (0 is top_k alone, 2 is top_p
followed by min_p), so a list is read as KoboldCpp's exactly if it consists of the ids 0 to 6, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_IDS: dict[int, tuple[str, ...]] = {
    0: ("top_k", "top_p"),
    1: ("top_a",),
    2: ("min_p",),
    3: ("tfs",),
    4: ("typical_p",),
    5: ("temperature",),
    6: ("penalties",),
    7: ("dry",),
    8: ("no_repeat_ngram",),
    9: ("top_nsigma",),
    10: ("eta_cutoff",),
    11: ("epsilon_cutoff",),
    12: ("quadratic",),
    13: ("xtc",),
}
_KOBOLD_IDS = {**{number: _IDS[number] for number in range(7)}, 0: ("top_k",), 2: ("top_p", "min_p")}

_NAMES: dict[str, tuple[str, ...]] = {
    "top_p_top_k": ("top_k", "top_p"),
    **dict.fromkeys(("temp", "dynatemp", "dynamic_temperature"), ("temperature",)),
    **dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty", "rep_pen"), ("penalties",)),
    "no_repeat_ngram_size": ("no_repeat_ngram",),
    **dict.fromkeys(("nsigma", "top_n_sigma"), ("top_nsigma",)),
    **dict.fromkeys(("typical", "typ_p"), ("typical_p",)),
    **dict.fromkeys(("tfs_z", "tail_free"), ("tfs",)),
    **dict.fromkeys(("quadratic_sampling", "smoothing", "smoothing_factor"), ("quadratic",)),
    # Of text-generation-webui and of llama.cpp: their clients name them in every order, and there is none here.
    **dict.fromkeys(("encoder_repetition_penalty", "infill"), ()),
}


def stage_names(order: Sequence[str | int]) -> tuple[str, ...]:
    """The stages that a client's order speaks of, each once, where it is first named.

    Names are read in any case; what is not known stays as it is, in lower case.

    Raises:
        KeyError: a number that stands for no sampler.
    """
    numbers = [entry for entry in order if isinstance(entry, int)]
    ids = _KOBOLD_IDS if len(numbers) == len(order) and sorted(numbers) == list(range(7)) else _IDS
    found = (ids[entry] if isinstance(entry, int) else _named(entry) for entry in order)
    return tuple(dict.fromkeys(name for names in found for name in names))


def arrange(default: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """`default` with the `wanted` names in their own order, in the places that they have between them there.

    So a partial list says how its stages stand to each other, and all others keep their places.
    """
    default = list(default)
    present = set(default)
    moved = iter([name for name in wanted if name in present])
    named = set(wanted)
    return [next(moved) if name in named else name for name in default]


def _named(name: str) -> tuple[str, ...]:
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    return _NAMES.get(key, (key,))
