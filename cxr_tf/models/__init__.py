"""Encoders, the U-Net decoder and the multi-task model."""
