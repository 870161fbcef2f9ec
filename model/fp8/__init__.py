"""Eight-bit floating point. `blocks`: weights, as released checkpoints store them."""
