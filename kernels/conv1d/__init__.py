"""The depthwise causal convolution in front of Mamba's scan, with its SiLU."""
