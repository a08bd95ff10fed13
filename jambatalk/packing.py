"""Batches without their padding: clips that lie one behind the other in a batch of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class Packing:
    """Where the frames of each clip are. `of` a mask, then `pack` and `unpack`."""

    shape: tuple[int, int]  # batch and length, padding included
    index: Tensor  # (packed length,) int64: of each frame among the batch * length
    positions: Tensor  # (packed length,) int64: of each frame in its own clip
    cu_seqlens: Tensor  # (batch + 1,) int32: where each clip begins, and the end of the last

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """valid (batch, length) bool: padding is at the end of each clip."""
        batch, length = valid.shape
        index = valid.flatten().nonzero()[:, 0]
        cu_seqlens = pad(valid.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls((batch, length), index, index % length, cu_seqlens)

    @property
    def clips(self) -> Tensor:
        """(packed length,) int64: which clip each frame is of."""
        return self.index // self.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """(batch, length, d) -> (1, packed length, d)"""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, packed length, d) -> (batch, length, d), zero in the padding."""
        batch, length = self.shape
        rows = x.new_zeros(batch * length, x.shape[-1]).index_copy(0, self.index, x.squeeze(0))
        return rows.view(batch, length, -1)
