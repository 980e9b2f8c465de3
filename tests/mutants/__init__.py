"""Mutation testing of the protocol: claim, step, failure, recovery, heartbeat, hand-back.

`python -m tests.mutants` changes one place of the code at a time, in memory, and runs the tests
that reach it. A change that no test notices, a survivor, is a missing test. The work tree is never
written to.
"""
