"""Is this sound file whole? Checks of the container that decoders leave out.

libsndfile reads what it finds: a wav file cut in half is, to it, a shorter wav file, and a damaged page of an Ogg file
is a silent gap. A face made from such a file would be wrong without a word, so the container is walked here, before
decoding, and what it promises is compared with what the file holds.

Costs one pass over the file for Ogg (its pages carry checksums) and a few seeks for wav. FLAC needs nothing here: its
frames carry checksums that the decoder verifies, and `jambatalk.audio` compares the number of samples with the
header's.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import BinaryIO

# A program that writes wav into a pipe cannot go back to fill in the sizes. These are what such programs put there
# (ffmpeg; sox; others): "until the end of the file". A size of zero is not among them: it means no sound.
STREAMED_SIZES = frozenset({0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000})

_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def container_fault(path: str | os.PathLike) -> str | None:
    """What is wrong with the container of the sound file at `path`, as one clause, or None.

    Knows wav (RIFF, RIFX, RF64) and Ogg; returns None for every other format. Raises OSError where the file cannot be
    read.
    """
    with open(path, "rb") as file:
        magic = file.read(12)
        size = os.fstat(file.fileno()).st_size
        if magic[:4] in (b"RIFF", b"RIFX", b"RF64") and magic[8:12] == b"WAVE":
            return _wav_fault(file, size, magic[:4])
        if magic[:4] == b"OggS":
            return _ogg_fault(file)
    return None


def _wav_fault(file: BinaryIO, file_size: int, form: bytes) -> str | None:
    unpack_size = struct.Struct(">I" if form == b"RIFX" else "<I").unpack
    sizes_64: dict[bytes, int] = {}
    position = 12
    while True:
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return "it is truncated: it ends before its sound data"
        name, (size,) = header[:4], unpack_size(header[4:])
        position += 8
        if name == b"ds64":  # RF64 keeps 64-bit sizes here and 0xFFFFFFFF in the chunk itself
            sizes_64[b"data"] = int.from_bytes(file.read(24)[8:16], "little")
        if name == b"data":
            size = sizes_64.get(name, size)
            there = file_size - position
            if size > there and (sizes_64 or size not in STREAMED_SIZES):
                return f"it is truncated: its header promises {size} bytes of sound and it holds {there}"
            return None
        position += size + size % 2  # chunks start at even offsets


def _ogg_fault(file: BinaryIO) -> str | None:
    open_streams: set[int] = set()
    last_page: dict[int, int] = {}
    file.seek(0)
    while True:
        header = file.read(27)
        if not header:
            break
        if header[:4] != b"OggS":
            return "it is corrupt: a page of its Ogg stream does not start where it should"
        if len(header) < 27:
            return "it is truncated: it ends inside a page of its Ogg stream"
        flags, serial, sequence, checksum, segments = (header[5], *struct.unpack("<III", header[14:26]), header[26])
        lacing = file.read(segments)
        body_size = sum(lacing)
        body = file.read(body_size)
        if len(lacing) < segments or len(body) < body_size:
            return "it is truncated: it ends inside a page of its Ogg stream"
        if _ogg_checksum(header[:22] + bytes(4) + header[26:] + lacing + body) != checksum:
            return "it is corrupt: the checksum of a page of its Ogg stream does not match"
        if not flags & 2 and sequence != last_page.get(serial, -1) + 1:  # 2: first page of a stream
            return "it is corrupt: a page of its Ogg stream is missing"
        last_page[serial] = sequence
        open_streams.add(serial)
        if flags & 4:  # 4: last page of a stream
            open_streams.discard(serial)
    return "it is truncated: its Ogg stream has no last page" if open_streams else None


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 as Ogg defines it: polynomial 0x04C11DB7, most significant bit first, starting from 0, not inverted.

    That is zlib's CRC-32 with the bits of every byte and of the result reversed and the two inversions undone, which
    makes it as fast as zlib.
    """
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reflected.to_bytes(4, "little").translate(_REVERSED_BITS), "big")
