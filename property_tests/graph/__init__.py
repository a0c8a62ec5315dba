"""The graph question, as users run it: edge cases, random graphs, models, and passes that are wrong."""
