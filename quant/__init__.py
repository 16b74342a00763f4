"""Quantized linear layers: two schemes (nf4, ternary), packed and fake-quantized. Usable alone."""
