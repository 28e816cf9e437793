"""What a call of the pipeline is given, checked and brought into the form that the rollout takes."""
