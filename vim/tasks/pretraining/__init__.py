"""Masked pre-training of video models."""
