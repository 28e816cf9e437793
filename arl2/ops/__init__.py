"""The gated delta rule, its products and precision, and compilation."""
