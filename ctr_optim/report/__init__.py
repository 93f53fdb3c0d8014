"""Reports on a run from its event log: a table for the terminal, an image, and an HTML page."""

from ctr_optim.report.figures import save_picture
from ctr_optim.report.follow import follow
from ctr_optim.report.page import save_page
from ctr_optim.report.run import Run, read_run
from ctr_optim.report.table import columns, side_by_side, table
from ctr_optim.report.verdict import verdict

__all__ = ["Run", "columns", "follow", "read_run", "save_page", "save_picture", "side_by_side", "table", "verdict"]
