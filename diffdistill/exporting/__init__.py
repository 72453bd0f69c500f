"""From a Generator to a folder that stock diffusers opens: chosen from a table, reopened, compared, or refused."""

from diffdistill.exporting.card import snippet
from diffdistill.exporting.compare import Replay
from diffdistill.exporting.exporters import EXPORTERS
from diffdistill.exporting.opened import StockPipeline, is_pipeline
from diffdistill.exporting.relay import RelayPipeline, RelayReport, write_relay
from diffdistill.exporting.routed import RoutedPipelines, RoutedReport, write_routed
from diffdistill.exporting.stock import Refusal, Stock
from diffdistill.exporting.write import TOLERANCE, Report, write_pipeline

__all__ = [
    "EXPORTERS",
    "TOLERANCE",
    "Refusal",
    "RelayPipeline",
    "RelayReport",
    "Replay",
    "Report",
    "RoutedPipelines",
    "RoutedReport",
    "Stock",
    "StockPipeline",
    "is_pipeline",
    "snippet",
    "write_pipeline",
    "write_relay",
    "write_routed",
]
