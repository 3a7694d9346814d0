"""Prepared stores, the input pipeline, and augmentation."""
