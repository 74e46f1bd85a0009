"""One file per variant; importing it registers it. A new variant adds its line here."""

from . import (
    block,
    strided,
    flash,
    sliding_window,
    big_bird,
    combined,
    lsh,
    routing,
    cluster_former,
    sinkhorn,
    topk_blocks,
    adaptive,
    linformer,
    linear,
    performer,
    transformer_xl,
    compressive,
    infini,
    mixture_of_heads,
    moe,
)
