"""Block digests against hashlib by hand, and what they must tell apart."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from aphrodite.core.prefix_cache import BlockHasher


def digests(hasher: BlockHasher, tokens: list[int], salt: bytes | None = None) -> list[bytes]:
    result: list[bytes] = []
    hasher.extend(result, array("i", tokens), len(tokens) // hasher.block_size, salt)
    return result


def test_digest_is_keyed_blake2b_chained_over_int32_tokens():
    key = b"k" * 32
    parent = blake2b(b"\x01tenant", digest_size=16, key=key).digest()
    expected = []
    for block in ([1, 2], [70000, 4]):
        data = b"".join(token.to_bytes(4, "little") for token in block)
        parent = blake2b(parent + data, digest_size=16, key=key).digest()
        expected.append(parent)
    assert digests(BlockHasher(2, key), [1, 2, 70000, 4, 5], b"tenant") == expected


def test_extending_bit_by_bit_reads_each_token_once():
    hasher = BlockHasher(4)
    tokens = array("i", range(20))
    whole = digests(hasher, list(tokens))
    result: list[bytes] = []
    for count in (0, 1, 1, 3, 5):
        hasher.extend(result, tokens, count, None)
        for position in range(count * 4):
            tokens[position] = -1  # already digested: may not be read again
    assert result == whole


def test_a_digest_depends_on_everything_before_it():
    hasher = BlockHasher(2)
    assert digests(hasher, [1, 2, 3, 4])[1] != digests(hasher, [1, 9, 3, 4])[1]
    assert digests(hasher, [1, 2, 3, 4])[0] == digests(hasher, [1, 2, 9, 9])[0]
    assert digests(hasher, [1, 1, 1, 1])[0] != digests(hasher, [1, 1, 1, 1])[1]


def test_salts_never_share():
    hasher = BlockHasher(2)
    salts = [None, b"", b"\x00", b"a", b"b"]
    assert len({digests(hasher, [1, 2], salt)[0] for salt in salts}) == len(salts)


def test_keys_differ_between_processes():
    assert digests(BlockHasher(2), [1, 2]) != digests(BlockHasher(2), [1, 2])
