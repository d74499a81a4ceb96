"""Tables and pictures of a run, in one self-contained HTML file. Text that users wrote is data here, and escaped."""

from zr.report.cards import Card, Judgement, cards
from zr.report.changes import Change
from zr.report.figures import Figure, Panel, Runs, curves, histograms, hpa_bars, reliability_panels, run_dots, scatter
from zr.report.page import Page, Section, render, write_page
from zr.report.pairs import Pair, inline, render_pairs
from zr.report.tables import Estimate, Table, dimension_table, scorer_table

__all__ = [
    "Card",
    "Change",
    "Estimate",
    "Figure",
    "Judgement",
    "Page",
    "Pair",
    "Panel",
    "Runs",
    "Section",
    "Table",
    "cards",
    "curves",
    "dimension_table",
    "histograms",
    "hpa_bars",
    "inline",
    "reliability_panels",
    "render",
    "render_pairs",
    "run_dots",
    "scatter",
    "scorer_table",
    "write_page",
]
