"""From annotation files to batches: `refer` layout -> shards (`pack`) -> ordered, decoded, tokenized samples (`loader`)."""
