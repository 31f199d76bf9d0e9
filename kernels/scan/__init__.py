"""The selective scan of Mamba (https://arxiv.org/abs/2312.00752)."""
