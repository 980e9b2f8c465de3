"""The admin's pages: importing this package registers them."""

from . import flow_executions, records

__all__ = ["flow_executions", "records"]
