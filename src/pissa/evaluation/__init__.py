"""What a model is worth: benchmarks through lm-evaluation-harness, GLUE, and nearness to its base."""
