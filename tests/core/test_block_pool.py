"""The block pool against an ordered dictionary that does the same slowly."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from aphrodite.core.block_pool import BlockPool


def registered(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    for block in blocks:
        pool.register(block, b"digest %d" % block)
    return blocks


def test_tail_of_a_sequence_is_evicted_before_its_head():
    pool = BlockPool(4)
    blocks = registered(pool, 4)
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[3], blocks[2]]
    assert pool.lookup(b"digest %d" % blocks[0]) == blocks[0]
    assert pool.lookup(b"digest %d" % blocks[3]) is None


def test_least_recently_used_sequence_is_evicted_first():
    pool = BlockPool(4)
    first, second = registered(pool, 2), registered(pool, 2)
    pool.release(first)
    pool.release(second)
    pool.reference(first)
    pool.release(first)
    assert set(pool.allocate(2)) == set(second)


def test_blocks_without_content_go_before_cached_ones():
    pool = BlockPool(3)
    cached = registered(pool, 1)
    plain = pool.allocate(2)
    pool.release(cached)
    pool.release(plain)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.num_cached == 1


def test_a_cached_block_is_revived_with_its_content():
    pool = BlockPool(2)
    block = registered(pool, 1)
    pool.release(block)
    pool.reference(block)
    assert (pool.num_used, pool.num_cached, pool.num_available) == (1, 0, 1)
    pool.allocate(1)
    assert pool.lookup(b"digest %d" % block[0]) == block[0]
    pool.check([block, pool.allocate(0), [1]])


def test_a_digest_stays_with_the_block_that_had_it_first():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    assert pool.lookup(b"same") == first
    pool.release([second])
    assert pool.num_cached == 0


def test_allocating_too_much_takes_nothing():
    pool = BlockPool(3)
    with pytest.raises(RuntimeError, match="4 blocks wanted, 3 available"):
        pool.allocate(4)
    assert pool.num_available == 3
    pool.check([])


def test_releasing_too_often_fails_loudly():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(blocks)


def test_check_sees_a_leak_and_a_double_owner():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.check([blocks])
    with pytest.raises(RuntimeError):
        pool.check([blocks[:1]])
    with pytest.raises(RuntimeError):
        pool.check([blocks, blocks])


def test_forgetting_keeps_references():
    pool = BlockPool(3)
    used, idle = registered(pool, 1), registered(pool, 1)
    pool.release(idle)
    pool.forget_all()
    assert pool.lookup(b"digest %d" % used[0]) is None
    assert pool.num_cached == 0
    pool.check([used])


@pytest.mark.parametrize("seed", range(20))
def test_random_use_equals_an_ordered_dictionary(seed: int):
    """The oracle's order: the next block to take comes first."""
    rng = random.Random(seed)
    pool = BlockPool(12)
    order: OrderedDict[int, bytes | None] = OrderedDict((block, None) for block in range(12))
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    for number in range(300):
        if rng.random() < 0.5 and order:
            count = rng.randint(1, len(order))
            expected = list(order)[:count]
            for block in expected:
                del order[block]
                content.pop(block, None)
            assert pool.allocate(count) == expected
            tables.append(expected)
            for block in expected[: rng.randint(0, count)]:
                content[block] = b"%d %d" % (number, block)
                pool.register(block, content[block])
        elif rng.random() < 0.3 and content:
            block = rng.choice(sorted(content))
            assert pool.lookup(content[block]) == block
            pool.reference([block])
            order.pop(block, None)
            tables.append([block])
        elif tables:
            table = tables.pop(rng.randrange(len(tables)))
            pool.release(table)
            for block in reversed(table):
                if not any(block in other for other in tables):
                    order[block] = content.get(block)
                    order.move_to_end(block, last=block in content)
        pool.check(tables)
        assert pool.num_available == len(order)
        assert pool.num_cached == sum(value is not None for value in order.values())
