"""What one forward of the transformer recomputes, and what stands in for the rest.

B batch, T tokens of a chunk, K kept tokens.
"""

from __future__ import annotations

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
        return self.outputs[layer].index_copy(1, self.tokens, output)
