"""The operators in plain torch: the fallback on any device, and what the kernels are held to."""
