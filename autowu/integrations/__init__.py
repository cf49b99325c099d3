"""AutoWU in the frameworks that call their schedulers in their own way; each module imports its framework only."""
