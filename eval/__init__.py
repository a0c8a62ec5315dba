"""Does the model answer as before? The evaluation model, its tasks, and the statistics of the gate."""
