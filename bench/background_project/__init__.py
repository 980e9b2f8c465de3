"""The project that `bench.background` runs in the background."""
