"""What a reader remembers is bounded."""

from __future__ import annotations

from storage.cache import BoundedCache


def filled(limit, values):
    cache = BoundedCache(limit, len)
    for key, value in values.items():
        cache.put(key, value)
    return cache


def test_the_least_recently_used_go_first():
    cache = filled(10, {key: key * 2 for key in "abcde"})
    assert cache.get("a") == "aa"
    cache.put("f", "ffff")
    assert [key for key in "abcdef" if cache.get(key) is not None] == ["a", "d", "e", "f"]
    assert cache.size == 10


def test_what_is_larger_than_the_limit_is_not_kept():
    cache = filled(3, {"small": "aa", "large": "aaaa"})
    assert (cache.get("large"), cache.get("small"), cache.size) == (None, "aa", 2)
    assert filled(0, {"any": "a"}).get("any") is None


def test_a_key_keeps_its_first_value():
    cache = filled(10, {"key": "first"})
    cache.put("key", "second")
    assert (cache.get("key"), cache.size) == ("first", 5)
