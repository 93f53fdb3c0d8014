"""The event log under its public name; :mod:`ctr_optim.report.log` defines it."""

from ctr_optim.report.log import EventLog, event_file, read_events, scalars

__all__ = ["EventLog", "event_file", "read_events", "scalars"]
