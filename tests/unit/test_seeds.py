"""Row seeds: the documented function, and what they depend on."""

import hashlib

from spin_megatron.run.seeds import row_seed

HAND_CHECKED = 6412429284640550598


def test_a_row_seed_is_the_shifted_head_of_sha256_over_the_json_list() -> None:
    # printf '[42,"generate",0,"ex-1"]' | sha256sum  ->  first 16 hex digits, shifted right by one bit.
    by_hand = int(hashlib.sha256(b'[42,"generate",0,"ex-1"]').hexdigest()[:16], 16) // 2
    assert row_seed(42, "generate", 0, "ex-1") == by_hand == HAND_CHECKED


def test_row_seeds_fit_a_signed_64_bit_field_and_differ_in_every_argument() -> None:
    all_arguments = [(1, "a", 0, "x"), (2, "a", 0, "x"), (1, "b", 0, "x"), (1, "a", 1, "x"), (1, "a", 0, "y")]
    seeds = [row_seed(*arguments) for arguments in all_arguments]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_arguments_cannot_run_into_each_other() -> None:
    assert row_seed(1, "generate", 1, "1x") != row_seed(1, "generate", 11, "x")


def test_an_id_outside_ascii_has_a_seed() -> None:
    # printf '[1,"generate",0,"\\u00fc"]' : JSON escapes keep the digest independent of the file encoding.
    expected = int.from_bytes(hashlib.sha256(b'[1,"generate",0,"\\u00fc"]').digest()[:8], "big") >> 1
    assert row_seed(1, "generate", 0, "ü") == expected
