"""What training shares: checkpoints, and the loop of models that have one."""
