"""The cache folder holds only complete token caches, readable as the user's umask allows, and nothing abandoned."""

import os
import time

import pytest

from gpt4o_jax.data import token_cache
from gpt4o_jax.data.tokenizer import byte_tokenizer
from gpt4o_jax.errors import ExitCode, RunError
from gpt4o_jax.paths import appearing_whole

TEXTS = ["one", "two"]


def test_a_cache_may_be_read_by_whom_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        token_cache.build(tmp_path / "cache", "name", TEXTS, byte_tokenizer())
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "name").stat().st_mode & 0o777 == 0o755


def test_what_a_killed_process_left_goes_after_a_day_and_not_before(tmp_path):
    for name, hours in {".name.young": 23, ".name.old": 25, ".other.old": 25}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.bin").touch()
        then = time.time() - 3600 * hours
        os.utime(tmp_path / name / "tokens.bin", (then, then))
        os.utime(tmp_path / name, (then - 3600 * 48,) * 2)
    assert token_cache.build(tmp_path, "name", TEXTS, byte_tokenizer()).documents == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [".name.young", ".other.old", "name"]


def test_a_document_that_cannot_be_tokenised_leaves_nothing(tmp_path):
    def encode(text):
        raise RunError("no", ExitCode.DATA)

    with pytest.raises(RunError, match="no"):
        token_cache.build(tmp_path, "name", TEXTS, byte_tokenizer(), encode)
    assert not any(tmp_path.iterdir())


def test_of_two_that_write_one_file_both_end_well(tmp_path):
    with appearing_whole(tmp_path / "x") as first, appearing_whole(tmp_path / "x") as second:
        first.write_text("same")
        second.write_text("same")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "same"
