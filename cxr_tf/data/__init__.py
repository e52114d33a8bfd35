"""From files to batches: readers, the manifest, splits, shards, pipeline, augmentation, generated films."""
