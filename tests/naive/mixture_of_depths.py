"""The oracle of `mixture_of_depths`."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from .base import oracle, softmax_attention


@oracle
def naive_mixture_of_depths(query, key, value, *, config, scaling, causal, module, hidden):
    """
    With logits l_i = `module.router.weight` hidden_i, the tokens that go through attention are: in an encoder the
    ceil(`capacity` N) of the highest logits, of equal ones the lower; in a decoder those with l_i >= `module.threshold`.

    They attend to one another (causally in a decoder), times p / constant(p), p = sigmoid(l). All others give zeros and are
    seen by none.
    """
    N = query.shape[1]
    logits = (hidden @ module.router.weight.T)[:, 0]
    if causal:
        chosen = [i for i in range(N) if logits[i] >= module.threshold]
    else:
        ranked = sorted(range(N), key=lambda i: (-logits[i].item(), i))
        chosen = sorted(ranked[: math.ceil(Fraction(str(config.capacity)) * N)])
    output = torch.zeros_like(query)
    if not chosen:
        return output
    visible = torch.tensor([[j <= i or not causal for j in chosen] for i in chosen], device=query.device)
    attended = softmax_attention(query[:, chosen], key[:, chosen], value[:, chosen], visible, scaling)
    p = torch.sigmoid(logits[chosen])
    return output.index_copy(1, torch.tensor(chosen), (p / p.detach())[:, None] * attended)
