"""What a run leaves for people to read: ``report.html``, and pages that set runs side by side."""

from granq_jax.reporting.inspection import Inspection as Inspection
from granq_jax.reporting.inspection import inspector as inspector
from granq_jax.reporting.page import comparison_page as comparison_page
from granq_jax.reporting.page import image_grid as image_grid
from granq_jax.reporting.page import run_page as run_page
from granq_jax.reporting.record import REPORT as REPORT
from granq_jax.reporting.record import RunRecord as RunRecord
from granq_jax.reporting.record import read_run as read_run
from granq_jax.reporting.record import run_record as run_record
