"""Per-layer maths: which captured call belongs to which family of per-unit gradients."""
