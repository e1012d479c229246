"""What a trained model is worth: answers to benchmarks in their own files, and a report against the base model."""
