"""Token rows as a training reads them: by position, round and round, with one block in memory."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stagediff.errors import UserError

if TYPE_CHECKING:
    from stagediff.spec import Ref
    from stagediff.store import Store

__all__ = ["TokenRows"]

BLOCK_TOKENS = 1 << 20


class TokenRows:
    """The rows of a tokens artifact; position p is row p modulo their number."""

    def __init__(self, store: "Store", ref: "Ref"):
        self._array = store.artifact(ref).require().array("rows")
        self.count, self.context = self._array.shape
        self.vocab = int(self._array.attributes["vocab"])
        self._size = max(1, BLOCK_TOKENS // self.context)
        self._number, self._block = -1, np.zeros((0, self.context), np.int32)

    def __len__(self) -> int:
        return self.count

    def at(self, start: int, n: int) -> Tensor:
        """`n` rows from position `start` on: int64 [n, context]."""
        parts = []
        while n:
            row = start % self.count
            number = row // self._size
            if number != self._number:
                self._block = self._array.read_rows(number * self._size, min(self.count, (number + 1) * self._size))
                self._number = number
            part = self._block[row - number * self._size :][:n]
            parts.append(part)
            start += len(part)
            n -= len(part)
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros((0, self.context), dtype=torch.int64)

    def check_vocab(self, size: int, what: str) -> None:
        """Raises UserError when these rows' tokenizer has more tokens than a model's embedding."""
        if self.vocab > size:
            raise UserError(
                f"The token rows were made with a tokenizer of {self.vocab} tokens, but {what} has a vocabulary of {size}. Draw the "
                "rows with that model's own tokenizer."
            )
