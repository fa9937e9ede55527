"""Call a library's own modules inside fused decoder layers: token mixers, experts, and the kernels they choose."""
