"""What one forward of the transformer recomputes, and what stands in for the rest.

B batch, T tokens of a chunk, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.config import Scope


class Reuse:
    """What one forward recomputes (`tokens`, [K], None for all) and where it keeps its outputs.

    `scope` is what a token that is left out skips. `outputs` [layers, B, T, dim] holds what it
    names put out in each layer, before its gate. `fixed_size`: all chunks keep equally many tokens,
    listed at the same place in memory.
    """

    def __init__(
        self,
        scope: Scope,
        outputs: Tensor,
        tokens: Tensor | None,
        *,
        fixed_size: bool,
    ) -> None:
        self.scope = scope
        self.tokens = tokens
        self.fixed_size = fixed_size
        self.outputs = outputs

    @property
    def idle(self) -> bool:
        """Whether nothing at all is to be computed."""
        return self.scope == "block" and self.tokens is not None and len(self.tokens) == 0

    @property
    def attending(self) -> Tensor | None:
        """The tokens [K] that self-attention is computed of; None is all."""
        return None if self.scope == "feedforward" else self.tokens

    def exchange(self, layer: int, output: Tensor) -> Tensor:
        """Outputs of the tokens computed, [B, T or K, dim], to those of all T.

        A dense step's outputs are stored; a pruned step's are put among the stored ones, which
        stay as they are.
        """
        if self.tokens is None:
            self.outputs[layer] = output
            return output
        return self.stored(layer).index_copy(1, self.tokens, output)

    def stored(self, layer: int) -> Tensor:
        """Outputs [B, T, dim] of a layer in the last dense step."""
        return self.outputs[layer]


class _Together(Reuse):
    """Of chunks in one forward, whose outputs stay where each has its own."""

    def __init__(self, chunks: Sequence[Reuse], tokens: Tensor) -> None:
        super().__init__(chunks[0].scope, chunks[0].outputs, tokens, fixed_size=False)
        self._chunks = chunks

    def stored(self, layer: int) -> Tensor:
        return torch.cat([chunk.stored(layer) for chunk in self._chunks], dim=1)


def together(chunks: Sequence[Reuse | None], tokens: int) -> Reuse | None:
    """What one forward over chunks of `tokens` tokens recomputes, of those that each does."""
    first = next((reuse for reuse in chunks if reuse is not None), None)
    if first is None:
        return None
    everything = torch.arange(tokens, device=first.outputs.device)
    kept = []
    for number, reuse in enumerate(chunks):
        own = everything if reuse is None else reuse.tokens
        assert own is not None, "outputs are stored a chunk at a time"
        kept.append(number * tokens + own)
    # Nothing stands in where a chunk computes all.
    return _Together([reuse or first for reuse in chunks], torch.cat(kept))
