"""Pack annotations and photographs into WebDataset shards, and verify the result.

    recipe -> refer, images -> layout -> write, vocabulary -> output -> verify

`pack` runs the steps, `counts` compares the numbers with the published ones.
"""
