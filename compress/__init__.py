"""Networks into smaller networks: trace, prune, shorten, distil."""
