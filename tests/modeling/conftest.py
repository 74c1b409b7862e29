from __future__ import annotations

import torch

# The networks here are tiny: more threads would only wait for each other, and on a busy machine
# for most of the time.
torch.set_num_threads(1)
