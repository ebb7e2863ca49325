"""The naming rules of the layout."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from tlcore.layout import names


def test_a_documented_name() -> None:
    assert names.step_dir(0) == "step_0"
    assert names.call_dir("model.embed_tokens", 0, frozenset()) == "model.embed_tokens"
    assert names.stem("inputs", [0], "cuda:0", 0) == "inputs_0_cuda_0"
    assert names.stem("outputs", [], "cuda:0", 0) == "outputs_cuda_0"
    assert names.stem("outputs", [0, 1], "cuda:0", 0) == "outputs_0_1_cuda_0"
    assert names.stem("outputs", ["key"], "cpu", 0) == "outputs_key_cpu"


def test_the_second_call_has_a_suffix() -> None:
    assert names.call_dir("rotary", 1, frozenset({"rotary"})) == "rotary_1"


def test_a_module_really_called_like_a_second_call_keeps_its_name() -> None:
    modules = frozenset({"l", "l_1"})
    assert names.call_dir("l_1", 0, modules) == "l_1"
    assert names.call_dir("l", 1, modules) == "l_1~2"


def test_rank_is_named_only_where_device_and_rank_disagree() -> None:
    assert names.device_label("cuda:1", 1) == "cuda_1"
    assert names.device_label("cuda:0", 8) == "cuda_0_rank_8"
    assert names.device_label("cpu", 0) == "cpu"
    assert names.device_label("cpu", 1) == "cpu_rank_1"
    assert names.rank_suffix(0) == ""
    assert names.rank_suffix(3) == "_rank_3"


def test_colliding_stems_are_kept_apart() -> None:
    taken: set[str] = set()
    assert [names.unique("outputs_a_b_cpu", taken) for _ in range(3)] == [
        "outputs_a_b_cpu",
        "outputs_a_b_cpu~2",
        "outputs_a_b_cpu~3",
    ]


@given(st.text())
def test_an_encoded_name_is_one_short_plain_file_name(text: str) -> None:
    encoded = names.safe(text)
    assert encoded not in ("", ".", "..")
    assert os.path.basename(encoded) == encoded
    assert len(encoded.encode()) <= 200
    assert "\0" not in encoded and "\\" not in encoded


@given(st.text(), st.text())
def test_different_names_stay_different(one: str, other: str) -> None:
    assert (names.safe(one) == names.safe(other)) == (one == other)


def test_dots_and_slashes_cannot_leave_the_directory() -> None:
    assert names.safe("..") == "%2E%2E"
    assert names.safe("../../etc/passwd") == "..%2F..%2Fetc%2Fpasswd"


def test_a_name_longer_than_a_file_system_allows_is_cut_but_stays_its_own() -> None:
    one, other = names.safe("x" * 400), names.safe("x" * 401)
    assert one != other
    assert len(names.stem("inputs", ["y" * 190, "z" * 190], "cpu", 0)) <= 200


def test_numbers_for_people_are_short_however_many() -> None:
    assert names.shown_numbers([]) == "none"
    assert names.shown_numbers([0, 1, 4, 6, 7, 8]) == "0, 1, 4, 6-8"
    assert names.shown_numbers(range(1_000_000)) == "0-999999"
    assert names.shown_numbers(range(0, 100, 2), most=3) == "0, 2, 4, ..."


def test_a_directory_tells_another_module_where_that_exists_or_the_name_was_cut() -> None:
    long = "x" * 300
    assert names.misread({"", "l", "l_1", "m_1", "a/b", "l_1.part", long}) == {
        "l_1": "l_1",
        names.safe(long): long,
    }
