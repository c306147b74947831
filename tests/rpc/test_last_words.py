"""Answers with last words come apart as they were put together, however they are cut on the way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.rpc.last_words import Chunks, chunk, ending


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.binary(max_size=40)), words=st.text(max_size=20), step=st.integers(1, 30))
def test_chunks_and_words_survive_any_cut(parts: list[bytes], words: str, step: int) -> None:
    stream = b"".join(chunk(part) for part in parts) + ending(words)
    chunks = Chunks()
    found = b""
    for at in range(0, len(stream), step):
        assert chunks.words is None
        found += chunks.feed(stream[at : at + step])
    assert found == b"".join(parts)
    assert chunks.words == words


def test_a_stream_that_breaks_off_has_no_words() -> None:
    chunks = Chunks()
    assert chunks.feed(chunk(b"ab") + ending("died")[:-1]) == b"ab"
    assert chunks.words is None


def test_what_is_not_cut_is_refused() -> None:
    with pytest.raises(ConnectionError, match="not cut into chunks"):
        Chunks().feed(b"\xff" * 8)
