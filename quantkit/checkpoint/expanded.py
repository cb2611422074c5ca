"""float32 attention on a GPU where several queries share a key: keys and values are repeated first.

Torch's fused attention takes shared keys in 16 bits alone. In float32 it falls back to one that holds the scores of all
heads, windows times heads times the square of the window's tokens, and is several times slower
(https://github.com/pytorch/pytorch/pull/181528).

Shape legend: B windows, H query heads, K key heads, T tokens, E head size.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

EXPANDED_ATTENTION = "sdpa-expanded"  # how transformers finds it


def _attend(
    module: nn.Module,
    query_BHTE: Tensor,
    key_BKTE: Tensor,
    value_BKTE: Tensor,
    attention_mask: None,
    scaling: float,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention [B, T, H, E] within whole windows."""
    assert attention_mask is None, "windows are whole"
    shared = query_BHTE.shape[1] // key_BKTE.shape[1]
    key_BHTE, value_BHTE = (repeat_kv(each, shared) for each in (key_BKTE, value_BKTE))
    attended_BHTE = nn.functional.scaled_dot_product_attention(
        query_BHTE, key_BHTE, value_BHTE, is_causal=True, scale=scaling
    )
    return attended_BHTE.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXPANDED_ATTENTION, _attend)
