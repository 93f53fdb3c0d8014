"""Public names of the event log that :mod:`ctr_optim.report.log` defines."""

from ctr_optim.report.log import EventLog, event_file, read_events, scalars

__all__ = ["EventLog", "event_file", "read_events", "scalars"]
