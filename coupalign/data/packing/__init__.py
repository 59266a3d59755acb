"""Annotations and photographs to verified WebDataset shards."""
