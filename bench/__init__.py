"""Benchmarks of ebbs_and_flows, of its limits, and of its peers, in one harness."""
