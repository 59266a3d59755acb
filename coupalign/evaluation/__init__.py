"""From logits to a score that is printed with its protocol: metrics, the three protocols, the evaluator."""
