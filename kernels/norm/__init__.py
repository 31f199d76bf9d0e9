"""Root-mean-square normalisation (https://arxiv.org/abs/1910.07467)."""
