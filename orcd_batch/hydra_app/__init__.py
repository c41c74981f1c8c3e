"""From overrides to jobs: composing them with Hydra and running one, or the jobs of a multirun."""
