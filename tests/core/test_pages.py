"""Pages of the cache against a plain model of who holds what."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from prune_llm.pages import FIRST, PagePool, page_key


def test_keys_name_all_tokens_up_to_the_end_of_their_page() -> None:
    first = page_key(FIRST, [1, 2, 3])
    keys = {
        first,
        page_key(FIRST, [1, 2, 4]),
        page_key(FIRST, [3, 2, 1]),
        page_key(first, [1, 2, 3]),
        page_key(page_key(FIRST, [1, 2, 4]), [1, 2, 3]),
    }
    assert len(keys) == 5
    assert page_key(FIRST, [1, 2, 3]) == first


def test_a_page_is_shared_until_its_last_holder_leaves() -> None:
    pool = PagePool(2)
    page, key = pool.take(), page_key(FIRST, [7])
    assert page is not None
    pool.register(page, key)
    assert pool.is_held(key) and pool.adopt(key) == page
    pool.release([page])
    assert (pool.held, pool.idle, pool.available) == (1, 0, 1)
    pool.release([page])
    assert (pool.held, pool.idle, pool.available) == (0, 1, 2) and not pool.is_held(key)
    assert pool.adopt(key) == page and pool.is_held(key)


def test_the_longest_idle_goes_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = PagePool(3)
    keys = [page_key(FIRST, [n]) for n in range(3)]
    pages = [pool.take() for _ in keys]
    assert None not in pages
    for page, key in zip(pages, keys, strict=True):
        assert page is not None
        pool.register(page, key)
    pool.release([pages[0], pages[1]])  # type: ignore[list-item]
    pool.release([pages[2]])  # type: ignore[list-item]
    assert pool.take() == pages[1]
    assert [pool.adopt(key) for key in keys] == [pages[0], None, pages[2]]
    assert pool.take() is None


def test_the_first_page_of_some_contents_stays_the_registered_one() -> None:
    pool = PagePool(2)
    one, other, key = pool.take(), pool.take(), page_key(FIRST, [1])
    assert one is not None and other is not None
    pool.register(one, key)
    pool.register(other, key)
    pool.release([other])
    assert pool.adopt(key) == one and pool.idle == 0 and pool.available == 1


def test_no_pages() -> None:
    with pytest.raises(ValueError, match="pages 0: must be at least 1"):
        PagePool(0)


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_against_a_plain_model(seed: int) -> None:
    """Every page is free, held by exactly those who got it, or idle; contents never mix."""
    random_ = random.Random(seed)
    pool = PagePool(7)
    holders: list[list[int]] = []
    contents: dict[int, bytes] = {}  # of registered pages, as far as they are known to live
    for _ in range(2000):
        action = random_.randrange(4)
        key = page_key(FIRST, [random_.randrange(12)])
        held = Counter(page for pages in holders for page in pages)
        if action == 0:
            page = pool.take()
            assert (page is None) == (len(held) == 7)
            if page is not None:
                assert page not in held
                contents.pop(page, None)
                holders.append([page])
        elif action == 1 and holders:
            pages = random_.choice(holders)
            if pages[-1] not in contents:
                pool.register(pages[-1], key)
                if key not in contents.values():
                    contents[pages[-1]] = key
        elif action == 2 and holders:
            expected = next((page for page, own in contents.items() if own == key), None)
            page = pool.adopt(key)
            assert page == expected
            if page is not None:
                random_.choice(holders).append(page)
        elif holders:
            pool.release(holders.pop(random_.randrange(len(holders))))
        held = Counter(page for pages in holders for page in pages)
        assert pool.held == len(held)
        assert pool.idle == len(contents.keys() - held.keys())
        assert pool.available == 7 - len(held)
    for pages in holders:
        pool.release(pages)
    assert pool.available == 7 and sorted(pool.take() for _ in range(7)) == list(range(7))  # type: ignore[type-var]
