"""The observatory: imports weather and airports, publishes reports, posts bulletins."""
