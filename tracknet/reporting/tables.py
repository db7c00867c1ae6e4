"""Tables shared by several commands."""

from __future__ import annotations

from rich.table import Table

from tracknet.quantization.parts import Part


def build_parts_table(parts: list[Part]) -> Table:
    """Build the table of a model's parts: storage dtype, size, and whether they are trained."""
    table = Table(title="Model", title_justify="left")
    for column in ("part", "stored as", "layers", "parameters", "MB", ""):
        table.add_column(column, justify="left" if column in ("part", "stored as", "") else "right")
    for part in parts:
        table.add_row(
            part.name,
            part.dtype,
            str(part.num_layers),
            f"{part.num_parameters:,}",
            f"{part.num_bytes / 1e6:.2f}",
            "trained" if part.trained else "frozen",
        )
    table.add_section()
    trained = sum(p.num_parameters for p in parts if p.trained)
    table.add_row(
        "all",
        "",
        "",
        f"{sum(p.num_parameters for p in parts):,}",
        f"{sum(p.num_bytes for p in parts) / 1e6:.2f}",
        f"{trained:,} trained",
    )
    return table
