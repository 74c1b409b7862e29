"""Which tokens of a chunk a mask cache recomputes; a new rule is a line in `POLICIES`.

`published` and `budget` (`streaming.policy`) read importance off the chunk before; `follow`
(`streaming.follow`) asks the chunk's own first step and keeps as many tokens as it must, `settled`
(`streaming.settled`) asks each of its steps and keeps all or none.
"""

from __future__ import annotations

from modeling.streaming.policy import Policy, budget_tokens, published_tokens
from modeling.tables import Table

POLICIES: Table[Policy] = Table(
    "mask-cache policy",
    {
        "published": Policy(published_tokens, fixed_size=False),
        "budget": Policy(budget_tokens, fixed_size=True),
        "follow": Policy(None, fixed_size=False, follows=True),
        "settled": Policy(None, fixed_size=False, settles=True),
    },
)
