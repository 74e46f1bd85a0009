"""The oracle of `lsh`."""

from __future__ import annotations

import torch

from .base import oracle, per_query_head, softmax_attention


@oracle
def naive_lsh(query, key, value, *, config, scaling, causal, module):
    """
    Round r's bucket of x is argmax [x R_r; -x R_r], R = `module.rotations` (G, rounds, D + 2, num_buckets / 2), 0 with one
    bucket. A decoder hashes x itself with the first D rows, an encoder q and k - mean k. `inner_products`: an encoder hashes
    [q, 0, sqrt(m - |q|^2)] and [k, sqrt(m - |k|^2), 0], m = max |q|^2 + max |k|^2 over the tokens, and the query heads of
    the key/value head.

    t reads itself and, in each round, of the keys in its query's bucket the `window` most recent at or before it (decoder)
    or the nearest `window` before it and as many after it (encoder); a key that several rounds give counts once. In a
    decoder the sinks are in no bucket, and every token from theirs on reads them.

    `shared_qk`: keys are q / |q|; tokens sorted by (bucket, position) in chunks of `window`; t reads its chunk and the one
    before, but itself only where no round gives another.
    """
    H, N, _ = query.shape
    G, M, _ = key.shape
    visible = torch.zeros(H, N, M, dtype=torch.bool, device=query.device)
    sinks = config.num_sinks if causal else 0
    for h in range(H):
        g = h // (H // G)
        group = query[g * (H // G) : (g + 1) * (H // G)].detach()
        rotations = module.rotations[g].to(query.dtype)
        q, k = query[h].detach(), key[g].detach()
        zero_q, zero_k = q.new_zeros(N, 1), k.new_zeros(M, 1)
        if causal or config.shared_qk or not config.inner_products:
            k = k if causal or config.shared_qk else k - k.mean(0)
            q, k = torch.cat([q, zero_q, zero_q], 1), torch.cat([k, zero_k, zero_k], 1)
        else:
            m = group.square().sum(-1).max() + k.square().sum(-1).max()
            lack_q, lack_k = ((m - x.square().sum(-1, keepdim=True)).clamp(min=0).sqrt() for x in (q, k))
            q, k = torch.cat([q, zero_q, lack_q], 1), torch.cat([k, lack_k, zero_k], 1)
        for rotation in rotations:
            bucket_q, bucket_k = (
                torch.cat([x @ rotation, -x @ rotation], 1).argmax(1).tolist()
                if config.num_buckets > 1
                else [0] * len(x)
                for x in (q, k)
            )
            order = sorted(range(N), key=lambda j: (bucket_q[j], j)) if config.shared_qk else []
            for i in range(N):
                t = M - N + i
                members = [j for j in range(sinks, M) if bucket_k[j] == bucket_q[i]]
                if config.shared_qk:
                    begin = order.index(t) // config.window * config.window
                    chosen = [j for j in order[max(begin - config.window, 0) : begin + config.window] if j != t]
                elif causal:
                    chosen = [j for j in members if j <= t][-config.window :] + list(range(min(sinks, t)))
                else:
                    chosen = [j for j in members if j < t][-config.window :] + [j for j in members if j > t][
                        : config.window
                    ]
                visible[h, i, chosen] = True
        for i in range(N):
            if not config.shared_qk or not visible[h, i].any():
                visible[h, i, M - N + i] = True
    if config.shared_qk:
        key = torch.nn.functional.normalize(query, dim=-1)
        value = per_query_head(query, value)
    return softmax_attention(query, key, value, visible, scaling)
