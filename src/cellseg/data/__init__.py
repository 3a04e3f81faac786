"""From folders to batches: layouts, splits, augmentation and loading."""
