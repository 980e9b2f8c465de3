"""A small real site that uses ebbs_and_flows: a weather observatory on public data."""
