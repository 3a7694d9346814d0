"""From photographs on disk to batches, and what augmentation makes of them."""
