"""How a row's plan looks to the sampling kernels: one record of 32-bit words in a table on the device.

A record is a header, then operations of OP_WORDS words each: first the row's program in its order, of which the first
`EDITS` change a logit by itself (they run while the logits are read), then lists of tokens that some positions mask.
Operation codes are those of `NativeOp`. Pointers take two words at an even place.
"""

from __future__ import annotations

import triton.language as tl

# Words of the header.
ACTIVE = tl.constexpr(0)  # 0: the row is not sampled here
GREEDY = tl.constexpr(1)
SEED_LOW = tl.constexpr(2)
SEED_HIGH = tl.constexpr(3)
NUM_PROMPT = tl.constexpr(4)
EDITS = tl.constexpr(5)  # operations that run while the logits are read
OPS = tl.constexpr(6)  # operations of the program, those included
ALL = tl.constexpr(7)  # and the lists behind them
FLAGS = tl.constexpr(8)
BARRED_COUNT = tl.constexpr(9)
BARRED_AT = tl.constexpr(10)  # the position at which they are barred
BARRED = tl.constexpr(12)  # pointer to int32
BIAS = tl.constexpr(14)  # pointer to float32: amounts of the tokens that have a bias
HEADER = tl.constexpr(16)

# Words of an operation.
CODE = tl.constexpr(0)
COUNT = tl.constexpr(1)  # entries behind the pointer
VALUES = tl.constexpr(2)  # six float32
POINTER = tl.constexpr(8)
FIRST = tl.constexpr(10)  # two integers
SECOND = tl.constexpr(11)
OP_WORDS = tl.constexpr(12)
MAX_OPS = 40
RECORD = tl.constexpr(16 + 12 * MAX_OPS)  # words

# Flags.
COUNTS = tl.constexpr(1)  # penalties count the row's tokens
MARKED = tl.constexpr(2)  # some tokens have a bias or are masked
HISTORY = tl.constexpr(4)  # marks are made at each step and taken back after it
STATS = tl.constexpr(8)  # the program starts with a stage that needs the whole distribution

# Codes as in NativeOp.
MASK = tl.constexpr(1)
PENALTIES = tl.constexpr(4)
TEMPERATURE = tl.constexpr(5)
TOP_K = tl.constexpr(6)
TOP_P = tl.constexpr(7)
MIN_P = tl.constexpr(8)
BAD_WORDS = tl.constexpr(9)
NO_REPEAT_NGRAM = tl.constexpr(10)
DRY = tl.constexpr(11)
DYNAMIC_TEMPERATURE = tl.constexpr(12)
TOP_NSIGMA = tl.constexpr(13)
TOP_A = tl.constexpr(14)
ETA_CUTOFF = tl.constexpr(16)
EPSILON_CUTOFF = tl.constexpr(17)
TYPICAL_P = tl.constexpr(18)
QUADRATIC = tl.constexpr(19)
XTC = tl.constexpr(20)
MIROSTAT = tl.constexpr(23)
ADAPTIVE_P = tl.constexpr(24)

# A token's mark, one int32 a token and row. The first four are kept while the request lives, the others for one step.
MATCH = tl.constexpr(0xFFFFF)  # DRY: one more than the longest match that the token would continue
BIAS_SHIFT = tl.constexpr(20)
BIAS_INDEX = tl.constexpr(0xFF)  # behind the shift: one more than its place among the amounts; 0: none
PROTECTED = tl.constexpr(1 << 28)  # XTC leaves it
BANNED = tl.constexpr(1 << 29)
BARRED_MARK = tl.constexpr(1 << 30)  # masked at this position
REPEATS = tl.constexpr(-(1 << 31))  # completes an n-gram that was there before
KEPT = tl.constexpr(0x3FF00000)
MAX_BIASES = 255

IN_PROMPT = tl.constexpr(1 << 30)  # of a token's count: it is in the prompt; the bits below count it in the answer
MAX_MATCH = 512  # tokens of history that DRY compares at most

# Where a row's distribution is after its program, and what is left to do (`state` of sampling.py).
DONE = tl.constexpr(0)  # the token is chosen
DRAW_EDITED = tl.constexpr(1)  # from the logits as they are read
RUN_WIDE = tl.constexpr(2)  # its survivors may be too many for a list: run the program over the vocabulary
DRAW_WORK = tl.constexpr(3)  # from the row's work buffer
LISTED = tl.constexpr(4)  # as DONE; the survivors are in the row's list
RUN_LIST = tl.constexpr(5)  # what may survive is in the row's list: run the program over that

# Words of a row's state, and floats beside them.
MODE = tl.constexpr(0)
TOKEN = tl.constexpr(1)
OK = tl.constexpr(2)
EXHAUSTED = tl.constexpr(3)
LISTED_COUNT = tl.constexpr(4)
ARRIVED = tl.constexpr(5)  # blocks that have drawn their share of the row
FIRST_OP = tl.constexpr(6)  # of the program that is left for a list
STATE_WORDS = tl.constexpr(8)
TOP = tl.constexpr(0)  # the largest score without noise
SHAPED = tl.constexpr(1)  # 1: adaptive-p's curve shapes the draw
TARGET = tl.constexpr(2)
NORMALIZER = tl.constexpr(3)  # of the distribution that adaptive-p or mirostat speaks of
CHOSEN = tl.constexpr(4)  # the chosen token's logit in it
SUMS = tl.constexpr(8)  # four float64 of two places each, see `run_program`
STATE_FLOATS = tl.constexpr(16)

# What a piece of a row says about all of it (`stats` of sampling_measure.py), relative to the piece's own maximum.
PIECE_TOP = tl.constexpr(0)
PIECE_MASS = tl.constexpr(1)
PIECE_WEIGHTED = tl.constexpr(2)  # sum of exp(d) * d
PIECE_COUNT = tl.constexpr(3)
PIECE_MEAN = tl.constexpr(4)  # of d
PIECE_SQUARES = tl.constexpr(5)  # sum of (d - mean)^2
PIECE_BAD = tl.constexpr(6)  # 1: a logit is NaN or +inf
PIECE_WORDS = tl.constexpr(8)
