"""DP-SGD on torch: capture, clipping, noise, sampling, accounting, ledger."""
