"""Training a drafter: the target writes texts, the drafter learns to guess them, the guesses are counted."""
