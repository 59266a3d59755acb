"""From logits to a printed score: metrics, protocols and the evaluator."""
