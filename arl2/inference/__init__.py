"""Fast inference: the numbers of `arl2.model`, from fused products, compiled kernels and recorded passes."""
