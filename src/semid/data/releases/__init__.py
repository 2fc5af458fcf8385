"""Public releases of review data, read into the layout that the rest of semid reads."""
