"""StreamDiT: real-time, endless text-to-video, in JAX and Flax (arXiv 2507.03745)."""
