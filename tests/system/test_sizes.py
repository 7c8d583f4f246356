"""Bytes and seconds as people write them."""

import pytest

from moesparse.system.sizes import format_bytes, format_seconds


# below one and a half of a unit the smaller one says more
@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (5400, "1.5 h"), (3 * 86400, "3.0 days")]
)
def test_seconds_in_words(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (1023 * 2**20, "1023 MiB"), (2**31, "2 GiB")]
)
def test_bytes_in_words(count, text):
    assert format_bytes(count) == text
