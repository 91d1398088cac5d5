"""A self-contained HTML file: a template, filled in, with its style and pictures."""

import argparse
import base64
import io
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Picture:
    description: str
    data: str  # a PNG in base64


def render(template: str, **values: Any) -> str:
    """The template with these values, escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["code"] = code
    return environment.get_template(template).render(values)


def code(text: str) -> Markup:
    """Text with `code` in backticks."""
    parts = [escape(part) for part in text.split("`")]
    parts[1::2] = [Markup("<code>{}</code>").format(part) for part in parts[1::2]]
    return Markup("").join(parts)


def pyplot() -> Any:
    """matplotlib.pyplot, for files and not for a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def picture(figure, description: str) -> Picture:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return Picture(description, base64.b64encode(buffer.getvalue()).decode())


def check_file(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """Ends the program with exit code 2 if no file of this name can be written."""
    if path is not None and not path.absolute().parent.is_dir():
        parser.error(f"{path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        parser.error(f"{path}: is a folder; name a file")


def check_html(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """As `check_file`, for a report with plots."""
    check_file(parser, path)
    if path is not None and find_spec("matplotlib") is None:
        parser.error("--html draws with matplotlib, which is missing: pip install matplotlib")
