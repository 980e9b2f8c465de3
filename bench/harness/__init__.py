"""What every benchmark shares; none of it knows what it measures."""
