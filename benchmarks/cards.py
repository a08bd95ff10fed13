"""What GPUs can do, from their makers' documents: the figures that predictions rest on.

Per multiprocessor and clock, compute capability 8.x to 12.x alike: 16 results of the special-function unit (ex2, lg2,
rcp), 32 of a shuffle, 128 bytes of shared memory; four schedulers issue one instruction of 32 lanes each. (CUDA C++
programming guide, "throughput of native arithmetic instructions". A shuffle passes through shared memory's data path:
both are counted against its 128 bytes.) float32: 64 a clock on capability 8.0, 128 on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

SPECIAL_PER_CLOCK = 16
SHARED_BYTES_PER_CLOCK = 128
LANES_ISSUED_PER_CLOCK = 128
SCHEDULERS = 4


@dataclass(frozen=True)
class Card:
    name: str
    capability: int
    multiprocessors: int
    clock: float  # boost, Hz
    dram: float  # bytes per second, by the datasheet
    copy_share: float  # of it that a copy reaches
    matrix: float  # bfloat16 products summed in float32, dense, operations per second by the datasheet
    cache: int  # L2 bytes
    source: str

    @property
    def float_per_clock(self) -> int:
        return 64 if self.capability == 80 else 128

    @property
    def copy_bandwidth(self) -> float:
        return self.dram * self.copy_share

    @property
    def special_rate(self) -> float:
        return self.multiprocessors * self.clock * SPECIAL_PER_CLOCK


_GUESS = "share of a copy assumed, as of its neighbours here"
CARDS = (
    Card("NVIDIA A100-SXM4-80GB", 80, 108, 1.41e9, 2039e9, 0.90, 312e12, 40 << 20, f"NVIDIA A100 datasheet; {_GUESS}"),
    Card("NVIDIA GeForce RTX 3090", 86, 82, 1.695e9, 936e9, 0.92, 71e12, 6 << 20, f"GA102 whitepaper; {_GUESS}"),
    Card(
        "NVIDIA GeForce RTX 4090", 89, 128, 2.52e9, 1008e9, 0.92, 165.2e12, 72 << 20, "Ada whitepaper; kernels.md 1.0"
    ),
    # A copy moved 4.3 TB/s on an H200 that this project's tools know (no run of ours).
    Card("NVIDIA H200", 90, 132, 1.98e9, 4800e9, 0.90, 989e12, 50 << 20, "NVIDIA H200 datasheet; kernels.md 1.0"),
    Card("NVIDIA B200", 100, 148, 1.965e9, 7700e9, 0.90, 2250e12, 126 << 20, f"NVIDIA B200 datasheet; {_GUESS}"),
    Card(
        "NVIDIA GeForce RTX 5090",
        120,
        170,
        2.41e9,
        1792e9,
        0.88,
        209.5e12,
        96 << 20,
        "Blackwell whitepaper; kernels.md 1.0",
    ),
)


def find(name: str) -> Card | None:
    """The card that a driver calls ``name``."""
    return next((card for card in CARDS if card.name in name or name in card.name), None)
