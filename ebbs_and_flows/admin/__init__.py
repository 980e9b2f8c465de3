"""The admin's pages: importing this package registers them."""

from . import flow_executions, flow_templates, records

__all__ = ["flow_executions", "flow_templates", "records"]
