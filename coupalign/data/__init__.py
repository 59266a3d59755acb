"""From annotation files to batches.

packing     annotations and photographs -> shards and their index
build       a configuration -> loaders of ordered, decoded, tokenized batches
refshapes   a small data set to try it with
"""
