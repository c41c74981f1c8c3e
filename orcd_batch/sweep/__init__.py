"""A multirun's jobs over as few loaded models as they need, each job as if it were alone."""
