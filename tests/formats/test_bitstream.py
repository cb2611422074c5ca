"""Packing against the specification's worked words and against a decode that reads one bit at a time."""

import pytest
import torch

from quantkit.formats.bitstream import pack, pack_rows, unpack, unpack_rows

WORKED = {
    2: ([0, 1, 2, 3] * 8, [0xE4E4E4E4, 0xE4E4E4E4]),
    3: (list(range(8)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    4: (list(range(8)) * 4, [0x76543210] * 4),
    8: ([0, 1, 2, 3] * 8, [0x03020100] * 8),
}


@pytest.mark.parametrize("bits", WORKED)
def test_worked_words(bits):
    codes, words = WORKED[bits]
    packed = pack(torch.tensor(codes, dtype=torch.uint8).unsqueeze(1), bits)
    assert [word & 0xFFFFFFFF for word in packed[:, 0].tolist()] == words


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_lies_where_the_specification_says(bits):
    codes = torch.randint(0, 2**bits, (96, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (96 * bits // 32, 5)
    for column in range(5):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed[:, column].tolist()))
        read = [(stream >> (bits * i)) & (2**bits - 1) for i in range(96)]
        assert read == codes[:, column].tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip(bits):
    codes = torch.randint(0, 2**bits, (64, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_bitstreams_of_their_own(bits):
    codes = torch.randint(0, 2**bits, (5, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, bits)
    assert torch.equal(words, pack(codes.t(), bits).t())
    assert words.is_contiguous()
    assert torch.equal(unpack_rows(words, bits), codes)
    assert torch.equal(pack_rows(codes.t().contiguous().t(), bits), words)
