"""The peers: a module and a list of requirements each, run in an environment of its own."""
