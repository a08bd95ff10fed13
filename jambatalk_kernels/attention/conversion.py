"""Multi-head checkpoints as grouped-query ones."""

from torch import Tensor

from jambatalk_kernels.checks import FLOATS

__all__ = ["mean_pool_heads"]


def mean_pool_heads(weight: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The projection of `heads` key or value heads as one of `kv_heads`: the mean over each group of consecutive heads.

    The heads that a group pools are those whose queries share its key-value head in `rope_attention`. With as many
    groups as heads nothing changes. It is a start for further training, not the same function (arXiv 2305.13245,
    section 2.1): means are what it found best.

    Args:
        weight: (heads * head_dim, ...) as in torch.nn.Linear: a weight, or a bias. Not changed.

    Returns:
        (kv_heads * head_dim, ...) in weight's dtype; the mean is taken in that dtype, half precision in float32.

    Raises:
        TypeError, ValueError: a bad dtype, shape or number, naming the argument.
    """
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight must be a float tensor, got {kind}")
    for name, value in (("heads", heads), ("kv_heads", kv_heads)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if heads % kv_heads:
        raise ValueError(f"kv_heads must divide the {heads} heads, got {kv_heads}")
    if weight.dim() == 0 or weight.shape[0] % heads:
        raise ValueError(f"weight must be ({heads} * head_dim, ...), got shape {tuple(weight.shape)}")
    if heads == kv_heads:
        return weight.clone()
    grouped = weight.reshape(kv_heads, heads // kv_heads, weight.shape[0] // heads, *weight.shape[1:])
    return (grouped.float() if weight.itemsize == 2 else grouped).mean(1).to(weight.dtype).flatten(0, 1)
