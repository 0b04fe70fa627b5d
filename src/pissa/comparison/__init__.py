"""Many runs side by side: every method at every learning rate, read together and told honestly."""
