"""The oracle of `adaptive`."""

from __future__ import annotations

import torch

from .base import naive_row, oracle


@oracle
def naive_adaptive(query, key, value, *, config, scaling, causal, module):
    """
    Every candidate c attends with `module.parts[str(c)]`. Key/value group g mixes their outputs by softmax(gate_g / tau), with
    tau = temperature (final_temperature / temperature)^min(1, steps / anneal_steps). With `choices`, group g has the
    output of candidate choices[g] alone, whose module serves the groups that chose it, in order.
    """
    H, G = query.shape[0], key.shape[0]
    size, options = H // G, {"scaling": scaling, "causal": causal}
    outputs = [None] * G
    for c, candidate in enumerate(config.candidates):
        groups = [g for g in range(G) if not config.choices or config.choices[g] == c]
        if not groups:
            continue
        heads = [h for g in groups for h in range(g * size, (g + 1) * size)]
        part = naive_row(
            candidate.name, query[heads], key[groups], value[groups], config=candidate, module=module.parts[str(c)], **options
        )  # fmt: skip
        for i, g in enumerate(groups):
            own = part[i * size : (i + 1) * size]
            if not config.choices:
                progress = min(1.0, module.steps.item() / config.anneal_steps)
                tau = config.temperature * (config.final_temperature / config.temperature) ** progress
                own = own * (module.gate[g].to(own.dtype) / tau).softmax(0)[c]
            outputs[g] = own if outputs[g] is None else outputs[g] + own
    return torch.cat(outputs)
