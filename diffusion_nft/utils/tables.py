"""Markdown tables."""

from collections.abc import Sequence

from tabulate import tabulate


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    return tabulate(cells, "firstrow", tablefmt="github", disable_numparse=True)
