"""Exported forms of a trained model."""
