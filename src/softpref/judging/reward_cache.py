"""Rewards by content, shared by all commands that ask the same reward model.

Shapes: n rewards of one model.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch

from softpref.data.column_cache import ColumnCache

_FORMAT = 1
"""Of a file on disk; another one is not read."""
_KEY_BYTES = 16
_UNSAVED = 1000
"""Rewards that a kill may lose, or an eighth of what is stored, if that is more."""


def token_key(ids: Sequence[int]) -> str:
    """Return a hash of a sequence's token ids, so of chat template, prompt and response."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=_KEY_BYTES).hexdigest()


class RewardCache:
    """The rewards of one model by `token_key`, in memory and in one sealed file.

    Processes that write the same file keep each other's rewards, unless at the same moment.

    Args:
        cache: where the file is.
        weights: `fingerprint_weights` of the model, so of its dtype and quantization, too.
    """

    def __init__(self, cache: ColumnCache, weights: str) -> None:
        self._cache = cache
        of_model = hashlib.sha256(f"{_FORMAT} {weights}".encode()).hexdigest()
        self._name = f"rewards-{of_model[:32]}"
        self._unsaved = 0

    @cached_property
    def _rewards(self) -> dict[str, float]:
        return self._read()

    def known(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the known rewards of these keys."""
        return {key: self._rewards[key] for key in keys if key in self._rewards}

    def add(self, rewards: Mapping[str, float]) -> None:
        """Take up rewards; they are on disk after `save`, or once they are many."""
        self._rewards.update(rewards)
        self._unsaved += len(rewards)
        if self._unsaved >= max(_UNSAVED, len(self._rewards) // 8):
            self.save()

    def save(self) -> None:
        """Write the rewards, with those that other processes have written meanwhile."""
        if not self._unsaved:
            return
        for key, reward in self._read().items():
            self._rewards.setdefault(key, reward)
        keys = torch.frombuffer(bytearray.fromhex("".join(self._rewards)), dtype=torch.uint8)
        rewards = torch.tensor(list(self._rewards.values()), dtype=torch.float64)
        self._cache.write(self._name, {"keys": keys.view(-1, _KEY_BYTES), "rewards": rewards})
        self._unsaved = 0

    def _read(self) -> dict[str, float]:
        found = self._cache.read(self._name, ["keys", "rewards"])
        if found is None:
            return {}
        keys = found["keys"].numpy().tobytes().hex()
        size = 2 * _KEY_BYTES
        names = (keys[start : start + size] for start in range(0, len(keys), size))
        return dict(zip(names, found["rewards"].tolist(), strict=True))
