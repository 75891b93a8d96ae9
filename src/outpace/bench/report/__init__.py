"""A result as something to look at: one HTML file, Markdown, JSON, and the comparison of two."""

from outpace.bench.report.compare import compare, comparison_markdown
from outpace.bench.report.files import load_result, write_report
from outpace.bench.report.html import render_html
from outpace.bench.report.markdown import render_markdown

__all__ = ["compare", "comparison_markdown", "load_result", "render_html", "render_markdown", "write_report"]
