"""Records of a tfrecord file, checked by the sums in it: https://www.tensorflow.org/tutorials/load_data/tfrecord.

A record is a length (8 bytes), its sum (4), the record, its sum (4); sums are CRC-32C, rotated and shifted.
"""

import struct
from pathlib import Path

import numpy as np


def read_tfrecords(path: Path) -> list[bytes]:
    """Reads all records of a file.

    Raises:
      ValueError: the file ends within a record, or a sum does not fit.
    """
    raw, starts, lengths = path.read_bytes(), list[int](), list[int]()
    at = 0
    while at < len(raw):
        length = struct.unpack_from("<Q", raw, at)[0] if at + 8 <= len(raw) else len(raw)
        if at + length + 16 > len(raw):
            raise ValueError(f"{path.name} ends within a record")
        starts.append(at)
        lengths.append(length)
        at += length + 16
    first, size = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    content = np.frombuffer(raw, np.uint8)
    for begin, length in ((first, np.full_like(size, 8)), (first + 12, size)):
        stored = content[(begin + length)[:, None] + np.arange(4)].copy().view("<u4")[:, 0]
        wrong = np.flatnonzero(_masked(_crc32c(content, begin, length)) != stored)
        if len(wrong):
            raise ValueError(f"record {wrong[0]} of {path.name} has changed since it was written")
    return [raw[start + 12 : start + 12 + length] for start, length in zip(starts, lengths, strict=True)]


def _table() -> np.ndarray:
    """What each value of a byte does to a CRC-32C (Castagnoli, reflected) [256]."""
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, (crc >> 1) ^ np.uint32(0x82F63B78), crc >> 1)
    return crc


_TABLE = _table()


def _crc32c(content: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The sums of many pieces at once, byte after byte.

    Args:
      content: bytes [B].
      begin, length: where each piece is [N].

    Returns:
      uint32 [N].
    """
    order = np.argsort(-length, kind="stable")  # so that the pieces that go on come first
    begin, longest = begin[order], length[order]
    crc = np.full(len(order), 0xFFFFFFFF, np.uint32)
    for place in range(int(longest.max(initial=0))):
        going = np.searchsorted(-longest, -place, side="left")
        now = crc[:going]
        crc[:going] = _TABLE[(now ^ content[begin[:going] + place]) & 255] ^ (now >> 8)
    found = np.empty_like(crc)
    found[order] = ~crc
    return found


def _masked(crc: np.ndarray) -> np.ndarray:
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
