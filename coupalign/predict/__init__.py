"""Segment images with a trained model."""
