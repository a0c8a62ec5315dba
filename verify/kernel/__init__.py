"""The kernel question: the stream of cases, the run over all subjects, its report and its screen."""
