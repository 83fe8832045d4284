"""The named sizes of DiT (arXiv 2212.09748, Table 1)."""

# hidden size, layers, heads
_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
_NAMES = ("hidden_size", "num_layers", "num_attention_heads")
DIT_SIZES = {
    f"DiT-{name}/{patch_size}": {**dict(zip(_NAMES, numbers, strict=True)), "patch_size": patch_size}
    for name, numbers in _WIDTHS.items()
    for patch_size in (2, 4, 8)
}
