"""What a run leaves for people to read: ``report.html``, and pages that set runs side by side."""

from granq_jax.report.inspection import Inspection as Inspection
from granq_jax.report.inspection import inspector as inspector
from granq_jax.report.page import comparison_page as comparison_page
from granq_jax.report.page import image_grid as image_grid
from granq_jax.report.page import run_page as run_page
from granq_jax.report.reading import RunRecord as RunRecord
from granq_jax.report.reading import read_run as read_run
from granq_jax.report.reading import run_record as run_record
