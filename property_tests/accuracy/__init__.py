"""The accuracy question as users run it: stock lm-eval runs, judged."""
