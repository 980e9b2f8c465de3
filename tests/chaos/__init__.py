"""The proof by fire: real workers on real databases, ended and cut off at every moment.

`python -m tests.chaos --help` says how to run it. `flows` and `evidence` are what the workers run
and what they leave outside of the database; `every_statement` and `at_random` are the two fires.
"""
