"""The input of the demo: real text, as the query, key, value and selection scores of a small attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flexsparse.errors import SettingError

_WIDTH = 64
# Each byte is seen with the three before it, so that equal bytes in different words are told apart.
_CONTEXT = (1.0, 0.7, 0.5, 0.35)


@dataclass(frozen=True)
class DemoInput:
    """Everything that decides the demo's tensors; ``path`` None means the text of the standard library."""

    path: str | None
    length: int
    k: int
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: str
    seed: int

    @property
    def expression(self) -> str:
        """A window, a few sinks, and the best-scored of the rest, under a bias that falls with distance."""
        kept = f"sliding_window({self.window}) | sinks(4) | sparsek({self.k}, after={self.window})"
        return f"(causal() & ({kept})) + alibi()"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """query [1, H, S, D], key and value [1, H_kv, S, D], scores [1, H_kv, S] float32; S = ``length``.

        Bytes are embedded and projected with fixed random weights; scores rise by 2 over the length, so that later
        text is a little more likely to be kept.
        """
        data = torch.frombuffer(bytearray(read_text(self.path)[: self.length]), dtype=torch.uint8).long()
        generator = torch.Generator().manual_seed(self.seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        embedded = weights(256, _WIDTH)[data]
        rows = torch.zeros_like(embedded)
        for back, share in enumerate(_CONTEXT):
            rows[back:] += share * embedded[: len(embedded) - back]
        rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
        made = {}
        for name, heads in (("query", self.heads), ("key", self.kv_heads), ("value", self.kv_heads)):
            projected = rows @ (weights(_WIDTH, heads * self.head_dim) / _WIDTH**0.5)
            projected = projected.unflatten(-1, (heads, self.head_dim)).transpose(0, 1).unsqueeze(0)
            made[name] = projected.contiguous().to(self.device, getattr(torch, self.dtype))
        slope = 2 / len(data) * torch.arange(len(data))
        scores = rows @ (weights(_WIDTH, self.kv_heads) / _WIDTH**0.5) + slope[:, None]
        made["scores"] = scores.t().unsqueeze(0).contiguous().to(self.device)
        return made


def read_text(path: str | None) -> bytes:
    """The bytes of a file, or of every topic of Python's own help. Raises SettingError."""
    if path is None:
        from pydoc_data import topics

        every: Mapping[str, str] = topics.topics
        return "\n".join(every.values()).encode()
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise SettingError(
            "--file",
            got=f"{path!r}: {error.strerror}",
            expected="a file that can be read",
            mend="Leave --file out to use the text of Python's own help.",
        ) from None
    if not data:
        raise SettingError("--file", got=f"{path!r}, which is empty", expected="a file with text")
    return data
