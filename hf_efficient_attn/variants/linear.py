"""
`linear`: weights phi(q_t) . phi(k_j) over their sum, with phi(x) = elu(x) + 1 in every coordinate,
    out_t = phi(q_t) . sum_j phi(k_j) v_j^T / phi(q_t) . sum_j phi(k_j),    j <= t in a decoder, all j in an encoder.

Paper: Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236. Cost N D^2: a decoder reads chunk by chunk,
an encoder in closed form. Decoder: the two sums, (G, D, D) and (G, D) per sequence, O(1). No dense limit: the kernel is
another one than exp(q . k), and a patched model must be trained. No parameters.

As in the paper, logits are not scaled: `scaling` is ignored. So is attention dropout: no probabilities are formed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config import EfficientAttentionConfig
from ..ops.chunked_scan import attend_linearly
from ..ops.features import Features, positive
from ..registry import register_variant
from ..variant import EfficientAttention


@dataclass(kw_only=True)
class LinearConfig(EfficientAttentionConfig):
    """No hyper-parameters besides `dense_below`."""


@register_variant(
    "linear",
    family="kernels",
    summary="feature map elu(x) + 1, a decoder state of constant size",
    paper="Katharopoulos 2020, arXiv:2006.16236",
    also=("linear_transformer",),
)
class LinearAttention(EfficientAttention):
    config_class = LinearConfig
    constant_state = True

    def attend(self, query, key, value, *, lengths, scaling, dropout, causal, state, hidden) -> Tensor:
        features = Features(positive, positive, self.host.head_dim, pulls=(_pull, _pull))
        return attend_linearly(query, key, value, features, causal=causal, lengths=lengths, state=state)


def _pull(x: Tensor, slope: Tensor) -> Tensor:
    return slope * x.clamp_max(0).exp_()
