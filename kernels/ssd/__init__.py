"""State space duality, the scan of Mamba-2 (https://arxiv.org/abs/2405.21060)."""
