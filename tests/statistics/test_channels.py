"""Statistics for each channel, against all values at once, and put together from parts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tlcore.statistics.channel_file import ChannelTables, decode, encode
from tlcore.statistics.channels import COLUMNS, ChannelStatistics, Table, merge_channels
from tlcore.statistics.channels_of_tensors import HostChannels, from_vector, has_channels, measure
from tlcore.testing.samples import bytes_of


def on_host(tensor: torch.Tensor) -> Table:
    # Memory of capture's own is aligned.
    data = torch.frombuffer(bytes_of(tensor), dtype=torch.uint8) if tensor.numel() else torch.empty(0)
    return HostChannels().table(data, tensor.dtype, tensor.shape)


def on_device(tensor: torch.Tensor) -> Table:
    vector = measure(tensor)
    assert vector.dtype == torch.int64
    return from_vector(bytes(bytes_of(vector.cpu())), tensor.shape)


def expected(tensor: torch.Tensor) -> Table:
    rows = tensor.double().reshape(-1, tensor.shape[-1])
    table = np.empty((len(COLUMNS), rows.shape[1]))
    for channel, values in enumerate(rows.T):
        clean = values[values.isfinite()]
        exact = [Fraction(float(each)) for each in clean]
        mean = sum(exact, Fraction()) / max(len(exact), 1)
        m2 = sum(((each - mean) ** 2 for each in exact), Fraction())
        low, high = (float(clean.min()), float(clean.max())) if len(clean) else (math.inf, -math.inf)
        zeros = int((values == 0).sum())
        table[:, channel] = [len(clean), float(mean), float(m2), low, high, zeros, len(values) - len(clean)]
    return table


def agree(one: Table, other: Table, rtol: float = 1e-9) -> bool:
    exact = [0, 3, 4, 5, 6]
    return bool(np.array_equal(one[exact], other[exact]) and np.allclose(one, other, rtol=rtol, atol=1e-300))


def samples() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    odd = torch.randn(40, 5)
    odd[3, 0], odd[7, 0], odd[:, 1], odd[::2, 2] = math.nan, math.inf, -math.inf, 0.0
    return {
        "plain": torch.randn(50, 7),
        "three dimensions": torch.randn(3, 4, 5),
        "one dimension": torch.randn(6),
        "bfloat16": torch.randn(30, 4).to(torch.bfloat16),
        "float16": torch.randn(30, 4).to(torch.float16) * 1e4,
        "float8": torch.randn(30, 4).to(torch.float8_e4m3fn),
        "far from zero": torch.randn(64, 3, dtype=torch.float64) + 1e9,
        "not finite": odd,
        "many rows": torch.randn(9000, 20)[:, :3].repeat(1, 10),
        "no rows": torch.empty(0, 4),
        "not contiguous": torch.randn(6, 8).T,
        "large": torch.tensor([[3e38, -3e38], [3e38, 3e38]]),
    }


@pytest.mark.parametrize("name", sorted(samples()))
def test_host_and_device_agree_with_exact_sums(name: str) -> None:
    tensor = samples()[name]
    wanted = expected(tensor)
    assert agree(on_host(tensor.contiguous()), wanted, rtol=1e-7 if name == "far from zero" else 1e-9)
    assert agree(on_device(tensor), wanted, rtol=1e-7 if name == "far from zero" else 1e-9)


def test_more_channels_than_are_looked_at_at_a_time() -> None:
    torch.manual_seed(1)
    wide, long = torch.randn(3, 200_000), torch.randn(60_000, 7)
    for tensor in (wide, long, torch.randn(1_000_000, 3)):
        values = tensor.double()
        for table in (on_host(tensor), on_device(tensor)):
            found = ChannelStatistics(table)
            assert (found.count == len(tensor)).all() and found.channels == tensor.shape[1]
            assert np.allclose(found.mean, values.mean(0).numpy(), rtol=1e-9, atol=1e-12)
            assert np.allclose(found.var, values.var(0, unbiased=False).numpy(), rtol=1e-9)
            assert np.array_equal(found.max, values.amax(0).numpy())


def test_parts_in_any_order_give_what_the_whole_gives() -> None:
    """Where a sum of squares would have no digit left."""
    torch.manual_seed(2)
    values = torch.randn(997, 6, dtype=torch.float64) + torch.tensor([0.0, 1e3, -1e6, 1e9, 1e12, 1.0])
    values[:, 5] = 0.1
    whole = expected(values)
    parts = [ChannelStatistics(on_host(each)) for each in torch.split(values, 10)]
    for order in (parts, parts[::-1], parts[1::2] + parts[::2]):
        found = merge_channels(order)
        assert np.array_equal(found.table[[0, 3, 4, 5, 6]], whole[[0, 3, 4, 5, 6]])
        assert np.allclose(found.mean, whole[1], rtol=1e-13)
        # The values themselves have lost digits where their mean is that large.
        assert np.allclose(found.std[:4], np.sqrt(whole[2] / whole[0])[:4], rtol=1e-7)
        assert found.std[5] < 1e-15
    left, right = merge_channels(parts[:30]), merge_channels(parts[30:])
    assert agree(left.merge(right).table[:, :3], merge_channels(parts).table[:, :3], rtol=1e-7)
    # Nothing is added to what was given.
    assert np.array_equal(parts[0].table, on_host(values[:10]))


def test_what_has_no_finite_value_says_so() -> None:
    found = ChannelStatistics(on_host(torch.tensor([[math.nan, 1.0], [math.inf, 3.0]])))
    assert found.count.tolist() == [0, 2] and found.nonfinite.tolist() == [2, 0]
    for row in (found.mean, found.std, found.min, found.max):
        assert math.isnan(row[0]) and math.isfinite(row[1])
    assert repr(found) == "<ChannelStatistics of 2 channels, up to 2 values>"


def test_what_does_not_fit_is_not_merged() -> None:
    one, other = (ChannelStatistics(on_host(torch.ones(2, width))) for width in (3, 4))
    with pytest.raises(ValueError, match="of 3, 4 channels cannot be merged"):
        one.merge(other)
    with pytest.raises(ValueError, match="of nothing cannot be merged"):
        merge_channels([])


def test_which_tensors_have_channels() -> None:
    assert has_channels(torch.bfloat16, (2, 3)) and has_channels(torch.float64, (1,))
    for dtype, shape in ((torch.int64, (2, 3)), (torch.bool, (2,)), (torch.complex64, (2,))):
        assert not has_channels(dtype, shape)
    assert not has_channels(torch.float32, ()) and not has_channels(torch.float32, (2, 0))


ABOUT = {"module": "a", "direction": "outputs", "path": [0], "dtype": "float32"}


def test_the_file_is_what_was_written_and_nothing_else() -> None:
    tables = {
        "b/outputs_cpu": on_host(torch.randn(4, 3)),
        "a/outputs_cpu": on_host(torch.full((2, 2), math.nan)),
    }
    given = ChannelTables(7, tables, dict.fromkeys(tables, ABOUT))
    data = encode(given)
    found = decode(data)
    assert (found.steps, found.about, list(found.tables)) == (7, given.about, list(tables))
    assert all(np.array_equal(found.tables[name], table) for name, table in tables.items())
    assert encode(found) == data
    for at in range(0, len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 4
        try:
            other = decode(bytes(damaged))
        except ValueError:
            continue
        # What only says less or other than numbers is not under the hash.
        assert all(np.array_equal(other.tables[name], table) for name, table in tables.items())


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"\xff" * 64, (2).to_bytes(8, "little") + b"{}"],
    ids=["empty", "json", "ones", "bare"],
)
def test_what_is_no_such_file_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no file of channel statistics"):
        decode(data)


@pytest.mark.parametrize(
    "about",
    [{}, {"a": 1}, {"a": {**ABOUT, "path": [None]}}, {"a": {**ABOUT, "module": 3}}, {"b": ABOUT}],
    ids=["none", "number", "path", "module", "other"],
)
def test_what_is_said_of_tables_is_checked(about: Any) -> None:
    data = encode(ChannelTables(1, {"a": on_host(torch.ones(1, 2))}, about))
    with pytest.raises(ValueError, match="makes no sense"):
        decode(data)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(samples()))
def test_a_device_agrees_with_the_host(name: str) -> None:
    tensor = samples()[name]
    wanted = expected(tensor)
    assert agree(on_device(tensor.cuda()), wanted, rtol=1e-7 if name == "far from zero" else 1e-9)
