"""The operators in Triton, for CUDA and ROCm devices; imported when a call is served by them."""
