"""From a Generator to a folder that stock diffusers opens: chosen from a table, reopened, compared, or refused."""

from diffdistill.export.card import snippet
from diffdistill.export.compare import Replay
from diffdistill.export.exporters import EXPORTERS
from diffdistill.export.stock import Refusal, Stock
from diffdistill.export.write import Report, export

__all__ = ["EXPORTERS", "Refusal", "Replay", "Report", "Stock", "export", "snippet"]
